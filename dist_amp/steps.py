"""One replica's train step and test step, and the compiled loop around them.

`Steps.train_step` is the heart of the library: read it first.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dist_amp import fused, padding, random_state, reduction, stopwatch
from dist_amp import strategy as strategy_lib
from dist_amp.data import REDUCTIONS, Batch
from dist_amp.metrics import MetricSet, MetricsLike
from dist_amp.optimizer import (
    DistributedOptimizer,
    LossScaleOptimizer,
    is_synchronized,
    layers_of,
    moving_statistics,
)
from dist_amp.stream import no_examples

_log = logging.getLogger(__name__)

# AutoGraph takes a tenth of a second a function to read code that has nothing
# for it.
_as_it_is = tf.autograph.experimental.do_not_convert


class Steps:
    """A model, its optimizer, loss and metrics, and what is done with them.

    Args:
        model: Built, in the scope of `strategy`.
        optimizer: Wrapped, in the same scope.
        loss: See `Trainer`.
        metrics: See `Trainer`.
        strategy: The strategy of the scope.
        jit_compile: Whether XLA compiles the forward and backward pass.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: DistributedOptimizer,
        *,
        loss: Any,
        metrics: MetricsLike,
        strategy: tf.distribute.Strategy,
        jit_compile: bool,
    ):
        self.model = model
        self.optimizer = optimizer
        self.loss = _resolve_loss(loss)
        self.strategy = strategy
        self.jit_compile = jit_compile
        self._has_warned = False  # of a loss that is not scaled
        self.replica_ids = _local_replica_ids(strategy)
        if strategy_lib.num_workers(strategy) > 1 and stopwatch.is_allowed():
            first = self.replica_ids[0]
            optimizer.stopwatch = stopwatch.Stopwatch(
                first, on_gpu=self.is_on("GPU")
            )
        with strategy.scope():
            self.metrics = MetricSet(metrics)
        self.train_replica = self._unconverted(self._train_replica)
        self.test_replica = self._unconverted(self._test_replica)
        self.predict_replica = self._unconverted(self._predict_replica)
        self._run = self._unconverted(self._run_on_replicas)
        self.run_update = (
            self._run_guarded
            if optimizer.wire.is_guarded
            else functools.partial(self._run, self.train_replica)
        )
        self._gradients = self._make_gradients()
        self._are_finite = tf.function(self._finite_flags, autograph=False)

    def _make_gradients(self) -> Callable[..., Any]:
        """Only for XLA it is a function of TensorFlow.

        One within another would forbid layers that talk to other replicas,
        like synchronized batch norm.
        """
        if not self.jit_compile:
            return self.compute_gradients
        return tf.function(
            self._unconverted(self.compute_gradients), jit_compile=True
        )

    def _unconverted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Spares AutoGraph our own code; an override may be written for it."""
        ours = (
            Steps.train_step,
            Steps.test_step,
            Steps.predict_step,
            Steps.compute_loss,
            Steps.compute_gradients,
        )
        if all(getattr(type(self), f.__name__) is f for f in ours):
            return _as_it_is(step)
        return step

    def _finite_flags(self) -> tf.Tensor:
        flags = [
            tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(variable)))
            for variable in self.model.trainable_variables
        ]
        return tf.stack(flags)

    # ---------------------------------------------------- in each replica

    def train_step(self, batch: Batch) -> None:
        """Forward, backward, one update; runs in a replica.

        Override it as you would `keras.Model.train_step`. The optimizer's
        `apply` sums the gradients over the replicas, so differentiate this
        replica's part of the loss: weighted sums with `batch.weight`.

        Args:
            batch: This replica's slice of the global batch.
        """
        loss, predictions, gradients = self._gradients(batch)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        self.metrics.update(batch, loss, predictions)

    def test_step(self, batch: Batch) -> None:
        """Forward in inference mode and metrics; runs in a replica.

        Args:
            batch: This replica's slice of the global batch.
        """
        predictions = self._predict(batch, training=False)
        loss = self.compute_loss(batch, predictions)
        self.metrics.update(batch, loss, predictions)

    def predict_step(self, batch: Batch) -> Any:
        """Forward in inference mode; runs in a replica.

        Args:
            batch: This replica's slice of the global batch.

        Returns:
            A structure of tensors, each with a row for each example.
        """
        return self._predict(batch, training=False)

    def compute_gradients(
        self, batch: Batch
    ) -> tuple[tf.Tensor, Any, list[Any]]:
        """Loss, predictions and the gradients of the scaled loss."""
        with tf.GradientTape() as tape:
            predictions = self._predict(batch, training=True)
            loss = self.compute_loss(batch, predictions)
            scaled_loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, self.model.trainable_variables)
        return loss, predictions, _zero_if_empty(gradients, batch)

    def _predict(self, batch: Batch, *, training: bool) -> Any:
        """What the model returns, a row for each example.

        Of a batch without any, oneDNN's kernels for images fail or end the
        process (TensorFlow 2.21), so the model is given a row of zeros then.
        """
        is_compiled = self.jit_compile and training  # without oneDNN
        is_guarded = _may_be_empty(batch) and self.is_on("CPU")
        if is_compiled or not is_guarded:
            return self.model(batch.x, training=training)
        rows = tf.shape(batch.weight)[0]
        x, weights = tf.cond(
            rows > 0,
            lambda: (batch.x, tf.ones([rows])),
            lambda: (
                tf.nest.map_structure(_row_of_zeros, batch.x),
                tf.zeros([1]),
            ),
        )
        has_sums = training and is_synchronized(self.model)
        with padding.heeded(weights if has_sums else None):
            predictions = self.model(x, training=training)
        return tf.nest.map_structure(
            lambda leaf: _first_rows(leaf, rows), predictions
        )

    def compute_loss(self, batch: Batch, predictions: Any) -> tf.Tensor:
        """This replica's part of the loss of the global batch.

        Args:
            batch: This replica's slice.
            predictions: What the model returned, any float dtype.

        Returns:
            Scalar float32; summed over replicas it is the loss that one
            device would compute, regularization included.
        """
        accumulates = bool(self.optimizer.gradient_accumulation_steps)
        losses = [
            _weighted_sum(loss, y, prediction, batch, accumulates=accumulates)
            for loss, y, prediction in _matched(self.loss, batch.y, predictions)
        ]
        share = _num_rows(batch) / batch.global_size
        losses += [
            # Without an example both may be 0, or the loss NaN.
            tf.math.multiply_no_nan(tf.cast(extra, tf.float32), share)
            for extra in self.model.losses
        ]
        if not losses:
            raise ValueError(
                "There is nothing to minimize: `loss` is None and the model "
                "adds no loss (`add_loss`)."
            )
        return tf.add_n(losses)

    # ------------------------------------------------------ on the host

    def make_train_loop(self) -> Any:
        """Compiles `loop(iterator, num_steps, num_micro_steps) -> logs`.

        Each step takes `num_micro_steps` elements of the iterator; both
        numbers are tensors, so one trace serves all lengths.
        """
        accumulates = bool(self.optimizer.gradient_accumulation_steps)

        def micro_step(iterator: Any, *, is_last: bool) -> None:
            with self.optimizer.accumulation(is_last=is_last):
                if is_last:
                    self.run_update(next(iterator))
                else:
                    self._run(self.train_replica, next(iterator))

        @tf.function
        def train_loop(
            iterator: Any, num_steps: tf.Tensor, num_micro_steps: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            for _ in tf.range(num_steps):
                if accumulates:
                    for _ in tf.range(num_micro_steps - 1):
                        micro_step(iterator, is_last=False)
                micro_step(iterator, is_last=True)
            return self.read_train_logs()

        return train_loop

    def make_stacked_loop(self, spec: Any) -> Any:
        """Compiles `loop(iterator, stack, place, num_steps)`.

        It returns `(logs, stack, place, num_stacks)`: the stack under way and
        the place in it of the next batch, which it wants back with the next
        call; and how many stacks it took of the iterator.

        Args:
            spec: Of the iterator's elements: a slice for each replica, all
                leaves of `[num_batches, per_replica_batch, ...]`.
        """
        number = tf.TensorSpec([], tf.int32)

        @tf.function(
            input_signature=[tf.data.IteratorSpec(spec), spec, number, number]
        )
        def stacked_loop(
            iterator: Any, stack: Any, place: tf.Tensor, num_steps: tf.Tensor
        ) -> tuple[dict[str, tf.Tensor], Any, tf.Tensor, tf.Tensor]:
            leaves, num_stacks = _leaves(stack), 0
            while num_steps > 0:
                size = tf.shape(leaves[0])[0]
                if place == size:
                    leaves, place = _leaves(next(iterator)), 0
                    size = tf.shape(leaves[0])[0]
                    num_stacks += 1
                end = tf.minimum(place + num_steps, size)
                num_steps -= end - place
                stack = _pack(spec, leaves)
                for i in tf.range(place, end):
                    self.run_update(batch_of(stack, i))
                place = end
            logs = self.read_train_logs()
            return logs, _pack(spec, leaves), place, num_stacks

        return stacked_loop

    def make_lockstep(self, run: Callable[[Any], None]) -> Any:
        """Compiles `run(iterator) -> (has_run, had_batch)`.

        One step of all workers, as long as any of them has a batch left: the
        others take part without examples. For data of unknown length, whose
        end must not be met within a step: counters would go on without data.

        Args:
            run: Runs a step on each replica's slice.
        """
        is_alone = strategy_lib.num_workers(self.strategy) == 1

        @_as_it_is
        def value_of(batch: Any) -> Any:
            if is_alone:
                return batch.get_value()
            return tf.cond(
                batch.has_value(),
                batch.get_value,
                lambda: no_examples(batch.element_spec),
            )

        @tf.function
        def lockstep(iterator: Any) -> tuple[tf.Tensor, tf.Tensor]:
            batch = iterator.get_next_as_optional()
            has_batch = batch.has_value()
            has_run = self._is_any(has_batch)
            if has_run:
                run(value_of(batch))
            return has_run, has_batch

        return lockstep

    def _is_any(self, flag: tf.Tensor) -> tf.Tensor:
        """Whether the flag is set on any worker; all must call it."""
        if strategy_lib.num_workers(self.strategy) == 1:
            return flag

        def in_replica() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            number = tf.cast(flag, tf.int32)
            return context.all_reduce(tf.distribute.ReduceOp.SUM, number)

        total = self.strategy.run(in_replica)
        return self.strategy.experimental_local_results(total)[0] > 0

    def make_test_loop(self) -> Any:
        """Compiles `loop(iterator, num_steps) -> logs`."""

        @tf.function
        def test_loop(
            iterator: Any, num_steps: tf.Tensor
        ) -> dict[str, tf.Tensor]:
            for _ in tf.range(num_steps):
                self._run(self.test_replica, next(iterator))
            return self.metrics.results()

        return test_loop

    def make_predict_call(self) -> Any:
        """Compiles `call(slices) -> [(predictions, rows), ...]`.

        One pair for each replica of this host, in order; of the predictions
        the first so many rows are of examples.
        """
        local = self.strategy.experimental_local_results

        @tf.function(reduce_retracing=True)
        def predict_call(slices: Any) -> list[Any]:
            results = self._run(self.predict_replica, slices)
            leaves = [local(leaf) for leaf in tf.nest.flatten(results)]
            return [
                tf.nest.pack_sequence_as(results, one)
                for one in zip(*leaves, strict=True)
            ]

        return predict_call

    def is_on(self, kind: str) -> bool:
        """Whether any replica is on a "CPU", "GPU" or "TPU"."""
        devices = self.strategy.extended.worker_devices
        return any(kind in device for device in devices)

    def prepare_layers(self) -> None:
        """See `fused.fuse` and `padding.heed`; the model must be built."""
        has_sums = is_synchronized(self.model) and self.is_on("CPU")
        if self.is_on("TPU") or has_sums:
            padding.heed(layers_of(self.model))
        if not self.is_on("TPU"):  # where XLA fuses all by itself
            fused.fuse(layers_of(self.model), on_cpu=self.is_on("CPU"))

    def spread_seeds(self) -> None:
        """See `random_state.spread_seeds`."""
        random_state.spread_seeds(self.model, self.replica_ids[0])

    def broken_weights(self) -> list[str]:
        """Paths of trainable variables that hold NaN or infinity."""
        variables = self.model.trainable_variables
        if not variables:
            return []
        flags = self._are_finite().numpy()
        return [
            variable.path
            for variable, is_finite in zip(variables, flags, strict=True)
            if not is_finite
        ]

    def _train_replica(self, batch: Batch) -> None:
        """The train step, and what must hold around any override of it."""
        statistics = self._statistics_to_settle()
        before = [tf.identity(variable) for variable in statistics]
        skipped_before = tf.convert_to_tensor(self.optimizer.skipped_updates)
        with (
            self.optimizer.micro_step_weight(batch.normalizer),
            fused.kernels(),
            padding.heeded(padding.weights_of_rows(batch)),
        ):
            self.train_step(batch)
        self._warn_of_no_scale()
        if statistics:
            skipped = tf.convert_to_tensor(self.optimizer.skipped_updates)
            _settle(statistics, before, batch, skipped > skipped_before)

    def _warn_of_no_scale(self) -> None:
        """Once, when a step is traced that does without the loss scale."""
        optimizer = self.optimizer
        if not isinstance(optimizer, LossScaleOptimizer):
            return
        if not optimizer.has_scaled_loss and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s.train_step never called `self.optimizer.scale_loss`, and "
                "the optimizer divides gradients by the loss scale: "
                "differentiate `self.optimizer.scale_loss(loss)`.",
                type(self).__name__,
            )

    def _test_replica(self, batch: Batch) -> None:
        with fused.kernels():
            self.test_step(batch)

    def _predict_replica(self, batch: Batch) -> tuple[Any, tf.Tensor]:
        with fused.kernels():
            predictions = self.predict_step(batch)
        return predictions, tf.cast(_num_rows(batch), tf.int32)

    def _statistics_to_settle(self) -> list[keras.Variable]:
        """None on one device that skips nothing: they are right as they are."""
        skips = isinstance(self.optimizer, LossScaleOptimizer)
        if self.strategy.num_replicas_in_sync == 1 and not skips:
            return []
        return moving_statistics(self.model)

    def _run_guarded(self, slices: Batch | tuple[Batch, ...]) -> None:
        """Trains on a batch; see `DistributedOptimizer.guarded`."""
        self.optimizer.guarded(lambda: self._run(self.train_replica, slices))

    def _run_on_replicas(
        self, step: Callable[[Batch], Any], slices: Batch | tuple[Batch, ...]
    ) -> Any:
        """Runs a step on each replica's slice; what it returns, by replica."""
        if isinstance(slices, Batch):  # of per-replica values
            return self.strategy.run(step, args=(slices,))
        if len(slices) == 1:
            return self.strategy.run(step, args=(slices[0],))
        local = iter(slices)
        return self.strategy.run(
            step,
            args=(
                self.strategy.experimental_distribute_values_from_function(
                    lambda context: next(local)
                ),
            ),
        )

    @_as_it_is
    def read_train_logs(self) -> dict[str, tf.Tensor]:
        """Metrics, and the optimizer's numbers; in cross-replica context."""
        optimizer = self.optimizer
        checked = {}
        if optimizer.wire.is_guarded:
            checked["wire_error"] = tf.convert_to_tensor(optimizer.wire_error)
        return {
            **self.metrics.logs(),
            "loss_scale": tf.convert_to_tensor(optimizer.loss_scale),
            "skipped_updates": tf.convert_to_tensor(optimizer.skipped_updates),
            "learning_rate": tf.convert_to_tensor(optimizer.learning_rate),
            **checked,
        }


