"""Faults of one worker under launch.local: what the user sees, and the end.

Whatever happened, the run ends with the bits of one that was left alone.
"""

import os
import random
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from dist_amp import storage
from tests.launch.train_test import SECONDS, command, environment
from tests.multi_worker import faulty_job
from tests.multi_worker.processes import assert_gone, children_of

JOB = "tests.multi_worker.faulty_job"
EPOCHS = 2
LAST_STEP = EPOCHS * faulty_job.NUM_BATCHES
FLAGS = [
    f"--model={JOB}:model",
    f"--dataset={JOB}:data",
    "--precision=mixed_float16",
    f"--epochs={EPOCHS}",
    "--run_dir=run",
    "--save_every_steps=5",
    "--heartbeat_timeout=3",
    "--collective_timeout=4",
]


def start(cwd, *flags, own=(), prefix=(), **faults):
    """Two workers; faults are variables of `faulty_job`."""
    return subprocess.Popen(
        [
            *prefix,
            *(sys.executable, "-m", "launch.local", "--leave_timeout=2"),
            *own,
            "--",
            *FLAGS,
            *flags,
        ],
        cwd=cwd,
        env=environment(**faults),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(cwd, *flags, **more):
    """Exit status, output and errors."""
    process = start(cwd, *flags, **more)
    try:
        results = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, *results


def with_fault(cwd, fault, *, worker, batch=None, **more):
    """The same, with a fault that happens once."""
    if batch is None:
        batch = random.randrange(faulty_job.NUM_BATCHES, LAST_STEP)
    variables = {
        "FAULT": fault,
        "FAULTY_WORKER": str(worker),
        "FAULTY_BATCH": str(batch),
        "MARK": str(cwd / "mark"),
    }
    return run(cwd, **variables, **more)


def tensors_of(cwd):
    checkpoints = storage.find(str(cwd / "run" / "checkpoints"))
    assert storage.step_of(checkpoints[-1]) == LAST_STEP
    return storage.read_tensors(checkpoints[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("undisturbed")
    status, output, errors = run(cwd)
    assert status == 0, errors
    assert output.splitlines()[-1].startswith("results are in run")
    assert "[worker 1] strategy: multi_worker" in errors
    assert (
        "strategy: multi_worker" in (cwd / "run/logs/worker-1.log").read_text()
    )
    return tensors_of(cwd)


def check_equal(cwd, expected):
    tensors = tensors_of(cwd)
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], name)


@pytest.mark.parametrize("worker", [0, 1])
def test_a_killed_worker_is_named_and_all_go_on(tmp_path, undisturbed, worker):
    status, _, errors = with_fault(tmp_path, "kill", worker=worker)
    assert status == 0, errors
    assert f"worker {worker} failed first" in errors
    assert "killed by SIGKILL" in errors
    assert "starts again from the last checkpoint on 2 workers" in errors
    check_equal(tmp_path, undisturbed)


def test_a_stopped_process_is_lost_and_all_go_on(tmp_path, undisturbed):
    status, _, errors = with_fault(tmp_path, "stop", worker=1, batch=7)
    assert status == 0, errors
    assert "was lost: it gave no sign of life for 3 s" in errors
    assert re.search("worker 1 failed first.*stopped, as by SIGSTOP", errors)
    check_equal(tmp_path, undisturbed)


def test_input_that_hangs_ends_the_attempt(tmp_path, undisturbed):
    status, _, errors = with_fault(tmp_path, "hang", worker=1, batch=7)
    assert status == 0, errors
    assert re.search("worker 1 held up the others.*exit status 142", errors)
    assert "waiting for input, at step 8" in errors
    check_equal(tmp_path, undisturbed)


def test_slow_input_is_waited_for(tmp_path, undisturbed):
    status, _, errors = with_fault(tmp_path, "slow", worker=1)
    assert status == 0, errors
    assert "starts again" not in errors
    check_equal(tmp_path, undisturbed)


def test_one_asked_worker_stops_all_and_the_same_command_goes_on(
    tmp_path, undisturbed
):
    status, output, errors = with_fault(tmp_path, "terminate", worker=1)
    assert status == 143, errors
    assert "stopped by SIGTERM at step" in output
    assert "starts again" not in errors
    status, _, errors = run(tmp_path)
    assert status == 0, errors
    check_equal(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("raise", "bad record"), ("model", "a mistake in the model")],
)
def test_an_exception_ends_the_job_with_its_traceback(
    tmp_path, fault, said, undisturbed
):
    status, _, errors = with_fault(tmp_path, fault, worker=1, batch=7)
    assert status == 1, errors
    summary = errors[errors.index("worker 1 failed first") :]
    assert f"  | ValueError: {said}" in summary or f"'{said}'" in summary
    assert "faulty_job.py" in summary
    assert "then worker 0: exit status 129" in summary
    assert "worker 1 (127.0.0.1:" in errors  # so worker 0 says
    status, _, errors = run(tmp_path)  # it is mended
    assert status == 0, errors
    check_equal(tmp_path, undisturbed)


def test_a_restart_may_leave_out_the_worker_that_failed(tmp_path):
    own = ["--num_workers=2", "--min_workers=1"]
    status, _, errors = with_fault(tmp_path, "kill", worker=0, own=own)
    assert status == 0, errors
    assert "starts again from the last checkpoint on 1 workers" in errors
    assert "resumed from run/checkpoints/ckpt-" in errors
    assert tensors_of(tmp_path)  # of the last step


def test_no_restart_is_left(tmp_path):
    status, _, errors = with_fault(
        tmp_path, "kill", worker=1, own=["--max_restarts=0"]
    )
    assert status == 137, errors
    assert "restarted 0 times (--max_restarts): that is it" in errors


def test_a_full_disk_of_the_chief_stops_no_training(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    mount = (
        "mount -t tmpfs -o size=64k tmpfs run/checkpoints || exit 77; "
        '"$@"; status=$?; ls run/checkpoints; exit $status'
    )
    prefix = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    status, output, errors = run(tmp_path, prefix=prefix)
    if status == 77:
        pytest.skip(f"mounting is not permitted here: {errors}")
    assert status == 0, errors
    assert "[worker 0] COULD NOT SAVE step" in errors
    assert "No space left on device" in errors
    assert "results are in run" in output
    assert "ckpt-5\n" in output  # whole, and the only one with room


def test_ctrl_c_reaches_the_workers_and_everything_is_saved(tmp_path):
    process = start(tmp_path, "--epochs=100000", "--save_every_epochs=0")
    try:
        for line in process.stdout:
            if line.startswith("Epoch 1"):
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped by SIGINT at step" in output


def test_a_taken_port_is_named_at_once_and_may_be_free_the_next_time(
    tmp_path,
):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            command(
                f"--workers=127.0.0.1:1,127.0.0.1:{port}", "--task_index=1"
            ),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    assert done.returncode == 129, done.stderr
    assert f"Port {port} of worker 1 (127.0.0.1:{port}) is taken" in done.stderr


def test_nothing_is_left_of_a_killed_launcher(tmp_path):
    process = start(tmp_path, "--epochs=100000")
    try:
        for line in process.stdout:
            if line.startswith("Epoch 1"):
                break
        workers = children_of(process.pid)
        assert len(workers) == 3  # and the guardian
    finally:
        process.kill()
    process.communicate(timeout=SECONDS)
    for pid in workers:
        assert_gone(pid)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
