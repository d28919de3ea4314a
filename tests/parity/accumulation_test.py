"""Accumulating K batches equals one batch of their examples."""

import functools
import sys

import keras
import pytest

from tests import support

MICRO_BATCH = 4
OPTIMIZERS = {
    "sgd": support.make_sgd,
    "adam": lambda **options: keras.optimizers.Adam(
        0.01, epsilon=1e-4, global_clipnorm=0.05, weight_decay=0.1, **options
    ),
    "EMA": lambda **options: support.make_sgd(
        use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2, **options
    ),
}
CASES = [
    (1, "float32"),
    (2, "float32"),
    (4, "float32"),
    (2, "mixed_float16"),
    (4, "mixed_bfloat16"),
]


def _accumulating(name, steps):
    return lambda: OPTIMIZERS[name](gradient_accumulation_steps=steps)


@functools.cache
def _reference(name, num_examples, batch_size, precision, make_model=None):
    return support.fit_reference(
        support.make_dataset(num_examples, batch_size),
        make_model or support.make_mlp,
        OPTIMIZERS[name],
        precision=precision,
    )


@pytest.mark.parametrize(("num_replicas", "precision"), CASES)
@pytest.mark.parametrize("steps", [2, 4])
def test_trainer_equals_one_big_batch(steps, num_replicas, precision):
    """35 examples: a last batch of 3 in a last update of fewer batches."""
    trained = support.fit_trainer(
        support.make_dataset(35, MICRO_BATCH),
        make_optimizer=_accumulating("sgd", steps),
        num_replicas=num_replicas,
        precision=precision,
    )
    reference = _reference("sgd", 35, steps * MICRO_BATCH, precision)
    support.assert_parity(trained, reference, precision)
    assert trained.trainer.global_step == 2 * -(-9 // steps)


@pytest.mark.parametrize("name", ["adam", "EMA"])
def test_clipping_decay_and_average_act_once_an_update(name):
    trained = support.fit_trainer(
        support.make_dataset(35, MICRO_BATCH),
        make_optimizer=_accumulating(name, 2),
        num_replicas=4,
    )
    reference = _reference(name, 35, 2 * MICRO_BATCH, "float32")
    support.assert_parity(trained, reference)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_last_update_may_hold_a_single_example(num_replicas):
    """17 examples: the second update of an epoch is one batch of one."""
    trained = support.fit_trainer(
        support.make_dataset(17, MICRO_BATCH),
        make_optimizer=_accumulating("sgd", 4),
        num_replicas=num_replicas,
    )
    reference = _reference("sgd", 17, 4 * MICRO_BATCH, "float32")
    support.assert_parity(trained, reference)


def _regularized_mlp():
    return support.make_mlp(kernel_regularizer=keras.regularizers.L2(0.05))


def test_regularization_counts_once_an_update():
    trained = support.fit_trainer(
        support.make_dataset(35, MICRO_BATCH),
        _regularized_mlp,
        _accumulating("sgd", 2),
        num_replicas=2,
    )
    reference = _reference(
        "sgd", 35, 2 * MICRO_BATCH, "float32", _regularized_mlp
    )
    support.assert_close(trained.weights, reference.weights)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("num_replicas", "precision"), support.FEW_CASES)
def test_fit_equals_one_big_batch(name, num_replicas, precision):
    trained = support.fit_keras(
        support.make_dataset(24, MICRO_BATCH),
        make_optimizer=_accumulating(name, 2),
        num_replicas=num_replicas,
        precision=precision,
    )
    reference = _reference(name, 24, 2 * MICRO_BATCH, precision)
    support.assert_parity(trained, reference, precision)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_fit_updates_on_every_fourth_batch(num_replicas):
    trained = support.fit_keras(
        support.make_dataset(32, MICRO_BATCH),
        make_optimizer=_accumulating("sgd", 4),
        num_replicas=num_replicas,
    )
    reference = _reference("sgd", 32, 4 * MICRO_BATCH, "float32")
    support.assert_parity(trained, reference)
    assert support.read([trained.optimizer.iterations]) == [4]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
