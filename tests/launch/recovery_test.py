"""Runs that are stopped, killed, locked out or damaged, as processes."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.launch.train_test import SECONDS, command, environment, launch

# Its second epoch is the last one that a test lives to see.
ENDLESS = ["--epochs=100000", "--save_every_epochs=0", "--save_every_steps=40"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


class Running:
    """A run in its second epoch; killed at the end of the block."""

    def __init__(self, cwd, *flags, **more):
        self.process = subprocess.Popen(
            command(*flags),
            cwd=cwd,
            env=environment(PYTHONUNBUFFERED="1", **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        for line in self.process.stdout:
            if line.startswith("Epoch 1"):
                break
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=SECONDS)

    def end(self):
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out, err


def test_sigusr1_saves_and_asks_to_be_started_again(tmp_path, data_dir):
    with Running(tmp_path, f"--data_dir={data_dir}", *ENDLESS) as run:
        run.process.send_signal(signal.SIGUSR1)
        status, out, _ = run.end()
    assert status == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 at step" in out


def test_a_time_budget_saves_and_asks_to_be_started_again(tmp_path, data_dir):
    flags = [f"--data_dir={data_dir}", *ENDLESS, "--max_minutes=0.02"]
    done = launch(tmp_path, *flags)
    assert done.returncode == 138
    assert "stopped by max_minutes" in done.stdout
    again = launch(tmp_path, *flags, "--resume=must")
    assert again.returncode == 138
    assert "resumed from" in again.stderr


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, data_dir):
    flags = [f"--data_dir={data_dir}", *ENDLESS]
    with Running(tmp_path, *flags) as first:
        for resume in ("auto", "never"):
            second = launch(tmp_path, *flags, f"--resume={resume}")
            assert second.returncode == 2
            last = second.stderr.splitlines()[-1]
            assert f"in use by another run (process {first.process.pid}" in last
        assert first.process.poll() is None
    third = launch(tmp_path, *flags, "--max_minutes=0.01")
    assert third.returncode == 138, third.stderr


def find_checkpoints(tmp_path):
    folder = tmp_path / "runs" / "mlp-digits" / "checkpoints"
    return sorted(folder.glob("ckpt-*"), key=lambda p: int(p.name[5:]))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def finished(tmp_path, data_dir):
    done = launch(tmp_path, f"--data_dir={data_dir}", "--epochs=2")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    finished, data_dir
):
    newest = find_checkpoints(finished)[-1]
    flip(newest / "tensors.data-00000-of-00001")
    done = launch(finished, f"--data_dir={data_dir}", "--epochs=3")
    assert done.returncode == 0, done.stderr
    assert "ckpt-90 is damaged: tensors.data-00000-of-00001" in done.stderr
    assert "resumed from" in done.stderr
    assert "ckpt-45: step 45, epoch 2" in done.stderr
    assert newest.with_name("ckpt-90.damaged").exists()


def test_nothing_is_started_anew_over_damaged_checkpoints(finished, data_dir):
    for path in find_checkpoints(finished):
        flip(path / "state.json")
    for _ in range(2):
        done = launch(finished, f"--data_dir={data_dir}", "--epochs=3")
        assert done.returncode == 2
        assert "no usable checkpoint" in done.stderr.splitlines()[-1]
    done = launch(
        finished, f"--data_dir={data_dir}", "--epochs=1", "--resume=never"
    )
    assert done.returncode == 0, done.stderr


def test_rollbacks_are_in_the_log_and_in_the_metrics(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np, tensorflow as tf\n"
        "def data(split):\n"
        "    x = np.random.default_rng(1).normal(size=(320, 4))\n"
        "    y = (x[:, 0] > 0).astype('int32')\n"
        "    if split == 'train':\n"
        "        x[100] = np.nan\n"
        "    dataset = tf.data.Dataset.from_tensor_slices(\n"
        "        (x.astype('float32'), y))\n"
        "    return lambda number: dataset\n"
    )
    done = launch(
        tmp_path,
        "--dataset=mine:data",
        "--precision=float32",
        "--epochs=2",
        "--rollback_on=nan,spike",
        "--rollback_lower=learning_rate",
        "--run_dir=run",
    )
    assert done.returncode == 0, done.stderr
    assert "batch 4 of epoch 1 is passed over" in done.stderr
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").open()]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["rollbacks"] for line in train] == [1, 2]
    assert train[1]["learning_rate"] == pytest.approx(0.01 / 4)


def test_a_full_disk_ends_no_training(tmp_path, data_dir):
    """A real one of 200 kB: the second checkpoint has no room."""
    flags = f"--data_dir={data_dir} --run_dir={tmp_path}/disk/run --epochs=3"
    mount = f"mount -t tmpfs -o size=200k tmpfs {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    script = f"{mount} && exec {' '.join(command())} {flags}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"needs a mount of its own: {done.stderr}")
    assert "COULD NOT SAVE step 135" in done.stderr
    assert "Epoch 3, Loss" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_run_whose_checkpoints_are_not_found_is_moved_aside(
    tmp_path, data_dir
):
    flags = [f"--data_dir={data_dir}", "--epochs=1"]
    assert launch(tmp_path, *flags).returncode == 0
    done = launch(tmp_path, *flags, "--checkpoint_dir=elsewhere")
    assert done.returncode == 0, done.stderr
    assert "holds results but no checkpoint in elsewhere" in done.stderr
    runs = tmp_path / "runs"
    assert (runs / "mlp-digits.1" / "model.keras").exists()
    assert (runs / "mlp-digits.1" / "checkpoints" / "ckpt-45").exists()


def test_initial_weights_are_for_a_new_run_only(tmp_path, data_dir):
    flags = [f"--data_dir={data_dir}", "--initial_weights=w.keras"]
    assert launch(tmp_path, flags[0], "--epochs=1").returncode == 0
    model = tmp_path / "runs" / "mlp-digits" / "model.keras"
    model.rename(tmp_path / "w.keras")
    first = launch(tmp_path, *flags, "--epochs=1", "--run_dir=tuned")
    assert first.returncode == 0, first.stderr
    (tmp_path / "w.keras").unlink()
    done = launch(tmp_path, *flags, "--epochs=2", "--run_dir=tuned")
    assert done.returncode == 0, done.stderr
    done = launch(tmp_path, *flags, "--epochs=2", "--run_dir=another")
    assert done.returncode == 2
    assert "there is no file w.keras" in done.stderr


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path, data_dir):
    (tmp_path / "file").touch()
    for flag in ("--run_dir=file/run", "--checkpoint_dir=file/checkpoints"):
        done = launch(tmp_path, f"--data_dir={data_dir}", flag)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"error: {flag}")


def test_checkpoints_can_go_elsewhere(tmp_path, data_dir):
    flags = [f"--data_dir={data_dir}", "--checkpoint_dir=elsewhere"]
    done = launch(tmp_path, *flags, "--epochs=1", "--keep_checkpoints=1")
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path / "elsewhere")) == {"lock", "ckpt-45"}
    done = launch(tmp_path, *flags, "--epochs=2", "--resume=must")
    assert "resumed from elsewhere/ckpt-45" in done.stderr
    done = launch(tmp_path, *flags, "--epochs=2", "--resume=never")
    assert done.returncode == 2
    assert "name an empty folder" in done.stderr


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
