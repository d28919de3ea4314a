"""What gradients travel in, what that loses, and whether it loses too much.

Bytes that each of N replicas sends in a ring all-reduce of n numbers:

    float32             2 (N - 1) / N * 4 n
    float16, bfloat16   2 (N - 1) / N * 2 n
    int8                2 (N - 1) / N * 1.016 n, and a second, small all-reduce

What eight bits lose, the replica that lost it adds to its next gradients
(`quantized` has the arithmetic). So over the steps what was applied differs
from the sum of the gradients by the last step's loss alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_amp import quantized, reduction
from dist_amp.reduction import Gradient

DTYPES = ("float16", "bfloat16", "int8")
CHECK_INTERVAL = 100
# Error feedback converges where a part of what is sent arrives at each step,
# an error below 1 (Karimireddy et al., "Error Feedback Fixes SignSGD", ICML
# 2019); half of that leaves room for the steps that are not checked.
ERROR_BOUND = 0.5

_USUAL, _CHECKED, _EXACT = range(3)


class Wire:
    """All-reduces gradients in fewer bytes, with memory and under guard.

    Args:
        dtype: One of `DTYPES`; None: gradients travel as they are.
        check_interval: Updates between checks; 0: never. In a check the exact
            sum is taken as well, and applied is what was sent.
        error_bound: The norm of what a checked sum has lost by the norm of
            the exact one. Beyond it all further sums are exact.

    Attributes:
        error: The last check's, scalar float32, equal on all replicas; a
            checkpoint holds it with the optimizer's variables.
        feedback: For each variable what its gradients have lost so far and
            not been given back, in float32 and without the loss scale:
            different on each replica. Empty but for "int8".
    """

    def __init__(
        self,
        dtype: str | None = None,
        *,
        check_interval: int = CHECK_INTERVAL,
        error_bound: float = ERROR_BOUND,
    ):
        self.dtype = dtype
        self.check_interval = check_interval
        self.error_bound = error_bound
        self.error: Any = 0.0
        self.feedback: list[keras.Variable] = []
        self._mode = _USUAL

    @property
    def is_guarded(self) -> bool:
        """Whether sums are checked now and then."""
        return self.dtype is not None and self.check_interval > 0

    def build(
        self,
        add_variable: Callable[..., keras.Variable],
        variables: Sequence[keras.Variable],
    ) -> None:
        """Creates the state; in the strategy's scope.

        Args:
            add_variable: Makes a variable that is equal on all replicas.
            variables: All trainable ones.
        """
        if self.is_guarded:
            self.error = add_variable((), dtype="float32", name="wire_error")
        if self.dtype == "int8":
            self.feedback = [
                keras.Variable(
                    "zeros",
                    shape=variable.shape,
                    dtype="float32",
                    trainable=False,
                    name=f"feedback_{variable.name}",
                )
                for variable in variables
            ]

    # ------------------------------------------------ in cross-replica context

    def guarded(self, attempts: tf.Tensor, run: Callable[[], Any]) -> None:
        """Runs one update on all replicas; checks its sums if it is time.

        Collectives cannot stand in a condition within a replica, so the whole
        update is traced three times: as usual, checked, and exact.

        Args:
            attempts: Updates so far, skipped ones included.
            run: Calls `strategy.run`.
        """
        if not self.is_guarded:
            run()
            return

        def run_in(mode: int) -> Callable[[], tf.Tensor]:
            def branch() -> tf.Tensor:
                with self._in_mode(mode):
                    run()
                return tf.constant(0)

            return branch

        is_due = attempts % self.check_interval == 0
        mode = tf.where(is_due, _CHECKED, _USUAL)
        is_too_large = tf.convert_to_tensor(self.error) > self.error_bound
        tf.switch_case(
            tf.where(is_too_large, _EXACT, mode),
            [run_in(_USUAL), run_in(_CHECKED), run_in(_EXACT)],
        )

    @contextlib.contextmanager
    def _in_mode(self, mode: int) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    # -------------------------------------------------------- in each replica

    def with_feedback(
        self,
        gradients: Sequence[Gradient],
        places: Sequence[int],
        scale: tf.Tensor,
    ) -> list[Gradient]:
        """Adds to a replica's gradients what they have lost before.

        Args:
            gradients: Dense or sparse.
            places: The number of each one's variable.
            scale: The loss scale that is in them.
        """
        if not self.feedback:
            return list(gradients)
        return [
            _plus(gradient, self.feedback[place], scale)
            for gradient, place in zip(
                reduction.for_collectives(gradients), places, strict=True
            )
        ]

    def all_reduce(
        self, gradients: Sequence[Gradient]
    ) -> tuple[list[Gradient], list[Gradient]]:
        """Sums over all replicas, and what this replica's part has lost.

        Returns:
            The sums, equal on all replicas; and for `keep` what is lost, or
            nothing where it is not made up for.
        """
        replicas = tf.distribute.get_replica_context().num_replicas_in_sync
        if self._mode == _EXACT or replicas == 1:
            lost = [reduction.zeros_like(g) for g in gradients]
            return reduction.all_reduce_sum(gradients), lost
        if self.dtype == "int8":
            sums, lost = reduction.all_reduce_quantized(gradients)
        else:
            sums, lost = reduction.all_reduce_sum(gradients, self.dtype), []
        if self._mode == _CHECKED:
            self._note(error_of(sums, reduction.all_reduce_sum(gradients)))
        return sums, lost

    def keep(
        self,
        lost: Sequence[Gradient],
        places: Sequence[int],
        scale: tf.Tensor,
        *,
        has_arrived: tf.Tensor,
    ) -> None:
        """Remembers what is lost, for the next gradients.

        Args:
            lost: From `all_reduce`, one for each gradient.
            places: As in `with_feedback`.
            scale: As in `with_feedback`.
            has_arrived: Whether all sums are finite. If not, the update is
                skipped on all replicas, and what was owed is owed still.
        """
        for one, place in zip(lost, places, strict=True):
            if isinstance(one, tf.IndexedSlices):
                continue
            owed = self.feedback[place]
            new = tf.cast(one, tf.float32) / scale
            owed.assign(tf.where(has_arrived, new, tf.convert_to_tensor(owed)))

    def _note(self, error: tf.Tensor) -> None:
        """Keeps a check's result: one number on all replicas."""
        context = tf.distribute.get_replica_context()
        # The last bits of a replica's own may depend on its processor.
        error = context.all_reduce(tf.distribute.ReduceOp.MEAN, error)
        before = tf.convert_to_tensor(self.error)
        is_overflow = tf.logical_not(tf.math.is_finite(error))
        self.error.assign(tf.where(is_overflow, before, error))


