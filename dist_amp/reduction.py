"""All-reduce of a list of gradients, dense and sparse.

Small dense gradients of one dtype lie in one vector until they are applied:
one operation sends, judges or unscales them all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from dist_amp import quantized
from dist_amp import strategy as strategy_lib

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices

# Below it an operation takes longer to start than to run, and what is copied
# stays in the processor's cache.
_SMALL = 64 * 1024  # bytes

# What a collective sends at once: much, to be fast, but not all, so that the
# first packs are under way while the backward pass computes the others.
_PACKS = 4
_MIN_BYTES_PER_PACK = 4 * 2**20
_MAX_BYTES_PER_PACK = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Packed:
    """Gradients of which small ones lie together in a vector.

    Attributes:
        tensors: The vectors, then all other gradients.
        groups: For each vector the shapes of the gradients in it, by their
            positions in the list that was packed.
        sent: Of sums, what this replica put in, in the same order.
    """

    tensors: list[Gradient]
    groups: tuple[dict[int, tf.TensorShape], ...] = ()
    sent: tuple[Gradient, ...] = ()

    def with_tensors(self, tensors: Sequence[Gradient]) -> "Packed":
        """The same gradients with other values, in the order of `tensors`."""
        return Packed(list(tensors), self.groups)

    def summed(self, sums: Sequence[Gradient]) -> "Packed":
        """Their sums over all replicas, in the order of `tensors`."""
        return Packed(list(sums), self.groups, tuple(self.tensors))

    def unpack(self) -> list[Gradient]:
        """The gradients in the order in which they were packed."""
        found: dict[int, Gradient] = {}
        for shapes, vector in zip(self.groups, self.tensors, strict=False):
            sizes = [shape.num_elements() for shape in shapes.values()]
            parts = tf.split(vector, sizes)
            for (i, shape), part in zip(shapes.items(), parts, strict=True):
                found[i] = tf.reshape(part, shape)
        rest = self.tensors[len(self.groups) :]
        size, alone = len(found) + len(rest), iter(rest)
        return [found[i] if i in found else next(alone) for i in range(size)]

    def finite_flags(self) -> tf.Tensor:
        """Whether each gradient is finite, in the order of `unpack`.

        Few operations, however many gradients lie together.

        Returns:
            bool `[number of gradients]`.
        """
        places: list[int] = []
        parts: list[tf.Tensor] = []
        for shapes, vector in zip(self.groups, self.tensors, strict=False):
            sizes = [shape.num_elements() for shape in shapes.values()]
            owners = np.repeat(np.arange(len(sizes)), sizes)
            is_bad = tf.cast(~tf.math.is_finite(vector), tf.float32)
            counts = tf.math.unsorted_segment_sum(is_bad, owners, len(sizes))
            parts.append(tf.equal(counts, 0.0))
            places += shapes
        rest = self.tensors[len(self.groups) :]
        size = len(places) + len(rest)
        places += [i for i in range(size) if i not in set(places)]
        parts += [finite_flags(rest)] if rest else []
        return tf.gather(tf.concat(parts, axis=0), np.argsort(places))


def pack(gradients: Sequence[Gradient]) -> Packed:
    """Puts small dense gradients of static shape into one vector a dtype.

    The vectors come first: TensorFlow's collectives start at the end of a
    list, where the gradients are that a backward pass computes first.
    """
    by_dtype: dict[tf.DType, dict[int, tf.TensorShape]] = {}
    for i, gradient in enumerate(gradients):
        if num_bytes(gradient) <= _SMALL:
            by_dtype.setdefault(gradient.dtype, {})[i] = gradient.shape
    groups = tuple(group for group in by_dtype.values() if len(group) > 1)
    packed = {i for group in groups for i in group}
    vectors = [
        tf.concat([tf.reshape(gradients[i], [-1]) for i in group], axis=0)
        for group in groups
    ]
    alone = [g for i, g in enumerate(gradients) if i not in packed]
    return Packed([*vectors, *alone], groups)


def num_bytes(gradient: Gradient) -> float:
    """Size of a dense gradient of static shape; else infinite."""
    if isinstance(gradient, tf.IndexedSlices):
        return float("inf")
    elements = gradient.shape.num_elements()
    return float("inf") if elements is None else elements * gradient.dtype.size


def bytes_per_pack(gradients: Sequence[Gradient]) -> int:
    """How much a collective should send at once of these; 0 for all."""
    total = sum(num_bytes(g) for g in gradients)
    if total == float("inf"):
        return 0
    wanted = int(total) // _PACKS
    return min(max(wanted, _MIN_BYTES_PER_PACK), _MAX_BYTES_PER_PACK)


def all_reduce_sum(
    gradients: Sequence[Gradient], wire_dtype: str | None = None
) -> list[Gradient]:
    """Sums each gradient over all replicas; call it in a replica context.

    Sparse gradients stay sparse on one worker: the slices of all replicas are
    put together and rows with the same index are added up, so that a later
    square or clip sees each row once.

    Args:
        gradients: One per variable: tensors of the variable's shape, or
            `tf.IndexedSlices` of it.
        wire_dtype: What the gradients travel and are summed in, "float16" or
            "bfloat16"; by default as they are. What a sum loses by it is the
            same on every replica.

    Returns:
        The sums, in the same order and dtypes, equal on every replica.
    """
    summed = list(gradients)
    if tf.distribute.get_replica_context().num_replicas_in_sync > 1:
        sent = [_cast(g, wire_dtype) for g in for_collectives(summed)]
        summed = [
            _cast(total, own.dtype)
            for total, own in zip(_all_reduce(sent), summed, strict=True)
        ]
    return [
        _add_up_rows(gradient)
        if isinstance(gradient, tf.IndexedSlices)
        else gradient
        for gradient in summed
    ]


def all_reduce_quantized(
    gradients: Sequence[Gradient],
) -> tuple[list[Gradient], list[Gradient]]:
    """The same in eight bits a number; see `quantized`.

    Sparse gradients and those of float64 or of a shape that varies are summed
    as they are.

    Args:
        gradients: As in `all_reduce_sum`.

    Returns:
        The sums, equal on every replica, and what each of this replica's own
        gradients has lost on its way: at most half a quantum a number.
    """
    sums, lost = list(gradients), [zeros_like(g) for g in gradients]
    small = {i: g for i, g in enumerate(gradients) if _is_quantized(g)}
    if small:
        found = _all_reduce_blocks(
            [quantized.to_blocks(gradient) for gradient in small.values()]
        )
        for (i, gradient), (total, own) in zip(
            small.items(), found, strict=True
        ):
            sums[i] = quantized.from_blocks(total, like=gradient)
            lost[i] = quantized.from_blocks(own, like=gradient)
    exact = [i for i in range(len(sums)) if i not in small]
    for i, total in zip(
        exact, all_reduce_sum([sums[i] for i in exact]), strict=True
    ):
        sums[i] = total
    return sums, lost


def _all_reduce_blocks(
    blocks: list[tf.Tensor],
) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """Sum and this replica's loss of each; all quanta are agreed on at once."""
    strategy = tf.distribute.get_strategy()
    is_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    # GPUs add integers of 32 bits on the host, TPUs know none of 64.
    word = tf.int32 if is_tpu else tf.int64
    magnitudes = [quantized.magnitudes(each) for each in blocks]
    (total,) = _all_reduce([tf.concat(magnitudes, axis=0)])
    quanta = tf.split(
        quantized.quantum_of(total, strategy.num_replicas_in_sync),
        [each.shape[0] for each in blocks],
    )
    units = list(map(quantized.quantize, blocks, quanta))
    words = _all_reduce([quantized.to_words(each, word) for each in units])
    sums = map(quantized.dequantize, map(quantized.from_words, words), quanta)
    sent = map(quantized.dequantize, units, quanta)
    lost = map(tf.subtract, blocks, sent)
    return list(zip(sums, lost, strict=True))


