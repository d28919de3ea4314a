"""A model and data for launch.train, with which worker 1 is slow.

SLOW says how: "input" or "compute".
"""

import json
import os
import time

import keras
import numpy as np
import tensorflow as tf

SECONDS = 0.05
NUM_FEATURES = 6


def _is_slow(what):
    config = json.loads(os.environ["TF_CONFIG"])
    return config["task"]["index"] == 1 and os.environ.get("SLOW") == what


class Wait(keras.layers.Layer):
    """Hands on its input, late."""

    def call(self, inputs):
        def wait(x):
            time.sleep(SECONDS)
            return x

        outputs = tf.numpy_function(wait, [inputs], inputs.dtype)
        return tf.ensure_shape(outputs, inputs.shape)


def model():
    layers = [keras.layers.Dense(3, dtype="float32")]
    if _is_slow("compute"):
        layers = [Wait(), *layers]
    return keras.Sequential([keras.Input((NUM_FEATURES,)), *layers])


def data(split, global_batch_size):
    x = np.ones((global_batch_size, NUM_FEATURES), np.float32)
    y = np.zeros(global_batch_size, np.int32)

    def batches():
        while True:
            if _is_slow("input"):
                time.sleep(SECONDS)
            yield x, y

    return tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec(x.shape),
            tf.TensorSpec(y.shape, y.dtype),
        ),
    )