@_as_it_is
def _settle(
    statistics: list[keras.Variable],
    before: list[tf.Tensor],
    batch: Batch,
    is_skipped: tf.Tensor,
) -> None:
    """Makes batch-norm statistics equal on all replicas: their mean.

    The mean is over the replicas that had an example. Where an update was
    skipped, or the mean is not finite, the statistics stay what they were.
    """
    means = [tf.cast(variable, tf.float32) for variable in statistics]
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync > 1:
        has_examples = tf.cast(_num_rows(batch) > 0, tf.float32)
        # Statistics of no example are NaN; NaN * 0 must be 0 here.
        present = [tf.math.multiply_no_nan(m, has_examples) for m in means]
        packed = reduction.pack([has_examples, *present])
        sums = reduction.all_reduce_sum(packed.tensors)
        number, *totals = packed.with_tensors(sums).unpack()
        means = [total / number for total in totals]
    for variable, mean, old in zip(statistics, means, before, strict=True):
        is_finite = tf.reduce_all(tf.math.is_finite(mean))
        keeps_new = is_finite & ~is_skipped
        new = tf.cast(mean, variable.dtype)
        variable.assign(tf.where(keeps_new, new, old))


@_as_it_is
def _leaves(stack: Any) -> list[tf.Tensor]:
    """Without those that are None, which a compiled loop cannot carry."""
    return [leaf for leaf in tf.nest.flatten(stack) if leaf is not None]


