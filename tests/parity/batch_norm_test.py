"""Batch norm: one set of moving statistics, whatever the replicas saw."""

import functools
import itertools
import sys

import keras
import numpy as np
import pytest

from dist_amp import fused
from tests import support

MOMENTUM = 0.75


def _slices(x, num_replicas):
    """The slices of the replicas that have an example of a batch."""
    bounds = [len(x) * r // num_replicas for r in range(num_replicas + 1)]
    pieces = [x[a:b] for a, b in itertools.pairwise(bounds)]
    return [piece for piece in pieces if len(piece)]


def _moved(mean, variance, x, num_replicas):
    """One step of the moving statistics, averaged over replicas, by hand."""
    pieces = _slices(x, num_replicas)
    batch_mean = np.mean([piece.mean(axis=0) for piece in pieces], axis=0)
    batch_variance = np.mean([piece.var(axis=0) for piece in pieces], axis=0)
    return (
        MOMENTUM * mean + (1 - MOMENTUM) * batch_mean,
        MOMENTUM * variance + (1 - MOMENTUM) * batch_variance,
    )


def _make_norm_first():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.BatchNormalization(momentum=MOMENTUM),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


class _ReadStatistics(keras.callbacks.Callback):
    """Reads the moving statistics of all replicas after each step."""

    def on_train_begin(self, logs=None):
        self.steps = []

    def on_train_batch_end(self, batch, logs=None):
        norm = self.model.layers[0]
        support.assert_same_on_replicas(self.model.variables)
        self.steps.append(
            support.read([norm.moving_mean, norm.moving_variance])
        )


@pytest.mark.parametrize("last_batch", [1, 3, 8])
@pytest.mark.parametrize(
    ("num_replicas", "precision"), [*support.FEW_CASES, (4, "mixed_float16")]
)
def test_moving_statistics_after_each_step(num_replicas, precision, last_batch):
    num_examples = 2 * support.GLOBAL_BATCH + last_batch
    read = _ReadStatistics()
    support.fit_trainer(
        support.make_dataset(num_examples),
        _make_norm_first,
        num_replicas=num_replicas,
        precision=precision,
        fit={"epochs": 1, "steps_per_loop": 1, "callbacks": [read]},
    )
    x, _ = support.make_arrays(num_examples)
    mean, variance = np.zeros(x.shape[1]), np.ones(x.shape[1])
    assert len(read.steps) == 3
    for step, statistics in enumerate(read.steps):
        begin = step * support.GLOBAL_BATCH
        batch = x[begin : begin + support.GLOBAL_BATCH]
        mean, variance = _moved(mean, variance, batch, num_replicas)
        support.assert_close(statistics, [mean, variance], precision)


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_a_frozen_layer_keeps_its_statistics(num_replicas):
    def make_model():
        model = _make_norm_first()
        model.layers[0].trainable = False
        return model

    trained = support.fit_trainer(
        support.make_dataset(), make_model, num_replicas=num_replicas
    )
    norm = trained.model.layers[0]
    statistics = support.read([norm.moving_mean, norm.moving_variance])
    np.testing.assert_array_equal(statistics[0], 0.0)
    np.testing.assert_array_equal(statistics[1], 1.0)


def _make_synchronized(synchronized=True):
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            # A bias before a batch norm has no gradient but rounding noise.
            keras.layers.Dense(8, use_bias=False),
            keras.layers.BatchNormalization(
                momentum=MOMENTUM, synchronized=synchronized
            ),
            keras.layers.ReLU(),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


@functools.cache
def _reference(num_examples, precision):
    return support.fit_reference(
        support.make_dataset(num_examples),
        lambda: _make_synchronized(False),
        precision=precision,
    )


@pytest.mark.parametrize("last_batch", [2, 3, 8])
@pytest.mark.parametrize(
    ("num_replicas", "precision"),
    [*support.FEW_CASES, (2, "float32"), (4, "mixed_bfloat16")],
)
def test_synchronized_equals_one_device(num_replicas, precision, last_batch):
    """A last batch of two or three leaves replicas empty."""
    num_examples = 2 * support.GLOBAL_BATCH + last_batch
    trained = support.fit_trainer(
        support.make_dataset(num_examples),
        _make_synchronized,
        num_replicas=num_replicas,
        precision=precision,
    )
    reference = _reference(num_examples, precision)
    support.assert_parity(trained, reference, precision)


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_synchronized_equals_one_device_in_fit(num_replicas):
    num_examples = 3 * support.GLOBAL_BATCH
    trained = support.fit_keras(
        support.make_dataset(num_examples),
        _make_synchronized,
        num_replicas=num_replicas,
    )
    support.assert_parity(trained, _reference(num_examples, "float32"))


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("num_replicas", [2, 4])
def test_one_example_for_all_replicas_leaves_no_nan(num_replicas, synchronized):
    trained = support.fit_trainer(
        support.make_dataset(support.GLOBAL_BATCH + 1),
        lambda: _make_synchronized(synchronized),
        num_replicas=num_replicas,
    )
    for weight in trained.weights:
        assert np.isfinite(weight).all()
    support.assert_same_on_replicas(trained.model.variables)


# --------------------------------------------------- images: the fused kernel


class _NotFused(keras.layers.BatchNormalization):
    """What is subclassed is left alone."""


def _make_convolutional(norm=keras.layers.BatchNormalization, **options):
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Reshape((2, 3, 1)),
            keras.layers.Conv2D(8, 2, padding="same", use_bias=False),
            norm(momentum=MOMENTUM, **options),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


@pytest.fixture
def small_is_large(monkeypatch):
    """Small images are fused, too."""
    monkeypatch.setattr(fused, "_LARGE_ON_CPU", 0)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("precision", support.PRECISIONS)
def test_fused_equals_keras(precision, jit_compile):
    trained, reference = (
        support.fit_trainer(
            support.make_dataset(2 * support.GLOBAL_BATCH + 3),
            functools.partial(_make_convolutional, norm),
            precision=precision,
            jit_compile=jit_compile,
        )
        for norm in (keras.layers.BatchNormalization, _NotFused)
    )
    support.assert_parity(trained, reference, precision)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize(
    "options", [{"scale": False}, {"center": False}, {"axis": 3}]
)
def test_fused_knows_the_options(options):
    dataset = support.make_dataset()
    trained = support.fit_trainer(
        dataset, lambda: _make_convolutional(**options)
    )
    reference = support.fit_reference(
        dataset, lambda: _make_convolutional(**options)
    )
    support.assert_parity(trained, reference)


@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("num_replicas", [2, 4])
def test_fused_on_replicas_of_which_some_are_empty(num_replicas):
    weights = []
    for norm in (keras.layers.BatchNormalization, _NotFused):
        trained = support.fit_trainer(
            support.make_dataset(support.GLOBAL_BATCH + 1),
            functools.partial(_make_convolutional, norm),
            num_replicas=num_replicas,
        )
        support.assert_same_on_replicas(trained.model.variables)
        weights.append(trained.weights)
    support.assert_close(*weights)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
