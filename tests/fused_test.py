"""What is fused, and that nothing but the speed tells.

`parity/batch_norm_test.py` trains with the fused batch normalization.
"""

import functools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_amp import fused
from tests import support


def _operations(layer, x, **arguments):
    function = tf.function(lambda: layer(x, **arguments))
    graph = function.get_concrete_function().graph
    return [operation.type for operation in graph.get_operations()]


@pytest.mark.parametrize(
    ("options", "shape", "training", "is_fused"),
    [
        ({}, (4, 32, 32, 4), True, True),
        ({}, (4, 32, 32, 4), False, False),
        ({}, (4, 3), True, False),
        ({}, (4, 2, 2, 4), True, False),  # too small on a CPU
        ({"trainable": False}, (4, 32, 32, 4), True, False),
        ({"axis": 1}, (4, 32, 32, 4), True, False),
        ({"renorm": True}, (4, 32, 32, 4), True, False),
        ({"synchronized": True}, (4, 32, 32, 4), True, False),
        ({"dtype": "float64"}, (4, 32, 32, 4), True, False),
    ],
)
def test_which_batch_norm_is_fused(options, shape, training, is_fused):
    layer = keras.layers.BatchNormalization(**options)
    x = tf.ones(shape, layer.compute_dtype)
    layer.build(shape)
    before = layer.get_config()
    fused.fuse([layer], on_cpu=True)
    operations = _operations(layer, x, training=training)
    assert ("FusedBatchNormV3" in operations) is is_fused
    assert layer.get_config() == before


def test_small_batch_norm_is_fused_on_other_devices():
    layer = keras.layers.BatchNormalization()
    x = tf.ones([4, 2, 2, 4])
    fused.fuse([layer], on_cpu=False)
    assert "FusedBatchNormV3" in _operations(layer, x, training=True)


def test_batch_norm_of_images_of_any_size_and_channels():
    layer = keras.layers.BatchNormalization()
    layer.build((None, None, None, 4))
    fused.fuse([layer], on_cpu=True)

    @tf.function(input_signature=[tf.TensorSpec([None] * 4)])
    def train(x):
        return layer(x, training=True)

    x = tf.random.stateless_normal([2, 3, 3, 4], [0, 1])
    np.testing.assert_allclose(
        tf.reduce_mean(train(x), [0, 1, 2]), np.zeros(4), atol=1e-6
    )


class Subclassed(keras.layers.Dense):
    pass


@pytest.mark.parametrize(
    ("make", "shape", "is_fused"),
    [
        (keras.layers.Dense, (2, 4096), True),
        (keras.layers.Dense, (2, 4095), False),
        (Subclassed, (2, 4096), False),
        (
            functools.partial(keras.layers.Dense, dtype="float64"),
            (2, 4096),
            False,
        ),
    ],
)
def test_which_gelu_is_fused(make, shape, is_fused):
    layer = make(shape[-1], activation="gelu")
    fused.fuse([layer, keras.layers.Flatten()], on_cpu=True)
    x = tf.ones(shape, layer.compute_dtype)
    with fused.kernels():
        operations = _operations(layer, x)
    assert ("Erfc" in operations) is not is_fused
    # A model that is exported has no kernels of XLA.
    assert "Erfc" in _operations(layer, x)
    assert layer.activation is keras.activations.gelu
    assert layer.get_config()["activation"] == "gelu"


def test_gelu_of_sequences_of_any_length_is_not_compiled_for_each():
    layer = keras.layers.Dense(4096, activation="gelu")
    layer.build((None, None, 2))
    fused.fuse([layer], on_cpu=True)
    sequences = tf.TensorSpec([None, None, 2])
    function = tf.function(lambda x: layer(x), input_signature=[sequences])
    with fused.kernels():
        graph = function.get_concrete_function().graph
    assert "Erfc" in [operation.type for operation in graph.get_operations()]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 8e-3)],
)
def test_gelu_and_its_slope_are_those_of_keras_in_float64(dtype, tolerance):
    x = tf.cast(tf.linspace(-10.0, 10.0, 4096)[None], dtype)
    exact = tf.cast(x, "float64")
    results = []
    for number, gelu in ((x, fused._gelu), (exact, keras.activations.gelu)):
        with tf.GradientTape() as tape:
            tape.watch(number)
            value = gelu(number)
        results.append((value, tape.gradient(value, number)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(
            tf.cast(found, "float64"), expected, rtol=tolerance, atol=1e-7
        )


def _make_wide():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(4096, activation="gelu"),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


@pytest.mark.parametrize(
    ("num_replicas", "precision", "jit_compile"),
    [
        (1, "float32", False),
        (2, "float32", False),
        (4, "float32", True),
        (2, "mixed_float16", False),
        (4, "mixed_bfloat16", False),
    ],
)
def test_training_with_the_fused_gelu_equals_keras(
    num_replicas, precision, jit_compile, tmp_path
):
    """A last batch of one leaves replicas without an example."""
    dataset = support.make_dataset(support.GLOBAL_BATCH + 1)
    trained = support.fit_trainer(
        dataset,
        _make_wide,
        num_replicas=num_replicas,
        precision=precision,
        jit_compile=jit_compile,
    )
    reference = support.fit_reference(dataset, _make_wide, precision=precision)
    support.assert_parity(trained, reference, precision)
    trained.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, _ = support.make_arrays(5)
    support.assert_close([loaded(x)], [trained.model(x)], precision)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
