"""Sparse gradients of embeddings: stay sparse, and add up over replicas."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import support

NUM_ROWS = 12
NUM_STEPS = 3
LEARNING_RATE = 0.5
CLIP_NORM = 0.05


def _make_model():
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(NUM_ROWS, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def _make_arrays(num_examples=NUM_STEPS * support.GLOBAL_BATCH - 3):
    """Tokens that meet again in an example, in a replica, and across them."""
    generator = np.random.default_rng(2)
    x = generator.integers(0, NUM_ROWS // 2, size=(num_examples, 3))
    x[:, 1] = 7
    x[::2, 2] = x[::2, 0]
    y = generator.integers(0, support.NUM_CLASSES, size=num_examples)
    return x.astype("int32"), y.astype("int32")


def _train_densely(precision, clip_norm=None):
    """SGD by hand on one device; the gradients are made dense."""
    trainer = support.make_trainer(_make_model, precision=precision)
    model, loss = trainer.model, support.make_loss()
    for x, y in support.batched(_make_arrays()):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = [
            tf.convert_to_tensor(gradient)
            for gradient in tape.gradient(value, model.trainable_variables)
        ]
        if clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, clip_norm)
        for variable, gradient in zip(
            model.trainable_variables, gradients, strict=True
        ):
            variable.assign_sub(LEARNING_RATE * gradient)
    return support.read(model.variables)


def _recording_sgd(kinds):
    """SGD that notes what kind of gradient each variable is updated with."""

    class RecordingSGD(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            name = variable.name.rpartition("/")[2].partition(":")[0]
            kinds[name] = type(gradient)
            super().update_step(gradient, variable, learning_rate)

    return RecordingSGD


def _fit(num_replicas, precision, **optimizer_options):
    kinds = {}
    trained = support.fit_trainer(
        support.batched(_make_arrays()),
        _make_model,
        lambda: _recording_sgd(kinds)(LEARNING_RATE, **optimizer_options),
        num_replicas=num_replicas,
        precision=precision,
        fit={"epochs": 1},
    )
    support.assert_same_on_replicas(trained.model.variables)
    return trained, kinds


@pytest.mark.parametrize("precision", support.PRECISIONS)
@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_sparse_gradients_stay_sparse_and_right(num_replicas, precision):
    trained, kinds = _fit(num_replicas, precision)
    assert issubclass(kinds["embeddings"], tf.IndexedSlices)
    assert not issubclass(kinds["kernel"], tf.IndexedSlices)
    support.assert_close(trained.weights, _train_densely(precision), precision)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_global_clipnorm_sees_each_row_once(num_replicas, precision):
    trained, _ = _fit(num_replicas, precision, global_clipnorm=CLIP_NORM)
    expected = _train_densely(precision, CLIP_NORM)
    support.assert_close(trained.weights, expected, precision)


@pytest.mark.parametrize(
    ("num_replicas", "precision"), [(1, "float32"), (2, "mixed_float16")]
)
def test_rows_that_no_example_has_stay_as_they_are(num_replicas, precision):
    trainer = support.make_trainer(
        _make_model,
        lambda: keras.optimizers.SGD(LEARNING_RATE),
        num_replicas=num_replicas,
        precision=precision,
    )
    dataset = support.batched(_make_arrays())
    trainer.build(dataset)
    table = trainer.model.layers[0].embeddings
    (before,) = support.read([table])
    trainer.fit(dataset, verbose=0)
    (after,) = support.read([table])
    is_unused = ~np.isin(np.arange(NUM_ROWS), _make_arrays()[0])
    assert is_unused.any()
    np.testing.assert_array_equal(after[is_unused], before[is_unused])
    assert (after[~is_unused] != before[~is_unused]).all()


@pytest.mark.parametrize(("num_replicas", "precision"), support.FEW_CASES)
def test_accumulated_sparse_gradients_equal_one_big_batch(
    num_replicas, precision
):
    options = {"precision": precision, "fit": {"epochs": 1}}
    trained = support.fit_trainer(
        support.batched(_make_arrays(16), 4),
        _make_model,
        lambda: support.make_sgd(gradient_accumulation_steps=2),
        num_replicas=num_replicas,
        **options,
    )
    reference = support.fit_reference(
        support.batched(_make_arrays(16)), _make_model, **options
    )
    support.assert_close(trained.weights, reference.weights, precision)


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_sparse_gradients_in_fit(num_replicas):
    dataset = support.batched(_make_arrays(16))
    trained = support.fit_keras(dataset, _make_model, num_replicas=num_replicas)
    reference = support.fit_reference(dataset, _make_model)
    support.assert_parity(trained, reference)


@pytest.mark.parametrize("replica", range(4))
def test_an_overflow_in_a_sparse_gradient_is_seen(replica):
    """The embedding is the only layer in float16."""
    x, y = _make_arrays(support.GLOBAL_BATCH)
    y = np.eye(support.NUM_CLASSES, dtype="float32")[y]
    y[2 * replica] = 1e6
    trained = support.fit_trainer(
        support.batched((x, y)),
        _make_model,
        num_replicas=4,
        precision="mixed_float16",
        loss="mean_squared_error",
        fit={"epochs": 1},
    )
    assert trained.history["skipped_updates"] == [1]
    assert all(np.isfinite(weight).all() for weight in trained.weights)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
