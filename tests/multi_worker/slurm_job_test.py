"""Jobs of launch.slurm in a real Slurm: its daemons run here, on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import keras
import pytest

from dist_amp import cluster
from tests.launch.train_test import environment, read_lines
from tests.multi_worker import slurm_cluster

_WHY_NOT = slurm_cluster.why_not()
pytestmark = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))

NASTY = "a 'b' \"c\" $HOME `id` \\ * # %j;|&é\n!x"

# Stands for Python: writes down what it was told, ends as the plan says.
_WORKER = f"""\
#!{sys.executable}
import json, os, pathlib, signal, sys, time
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
index = int(os.environ["SLURM_PROCID"])
told = {{"arguments": sys.argv[1:], "environment": dict(os.environ)}}
path = pathlib.Path(f"told-{{start}}-{{index}}")
path.with_suffix(".part").write_text(json.dumps(told))
path.with_suffix(".part").rename(path)
plan = json.loads(pathlib.Path("plan").read_text())
statuses = plan[min(start, len(plan) - 1)]
status = statuses[index]
if status == "save":  # what worker 0 does while the others are gone
    tell = lambda *_: pathlib.Path("interrupted").touch()
    signal.signal(signal.SIGTERM, tell)
    time.sleep(3)
    sys.exit(138)
if status == "wait":
    os.execvp("sleep", ["sleep", "1000"])
