"""The proof itself, and that it can fail."""

import subprocess
import sys

import pytest

from tests.launch.train_test import SECONDS, environment

MODEL = """
import keras
import numpy as np
import tensorflow as tf
from dist_amp import data as data_lib

def model():
    return keras.Sequential([
        keras.Input((6,)),
        keras.layers.GaussianNoise(0.1),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(3, dtype="float32"),
    ])

def plain_model():
    return keras.Sequential([
        keras.Input((6,)),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.Dense(3, dtype="float32"),
    ])

def data(split, global_batch_size, seed):
    x = np.random.default_rng(1).normal(size=(200, 6)).astype("float32")
    y = np.argmax(x[:, :3], axis=-1)
    shuffle_seed = seed if split == "train" else None
    make = data_lib.from_arrays((x, y), global_batch_size, shuffle_seed)
    if split != "train":
        return make(tf.constant(0, tf.int64))

    def augmented(number):
        def augment(x, y):
            seed = [1, tf.cast(number, tf.int32)]
            return x + 0.1 * tf.random.stateless_normal(tf.shape(x), seed), y
        return make(number).map(augment)

    return augmented

def unlucky(split, global_batch_size):
    noise = np.random.default_rng().normal(size=(200, 6))  # no seed
    x = noise.astype("float32")
    y = np.argmax(x[:, :3], axis=-1)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(global_batch_size)
"""


def prove(tmp_path, *flags):
    (tmp_path / "mine.py").write_text(MODEL)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.prove_resume",
            "--num_updates=14",
            f"--run_dir={tmp_path / 'run'}",
            *flags,
        ],
        cwd=tmp_path,
        env=environment(PYTHONPATH=":".join([str(tmp_path), *sys.path])),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision=float32", "--gradient_accumulation_steps=2"],
        ["--precision=mixed_float16", "--num_logical_cpus=2", "--ema=0.9"],
        ["--precision=mixed_bfloat16", "--num_logical_cpus=2"],
    ],
)
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path, flags):
    """With dropout, noise, batch norm, shuffling and augmentation."""
    done = prove(tmp_path, "--model=mine:model", "--dataset=mine:data", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "are equal bit for bit" in done.stdout
    assert done.stdout.endswith("PROVED\n")


def test_it_goes_on_on_other_devices_within_the_tolerance(tmp_path):
    done = prove(
        tmp_path,
        "--model=mine:plain_model",
        "--dataset=mine:data",
        "--precision=float32",
        "--num_logical_cpus=2",
        "--onto=--num_logical_cpus=4",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "are equal within rtol 1e-05, atol 1e-06" in done.stdout


def test_a_run_that_does_not_repeat_is_not_proved(tmp_path):
    done = prove(
        tmp_path,
        "--model=mine:plain_model",
        "--dataset=mine:unlucky",
        "--precision=float32",
    )
    assert done.returncode == 1
    assert "differs: model/" in done.stdout
    assert "NOT PROVED" in done.stdout


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
