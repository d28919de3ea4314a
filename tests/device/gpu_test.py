"""What only a GPU can show: `pytest -m gpu tests/device`.

One card is enough: it is split into two logical GPUs.
"""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from tests import support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not tf.config.list_physical_devices("GPU"), reason="needs a GPU"
    ),
]
MEMORY_MIB = 4096


@pytest.fixture(scope="module", autouse=True)
def two_logical_gpus():
    card = tf.config.list_physical_devices("GPU")[0]
    tf.config.set_logical_device_configuration(
        card,
        [tf.config.LogicalDeviceConfiguration(memory_limit=MEMORY_MIB)] * 2,
    )


def fit(num_replicas, precision, **options):
    """Three epochs with a partial last batch; returns weights and losses."""
    devices = [f"GPU:{index}" for index in range(num_replicas)]
    # NCCL refuses two ranks on one card.
    all_reduce = "auto" if num_replicas == 1 else "one_device"
    strategy = dist_amp.make_strategy(
        "one_device" if num_replicas == 1 else "mirrored",
        devices=devices,
        all_reduce=all_reduce,
    )
    keras.utils.set_random_seed(0)
    with dist_amp.scope(strategy, precision):
        model = support.make_mlp()
        optimizer = dist_amp.wrap_optimizer(
            keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0)
        )
    trainer = dist_amp.Trainer(
        model, optimizer, loss=support.make_loss(), **options
    )
    history = trainer.fit(support.make_dataset(21), epochs=3, verbose=0)
    return trainer, history.history["loss"]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("precision", support.PRECISIONS)
def test_parity_with_the_cpu(precision, num_replicas, jit_compile):
    trainer, _ = fit(num_replicas, precision, jit_compile=jit_compile)
    expected = support.fit_trainer(
        support.make_dataset(21),
        make_optimizer=lambda: keras.optimizers.SGD(
            0.1, momentum=0.9, global_clipnorm=1.0
        ),
        precision=precision,
        fit={"epochs": 3},
    )
    # TensorFloat-32 has ten bits of mantissa.
    tolerance = "mixed_float16" if precision == "float32" else precision
    support.assert_close(
        support.read(trainer.model.trainable_variables),
        expected.weights,
        tolerance,
    )


def test_auto_takes_the_card_and_its_tensor_cores():
    strategy = dist_amp.make_strategy("auto", devices=["GPU:0"])
    with dist_amp.scope(strategy, "auto") as precision:
        layer = keras.layers.Dense(4)
    assert precision.name.startswith("mixed_")
    assert "compute capability" in precision.reason
    assert "GPU" in layer(tf.ones([2, 4])).device


def test_grappler_rewrites_to_float16():
    strategy = dist_amp.make_strategy("one_device", devices=["GPU:0"])
    x = tf.random.stateless_normal([256, 256], [1, 2])

    def product():
        return tf.function(lambda a: tf.nn.relu(tf.matmul(a, a)))(x)

    exact = product()
    with dist_amp.scope(strategy, "graph_float16") as precision:
        rewritten = product()
    assert precision.needs_loss_scale
    assert not np.array_equal(exact, rewritten)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