# Whoever ends first has the others ended: not before they can say theirs.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
path.with_suffix(".ready").touch()
for other, number in enumerate(statuses):
    ready = pathlib.Path(f"told-{{start}}-{{other}}.ready")
    while isinstance(number, int) and not ready.exists():
        time.sleep(0.01)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, isolated_network):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def submit(slurm, tmp_path):
    """Submits with launch.slurm and returns the job's number."""

    def submit(*flags, variables=None):
        done = subprocess.run(
            [sys.executable, "-m", "launch.slurm", *flags],
            cwd=tmp_path,
            env=environment(**slurm.environment, **(variables or {})),
            capture_output=True,
            text=True,
            timeout=slurm_cluster.SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return re.search(r"submitted job (\d+)", done.stdout)[1]

    return submit


@pytest.fixture
def submit_plan(submit, tmp_path):
    """The same with workers that end as planned, start by start."""

    def submit_plan(*statuses, flags=(), train=()):
        python = tmp_path / "python"
        python.write_text(_WORKER)
        python.chmod(0o755)
        (tmp_path / "plan").write_text(json.dumps(statuses))
        return submit(
            f"--python={python}",
            "--tasks_per_node=2",
            "--time=10",
            *flags,
            "--",
            *train,
        )

    return submit_plan


def output(tmp_path, job):
    return (tmp_path / f"slurm-{job}.out").read_text()


def told(tmp_path, start, index):
    return json.loads((tmp_path / f"told-{start}-{index}").read_text())


def num_trained(tmp_path, job):
    """Starts that have come as far as an epoch."""
    path = tmp_path / f"slurm-{job}.out"
    said = path.read_text() if path.exists() else ""
    starts = re.split(r"queues again", said)
    return sum("Epoch " in start for start in starts)


def wait_until(is_done, why):
    deadline = time.monotonic() + 2 * slurm_cluster.SECONDS
    while not is_done():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


def wait_for(*paths):
    wait_until(lambda: all(path.exists() for path in paths), lambda: paths)


def test_two_tasks_train(slurm, submit, tmp_path):
    job = submit(
        "--tasks_per_node=2",
        "--cpus_per_task=1",
        "--time=10",
        "--",
        "--epochs=1",
        f"--data_dir={tmp_path}",
    )
    known = slurm.wait(job, seconds=180)
    said = output(tmp_path, job)
    assert (known["JobState"], known["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert "multi_worker, 2 replicas" in said
    assert len(re.findall(r"^Epoch 1, ", said, re.MULTILINE)) == 1
    keras.models.load_model(tmp_path / "runs" / "mlp-digits" / "model.keras")


def test_a_run_whose_time_is_over_queues_again_and_goes_on(
    slurm, submit, tmp_path
):
    """SIGUSR1 is what Slurm sends ahead of the time limit."""
    job = submit(
        "--tasks_per_node=2",
        "--time=10",
        "--max_restarts=1",
        "--",
        "--epochs=1000000",
        "--save_every_epochs=0",
        f"--data_dir={tmp_path}",
        "--run_dir=run",
    )
    for start in (1, 2):
        wait_until(
            lambda start=start: num_trained(tmp_path, job) == start,
            lambda: output(tmp_path, job),
        )
        slurm.call("scancel", "--signal=USR1", job)
    known = slurm.wait(job)
    said = output(tmp_path, job)
    assert (known["Restarts"], known["ExitCode"]) == ("1", "138:0"), said
    steps = re.findall(r"^stopped by SIGUSR1 at step (\d+)", said, re.MULTILINE)
    first, second = map(int, steps)
    # The second start may only have ended the epoch, without a step of its own.
    assert 0 < first <= second
    assert "exit status 138: queues again (1 of 1)" in said
    assert "exit status 138 after 1 restarts" in said
    epochs = [line["epoch"] for line in read_lines(tmp_path / "run")]
    assert epochs == sorted(epochs)
    assert set(epochs) == set(range(1, epochs[-1] + 1))


def test_sbatch_accepts_every_flag(slurm, tmp_path):
    script = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.slurm",
            "--dry_run",
            "--nodes=2",
            "--tasks_per_node=2",
            "--gpus_per_task=1",
            "--cpus_per_task=2",
            "--mem=1G",
            "--time=1-00:30",
            "--partition=main",
            "--account=some one",
            "--job_name=it's a #job",
            "--output=o %x.out",
            "--sbatch=--qos=high",
            '--sbatch=--comment=a \\ "b" # c',
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    done = subprocess.run(
        ["sbatch", "--test-only"],
        input=script,
        cwd=tmp_path,
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "using 8 processors on nodes 127.0.0.[1-2]" in done.stderr


def test_every_value_arrives_as_it_was_typed(slurm, submit_plan, tmp_path):
    name = NASTY.replace("\n", " ")
    job = submit_plan(
        [0, 0],
        flags=(
            f"--job_name={name}",
            f"--env=NCCL_NASTY={NASTY}",
            f"--sbatch=--comment={name}",
        ),
        train=(f"--run_dir={NASTY}", "--data_dir", NASTY, "--nojit_compile"),
    )
    known = slurm.wait(job)
    assert known["ExitCode"] == "0:0", output(tmp_path, job)
    for index in (0, 1):
        heard = told(tmp_path, 0, index)
        assert heard["arguments"] == [
            "-m",
            "launch.train",
            f"--run_dir={NASTY}",
            "--data_dir",
            NASTY,
            "--nojit_compile",
        ]
        assert heard["environment"]["NCCL_NASTY"] == NASTY
        assert heard["environment"]["SLURM_JOB_NAME"] == name
    shown = slurm.call("squeue", "--states=all", f"--jobs={job}", "--format=%k")
    assert name in shown


def test_a_gpu_for_each_task(slurm, submit_plan, tmp_path):
    job = submit_plan([0, 0], flags=("--gpus_per_task=1",))
    assert slurm.wait(job)["ExitCode"] == "0:0", output(tmp_path, job)
    seen = [
        told(tmp_path, 0, index)["environment"]["CUDA_VISIBLE_DEVICES"]
        for index in (0, 1)
    ]
    assert seen == ["0", "1"]


def test_tf_config_of_the_machine_that_submits_is_not_the_jobs(
    slurm, submit, tmp_path
):
    python = tmp_path / "python"
    python.write_text(_WORKER)
    python.chmod(0o755)
    (tmp_path / "plan").write_text("[[0]]")
    job = submit(f"--python={python}", variables={"TF_CONFIG": "{}"})
    assert slurm.wait(job)["ExitCode"] == "0:0", output(tmp_path, job)
    assert "TF_CONFIG" not in told(tmp_path, 0, 0)["environment"]


@pytest.mark.parametrize(("status", "other"), [(129, 138), (143, "wait")])
def test_statuses_that_ask_for_it_start_the_job_again(
    slurm, submit_plan, tmp_path, status, other
):
    job = submit_plan([status, other], [0, 0])
    known = slurm.wait(job)
    said = output(tmp_path, job)
    assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "1"), said
    assert "queues again (1 of 20)" in said


def test_a_worker_that_is_killed_starts_the_job_again(
    slurm, submit_plan, tmp_path
):
    job = submit_plan(["wait", "wait"], [0, 0])
    wait_for(tmp_path / "told-0-0", tmp_path / "told-0-1")
    victim = told(tmp_path, 0, 1)["environment"]["SLURM_TASK_PID"]
    children = f"/proc/{victim}/task/{victim}/children"
    with open(children) as file:  # of the shell around it
        os.kill(int(file.read()), signal.SIGKILL)
    known = slurm.wait(job)
    said = output(tmp_path, job)
    assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "1"), said


@pytest.mark.parametrize("other", [129, 143, "wait"])
@pytest.mark.parametrize("status", [1, 2])
def test_wrong_settings_and_exceptions_end_the_job_whatever_others_say(
    slurm, submit_plan, tmp_path, status, other
):
    job = submit_plan([other, status], flags=("--max_restarts=1",))
    known = slurm.wait(job)
    said = output(tmp_path, job)
    assert known["ExitCode"] == f"{status}:0", said
    assert known["Restarts"] == "0"
    assert f"worker 1 ended with exit status {status}" in said


def test_worker_0_may_still_be_saving_when_the_others_have_stopped(
    slurm, submit_plan, tmp_path
):
    """Srun would end it, and kill it after KillWait."""
    job = submit_plan(["save", 138], flags=("--max_restarts=0",))
    assert slurm.wait(job)["ExitCode"] == "138:0", output(tmp_path, job)
    assert not (tmp_path / "interrupted").exists()


def test_restarts_come_to_an_end(slurm, submit_plan, tmp_path):
    job = submit_plan([138, 138], flags=("--max_restarts=0",))
    known = slurm.wait(job)
    assert (known["ExitCode"], known["Restarts"]) == ("138:0", "0")
    assert known["Requeue"] == "0"
    assert "exit status 138 after 0 restarts" in output(tmp_path, job)


def test_a_cancelled_job_does_not_come_back(slurm, submit_plan, tmp_path):
    job = submit_plan(["wait", "wait"])
    wait_for(tmp_path / "told-0-0", tmp_path / "told-0-1")
    slurm.call("scancel", job)
    known = slurm.wait(job)
    said = output(tmp_path, job)
    assert (known["JobState"], known["Restarts"]) == ("CANCELLED", "0"), said


def test_a_signal_to_the_job_reaches_the_workers_and_starts_it_again(
    slurm, submit_plan, tmp_path
):
    job = submit_plan(["wait", "wait"], [0, 0])
    wait_for(tmp_path / "told-0-0", tmp_path / "told-0-1")
    slurm.call("scancel", "--signal=USR1", job)
    known = slurm.wait(job)
    said = output(tmp_path, job)
    assert (known["JobState"], known["Restarts"]) == ("COMPLETED", "1"), said
    assert "exit status 138: queues again" in said


@pytest.mark.parametrize("layout", ["block", "cyclic", "plane=2", "plane=1"])
def test_a_worker_finds_out_who_it_is(slurm, tmp_path, layout):
    """What Slurm tells is what cluster.py reads."""
    slurm.call(
        "srun",
        "--nodes=2",
        "--ntasks-per-node=2",
        f"--distribution={layout}",
        "sh",
        "-c",
        "env --null > env-$SLURM_PROCID",
        cwd=tmp_path,
    )
    environments = [
        dict(item.split("=", 1) for item in path.read_text()[:-1].split("\0"))
        for path in tmp_path.glob("env-*")
    ]
    assert len(environments) == 4
    if layout == "plane=1":  # which is no block, and does not say so
        with pytest.raises(ValueError, match="--distribution=block"):
            [cluster.find(environment=env) for env in environments]
        return
    specs = [cluster.find(environment=env) for env in environments]
    (workers,) = {spec.workers for spec in specs}
    assert len(set(workers)) == 4
    for env, spec in zip(environments, specs, strict=True):
        assert spec.task_index == int(env["SLURM_PROCID"])
        node = f"127.0.0.{1 + int(env['SLURM_NODEID'])}"
        assert spec.address.startswith(f"{node}:")


def test_a_batch_script_alone_is_no_step(slurm, tmp_path):
    job = slurm.call(
        "sbatch",
        "--parsable",
        "--wait",
        "--ntasks=2",
        f"--output={tmp_path / 'out'}",
        f"--wrap={sys.executable} -c 'import json, os; "
        "print(json.dumps(dict(os.environ)))'",
    )
    env = json.loads((tmp_path / "out").read_text())
    assert env["SLURM_JOB_ID"] == job.strip()
    assert env["SLURM_NTASKS"] == "2"
    assert "SLURM_STEP_ID" not in env
    assert cluster.find(environment=env) is None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
