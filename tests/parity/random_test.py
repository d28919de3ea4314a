"""Random layers: apart on each replica, the same run after run."""

import functools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import support

NUM_EPOCHS = 4
RANDOM_LAYERS = {
    "dropout": lambda: keras.layers.Dropout(0.5),
    "spatial dropout": lambda: keras.layers.SpatialDropout1D(0.5),
    "gaussian dropout": lambda: keras.layers.GaussianDropout(0.5),
    "gaussian noise": lambda: keras.layers.GaussianNoise(1.0),
}
CASES = [*support.FEW_CASES, (4, "mixed_bfloat16")]


def _make_model():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.GaussianNoise(0.3),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def _fit(num_replicas, precision, **options):
    """Four epochs of three steps, each in a call of its own."""
    fit = {"epochs": NUM_EPOCHS, "steps_per_loop": 1} | options.pop("fit", {})
    return support.fit_trainer(
        support.make_dataset(),
        _make_model,
        lambda: keras.optimizers.Adam(0.01),
        num_replicas=num_replicas,
        precision=precision,
        fit=fit,
        **options,
    )


@functools.cache
def _whole(num_replicas, precision):
    """A fit from beginning to end."""
    return _fit(num_replicas, precision)


def _assert_identical(one, other):
    for group in ("model", "optimizer"):
        for a, b in zip(
            getattr(one, group).variables,
            getattr(other, group).variables,
            strict=True,
        ):
            np.testing.assert_array_equal(
                support.local_copies(a), support.local_copies(b), a.path
            )


def _draws(layer, strategy):
    """What a layer makes of ones on each replica."""
    ones = tf.ones([8, 16, 4])
    drawn = strategy.run(lambda: layer(ones, training=True))
    return [copy.numpy() for copy in strategy.experimental_local_results(drawn)]


@pytest.mark.parametrize("num_replicas", [2, 4])
@pytest.mark.parametrize("name", RANDOM_LAYERS)
def test_replicas_draw_different_masks(name, num_replicas):
    trainer = support.make_trainer(
        lambda: keras.Sequential(
            [
                keras.Input((16, 4)),
                RANDOM_LAYERS[name](),
                keras.layers.Flatten(),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        ),
        num_replicas=num_replicas,
    )
    x, y = np.ones([8, 16, 4], "float32"), np.zeros(8, "int32")
    trainer.build(support.batched((x, y)))
    draws = _draws(trainer.model.layers[0], trainer.strategy)
    draws += _draws(trainer.model.layers[0], trainer.strategy)
    assert len({draw.tobytes() for draw in draws}) == 2 * num_replicas


@pytest.mark.parametrize(("num_replicas", "precision"), CASES)
def test_one_seed_gives_one_run(num_replicas, precision):
    again = _fit(num_replicas, precision)
    _assert_identical(again, _whole(num_replicas, precision))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_another_seed_gives_other_masks(num_replicas):
    """The weights are made equal, so that only the masks differ."""
    first = _fit(num_replicas, "float32", fit={"epochs": 1})
    other = support.make_trainer(
        _make_model,
        lambda: keras.optimizers.Adam(0.01),
        num_replicas=num_replicas,
        seed=1,
    )
    initial = support.make_trainer(_make_model, num_replicas=num_replicas)
    support.assign(
        other.model.trainable_variables,
        support.read(initial.model.trainable_variables),
    )
    other.fit(support.make_dataset(), verbose=0)
    with pytest.raises(AssertionError):
        support.assert_close(
            support.read(other.model.trainable_variables),
            support.read(first.model.trainable_variables),
        )


@pytest.mark.parametrize(("num_replicas", "precision"), CASES)
def test_resume_after_an_epoch_is_bit_exact(num_replicas, precision, tmp_path):
    """The second process starts from another seed: all of it is restored."""
    whole = _whole(num_replicas, precision)
    _fit(
        num_replicas,
        precision,
        fit={"epochs": 2, "checkpoint_dir": tmp_path},
    )
    resumed = _fit(
        num_replicas, precision, seed=7, fit={"checkpoint_dir": tmp_path}
    )
    _assert_identical(resumed, whole)
    assert len(resumed.history["loss"]) == NUM_EPOCHS
    assert resumed.history["loss"] == whole.history["loss"]


class _StopAfter(keras.callbacks.Callback):
    """Asks the trainer to stop after so many batches."""

    def __init__(self, num_batches):
        super().__init__()
        self.trainer = None
        self._left = num_batches

    def on_train_batch_end(self, batch, logs=None):
        self._left -= 1
        if self._left == 0:
            self.trainer.request_stop("the test asks for it")


def _fit_until(num_batches, num_replicas, precision, directory):
    stop = _StopAfter(num_batches)
    trainer = support.make_trainer(
        _make_model,
        lambda: keras.optimizers.Adam(0.01),
        num_replicas=num_replicas,
        precision=precision,
    )
    stop.trainer = trainer
    trainer.fit(
        support.make_dataset(),
        epochs=NUM_EPOCHS,
        steps_per_loop=1,
        checkpoint_dir=directory,
        callbacks=[stop],
        verbose=0,
    )
    return trainer


@pytest.mark.parametrize(
    ("num_batches", "num_replicas", "precision"),
    [
        (1, 2, "mixed_bfloat16"),
        (2, 4, "float32"),
        (5, 1, "float32"),
        (5, 2, "mixed_float16"),
        (5, 4, "float32"),
    ],
)
def test_resume_within_an_epoch_is_bit_exact(
    num_batches, num_replicas, precision, tmp_path
):
    whole = _whole(num_replicas, precision)
    stopped = _fit_until(num_batches, num_replicas, precision, tmp_path)
    assert stopped.stop_reason == "the test asks for it"
    assert stopped.global_step == num_batches
    resumed = _fit(
        num_replicas, precision, seed=7, fit={"checkpoint_dir": tmp_path}
    )
    _assert_identical(resumed, whole)
    assert resumed.history["loss"] == whole.history["loss"]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
