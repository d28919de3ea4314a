"""Clipping acts on the gradient of the global batch, after the unscaling."""

import functools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from tests import support

CLIPPING = {
    "clipnorm": {"clipnorm": 0.02},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.005},
}
CASES = [*support.FEW_CASES, (4, "mixed_bfloat16")]


def _make_optimizer(name):
    return lambda: support.make_sgd(**CLIPPING.get(name, {}))


@functools.cache
def _reference(name, precision):
    return support.fit_reference(
        support.make_dataset(),
        make_optimizer=_make_optimizer(name),
        precision=precision,
    )


@pytest.mark.parametrize(("num_replicas", "precision"), CASES)
@pytest.mark.parametrize("name", CLIPPING)
def test_trainer_clips_like_one_device(name, num_replicas, precision):
    trained = support.fit_trainer(
        support.make_dataset(),
        make_optimizer=_make_optimizer(name),
        num_replicas=num_replicas,
        precision=precision,
    )
    support.assert_parity(trained, _reference(name, precision), precision)


@pytest.mark.parametrize(
    ("num_replicas", "precision"), [(2, "float32"), (4, "mixed_float16")]
)
@pytest.mark.parametrize("name", CLIPPING)
def test_fit_clips_like_one_device(name, num_replicas, precision):
    trained = support.fit_keras(
        support.make_dataset(),
        make_optimizer=_make_optimizer(name),
        num_replicas=num_replicas,
        precision=precision,
    )
    support.assert_parity(trained, _reference(name, precision), precision)


@pytest.mark.parametrize("name", CLIPPING)
def test_clipping_is_active_in_the_reference(name):
    clipped, free = _reference(name, "float32"), _reference("none", "float32")
    moved = max(
        np.max(np.abs(one - other))
        for one, other in zip(clipped.weights, free.weights, strict=True)
    )
    assert moved > 1e-2


@pytest.mark.parametrize("loss_scale", [None, 2.0**10])
@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize(
    ("clipping", "expected"),
    [
        ({"clipnorm": 1.0}, [-0.6, -0.8]),
        ({"global_clipnorm": 1.0}, [-0.6, -0.8]),
        ({"clipvalue": 1.0}, [-1.0, -1.0]),
    ],
)
def test_the_sum_over_replicas_is_clipped_once(
    clipping, expected, num_replicas, loss_scale
):
    """A global gradient of (3, 4), whatever each replica holds of it."""
    strategy = support.make_strategy(num_replicas)
    with dist_amp.scope(strategy, "float32"):
        weight = keras.Variable([0.0, 0.0])
        optimizer = dist_amp.wrap_optimizer(
            keras.optimizers.SGD(1.0, **clipping), loss_scale=loss_scale
        )
        optimizer.build([weight])

    @tf.function
    def step():
        part = tf.constant([3.0, 4.0]) / num_replicas
        optimizer.apply([optimizer.scale_loss(part)], [weight])

    strategy.run(step)
    support.assert_close(
        support.local_copies(weight), [expected] * num_replicas
    )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