@_as_it_is
def _pack(spec: Any, leaves: list[tf.Tensor]) -> Any:
    """The reverse of `_leaves`."""
    rest = iter(leaves)
    return tf.nest.map_structure(
        lambda leaf: next(rest) if isinstance(leaf, tf.TensorSpec) else None,
        spec,
    )


@_as_it_is
def batch_of(stack: Any, place: tf.Tensor) -> Any:
    """One batch of a stack; what is whole and aligned is not copied."""
    return tf.nest.map_structure(
        lambda leaf: None if leaf is None else leaf[place], stack
    )


def _local_replica_ids(strategy: tf.distribute.Strategy) -> list[int]:
    ids = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(context.replica_id_in_sync_group)
    )
    return [int(i) for i in strategy.experimental_local_results(ids)]


def _resolve_loss(loss: Any) -> Any:
    if isinstance(loss, dict):
        return {key: _resolve_loss(value) for key, value in loss.items()}
    if isinstance(loss, list | tuple):
        return [_resolve_loss(value) for value in loss]
    if isinstance(loss, str):
        return keras.losses.get(loss)
    return loss() if isinstance(loss, type) else loss


def reduction_of(loss: Any) -> str:
    """What the losses divide by; they must agree."""
    losses = tf.nest.flatten(loss)
    found = {
        getattr(one, "reduction", "sum_over_batch_size") for one in losses
    } or {"sum_over_batch_size"}
    if found == {"mean"}:
        return "sum_over_batch_size"
    if len(found) > 1 or not found <= set(REDUCTIONS):
        raise ValueError(
            "All losses must have one `reduction`, out of "
            f"{', '.join(REDUCTIONS)}. Received {sorted(map(str, found))}."
        )
    return found.pop()


