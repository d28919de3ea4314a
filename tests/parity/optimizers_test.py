"""Optimizers, weight decay and averages: N replicas equal plain Keras."""

import functools
import sys

import keras
import pytest

from tests import support

OPTIMIZERS = {
    "sgd": support.make_sgd,
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-4),
    "adamw": lambda: keras.optimizers.AdamW(
        0.01, epsilon=1e-4, weight_decay=0.1
    ),
    "lamb": lambda: keras.optimizers.Lamb(0.01, epsilon=1e-4),
    "weight decay": lambda: support.make_sgd(weight_decay=0.1),
    "EMA": lambda: support.make_sgd(use_ema=True, ema_momentum=0.5),
    "EMA that overwrites": lambda: support.make_sgd(
        use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
}


@functools.cache
def _reference(name, precision):
    return support.fit_reference(
        support.make_dataset(),
        make_optimizer=OPTIMIZERS[name],
        precision=precision,
    )


def _assert_equals_reference(trained, name, precision):
    reference = _reference(name, precision)
    support.assert_parity(trained, reference, precision)
    if precision == "float32":
        support.assert_close(
            support.read(trained.optimizer.inner_optimizer.variables),
            support.read(reference.optimizer.variables),
        )


@pytest.mark.parametrize("precision", support.PRECISIONS)
@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_trainer_equals_plain_keras_in_every_precision(
    name, num_replicas, precision
):
    trained = support.fit_trainer(
        support.make_dataset(),
        make_optimizer=OPTIMIZERS[name],
        num_replicas=num_replicas,
        precision=precision,
    )
    _assert_equals_reference(trained, name, precision)


@pytest.mark.parametrize(
    ("num_replicas", "precision"),
    [*support.FEW_CASES, (2, "mixed_bfloat16")],
)
@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name not in ("sgd", "adam")]
)
def test_trainer_equals_plain_keras(name, num_replicas, precision):
    trained = support.fit_trainer(
        support.make_dataset(),
        make_optimizer=OPTIMIZERS[name],
        num_replicas=num_replicas,
        precision=precision,
    )
    _assert_equals_reference(trained, name, precision)


@pytest.mark.parametrize(
    ("num_replicas", "precision"),
    [(1, "mixed_float16"), (2, "float32"), (4, "mixed_float16")],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_equals_plain_keras(name, num_replicas, precision):
    trained = support.fit_keras(
        support.make_dataset(),
        make_optimizer=OPTIMIZERS[name],
        num_replicas=num_replicas,
        precision=precision,
    )
    _assert_equals_reference(trained, name, precision)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_fit_equals_plain_keras_in_bfloat16(num_replicas):
    trained = support.fit_keras(
        support.make_dataset(),
        num_replicas=num_replicas,
        precision="mixed_bfloat16",
    )
    _assert_equals_reference(trained, "sgd", "mixed_bfloat16")


@pytest.mark.parametrize(
    "name", ["adamw", "weight decay", "EMA", "EMA that overwrites"]
)
def test_options_change_the_reference(name):
    """Else the tests above would pass with the option ignored."""
    plain = _reference("adam" if name == "adamw" else "sgd", "float32")
    with pytest.raises(AssertionError):
        support.assert_parity(_reference(name, "float32"), plain)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
