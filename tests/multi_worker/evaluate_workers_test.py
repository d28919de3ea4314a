"""Evaluation beside a training under way, and on several workers."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.launch.train_test import SECONDS, command, environment
from tests.multi_worker.processes import end, start

JOB = """
import pathlib
import time

import keras
import tensorflow as tf


def model():
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, dtype="float32")]
    )


def data(split, global_batch_size):
    x = tf.reshape(tf.cast(tf.range(27 * 4), tf.float32) % 7.0, [27, 4])
    dataset = tf.data.Dataset.from_tensor_slices((x, tf.range(27) % 3))
    dataset = dataset.batch(global_batch_size)
    if split == "test":
        return dataset
    return lambda number: dataset.map(lambda x, y: (wait_for(number, x), y))


def wait_for(number, x):
    '''From the third pass on, until what the first left was evaluated.'''

    def wait(number):
        while number > 1 and not pathlib.Path("run/evaluations.jsonl").exists():
            time.sleep(0.05)

    with tf.control_dependencies([tf.py_function(wait, [number], [])]):
        return tf.identity(x)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run, and what was said of it meanwhile."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "mine.py").write_text(JOB)
    watcher = subprocess.Popen(
        program("evaluate", "--run_dir=run", "--watch", "--poll_seconds=0.1"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        done = subprocess.run(
            command(
                "--model=mine:model",
                "--dataset=mine:data",
                "--run_dir=run",
                "--epochs=3",
                "--global_batch_size=8",
            ),
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said, errors = watcher.communicate(timeout=SECONDS)
    finally:
        watcher.kill()
    assert watcher.returncode == 0, errors
    return folder, said.splitlines()


def program(name, *flags):
    return [sys.executable, "-m", f"launch.{name}", *flags]


def losses_in(path):
    lines = map(json.loads, path.read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "test"]


def test_checkpoints_are_evaluated_beside_a_training_under_way(trained):
    """The run itself ends only after the first was."""
    folder, said = trained
    *lines, last = said
    assert last == "run holds a finished run"
    assert [line.partition(":")[0] for line in lines] == [
        "ckpt-4",
        "ckpt-8",
        "ckpt-12",
    ]
    found, expected = (
        losses_in(folder / "run" / name)
        for name in ("evaluations.jsonl", "metrics.jsonl")
    )
    assert found == pytest.approx(expected)


def test_two_workers_evaluate_as_one_process_does(trained):
    folder, _ = trained
    flags = ["--run_dir=run", "--predictions=two.npz"]
    results = end(start(program("evaluate", *flags), cwd=folder))
    assert [status for status, _, _ in results] == [0, 0], results
    first, loss, _, written = results[0][1].splitlines()
    assert "2 replicas" in first
    assert written == "written: two.npz"
    assert results[1][1] == ""  # only the chief speaks
    expected = losses_in(folder / "run" / "metrics.jsonl")[-1]
    assert float(loss.split()[1]) == pytest.approx(expected, rel=1e-5)
    assert np.load(folder / "two.npz")["predictions"].shape == (27, 3)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