def _matched(loss: Any, y: Any, predictions: Any) -> list[tuple]:
    """Triples of one loss, its targets and its predictions."""
    if loss is None:
        return []
    if y is None:
        raise ValueError(
            "The dataset yields inputs without targets, but there is a "
            "`loss`. Yield `(x, y)`, or pass `loss=None` if the model adds "
            "its own (`add_loss`)."
        )
    if isinstance(predictions, dict):
        named = loss if isinstance(loss, dict) else dict.fromkeys(y, loss)
        if not set(named) <= set(predictions) & set(y):
            raise ValueError(
                "`loss` and targets must use the names of the model's outputs "
                f"({sorted(predictions)}). Received losses for "
                f"{sorted(named)} and targets for {sorted(y)}."
            )
        return [(named[key], y[key], predictions[key]) for key in named]
    if isinstance(predictions, list | tuple):
        losses = loss if isinstance(loss, list) else [loss] * len(predictions)
        if not len(losses) == len(y) == len(predictions):
            raise ValueError(
                "There must be one loss and one target for each output. "
                f"Received {len(losses)}, {len(y)} and {len(predictions)}."
            )
        return list(zip(losses, y, predictions, strict=True))
    if isinstance(loss, dict | list):
        raise ValueError(
            "The model has one output, so `loss` must be one loss. Received "
            f"{loss}."
        )
    return [(loss, y, predictions)]


