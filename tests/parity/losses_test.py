"""What a loss is divided by: Keras on one device is right, N must agree."""

import functools
import sys

import keras
import numpy as np
import pytest

from tests import support

REDUCTIONS = ["sum_over_batch_size", "mean_with_sample_weight", "sum", "mean"]


@pytest.mark.parametrize("num_examples", [16, 21, 9])
def test_one_device_equals_plain_keras(num_examples):
    """Weights, optimizer, losses, metrics, validation."""
    dataset = support.make_dataset(num_examples)
    options = {
        "make_optimizer": lambda: keras.optimizers.Adam(0.01, epsilon=1e-4),
        "fit": {"validation_data": support.make_dataset(13)},
        "metrics": ["accuracy"],
    }
    trained = support.fit_trainer(dataset, **options)
    reference = support.fit_reference(dataset, **options)
    support.assert_parity(trained, reference)
    for name in ("accuracy", "val_loss", "val_accuracy"):
        support.assert_close([trained.history[name]], [reference.history[name]])


def _reduced(reduction):
    """Loss and optimizer; a sum of losses asks for a lower rate."""
    rate = 0.05 / (support.GLOBAL_BATCH if reduction == "sum" else 1)
    return {
        "loss": support.make_loss(reduction=reduction),
        "make_optimizer": lambda: support.make_sgd(rate),
    }


# Not in float16: whether eight large gradients overflow in one sum depends on
# how many of them a replica adds up, and with it the loss scale.
@pytest.mark.parametrize(
    ("num_replicas", "precision"),
    [(1, "float32"), (4, "float32"), (2, "mixed_bfloat16")],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction, num_replicas, precision):
    dataset = support.make_dataset(21)
    options = _reduced(reduction) | {"precision": precision}
    trained = support.fit_trainer(dataset, num_replicas=num_replicas, **options)
    reference = support.fit_reference(dataset, **options)
    support.assert_close(trained.weights, reference.weights, precision)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("num_examples", [16, 9])
def test_weight_regularization(num_replicas, num_examples):
    def make_model():
        return support.make_mlp(
            kernel_regularizer=keras.regularizers.L2(0.1),
            bias_regularizer=keras.regularizers.L1(0.1),
        )

    dataset = support.make_dataset(num_examples)
    trained = support.fit_trainer(
        dataset, make_model, num_replicas=num_replicas
    )
    support.assert_parity(trained, support.fit_reference(dataset, make_model))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_activity_regularization(num_replicas):
    def make_model():
        return support.make_mlp(
            activity_regularizer=keras.regularizers.L2(0.01)
        )

    dataset = support.make_dataset(16)
    trained = support.fit_trainer(
        dataset, make_model, num_replicas=num_replicas
    )
    support.assert_parity(trained, support.fit_reference(dataset, make_model))


class _AddMeanSquare(keras.layers.Layer):
    """Adds a mean over the batch to the loss."""

    def call(self, x):
        self.add_loss(0.5 * keras.ops.mean(keras.ops.square(x)))
        return x


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("num_examples", [21, 9])
def test_added_loss_that_is_a_mean_over_the_batch(num_replicas, num_examples):
    def make_model():
        model = support.make_mlp()
        model.add(_AddMeanSquare(dtype="float32"))
        return model

    dataset = support.make_dataset(num_examples)
    trained = support.fit_trainer(
        dataset, make_model, num_replicas=num_replicas
    )
    support.assert_parity(trained, support.fit_reference(dataset, make_model))


def _two_outputs():
    x = keras.Input((support.NUM_FEATURES,))
    hidden = keras.layers.Dense(8, activation="tanh")(x)
    return keras.Model(
        x,
        {
            "kind": keras.layers.Dense(
                support.NUM_CLASSES, dtype="float32", name="kind"
            )(hidden),
            "size": keras.layers.Dense(2, dtype="float32", name="size")(hidden),
        },
    )


@pytest.mark.parametrize(
    ("num_replicas", "precision"), [*support.FEW_CASES, (2, "float32")]
)
def test_two_outputs_with_a_dict_of_losses(num_replicas, precision):
    x, y = support.make_arrays(21)
    dataset = support.batched((x, {"kind": y, "size": x[:, :2]}))
    options = {
        "make_model": _two_outputs,
        "make_optimizer": lambda: support.make_sgd(0.02),
        "loss": {"kind": support.make_loss(), "size": "mean_squared_error"},
        "precision": precision,
    }
    trained = support.fit_trainer(
        dataset,
        num_replicas=num_replicas,
        metrics={"kind": ["accuracy"], "size": ["mean_absolute_error"]},
        **options,
    )
    support.assert_parity(
        trained, support.fit_reference(dataset, **options), precision
    )
    assert {"kind_accuracy", "size_mean_absolute_error"} <= set(trained.history)


