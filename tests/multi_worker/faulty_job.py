"""A model and data for launch.train, with which one worker has a fault.

The environment says what, on whom, and when: FAULT (as in `_FAULTS`),
FAULTY_WORKER, FAULTY_BATCH, and MARK, a file that keeps it from happening
twice.
"""

import itertools
import json
import os
import pathlib
import signal
import threading
import time

import keras
import numpy as np
import tensorflow as tf

NUM_BATCHES = 12
NUM_FEATURES = 6


def _is_here():
    config = json.loads(os.environ["TF_CONFIG"])
    return str(config["task"]["index"]) == os.environ.get("FAULTY_WORKER")


def _raise():
    raise ValueError("bad record")


_FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "hang": lambda: threading.Event().wait(),
    "slow": lambda: time.sleep(3),
}


def _happens(name):
    if os.environ.get("FAULT") != name:
        return False
    mark = pathlib.Path(os.environ["MARK"])
    if mark.exists() or not _is_here():
        return False
    mark.touch()
    return True


def model():
    if _happens("model"):
        raise ValueError("a mistake in the model")
    return keras.Sequential(
        [
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dropout(0.2, seed=1),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )


def data(split, global_batch_size):
    random = np.random.default_rng(0)
    shape = (NUM_BATCHES, global_batch_size, NUM_FEATURES)
    x = random.standard_normal(shape, dtype=np.float32)
    y = x[..., :3].argmax(-1).astype(np.int32)
    faulty_batch = int(os.environ.get("FAULTY_BATCH", -1))
    taken = itertools.count()  # of all passes

    def batches():
        for number in range(NUM_BATCHES):
            if split == "train" and next(taken) == faulty_batch:
                for name, happen in _FAULTS.items():
                    if _happens(name):
                        happen()
            yield x[number], y[number]

    dataset = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec(shape[1:]),
            tf.TensorSpec(shape[1:2], tf.int32),
        ),
    )
    return dataset.apply(tf.data.experimental.assert_cardinality(NUM_BATCHES))