def _weighted_sum(
    loss: Any,
    y: Any,
    prediction: tf.Tensor,
    batch: Batch,
    *,
    accumulates: bool,
) -> tf.Tensor:
    """Sum over the slice of loss times weight, in float32."""
    per_example = loss.call if isinstance(loss, keras.losses.Loss) else loss
    reduction_of_loss = getattr(loss, "reduction", "sum_over_batch_size")
    mask = getattr(prediction, "_keras_mask", None)
    prediction = tf.cast(prediction, tf.float32)
    values = per_example(_aligned(y, prediction), prediction)
    values = tf.cast(values, tf.float32)
    if values.shape.rank == 0:
        raise ValueError(
            "`loss` must return one value for each example, or more. "
            f"Received a scalar from {loss}; leave the mean to the trainer, "
            "which takes it over the global batch."
        )
    weight = _with_rank_of(values, batch.weight)
    if mask is not None:
        values *= tf.cast(mask, tf.float32)
    if reduction_of_loss == "sum":
        return tf.reduce_sum(values * weight)
    total = _sum_of_means(values * weight)
    if mask is None:
        return total
    if accumulates:
        raise ValueError(
            "`gradient_accumulation_steps` cannot weigh losses that a "
            "Keras mask makes shorter; mask by sample weights instead."
        )
    counts = weight
    if reduction_of_loss != "mean_with_sample_weight":
        counts = 1.0 / batch.global_size
        rows = padding.weights_of_rows(batch)
        if rows is not None:
            counts *= _with_rank_of(values, rows)
    valid = _sum_of_means(
        tf.cast(mask, tf.float32) * counts * tf.ones_like(values)
    )
    context = tf.distribute.get_replica_context()
    valid = context.all_reduce(tf.distribute.ReduceOp.SUM, valid)
    return tf.math.divide_no_nan(total, valid)