def _plus(
    gradient: Gradient, owed: keras.Variable, scale: tf.Tensor
) -> Gradient:
    if isinstance(gradient, tf.IndexedSlices):  # which loses nothing
        return gradient
    scaled = tf.cast(tf.convert_to_tensor(owed) * scale, gradient.dtype)
    # Of slices made dense TensorFlow does not know the shape.
    return tf.reshape(gradient, owed.shape) + scaled


def error_of(sums: Sequence[Gradient], exact: Sequence[Gradient]) -> tf.Tensor:
    """Norm of the difference by the norm of the exact sums, scalar float32.

    Not finite where any of them is not.
    """
    pairs = [
        [tf.cast(reduction.values_of(g), tf.float32) for g in pair]
        for pair in zip(sums, exact, strict=True)
    ]
    magnitudes = [tf.reduce_max(tf.abs(e)) for _, e in pairs]
    largest = tf.reduce_max(tf.stack([0.0, *magnitudes]))
    unit = tf.where(largest > 0.0, largest, 1.0)  # no square overflows
    difference = tf.add_n([_square_sum((s - e) / unit) for s, e in pairs])
    whole = tf.add_n([_square_sum(e / unit) for _, e in pairs])
    return tf.sqrt(tf.math.divide_no_nan(difference, whole))


def _square_sum(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(values))


def check(
    dtype: str | None,
    *,
    check_interval: int,
    error_bound: float,
    has_scale: bool,
) -> None:
    """Refuses settings of a `Wire` that are wrong or would lose too much.

    Raises:
        ValueError: The message says which, and how to mend it.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(
            f"`wire_dtype` must be None or one of {', '.join(DTYPES)}. "
            f"Received {dtype!r} (--wire_dtype)."
        )
    if dtype == "float16" and not has_scale:
        raise ValueError(
            '`wire_dtype="float16"` needs a loss scale, so that what overflows '
            'on the way is skipped; pass `loss_scale="dynamic"` '
            "(--loss_scale=dynamic), or bfloat16 or int8, which do without."
        )
    if check_interval < 0 or not error_bound > 0:
        raise ValueError(
            "`wire_check_interval` must not be negative, `wire_error_bound` "
            f"must be positive. Received {check_interval} and {error_bound} "
            "(--wire_check_interval, --wire_error_bound)."
        )
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if dtype == "int8" and replicas > quantized.MAX_REPLICAS:
        raise ValueError(
            '`wire_dtype="int8"` has too few levels for more than '
            f"{quantized.MAX_REPLICAS} replicas. Received {replicas}; pass "
            "bfloat16 or float16 (--wire_dtype)."
        )


def check_is_used(dtype: str | None, check_interval: int, bound: float) -> None:
    """Refuses settings that the current strategy, or others, would ignore.

    Raises:
        ValueError: The message says which.
    """
    strategy = tf.distribute.get_strategy()
    is_alone = not tf.distribute.has_strategy() or isinstance(
        strategy, tf.distribute.OneDeviceStrategy
    )
    if dtype is not None and is_alone:
        raise ValueError(
            f"`wire_dtype={dtype!r}` would be ignored on one device, where "
            "gradients travel nowhere: leave it out (--wire_dtype=float32), or "
            "make the strategy with `kind='mirrored'` (--strategy=mirrored) to "
            "go on from a checkpoint of several replicas."
        )
    usual = (CHECK_INTERVAL, ERROR_BOUND)
    if dtype is None and (check_interval, bound) != usual:
        raise ValueError(
            "`wire_check_interval` and `wire_error_bound` would be ignored: "
            "gradients travel exactly. Pass `wire_dtype` (--wire_dtype)."
        )
