"""A set of Keras metrics: updated in the replicas, read on the host.

The variables of a metric made in a strategy's scope are kept apart on each
replica and added up when they are read; so results are exact over every
example, and a replica with no example adds nothing.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from dist_amp import padding
from dist_amp import strategy as strategy_lib
from dist_amp.data import Batch
from dist_amp.pace import COUNTS

MetricLike: TypeAlias = str | keras.metrics.Metric
MetricsLike: TypeAlias = (
    Sequence[MetricLike] | Mapping[str, Sequence[MetricLike]]
)


# Packages whose metrics have one result, of the metric's name.
_KNOWN = ("keras", "dist_amp")


class MetricSet:
    """The mean loss, metrics of the predictions, and counts of bad numbers.

    Make it in the strategy's scope.

    Args:
        metrics: Names or `keras.metrics.Metric`s for a model of one output;
            a dict of lists for several outputs, by name or index. "accuracy"
            means what fits the shapes, as in Keras. An instance made outside
            of the scope is replaced by a copy.
    """

    def __init__(self, metrics: MetricsLike):
        self._wanted = metrics
        self._totals = _Totals()
        self._metrics: list[tuple[Any, keras.metrics.Metric]] = []

    @property
    def _all(self) -> list[keras.metrics.Metric]:
        return [self._totals, *(metric for _, metric in self._metrics)]

    @property
    def variables(self) -> list[keras.Variable]:
        """State of all metrics."""
        return [v for metric in self._all for v in metric.variables]

    def build(self, y: Any, predictions: Any) -> None:
        """Creates the variables of metrics that wait for shapes.

        Args:
            y: Targets of one example or more, as the model's data gives them.
            predictions: What the model returns for them.
        """
        pairs = list(_pairs(self._wanted))
        has_parts = isinstance(predictions, dict | list | tuple)
        if pairs and (has_parts == (pairs[0][0] is None) or y is None):
            raise ValueError(
                "`metrics` must be a list for a model of one output, and a "
                "dict of lists for several, by name or index. Received "
                f"{self._wanted} for outputs of type "
                f"{type(predictions).__name__}."
            )
        for key, wanted in pairs:
            mine, predicted = _pick(y, key), _pick(predictions, key)
            metric = _to_metric(wanted, mine, predicted)
            metric.update_state(mine, predicted)
            self._metrics.append((key, metric))
        names = ["loss", *(_full_name(*pair) for pair in self._metrics)]
        if len(set(names)) != len(names):
            raise ValueError(
                "Metrics must have names that differ, from each other and "
                f"from 'loss'. Received {names}."
            )
        self.reset()

    @property
    def names(self) -> list[str] | None:
        """Of the results; None where a metric of the user's decides.

        Its result may be a dict of any names.
        """
        for _, metric in self._metrics:
            if type(metric).__module__.partition(".")[0] not in _KNOWN:
                return None
        return ["loss", *(_full_name(*pair) for pair in self._metrics)]

    def direction_of(self, name: str) -> str | None:
        """Tells "max" or "min" for a metric that Keras says is better so."""
        for pair in self._metrics:
            if _full_name(*pair) == name:
                # Private in Keras 3.15; callbacks with mode="auto" read it.
                direction = getattr(pair[1], "_direction", None)
                return {"up": "max", "down": "min"}.get(str(direction))
        return None

    def reset(self) -> None:
        """Forgets every example seen so far."""
        for metric in self._all:
            metric.reset_state()

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Starts afresh; on exit all is as it was before, on each replica."""
        copies = [
            copy
            for variable in self.variables
            for copy in strategy_lib.local_copies(variable)
        ]
        before = [tf.convert_to_tensor(copy) for copy in copies]
        self.reset()
        try:
            yield
        finally:
            for copy, value in zip(copies, before, strict=True):
                copy.assign(value)

    @tf.autograph.experimental.do_not_convert  # which is slow, for nothing
    def update(self, batch: Batch, loss: tf.Tensor, predictions: Any) -> None:
        """Adds one replica's slice; call it in the replica.

        A loss that is not finite is counted and left out of the mean, and
        the inputs are searched for what may have caused it.

        Args:
            batch: The slice.
            loss: This replica's part of the mean over the global batch,
                scalar float32.
            predictions: What the model returned.
        """
        self._totals.update_state(batch, loss)
        rows = padding.weights_of_rows(batch)
        weights = {} if rows is None else {"sample_weight": rows}
        for key, metric in self._metrics:
            if weights:
                _check_takes_weights(metric)
            metric.update_state(
                _pick(batch.y, key), _pick(predictions, key), **weights
            )

    @tf.autograph.experimental.do_not_convert
    def results(self) -> dict[str, tf.Tensor]:
        """Reduced over replicas, by name; call it in cross-replica context."""
        return self._results(self._totals.result())

    @tf.autograph.experimental.do_not_convert
    def logs(self) -> dict[str, tf.Tensor]:
        """`results` and `counts`, of one reading; where `results` may be."""
        totals = self._totals.result()
        return {**self._results(totals), **_counts(totals)}

    def _results(self, totals: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # Where no loss was finite there is no mean: 0 / 0 is NaN.
        results = {"loss": totals["loss"] / totals["examples"]}
        for key, metric in self._metrics:
            value = metric.result()
            if isinstance(value, dict):
                results.update(value)
            else:
                results[_full_name(key, metric)] = value
        return results

    @property
    def num_examples(self) -> float:
        """Examples in the mean loss since `reset`; read it on the host."""
        return float(self._totals.result()["examples"])

    def counts(self) -> dict[str, tf.Tensor]:
        """Examples in the mean loss, and what was not finite, since `reset`.

        Losses and inputs are counted by slice: a replica's part of a batch.
        """
        return _counts(self._totals.result())


@keras.saving.register_keras_serializable(package="dist_amp")
class OfProbabilities(keras.metrics.Metric):
    """A metric of what a sigmoid or a softmax makes of logits.

    Args:
        metric: A `keras.metrics.Metric`, or "accuracy" for what fits the
            shapes.
        activation: "sigmoid" or "softmax".

    Example:
    >>> metric = OfProbabilities(keras.metrics.BinaryAccuracy(), "sigmoid")
    >>> metric.update_state([[0], [1]], [[0.2], [0.3]])  # logits
    >>> float(metric.result())
    0.5
    """

    def __init__(
        self,
        metric: MetricLike,
        activation: str,
        name: str | None = None,
        dtype: Any = None,
    ):
        given = metric if isinstance(metric, str) else metric.name
        super().__init__(name=name or given, dtype=dtype)
        self.activation = activation
        self._wanted = metric
        self._inner: Any = None if isinstance(metric, str) else metric

    @property
    def _direction(self) -> Any:
        return getattr(self._inner, "_direction", None)

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        """Adds some examples, with logits for predictions."""
        convert = keras.activations.get(self.activation)
        probabilities = convert(tf.cast(y_pred, tf.float32))
        if self._inner is None:
            y_true = tf.convert_to_tensor(y_true)
            self._inner = _to_metric(self._wanted, y_true, probabilities)
        self._inner.update_state(
            y_true, probabilities, sample_weight=sample_weight
        )

    def result(self) -> Any:
        """What the inner metric has."""
        return 0.0 if self._inner is None else self._inner.result()

    def reset_state(self) -> None:
        """Forgets every example."""
        if self._inner is not None:
            self._inner.reset_state()

    def get_config(self) -> dict[str, Any]:
        """Keras configuration."""
        metric = self._wanted
        if not isinstance(metric, str):
            metric = keras.saving.serialize_keras_object(metric)
        return {
            "name": self.name,
            "metric": metric,
            "activation": self.activation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "OfProbabilities":
        """Of `get_config`."""
        metric = config["metric"]
        if not isinstance(metric, str):
            metric = keras.saving.deserialize_keras_object(metric)
        return cls(**{**config, "metric": metric})


def _counts(totals: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {name: totals[name] for name in COUNTS}


class _Totals(keras.metrics.Metric):
    """Sums that every run needs, in one variable: a step adds to it once."""

    _NAMES = ("loss", *COUNTS)

    def __init__(self) -> None:
        super().__init__(name="totals", dtype="float32")
        self._sums = self.add_variable(
            (len(self._NAMES),), initializer="zeros", name="sums"
        )

    def update_state(self, batch: Batch, loss: tf.Tensor) -> None:
        size = batch.num_examples
        if size is None:
            rows = tf.shape(tf.nest.flatten(batch.x)[0])[0]
            size = tf.cast(rows, tf.float32)
        # A NaN in the sum; looking at each number would take twice as long.
        sums = [
            tf.reduce_sum(tf.cast(leaf, tf.float32))
            for leaf in tf.nest.flatten((batch.x, batch.y, batch.weight))
            if leaf is not None and leaf.dtype.is_floating
        ]
        is_bad = tf.logical_not(tf.math.is_finite(tf.add_n(sums)))
        good = tf.stack([loss * batch.global_size, size, 0.0, 0.0])
        bad = tf.stack([0.0, 0.0, 1.0, tf.cast(is_bad, tf.float32)])
        self._sums.assign_add(tf.where(tf.math.is_finite(loss), good, bad))

    def result(self) -> dict[str, tf.Tensor]:
        sums = tf.unstack(tf.convert_to_tensor(self._sums))
        return dict(zip(self._NAMES, sums, strict=True))


def to_numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Python numbers (lists, for metrics of several numbers); loss first."""
    names = sorted(logs, key=lambda name: name != "loss")
    return {
        name: tf.convert_to_tensor(logs[name]).numpy().tolist()
        for name in names
    }


def _pairs(metrics: MetricsLike) -> Iterable[tuple[Any, MetricLike]]:
    """Each metric with the key of its output; None for the only output."""
    if isinstance(metrics, Mapping):
        for key, several in metrics.items():
            yield from ((key, metric) for metric in _listed(several))
    else:
        yield from ((None, metric) for metric in _listed(metrics or ()))


def _listed(metrics: Any) -> Sequence[MetricLike]:
    is_one = isinstance(metrics, str | keras.metrics.Metric)
    return [metrics] if is_one else metrics


def _to_metric(
    metric: MetricLike, y: tf.Tensor, prediction: tf.Tensor
) -> keras.metrics.Metric:
    if isinstance(metric, str) and metric.lower() in ("accuracy", "acc"):
        return _accuracy_for(y, prediction)(name=metric)
    found = keras.metrics.get(metric)
    if isinstance(found, type):
        found = found()
    if not isinstance(found, keras.metrics.Metric):
        return keras.metrics.MeanMetricWrapper(found, name=found.__name__)
    strategy = tf.distribute.get_strategy()
    owners = {
        getattr(v.value, "distribute_strategy", None) for v in found.variables
    }
    if strategy.num_replicas_in_sync == 1 or owners <= {strategy}:
        return found
    try:
        return type(found).from_config(found.get_config())
    except (TypeError, ValueError) as error:
        if isinstance(strategy, tf.distribute.MirroredStrategy):
            return found  # one process: its replicas share the variables
        raise ValueError(
            f"The metric {found.name!r} was made outside of the strategy's "
            "scope and cannot be copied; make it in `with dist_amp.scope(...)`."
        ) from error


def _accuracy_for(
    y: tf.Tensor, prediction: tf.Tensor
) -> type[keras.metrics.Metric]:
    """What Keras takes "accuracy" for, by the shapes."""
    num_classes = prediction.shape[-1]
    if num_classes == 1 or prediction.shape.rank == 1:
        return keras.metrics.BinaryAccuracy
    if y.shape.rank < prediction.shape.rank or y.shape[-1] == 1:
        return keras.metrics.SparseCategoricalAccuracy
    return keras.metrics.CategoricalAccuracy


def _check_takes_weights(metric: keras.metrics.Metric) -> None:
    """Where slices are padded, weights tell what is an example."""
    names = inspect.signature(metric.update_state).parameters
    if "sample_weight" not in names:
        raise ValueError(
            f"The metric {metric.name!r} takes no `sample_weight`, and would "
            "count the copies that fill up a smaller last batch on a TPU: give "
            "its `update_state` one, or drop the last batch "
            "(`batch(size, drop_remainder=True)`)."
        )


def _pick(structure: Any, key: str | None) -> Any:
    return structure if key is None else structure[key]


def _full_name(key: str | None, metric: keras.metrics.Metric) -> str:
    return metric.name if key is None else f"{key}_{metric.name}"
