"""Metrics and validation: exact over every example, on any replicas."""

import functools
import sys

import keras
import numpy as np
import pytest

from dist_amp.meter import MEASURED
from tests import support

# Sizes of a dataset: whole batches, and last batches with empty replicas.
NUM_EXAMPLES = [1, 8, 9, 13, 16]


def _make_metrics():
    return [
        keras.metrics.BinaryAccuracy(name="accuracy"),
        keras.metrics.AUC(name="auc"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.Recall(name="recall"),
        keras.metrics.MeanAbsoluteError(name="error"),
    ]


def _make_binary_model():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(1, activation="sigmoid", dtype="float32"),
        ]
    )


def _binary_arrays(num_examples):
    x, y = support.make_arrays(num_examples)
    return x, (y > 0).astype("float32")[:, None]


@functools.cache
def _trainer(num_replicas, precision="float32"):
    """One that never changes its model: the learning rate is zero."""
    return support.make_trainer(
        _make_binary_model,
        lambda: keras.optimizers.SGD(0.0),
        num_replicas=num_replicas,
        precision=precision,
        loss="binary_crossentropy",
        metrics=_make_metrics(),
    )


@functools.cache
def _expected(num_examples, precision="float32"):
    """Each metric, called once with every example, and the mean loss."""
    x, y = _binary_arrays(num_examples)
    predictions = _trainer(1, precision).model(x, training=False)
    results = {
        metric.name: float(metric(y, predictions)) for metric in _make_metrics()
    }
    losses = keras.losses.binary_crossentropy(y, predictions)
    return results | {"loss": float(np.mean(losses))}


def _assert_results(results, expected, precision="float32"):
    told = [v for name, v in results.items() if name not in MEASURED]
    assert all(np.isfinite(value) for value in told)
    support.assert_close(
        [results[name] for name in expected], list(expected.values()), precision
    )


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
def test_evaluate_counts_every_example_once(num_examples, num_replicas):
    dataset = support.batched(_binary_arrays(num_examples))
    results = _trainer(num_replicas).evaluate(dataset)
    _assert_results(results, _expected(num_examples))


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("num_examples", NUM_EXAMPLES)
def test_fit_counts_every_example_once(num_examples, num_replicas):
    """Training and validation do not get in each other's way."""
    trainer = _trainer(num_replicas)
    history = trainer.fit(
        support.batched(_binary_arrays(num_examples)),
        epochs=2,
        validation_data=support.batched(_binary_arrays(11)),
        verbose=0,
    ).history
    for epoch in range(2):
        logs = {name: values[epoch] for name, values in history.items()}
        validation = {
            name.removeprefix("val_"): logs.pop(name)
            for name in list(logs)
            if name.startswith("val_")
        }
        _assert_results(logs, _expected(num_examples))
        _assert_results(validation, _expected(11))


@pytest.mark.parametrize(
    ("num_replicas", "precision"),
    [(2, "mixed_float16"), (4, "mixed_bfloat16")],
)
def test_evaluate_in_mixed_precision(num_replicas, precision):
    dataset = support.batched(_binary_arrays(13))
    results = _trainer(num_replicas, precision).evaluate(dataset)
    _assert_results(results, _expected(13, precision), precision)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_steps_limit_the_examples(num_replicas):
    trainer = _trainer(num_replicas)
    repeated = support.batched(_binary_arrays(16)).repeat()
    _assert_results(trainer.evaluate(repeated, steps=2), _expected(16))
    _assert_results(trainer.evaluate(repeated, steps=1), _expected(8))


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_a_dataset_of_unknown_length(num_replicas):
    dataset = support.batched(_binary_arrays(13)).filter(lambda x, y: True)
    results = _trainer(num_replicas).evaluate(dataset)
    _assert_results(results, _expected(13))


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_steps_of_one_call_do_not_change_the_results(num_replicas):
    history = _trainer(num_replicas).fit(
        support.batched(_binary_arrays(13)), steps_per_loop=2, verbose=0
    )
    logs = {name: values[0] for name, values in history.history.items()}
    _assert_results(logs, _expected(13))


def _prediction(y, prediction):
    return keras.ops.squeeze(prediction, axis=-1)


class _FactoredMean(keras.metrics.Mean):
    """As users write them: an argument, and no `get_config`."""

    def __init__(self, factor):
        super().__init__(name="factored")
        self._factor = factor

    def update_state(self, y, prediction, sample_weight=None):
        return super().update_state(self._factor * prediction)


@pytest.mark.parametrize(
    ("make_metric", "factor"),
    [
        (lambda: _prediction, 1.0),
        (lambda: keras.metrics.MeanMetricWrapper(_prediction), 1.0),
        (lambda: _FactoredMean(3.0), 3.0),
    ],
    ids=["function", "wrapped function", "own class"],
)
def test_metrics_that_keras_cannot_copy(make_metric, factor):
    trainer = support.make_trainer(
        _make_binary_model,
        num_replicas=4,
        loss="binary_crossentropy",
        metrics=[make_metric()],
    )
    x, y = _binary_arrays(13)
    results = trainer.evaluate(support.batched((x, y)))
    results.pop("loss")
    mean = np.mean(trainer.model(x, training=False))
    support.assert_close(list(results.values()), [factor * mean])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
