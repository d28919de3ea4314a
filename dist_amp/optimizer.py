"""The optimizers: reduce first, then judge, unscale, clip and apply.

Keras clips, decays and tests for overflow on each replica's own gradients.
Here the gradients are all-reduced first; from then on every replica holds the
same numbers and updates its own copy of each variable with no further
communication, so replicas cannot drift apart:

    all-reduce -> (accumulate) -> one verdict on finiteness
               -> unscale -> clip -> decay weights -> step -> average (EMA)
               or -> skip, the same on every replica

This is the one file that touches private names of Keras and TensorFlow
(`_PRIVATE_NAMES` lists them with the reason; a test fails when one changes).
"""

import contextlib
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_amp import precision as precision_lib
from dist_amp import reduction
from dist_amp import wire as wire_lib
from dist_amp.gradient_log import GradientLog
from dist_amp.loss_scale import LossScaleRule
from dist_amp.overflow import OverflowLog
from dist_amp.stopwatch import Stopwatch

_PRIVATE_NAMES = {
    "keras 3.15, Optimizer": {
        "_backend_apply_gradients": "clip, decay, step, EMA in Keras' order",
        "_all_reduce_sum_gradients": "would reduce a second time",
        "_overwrite_variable_with_gradient": "float8 variables, refused",
        "_iterations": "counts attempts that were applied",
        "_learning_rate": "a schedule, so that it can be lowered",
        "_accumulated_gradients": "made by `build`",
        "_distribution_strategy": "the scope that it was made in",
    },
    "keras 3.15, Layer": {
        "_flatten_layers": "layers at any depth, inside custom layers too",
        "_non_trainable_variables": "a layer's own, made non-trainable",
    },
    "keras 3.15, KerasTensor": {
        "_keras_history": "the operation and the call that made it",
    },
    "keras 3.15, Operation": {
        "_inbound_nodes": "the calls, with their inputs",
    },
    "keras 3.15, DTypePolicy": {
        "_variable_dtype": "a policy of two dtypes that has no name",
    },
    "keras 3.15, BatchNormalization": {
        "_moments": "statistics of a batch, of which some rows do not count",
    },
    "tensorflow 2.21, StrategyExtended": {
        "_use_merge_call": "False: `update` touches this replica's copy only",
    },
}

MAX_SKIPS_AT_FLOOR = 20