def _is_quantized(gradient: Gradient) -> bool:
    return num_bytes(gradient) != float("inf") and gradient.dtype in (
        tf.float32,
        tf.float16,
        tf.bfloat16,
    )


def _all_reduce(gradients: list[Gradient]) -> list[Gradient]:
    """A dtype at a time: TensorFlow would join several in one pack."""
    totals: dict[int, Gradient] = {}
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        sent = {i: g for i, g in enumerate(gradients) if g.dtype == dtype}
        received = tf.distribute.get_replica_context().all_reduce(
            tf.distribute.ReduceOp.SUM,
            list(sent.values()),
            options=tf.distribute.experimental.CommunicationOptions(
                bytes_per_pack=bytes_per_pack(list(sent.values()))
            ),
        )
        totals.update(zip(sent, received, strict=True))
    return [totals[i] for i in range(len(gradients))]


def for_collectives(gradients: Sequence[Gradient]) -> list[Gradient]:
    """Dense where several workers sum: collectives want the same shape always.

    TensorFlow 2.21 gathers slices by collectives that fail as soon as their
    number is not that of the first step, as in a smaller last batch.
    """
    if strategy_lib.num_workers(tf.distribute.get_strategy()) == 1:
        return list(gradients)
    return [tf.convert_to_tensor(gradient) for gradient in gradients]


def _cast(gradient: Gradient, dtype: Any) -> Gradient:
    if dtype is None or gradient.dtype == dtype:
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.cast(gradient.values, dtype),
            gradient.indices,
            gradient.dense_shape,
        )
    return tf.cast(gradient, dtype)


def _add_up_rows(slices: tf.IndexedSlices) -> tf.IndexedSlices:
    """Makes the indices of sparse slices unique; adds up equal rows."""
    indices, position = tf.unique(slices.indices)
    values = tf.math.unsorted_segment_sum(
        slices.values, position, tf.size(indices)
    )
    return tf.IndexedSlices(values, indices, slices.dense_shape)


def is_all_finite(gradients: Sequence[Gradient]) -> tf.Tensor:
    """Whether no gradient holds an inf or a NaN, scalar bool."""
    return tf.reduce_all(finite_flags(gradients))


def finite_flags(gradients: Sequence[Gradient]) -> tf.Tensor:
    """Whether each gradient is finite, bool of shape `[len(gradients)]`."""
    return tf.stack(
        [tf.reduce_all(tf.math.is_finite(values_of(g))) for g in gradients]
    )


def divide(gradient: Gradient, divisor: tf.Tensor) -> Gradient:
    """`gradient / divisor`, sparse if `gradient` is."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values / divisor, gradient.indices, gradient.dense_shape
        )
    return gradient / divisor


def zeros_like(gradient: Gradient) -> Gradient:
    """A gradient of the same form that changes nothing."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            tf.zeros_like(gradient.values),
            gradient.indices,
            gradient.dense_shape,
        )
    return tf.zeros_like(gradient)


def values_of(gradient: Gradient) -> tf.Tensor:
    """The dense tensor, or the values of the slices."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient.values
    return gradient
