"""launch.numerics as a user calls it."""

import json
import sys

import pytest

from launch.config import ConfigError
from launch.numerics import NumericsConfig
from tests.launch.programs import run

MINE = """
import keras
import numpy as np
import tensorflow as tf

def model():
    return keras.Sequential([
        keras.Input((6,)),
        keras.layers.Dense(8, activation="relu", name="hidden"),
        keras.layers.Rescaling(1e6, name="large"),
        keras.layers.LayerNormalization(name="norm"),
        keras.layers.Dense(3, dtype="float32", name="logits"),
    ])

def data(split, global_batch_size):
    x = np.random.default_rng(1).normal(size=(96, 6)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(global_batch_size)
"""
OURS = ("--model=mine:model", "--dataset=mine:data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a model, and a run of it with auto_layers."""
    folder = tmp_path_factory.mktemp("numerics")
    (folder / "mine.py").write_text(MINE)
    flags = ("--precision=auto_layers", "--epochs=2", "--run_dir=run")
    done = run(folder, "train", *OURS, *flags)
    assert done.returncode == 0, done.stderr
    assert "float32 from here on: large (its output reaches" in done.stderr
    return folder


def test_it_tells_what_needs_float32_and_writes_it_down(folder):
    done = run(folder, "numerics", *OURS, "--out=look")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("weights: new ones (--seed=0)\n\nlayer ")
    rows = [line.split() for line in done.stdout.splitlines()[3:7]]
    assert [row[0] for row in rows[:2]] == ["large", "norm"]
    assert {row[0] for row in rows[2:]} == {"hidden", "logits"}
    assert "overflow" in rows[0]
    assert "large to float32: its output reaches" in done.stdout
    assert "norm to float32: its input reaches" in done.stdout
    assert "\nloss scale: 2^-14 to 2^" in done.stdout
    for name in ("numerics.json", "numerics.html", "numerics.png"):
        assert f"look/{name}" in done.stdout
        assert (folder / "look" / name).stat().st_size > 1000
    values = json.loads((folder / "look" / "numerics.json").read_text())
    pins = [pin["layer"] for pin in values["advice"]["pins"]]
    assert pins == ["large", "norm"]
    assert done.stderr == ""


@pytest.mark.parametrize("is_saved", [False, True])
def test_it_takes_the_weights_of_a_run(folder, is_saved):
    flags = ["--run_dir=run", "--precision=mixed_float16"]
    source = "run/checkpoints/ckpt-6"
    if is_saved:
        flags += ["--checkpoint_dir=none"]
        source = "run/model.keras"
    done = run(folder, "numerics", *OURS, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"weights: {source}\n")


def test_a_run_that_is_not_there_is_an_error(folder):
    done = run(folder, "numerics", *OURS, "--run_dir=nowhere")
    assert done.returncode == 2
    assert "--run_dir=nowhere holds neither a checkpoint" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_batches": 0}, "--num_batches must be positive"),
        ({"max_lost": -1.0}, "--max_lost must be positive"),
        ({"strategy": "multi_worker"}, "in one process: drop --workers"),
        ({"precision": "float8"}, "--precision must be one of"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        NumericsConfig(**settings)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