def _with_rank_of(values: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Weights `[batch]` as `[batch, 1, ...]`, to multiply the values."""
    missing = values.shape.rank - weight.shape.rank
    shape = tf.concat([tf.shape(weight), [1] * missing], axis=0)
    return tf.reshape(weight, shape) if missing > 0 else weight


def _sum_of_means(values: tf.Tensor) -> tf.Tensor:
    """Sum over examples of the mean over the other axes: tokens, pixels."""
    axes = list(range(1, values.shape.rank))
    return tf.reduce_sum(tf.reduce_mean(values, axis=axes))


def _aligned(y: tf.Tensor, prediction: tf.Tensor) -> tf.Tensor:
    """Targets in float32 if they are floats, `[batch, 1]` if predictions are.

    Without it `[batch]` against `[batch, 1]` would broadcast.
    """
    y = tf.cast(y, tf.float32) if y.dtype.is_floating else y
    lacks_axis = y.shape.rank == prediction.shape.rank - 1
    if lacks_axis and prediction.shape[-1] == 1:
        return tf.expand_dims(y, axis=-1)
    return y


def _row_of_zeros(empty: tf.Tensor) -> tf.Tensor:
    row = tf.zeros([1, *tf.unstack(tf.shape(empty))[1:]], empty.dtype)
    return tf.ensure_shape(row, [1, *empty.shape[1:]])


def _first_rows(prediction: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    has_examples = prediction.shape.rank != 0 and prediction.shape[0] is None
    if not has_examples:
        return prediction
    # All of them, unless they came of the row that was put in.
    first = prediction[: tf.where(rows > 0, tf.shape(prediction)[0], 0)]
    mask = getattr(prediction, "_keras_mask", None)
    if mask is not None:
        first._keras_mask = mask[:rows]
    return first


def _num_rows(batch: Batch) -> tf.Tensor:
    """Examples in the slice."""
    if batch.num_examples is not None:
        return batch.num_examples
    return tf.cast(tf.shape(batch.weight)[0], tf.float32)


def _may_be_empty(batch: Batch) -> bool:
    """Whether a replica may get no example of a global batch."""
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return replicas > 1 and batch.weight.shape[0] is None


def _zero_if_empty(gradients: list[Any], batch: Batch) -> list[Any]:
    """No example, no gradient: a mean over nothing may have made it NaN."""
    if not _may_be_empty(batch):
        return gradients
    present = [gradient for gradient in gradients if gradient is not None]
    guarded = iter(
        tf.cond(
            _num_rows(batch) > 0,
            lambda: present,
            lambda: [reduction.zeros_like(gradient) for gradient in present],
        )
    )
    return [None if g is None else next(guarded) for g in gradients]