class _Lowered(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule times a factor that a rollback may lower."""

    def __init__(self, schedule: Any):
        self.schedule = schedule
        self.factor: Any = 1.0

    def __call__(self, step: Any) -> Any:
        return self.schedule(step) * self.factor

    def get_config(self) -> dict[str, Any]:
        return self.schedule.get_config()


@keras.saving.register_keras_serializable(package="dist_amp")
class DistributedOptimizer(keras.optimizers.Optimizer):
    """Wraps a Keras optimizer so that N replicas update as one device would.

    Clipping, weight decay, gradient accumulation and EMA act on the
    all-reduced gradient. Works in `model.compile` / `fit`, in a hand-written
    loop (`apply` in a replica context) and in `dist_amp.Trainer`.

    Args:
        inner: The `keras.optimizers.Optimizer` to wrap. It belongs to the
            wrapper from now on: do not apply it by itself.
        wire_dtype: Dtype in which gradients are all-reduced; by default they
            travel as they are. "float16" takes half the bytes of float32, at
            the price of its rounding, and needs a loss scale. "bfloat16" takes
            as many, rounds eight times as much, and needs none. "int8" takes a
            quarter, for at most 32 replicas; what it loses a replica adds to
            its next gradients. Sparse gradients keep to one process as they
            are, and are dense between several.
        wire_check_interval: Updates between checks, in `dist_amp.Trainer` or
            `guarded`, of what the wire has lost; 0: never.
        wire_error_bound: Norm of that by the norm of the exact sum. Beyond it
            gradients travel exactly for the rest of the run.
        name: Name of the wrapper's own variables.

    Raises:
        TypeError: `inner` is not an optimizer, or one that wraps others.
        ValueError: `wire_dtype` is none of these, or not for this strategy.

    Example:
    >>> optimizer = dist_amp.DistributedOptimizer(keras.optimizers.SGD(0.5))
    >>> weight = keras.Variable(1.0)
    >>> bool(optimizer.apply([tf.constant(1.0)], [weight]))
    True
    >>> float(weight)
    0.5
    """

    def __init__(
        self,
        inner: keras.optimizers.Optimizer,
        *,
        wire_dtype: str | None = None,
        wire_check_interval: int = wire_lib.CHECK_INTERVAL,
        wire_error_bound: float = wire_lib.ERROR_BOUND,
        name: str | None = None,
    ):
        _check_can_wrap(inner)
        checks: dict[str, Any] = {
            "check_interval": wire_check_interval,
            "error_bound": wire_error_bound,
        }
        has_scale = isinstance(self, LossScaleOptimizer)
        wire_lib.check(wire_dtype, has_scale=has_scale, **checks)
        # Explicit: a subclass may also derive from Keras' wrapper, whose
        # __init__ takes other arguments.
        keras.optimizers.Optimizer.__init__(self, learning_rate=0.0, name=name)
        self.inner_optimizer = inner
        self.wire = wire_lib.Wire(wire_dtype, **checks)
        self.gradient_accumulation_steps = inner.gradient_accumulation_steps
        inner.gradient_accumulation_steps = None
        inner.loss_scale_factor = None
        inner._all_reduce_sum_gradients = _already_reduced
        self._lowered: _Lowered | None = None
        if isinstance(
            inner._learning_rate,
            keras.optimizers.schedules.LearningRateSchedule,
        ):
            self._lowered = _Lowered(inner._learning_rate)
            inner._learning_rate = self._lowered
        self.stopwatch: Stopwatch | None = None
        self.gradient_log: GradientLog | None = None
        self._accumulates_locally: bool | None = None
        self._in_replica = threading.local()  # each is traced in its thread

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates all state; call it in the strategy's scope.

        Args:
            variables: The model's trainable variables.
        """
        if self.built:
            return
        refused = [
            v.path
            for v in variables
            if self._overwrite_variable_with_gradient(v)
        ]
        if refused:
            raise ValueError(
                "Variables that Keras overwrites with their gradient (float8) "
                f"cannot be all-reduced. Received {refused}."
            )
        self.inner_optimizer.build(variables)
        keras.optimizers.Optimizer.build(self, variables)
        self.wire.build(self.add_variable, variables)
        if self._lowered:
            self._lowered.factor = self.add_variable(
                (),
                initializer="ones",
                dtype="float32",
                name="learning_rate_factor",
            )
        if self.gradient_accumulation_steps:
            self._micro_steps = self._counter("micro_steps", "int64")
            self._accumulated_weight = self._counter(
                "accumulated_weight", "float32"
            )

    def _counter(self, name: str, dtype: str) -> keras.Variable:
        return self.add_variable((), dtype=dtype, name=name)

    @property
    def variables(self) -> list[keras.Variable]:
        """State of the wrapper, then that of the inner optimizer."""
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's; may be assigned unless it is a schedule."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    def lower_learning_rate(self, factor: float) -> None:
        """Multiplies the rate, or all that a schedule gives from now on.

        Args:
            factor: In (0, 1).
        """
        if self._lowered:
            now = tf.convert_to_tensor(self._lowered.factor)
            self._lowered.factor.assign(now * factor)
        else:
            rate = tf.convert_to_tensor(self.learning_rate)
            self.learning_rate = rate * factor

    @property
    def iterations(self) -> keras.Variable:
        """Applied updates, scalar int64; schedules read this."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale(self) -> Any:
        """1.0: this optimizer scales no loss."""
        return 1.0

    @property
    def skipped_updates(self) -> Any:
        """0: this optimizer skips no update."""
        return 0

    def keep_gradients(self) -> GradientLog:
        """Keeps the newest reduced gradient from now on, to be looked at.

        Call it in the strategy's scope, built, before a step is traced. It
        takes the memory of a gradient, and a copy of it an update.
        """
        if self.gradient_log is None:
            self.gradient_log = GradientLog(self._trainable_variables)
        return self.gradient_log

    def finalize_variable_values(
        self, var_list: Sequence[keras.Variable]
    ) -> None:
        """Replaces the weights by their moving average, if EMA is on."""
        self.inner_optimizer.finalize_variable_values(var_list)

    # --------------------------------------------------------------- update

    @tf.autograph.experimental.do_not_convert  # which is slow, for nothing
    def apply(
        self,
        grads: Sequence[reduction.Gradient | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
        *,
        weight: tf.Tensor | float | None = None,
    ) -> tf.Tensor:
        """Reduces the gradients and updates the variables, or skips.

        Call it in a replica context (or outside any strategy). With
        `gradient_accumulation_steps=K` every K-th call updates.

        Args:
            grads: This replica's gradients of its part of the loss (already
                multiplied by `scale_loss`); they are summed over replicas.
                `None` for a variable that the loss does not depend on.
            trainable_variables: The variables, in the same order; those given
                to `build` by default.
            weight: Weight of this micro-step in the mean over the accumulated
                ones, equal on every replica (say, its number of examples);
                1 by default. Without accumulation it has no effect.

        Returns:
            Scalar bool: False if this call skipped an update, else True.

        Raises:
            ValueError: No variable has a gradient, or one is unknown.
        """
        if not tf.distribute.get_replica_context():
            raise RuntimeError(
                "`apply` must be called in a replica: inside "
                "`strategy.run(step)`, not just `strategy.scope()`."
            )
        if weight is None:
            weight = getattr(self._in_replica, "weight", 1.0)
        gradients, variables = self._pair(grads, trainable_variables)
        if not self.gradient_accumulation_steps:
            sums = self._all_reduce(gradients, variables)
            return self._attempt(sums, variables)
        if self._accumulates_locally is True:
            self._accumulate(gradients, variables, weight)
            return tf.constant(True)
        if self._accumulates_locally is False:
            self._accumulate(gradients, variables, weight)
            return self._attempt_accumulated(variables, is_reduced=False)
        reduced = self._all_reduce(gradients, variables).unpack()
        self._accumulate(reduced, variables, weight)
        return tf.cond(
            self._micro_steps >= self.gradient_accumulation_steps,
            lambda: self._attempt_accumulated(variables, is_reduced=True),
            lambda: tf.constant(True),
        )

    @contextlib.contextmanager
    def accumulation(self, *, is_last: bool) -> Iterator[None]:
        """For a loop that knows which micro-step is the last of an update.

        In the context `apply` keeps the gradients of all but the last
        micro-step on their replica, and reduces once an update.
        """
        before = self._accumulates_locally
        self._accumulates_locally = not is_last
        try:
            yield
        finally:
            self._accumulates_locally = before

    @contextlib.contextmanager
    def micro_step_weight(self, weight: tf.Tensor) -> Iterator[None]:
        """What `apply` takes for `weight` in the replica's code within."""
        self._in_replica.weight = weight
        try:
            yield
        finally:
            del self._in_replica.weight

    def _all_reduce(
        self,
        gradients: Sequence[reduction.Gradient],
        variables: Sequence[keras.Variable],
    ) -> reduction.Packed:
        """The sums over all replicas; measures the wait, if asked to."""
        places = [self._get_variable_index(v) for v in variables]
        scale = tf.convert_to_tensor(self.loss_scale)
        sent = self.wire.with_feedback(gradients, places, scale)
        packed = self._pack(sent)
        watch = self.stopwatch if gradients else None
        if watch:
            values = [reduction.values_of(g) for g in packed.tensors]
            begin = watch.start(values)
        sums, lost = self.wire.all_reduce(packed.tensors)
        if watch:
            watch.stop(begin, [reduction.values_of(g) for g in sums])
        if self.wire.feedback:
            self.wire.keep(
                packed.with_tensors(lost).unpack(),
                places,
                scale,
                has_arrived=reduction.is_all_finite(sums),
            )
        return packed.summed(sums)

    def _pack(
        self, gradients: Sequence[reduction.Gradient]
    ) -> reduction.Packed:
        """Small gradients together, where it spares more than it takes."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas == 1 and not isinstance(self, LossScaleOptimizer):
            return reduction.Packed(list(gradients))
        return reduction.pack(gradients)

    def _pair(
        self,
        grads: Sequence[reduction.Gradient | None],
        trainable_variables: Iterable[keras.Variable] | None,
    ) -> tuple[list[reduction.Gradient], list[keras.Variable]]:
        """Drops variables that have no gradient; builds on the first call."""
        variables = list(trainable_variables or self._trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                "`grads` must hold one gradient for each variable. Received "
                f"{len(grads)} gradients and {len(variables)} variables."
            )
        self.build(variables)
        self._check_variables_are_known(variables)
        return self._filter_empty_gradients(grads, variables)

    def _accumulate(
        self,
        gradients: Sequence[reduction.Gradient],
        variables: Sequence[keras.Variable],
        weight: tf.Tensor | float,
    ) -> None:
        for gradient, accumulator in zip(
            gradients, self._accumulators(variables), strict=True
        ):
            weighted = reduction.divide(gradient, 1.0 / weight)
            self.assign_add(accumulator, weighted)
        self.assign_add(self._accumulated_weight, weight)
        self.assign_add(self._micro_steps, 1)

    def _attempt_accumulated(
        self, variables: Sequence[keras.Variable], *, is_reduced: bool
    ) -> tf.Tensor:
        """Updates with the weighted mean of the accumulated gradients."""
        accumulators = self._accumulators(variables)
        total = tf.convert_to_tensor(self._accumulated_weight)
        means = [
            tf.math.divide_no_nan(tf.convert_to_tensor(a), total)
            for a in accumulators
        ]
        packed = (
            self._pack(means)
            if is_reduced
            else self._all_reduce(means, variables)
        )
        applied = self._attempt(packed, variables)
        with tf.control_dependencies([applied]):
            for state in (
                *accumulators,
                self._accumulated_weight,
                self._micro_steps,
            ):
                self.assign(state, tf.zeros(state.shape, state.dtype))
        return applied

    def _accumulators(
        self, variables: Sequence[keras.Variable]
    ) -> list[keras.Variable]:
        return [
            self._accumulated_gradients[self._get_variable_index(v)]
            for v in variables
        ]

    def _attempt(
        self, packed: reduction.Packed, variables: Sequence[keras.Variable]
    ) -> tf.Tensor:
        """One update with reduced gradients; LossScaleOptimizer may skip."""
        self._update(packed.unpack(), variables)
        return tf.constant(True)

    def _update(
        self,
        gradients: Sequence[reduction.Gradient],
        variables: Sequence[keras.Variable],
    ) -> None:
        """Clips, decays, steps and averages this replica's copies."""
        inner = self.inner_optimizer
        strategy = tf.distribute.get_strategy()
        with _replica_local(strategy):
            if self.gradient_log:
                places = [self._get_variable_index(v) for v in variables]
                self.gradient_log.write(gradients, places)
            inner._backend_apply_gradients(gradients, variables)
            for variable in variables:
                if variable.constraint is not None:
                    variable.assign(variable.constraint(variable))
            strategy.extended.update(
                inner._iterations.value, lambda counter: counter.assign_add(1)
            )

    # ------------------------------------------------------------- the wire

    @property
    def wire_dtype(self) -> str | None:
        """What gradients travel in; None: as they are."""
        return self.wire.dtype

    @property
    def wire_error(self) -> Any:
        """What the last checked sum has lost, scalar float32; 0.0 at first.

        Norm of the difference by the norm of the exact sum.
        """
        return self.wire.error

    @property
    def feedback(self) -> list[keras.Variable]:
        """What each replica's gradients have lost on their way so far.

        Not among `variables`, since no two replicas have the same.
        """
        return self.wire.feedback

    def guarded(self, run: Callable[[], Any]) -> None:
        """Runs an update with the check of the wire, where it is time for it.

        `dist_amp.Trainer` does so by itself. For a loop of your own, in a
        `tf.function` and with the optimizer built.

        Args:
            run: Calls `strategy.run` of a step that calls `apply`.
        """
        attempts = tf.convert_to_tensor(self.iterations)
        self.wire.guarded(attempts + self.skipped_updates, run)

    # -------------------------------------------------------------- saving

    def get_config(self) -> dict[str, Any]:
        """Keras configuration; the inner optimizer's is nested in it."""
        inner = self.inner_optimizer
        with (
            _attribute(
                inner,
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
            ),
            contextlib.ExitStack() as stack,
        ):
            if self._lowered:
                schedule = self._lowered.schedule
                stack.enter_context(
                    _attribute(inner, "_learning_rate", schedule)
                )
            serialized = keras.saving.serialize_keras_object(inner)
        return {
            "name": self.name,
            "inner": serialized,
            "wire_dtype": self.wire.dtype,
            "wire_check_interval": self.wire.check_interval,
            "wire_error_bound": self.wire.error_bound,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> "DistributedOptimizer":
        """The reverse of `get_config`."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner"), custom_objects=custom_objects
        )
        return cls(inner, **config)


@keras.saving.register_keras_serializable(package="dist_amp")
class LossScaleOptimizer(
    DistributedOptimizer, keras.optimizers.LossScaleOptimizer
):
    """Loss scaling that is right on any number of replicas.

    The verdict on overflow is taken on the all-reduced gradients, so every
    replica applies or skips the same update. The scale follows
    `dist_amp.loss_scale.LossScaleRule`.

    A subclass of `keras.optimizers.LossScaleOptimizer`, so that
    `model.compile` under mixed_float16 takes it as it is.

    Args:
        inner: The `keras.optimizers.Optimizer` to wrap.
        initial_scale: First loss scale.
        growth_interval: Finite updates in a row until the scale grows.
        growth_factor: What the scale grows by.
        backoff_factor: What the scale is multiplied by after an overflow.
        min_scale: The floor. After 20 skipped updates in a row at the floor
            `apply` raises `tf.errors.InvalidArgumentError`, naming the
            variables whose gradients are not finite.
        max_scale: The ceiling. Equal to `min_scale` and `initial_scale`: the
            scale is fixed.
        wire_dtype: See `DistributedOptimizer`. In float16 a sum that
            overflows on its way is skipped like any other.
        wire_check_interval: See `DistributedOptimizer`.
        wire_error_bound: See `DistributedOptimizer`.
        name: Name of the wrapper's own variables.

    Raises:
        ValueError: A number is out of range; the message says which.

    Example:
    >>> optimizer = dist_amp.LossScaleOptimizer(
    ...     keras.optimizers.SGD(0.1), initial_scale=8.0)
    >>> weight = keras.Variable(1.0)
    >>> optimizer.build([weight])
    >>> float(optimizer.scale_loss(tf.constant(2.0)))
    16.0
    >>> bool(optimizer.apply([tf.constant(float("inf"))], [weight]))
    False
    >>> float(optimizer.loss_scale), float(weight)
    (4.0, 1.0)
    """

    def __init__(
        self,
        inner: keras.optimizers.Optimizer,
        *,
        initial_scale: float = 2.0**15,
        growth_interval: int = 2000,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        min_scale: float = 2.0**-14,
        max_scale: float = 2.0**24,
        wire_dtype: str | None = None,
        wire_check_interval: int = wire_lib.CHECK_INTERVAL,
        wire_error_bound: float = wire_lib.ERROR_BOUND,
        name: str | None = None,
    ):
        rule = LossScaleRule(
            growth_interval=growth_interval,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            min_scale=min_scale,
            max_scale=max_scale,
        )
        if not min_scale <= initial_scale <= max_scale:
            raise ValueError(
                "`initial_scale` must be between `min_scale` and `max_scale`. "
                f"Received {initial_scale:g} with {min_scale:g} and "
                f"{max_scale:g}."
            )
        super().__init__(
            inner,
            wire_dtype=wire_dtype,
            wire_check_interval=wire_check_interval,
            wire_error_bound=wire_error_bound,
            name=name,
        )
        self.rule = rule
        self.initial_scale = initial_scale
        self.has_scaled_loss = False  # a step that was traced, or run
        # Keras reads this name; ours is `growth_interval`.
        self.dynamic_growth_steps = growth_interval

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates all state; call it in the strategy's scope."""
        if self.built:
            return
        self.dynamic_scale = self.add_variable(
            (),
            initializer=keras.initializers.Constant(self.initial_scale),
            dtype="float32",
            name="loss_scale",
        )
        self.step_counter = self._counter("good_steps", "int64")
        self._skipped_updates = self._counter("skipped_updates", "int64")
        self._skips_at_floor = self._counter("skips_at_floor", "int64")
        self.overflows = OverflowLog(variables)
        super().build(variables)

    @property
    def loss_scale(self) -> Any:
        """The current loss scale, scalar float32."""
        return self.dynamic_scale if self.built else self.initial_scale

    @property
    def skipped_updates(self) -> Any:
        """Updates skipped since the start, scalar int64; see `overflows`."""
        return self._skipped_updates if self.built else 0

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """`loss * loss_scale`, to be differentiated."""
        self.has_scaled_loss = True
        return loss * tf.cast(self.loss_scale, loss.dtype)

    def lower_loss_scale(self, factor: float) -> None:
        """Multiplies the loss scale, down to its floor; call it on the host.

        Args:
            factor: In (0, 1).
        """
        scale = tf.convert_to_tensor(self.dynamic_scale) * factor
        self.dynamic_scale.assign(tf.maximum(scale, self.rule.min_scale))

    def set_loss_scale(self, scale: float) -> None:
        """Sets the loss scale, within its limits; call it on the host.

        Args:
            scale: The next update's.
        """
        limited = min(max(scale, self.rule.min_scale), self.rule.max_scale)
        self.dynamic_scale.assign(limited)

    def _attempt(
        self, packed: reduction.Packed, variables: Sequence[keras.Variable]
    ) -> tf.Tensor:
        finite = reduction.is_all_finite(packed.tensors)
        scale = tf.convert_to_tensor(self.dynamic_scale)

        def update() -> tf.Tensor:
            unscaled = [reduction.divide(g, scale) for g in packed.tensors]
            self._update(packed.with_tensors(unscaled).unpack(), variables)
            self.assign(self._skips_at_floor, 0)
            return tf.constant(True)

        def skip() -> tf.Tensor:
            self._write_down(scale, packed, variables)
            self._count_skip(scale, packed, variables)
            return tf.constant(False)

        applied = tf.cond(finite, update, skip)
        next_scale, good_steps = self.rule.next_state(
            scale, self.step_counter, finite
        )
        self.assign(self.dynamic_scale, next_scale)
        self.assign(self.step_counter, good_steps)
        return applied

    def _write_down(
        self,
        scale: tf.Tensor,
        packed: reduction.Packed,
        variables: Sequence[keras.Variable],
    ) -> None:
        """For the log: which of this replica's gradients are not finite."""
        sent = packed.with_tensors(packed.sent or packed.tensors)
        attempts = tf.convert_to_tensor(self.iterations)
        self.overflows.write(
            sent.finite_flags(),
            [self._get_variable_index(v) for v in variables],
            attempts + tf.convert_to_tensor(self._skipped_updates),
            scale,
        )

    def _count_skip(
        self,
        scale: tf.Tensor,
        packed: reduction.Packed,
        variables: Sequence[keras.Variable],
    ) -> None:
        """Counts the skip; stops the run when the floor does not help."""
        self.assign_add(self._skipped_updates, 1)
        is_at_floor = tf.cast(scale <= self.rule.min_scale, tf.int64)
        self.assign_add(self._skips_at_floor, is_at_floor)
        overflowed = tf.logical_not(packed.finite_flags())
        # XLA has no strings but constants, so the names are picked by number.
        tf.debugging.Assert(
            self._skips_at_floor < MAX_SKIPS_AT_FLOOR,
            [
                f"{MAX_SKIPS_AT_FLOOR} updates in a row were skipped with the "
                f"loss scale at its floor ({self.rule.min_scale:g}). Numbers "
                "of the gradients that are not finite, in the list behind:",
                tf.where(overflowed)[:, 0],
                ", ".join(variable.path for variable in variables),
            ],
            summarize=len(variables),
        )

    def get_config(self) -> dict[str, Any]:
        """Keras configuration; the inner optimizer's is nested in it."""
        rule = self.rule
        return {
            **super().get_config(),
            "initial_scale": self.initial_scale,
            "growth_interval": rule.growth_interval,
            "growth_factor": rule.growth_factor,
            "backoff_factor": rule.backoff_factor,
            "min_scale": rule.min_scale,
            "max_scale": rule.max_scale,
        }


def wrap_optimizer(
    optimizer: keras.optimizers.Optimizer,
    *,
    loss_scale: str | float | None = "auto",
    wire_dtype: str | None = None,
    wire_check_interval: int = wire_lib.CHECK_INTERVAL,
    wire_error_bound: float = wire_lib.ERROR_BOUND,
    **loss_scale_options: Any,
) -> DistributedOptimizer:
    """Makes a Keras optimizer right for the current precision and strategy.

    Args:
        optimizer: Any Keras optimizer; one that is wrapped already is
            returned as it is.
        loss_scale: "auto" scales the loss dynamically where the precision of
            the surrounding `dist_amp.scope` computes in float16 and not at
            all elsewhere; "dynamic" and a positive number (a fixed scale)
            force it; None forbids it.
        wire_dtype: See `DistributedOptimizer`.
        wire_check_interval: See `DistributedOptimizer`.
        wire_error_bound: See `DistributedOptimizer`.
        **loss_scale_options: Further arguments of `LossScaleOptimizer`.

    Returns:
        A `LossScaleOptimizer`, or a `DistributedOptimizer` where there is no
        loss scale.

    Raises:
        ValueError: `loss_scale` is none of these, or options were given that
            would be ignored.

    Example:
    >>> with dist_amp.scope(dist_amp.make_strategy(), "mixed_float16"):
    ...     optimizer = dist_amp.wrap_optimizer(keras.optimizers.Adam(1e-3))
    >>> type(optimizer).__name__
    'LossScaleOptimizer'
    """
    if isinstance(optimizer, DistributedOptimizer):
        return optimizer
    wire_lib.check_is_used(wire_dtype, wire_check_interval, wire_error_bound)
    wire: dict[str, Any] = {
        "wire_dtype": wire_dtype,
        "wire_check_interval": wire_check_interval,
        "wire_error_bound": wire_error_bound,
    }
    if loss_scale == "auto":
        is_needed = precision_lib.current().needs_loss_scale
        loss_scale = "dynamic" if is_needed else None
    if loss_scale is None:
        if loss_scale_options:
            raise ValueError(
                f"{sorted(loss_scale_options)} would be ignored: there is no "
                "loss scale in this precision. Pass `loss_scale='dynamic'` "
                "to have one all the same (--loss_scale=dynamic)."
            )
        return DistributedOptimizer(optimizer, **wire)
    if loss_scale != "dynamic":
        loss_scale_options |= _fixed(loss_scale)
    return LossScaleOptimizer(optimizer, **wire, **loss_scale_options)


def strategy_of(
    optimizer: keras.optimizers.Optimizer,
) -> tf.distribute.Strategy:
    """The strategy in whose scope an optimizer was made."""
    return optimizer._distribution_strategy


def layers_of(model: keras.Model) -> Iterable[keras.layers.Layer]:
    """All layers, at any depth."""
    return model._flatten_layers()


def children_of(layer: keras.layers.Layer) -> Iterable[keras.layers.Layer]:
    """The layers that a layer or a model is made of, one level down."""
    return layer._flatten_layers(include_self=False, recursive=False)


def made_by(tensor: Any) -> tuple[Any, list[Any]]:
    """What makes an output of a functional model, and of which tensors.

    Args:
        tensor: Of `model.outputs`, or one of those returned.

    Returns:
        A layer or an operation of `keras.ops`, and its inputs.
    """
    history = tensor._keras_history
    node = history.operation._inbound_nodes[history.node_index]
    return history.operation, list(node.input_tensors)


def make_policy(compute_dtype: str, variable_dtype: str) -> keras.DTypePolicy:
    """A Keras policy of any two dtypes; Keras has names for some only."""
    if variable_dtype == "float32" != compute_dtype:
        return keras.DTypePolicy(f"mixed_{compute_dtype}")
    policy = keras.DTypePolicy(compute_dtype)
    policy._variable_dtype = variable_dtype
    return policy


def computes_in_float16(model: keras.Model) -> bool:
    """Whether any layer, at any depth, computes in float16."""
    return any(layer.compute_dtype == "float16" for layer in layers_of(model))


def odd_sizes(model: keras.Model) -> list[tuple[str, int]]:
    """Layers in half precision whose outputs are no multiple of 8.

    Source: NVIDIA, "Train With Mixed Precision", on tensor cores.

    Returns:
        Their paths with the units or filters.
    """
    sizes = [
        (layer.path, getattr(layer, "filters", None) or layer.units)
        for layer in layers_of(model)
        if layer.compute_dtype in ("float16", "bfloat16")
        and (
            isinstance(layer, keras.layers.Dense)
            or getattr(layer, "filters", None)
        )
    ]
    return [(path, size) for path, size in sizes if size % 8]


def is_synchronized(model: keras.Model) -> bool:
    """Whether a layer talks to the other replicas in the forward pass."""
    return any(
        getattr(layer, "synchronized", False) for layer in layers_of(model)
    )


def unsynchronized(model: keras.Model) -> list[str]:
    """Paths of batch norm that is trained on the statistics of a slice."""
    return [
        layer.path
        for layer in layers_of(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and not layer.synchronized
    ]


def set_moments(
    layer: keras.layers.BatchNormalization, function: Callable[..., Any]
) -> None:
    """Has a layer take its batch statistics by another function.

    Args:
        layer: Changed for good; it is saved as before.
        function: From `(layer, inputs, mask)`, inputs in float32, to `(mean,
            variance)` of shape `[channels]`; or to None where Keras' own are
            wanted.
    """
    usual = type(layer)._moments

    def moments(
        layer: keras.layers.BatchNormalization, inputs: Any, mask: Any
    ) -> Any:
        found = function(layer, inputs, mask)
        return usual(layer, inputs, mask) if found is None else found

    layer._moments = types.MethodType(moments, layer)


def generator_states(model: keras.Model) -> list[tf.Variable]:
    """State of each `tf.random.Generator` that a layer has, at any depth."""
    return [
        state
        for layer in layers_of(model)
        for state in generator_states_of(layer)
    ]


def generator_states_of(layer: keras.layers.Layer) -> list[tf.Variable]:
    """State of each `tf.random.Generator` that a layer has itself."""
    return [
        value.state
        for value in vars(layer).values()
        if isinstance(value, tf.random.Generator)
    ]


def moving_statistics(model: keras.Model) -> list[keras.Variable]:
    """Floats that a layer in training mode may assign, like batch norm's.

    They are what trainable layers made as non-trainable variables; the
    weights of a frozen layer are none of them.
    """
    found = {
        id(variable): variable
        for layer in layers_of(model)
        if layer.trainable
        for variable in layer._non_trainable_variables
        if "float" in variable.dtype
    }
    return list(found.values())


def _fixed(loss_scale: str | float) -> dict[str, float]:
    if isinstance(loss_scale, str) or not loss_scale > 0:
        raise ValueError(
            '`loss_scale` must be "auto", "dynamic", None or a positive '
            f"number. Received {loss_scale!r}."
        )
    return dict.fromkeys(
        ("initial_scale", "min_scale", "max_scale"), float(loss_scale)
    )


def _check_can_wrap(inner: keras.optimizers.Optimizer) -> None:
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner` must be a keras.optimizers.Optimizer. Received "
            f"{inner!r} of type {type(inner).__name__}."
        )
    if isinstance(
        inner, (DistributedOptimizer, keras.optimizers.LossScaleOptimizer)
    ) or hasattr(inner, "optimizers"):
        raise TypeError(
            "`inner` must not wrap other optimizers. Received "
            f"{type(inner).__name__}; pass the optimizer inside it."
        )


def _already_reduced(pairs: Iterable[Any]) -> list[Any]:
    return list(pairs)


@contextlib.contextmanager
def _replica_local(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Each replica updates its own copy; there is nothing left to merge.

    TensorFlow has this mode for XLA on GPUs. Replicas are traced one after
    another and never change places inside the context, since only a merge
    call would let them.
    """
    if strategy.num_replicas_in_sync == 1 or isinstance(
        strategy, tf.distribute.TPUStrategy
    ):
        yield
        return
    with _attribute(strategy.extended, "_use_merge_call", lambda: False):
        yield


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of one object for the length of a context."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