def _list_of_outputs():
    model = _two_outputs()
    return keras.Model(
        model.inputs, [model.output["kind"], model.output["size"]]
    )


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_two_outputs_with_a_list_of_losses(num_replicas):
    x, y = support.make_arrays(21)
    dataset = support.batched((x, (y, x[:, :2])))
    losses = [support.make_loss(), keras.losses.MeanSquaredError()]
    options = {"make_model": _list_of_outputs, "loss": losses}
    trained = support.fit_trainer(dataset, num_replicas=num_replicas, **options)
    support.assert_parity(trained, support.fit_reference(dataset, **options))


# ---------------------------------------------------------- tokens, masks

NUM_TOKENS = 5


def _token_arrays(num_examples=21):
    """Sequences that end in zeros (masked), of all lengths, with weights."""
    generator = np.random.default_rng(3)
    x = generator.integers(1, 10, size=(num_examples, NUM_TOKENS))
    length = generator.integers(1, NUM_TOKENS + 1, size=num_examples)
    x[np.arange(NUM_TOKENS) >= length[:, None]] = 0
    y = generator.integers(0, support.NUM_CLASSES, size=x.shape)
    weight = generator.uniform(0.5, 2.0, size=num_examples)
    token_weight = generator.uniform(0.5, 2.0, size=x.shape)
    return (
        x.astype("int32"),
        y.astype("int32"),
        weight.astype("float32"),
        token_weight.astype("float32"),
    )


def _make_tagger(mask_zero=True):
    return keras.Sequential(
        [
            keras.Input((NUM_TOKENS,), dtype="int32"),
            keras.layers.Embedding(10, 8, mask_zero=mask_zero),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def _assert_tagger_parity(arrays, num_replicas, mask_zero=True, **options):
    dataset = support.batched(arrays)
    make_model = functools.partial(_make_tagger, mask_zero)
    trained = support.fit_trainer(
        dataset, make_model, num_replicas=num_replicas, **options
    )
    reference = support.fit_reference(dataset, make_model, **options)
    precision = options.get("precision", "float32")
    support.assert_close(trained.weights, reference.weights, precision)


@pytest.mark.parametrize(
    ("num_replicas", "precision"), [*support.FEW_CASES, (4, "mixed_bfloat16")]
)
@pytest.mark.parametrize("mask_zero", [False, True])
def test_losses_per_token(num_replicas, precision, mask_zero):
    x, y, _, _ = _token_arrays()
    _assert_tagger_parity((x, y), num_replicas, mask_zero, precision=precision)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_an_empty_replica_has_no_masked_token(num_replicas):
    x, y, _, _ = _token_arrays(9)
    _assert_tagger_parity((x, y), num_replicas)


def _weighted(kind):
    """Arrays with weights `[n]` (ours alone), `[n, 1]` or `[n, tokens]`."""
    x, y, weight, token_weight = _token_arrays()
    return {
        "none": (x, y),
        "flat": (x, y, weight),
        "sequence": (x, y, weight[:, None]),
        "token": (x, y, token_weight),
    }[kind]


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("mask_zero", [False, True])
def test_weights_of_tokens(mask_zero, num_replicas):
    _assert_tagger_parity(_weighted("token"), num_replicas, mask_zero)


@pytest.mark.parametrize("num_replicas", [1, 4])
@pytest.mark.parametrize("mask_zero", [False, True])
def test_weights_of_sequences(mask_zero, num_replicas):
    """Plain Keras wants the axis of the tokens to be there."""
    trained = support.fit_trainer(
        support.batched(_weighted("flat")),
        functools.partial(_make_tagger, mask_zero),
        num_replicas=num_replicas,
    )
    reference = support.fit_reference(
        support.batched(_weighted("sequence")),
        functools.partial(_make_tagger, mask_zero),
    )
    support.assert_close(trained.weights, reference.weights)


@pytest.mark.parametrize("num_replicas", [1, 4])
@pytest.mark.parametrize("mask_zero", [False, True])
def test_weights_of_sequences_in_keras_form(mask_zero, num_replicas):
    _assert_tagger_parity(_weighted("sequence"), num_replicas, mask_zero)


@pytest.mark.parametrize("num_replicas", [1, 4])
@pytest.mark.parametrize("weights", ["none", "token"])
@pytest.mark.parametrize("mask_zero", [False, True])
def test_sum_of_token_losses(mask_zero, weights, num_replicas):
    _assert_tagger_parity(
        _weighted(weights), num_replicas, mask_zero, **_reduced("sum")
    )


@pytest.mark.parametrize("num_replicas", [1, 4])
@pytest.mark.parametrize("weights", ["none", "token"])
@pytest.mark.parametrize("mask_zero", [False, True])
def test_weighted_mean_of_token_losses(mask_zero, weights, num_replicas):
    _assert_tagger_parity(
        _weighted(weights),
        num_replicas,
        mask_zero,
        **_reduced("mean_with_sample_weight"),
    )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
