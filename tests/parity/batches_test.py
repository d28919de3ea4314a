"""Batches of any size, sample weights and class weights."""

import functools
import sys

import keras
import numpy as np
import pytest

from tests import support

LAST_BATCHES = range(1, support.GLOBAL_BATCH)
CLASS_WEIGHT = {0: 0.5, 1: 2.0, 2: 0.0}


@functools.cache
def _trainer(num_replicas, precision):
    """One trainer for all sizes; shows that one trace serves them all."""
    trainer = support.make_trainer(
        num_replicas=num_replicas, precision=precision
    )
    trainer.build(support.make_dataset())
    variables = trainer.model.variables + trainer.optimizer.variables
    return trainer, variables, support.read(variables)


def _fit(dataset, num_replicas, precision):
    trainer, variables, initial_values = _trainer(num_replicas, precision)
    support.assign(variables, initial_values)
    history = trainer.fit(dataset, epochs=2, verbose=0).history
    return support.Trained(trainer.model, trainer.optimizer, history, trainer)


@functools.cache
def _reference(num_examples, precision):
    return support.fit_reference(
        support.make_dataset(num_examples), precision=precision
    )


@pytest.mark.parametrize("precision", support.PRECISIONS)
@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("last_batch", LAST_BATCHES)
def test_last_batch_of_any_size_counts_each_example_once(
    last_batch, num_replicas, precision
):
    num_examples = support.GLOBAL_BATCH + last_batch
    trained = _fit(support.make_dataset(num_examples), num_replicas, precision)
    reference = _reference(num_examples, precision)
    support.assert_parity(trained, reference, precision)
    assert trained.trainer._train_loop.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_dataset_smaller_than_the_replicas(num_replicas):
    trained = _fit(support.make_dataset(1), num_replicas, "float32")
    support.assert_parity(trained, _reference(1, "float32"))


def _make_convolutional():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Reshape((2, 3, 1)),
            keras.layers.Conv2D(4, 2, padding="same"),
            keras.layers.DepthwiseConv2D(2, padding="same"),
            keras.layers.MaxPooling2D(2, strides=1, padding="same"),
            keras.layers.AveragePooling2D((1, 2)),
            keras.layers.Conv2D(3, 1),
            keras.layers.Flatten(),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("num_replicas", [2, 4])
def test_images_of_which_some_replicas_get_none(num_replicas, jit_compile):
    """TensorFlow's own kernels for images break without an example."""
    num_examples = support.GLOBAL_BATCH + 1
    dataset = support.make_dataset(num_examples)
    trained = support.fit_trainer(
        dataset,
        _make_convolutional,
        num_replicas=num_replicas,
        jit_compile=jit_compile,
    )
    reference = support.fit_reference(dataset, _make_convolutional)
    support.assert_parity(trained, reference)
    x, y = support.make_arrays(num_examples)
    expected = support.make_loss()(y, trained.model(x))
    results = trained.trainer.evaluate(dataset)
    np.testing.assert_allclose(results["loss"], expected, rtol=1e-5)


class _WithScalar(keras.Model):
    """Returns a number that belongs to no example, too."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(support.NUM_CLASSES)

    def call(self, x):
        logits = self.dense(x)
        return {"logits": logits, "norm": keras.ops.sum(self.dense.kernel)}


def test_outputs_without_examples_where_a_replica_gets_none():
    x, y = support.make_arrays(support.GLOBAL_BATCH + 1)
    trainer = support.make_trainer(
        _WithScalar, num_replicas=2, loss={"logits": support.make_loss()}
    )
    dataset = support.batched((x, {"logits": y}))
    history = trainer.fit(dataset, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def _weighted_arrays(num_examples=21):
    """Weights with zeros, a whole last batch of small ones among them."""
    x, y = support.make_arrays(num_examples)
    weight = np.linspace(0.0, 2.0, num_examples, dtype="float32")
    weight[[2, 3]] = 0.0
    return x, y, weight[::-1].copy()


@pytest.mark.parametrize(
    "reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"]
)
@pytest.mark.parametrize(("num_replicas", "precision"), support.FEW_CASES)
def test_sample_weights(num_replicas, precision, reduction):
    if (reduction, precision) == ("sum", "mixed_float16"):
        # Whether eight large gradients overflow in one sum depends on how many
        # of them a replica adds up, and with it the loss scale.
        precision = "mixed_bfloat16"
    dataset = support.batched(_weighted_arrays())
    options = {
        "loss": support.make_loss(reduction=reduction),
        "make_optimizer": lambda: support.make_sgd(
            0.05 / support.GLOBAL_BATCH if reduction == "sum" else 0.05
        ),
        "precision": precision,
    }
    trained = support.fit_trainer(dataset, num_replicas=num_replicas, **options)
    reference = support.fit_reference(dataset, **options)
    support.assert_close(trained.weights, reference.weights, precision)
    support.assert_same_on_replicas(trained.model.variables)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_a_replica_whose_weights_are_all_zero_adds_nothing(num_replicas):
    x, y, weight = _weighted_arrays(16)
    weight[: support.GLOBAL_BATCH // 2] = 0.0
    dataset = support.batched((x, y, weight))
    trained = support.fit_trainer(dataset, num_replicas=num_replicas)
    support.assert_parity(trained, support.fit_reference(dataset))


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize(("num_replicas", "precision"), support.FEW_CASES)
def test_class_weights(num_replicas, precision, one_hot):
    x, y = support.make_arrays(21)
    loss = support.make_loss()
    if one_hot:
        y = np.eye(support.NUM_CLASSES, dtype="float32")[y]
        loss = "categorical_crossentropy"
    options = {
        "loss": loss,
        "precision": precision,
        "fit": {"class_weight": CLASS_WEIGHT},
    }
    make_model = _softmax_mlp if one_hot else support.make_mlp
    dataset = support.batched((x, y))
    trained = support.fit_trainer(
        dataset, make_model, num_replicas=num_replicas, **options
    )
    reference = support.fit_reference(dataset, make_model, **options)
    support.assert_parity(trained, reference, precision)


def _softmax_mlp():
    model = support.make_mlp()
    model.add(keras.layers.Softmax(dtype="float32"))
    return model


def test_class_weights_multiply_sample_weights():
    """Plain Keras refuses the two together; their product is meant."""
    x, y, weight = _weighted_arrays()
    table = np.array([CLASS_WEIGHT[index] for index in range(3)], "float32")
    trained = support.fit_trainer(
        support.batched((x, y, weight)),
        num_replicas=4,
        fit={"class_weight": CLASS_WEIGHT},
    )
    product = support.batched((x, y, weight * table[y]))
    support.assert_parity(trained, support.fit_reference(product))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
