"""`python -m launch.replay` of a run in which an update was skipped."""

import json
import re
import sys

import pytest

from tests.launch.programs import run

JOB = """
import keras
import numpy as np
import tensorflow as tf


def model():
    layers = keras.layers
    return keras.Sequential([
        keras.Input((6,)),
        layers.Dense(8, name="first"),
        layers.Rescaling(100.0, name="steep"),
        layers.LayerNormalization(name="norm"),
        layers.Dense(3, dtype="float32"),
    ])


def data(split, global_batch_size):
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 6)).astype("float32")
    if split == "train":
        x[21] = 2e3  # batch 3, replica 1
    y = random.integers(0, 3, 40)
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    return dataset.batch(global_batch_size)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    (folder / "steep.py").write_text(JOB)
    done = run(
        folder,
        "train",
        "--model=steep:model",
        "--dataset=steep:data",
        "--precision=mixed_float16",
        "--num_logical_cpus=2",
        "--global_batch_size=8",
        "--epochs=2",
        "--run_dir=run",
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_what_the_log_tells_can_be_replayed(trained):
    folder, log = trained
    steps = re.findall(r"step (\d+) skipped: not finite on replica 1 of 2", log)
    assert steps == ["3", "8"]
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("run/**"))
    done = run(folder, "replay", "--run_dir=run", "--step=8", "--json=it.json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "training to step 8 from run/checkpoints/ckpt-5"
    assert lines[1] == "step 8: batch 3 of epoch 2, loss scale 16384"
    assert lines[2] == "gradients of replica 0: finite"
    assert lines[3].startswith("gradients of replica 1: NOT FINITE: ")
    (line,) = (x for x in lines if x.startswith("first output beyond"))
    assert "steep (its output reaches" in line
    content = json.loads((folder / "it.json").read_text())
    assert content["is_skipped"] is True
    assert content["report"]["layers"]
    after = sorted(path.stat().st_mtime_ns for path in folder.rglob("run/**"))
    assert before == after  # nothing was written there


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--step=8"], "--run_dir must be given"),
        (["--run_dir=run"], "--step must be given"),
        (["--run_dir=run", "--step=0"], "--step must be positive"),
        (["--run_dir=nowhere", "--step=8"], "nowhere holds no run"),
    ],
)
def test_wrong_settings_are_told(trained, arguments, told):
    folder, _ = trained
    done = run(folder, "replay", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
