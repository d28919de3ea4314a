"""All-reduce of a list of gradients, dense and sparse."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import tensorflow as tf

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices


def all_reduce_sum(
    gradients: Sequence[Gradient], wire_dtype: str | None = None
) -> list[Gradient]:
    """Sums each gradient over all replicas; call it in a replica context.

    Sparse gradients stay sparse: the slices of all replicas are put together
    and rows with the same index are added up, so that a later square or clip
    sees each row once.

    Args:
        gradients: One per variable: tensors of the variable's shape, or
            `tf.IndexedSlices` of it.
        wire_dtype: What the gradients travel and are summed in, "float16";
            by default as they are. What a sum loses by it is the same on
            every replica. (TensorFlow's collectives carry no bfloat16.)

    Returns:
        The sums, in the same order and dtypes, equal on every replica.
    """
    context = tf.distribute.get_replica_context()
    summed = list(gradients)
    if context.num_replicas_in_sync > 1 and summed:
        sent = [_cast(g, wire_dtype) for g in summed]
        received = context.all_reduce(tf.distribute.ReduceOp.SUM, sent)
        summed = [
            _cast(total, own.dtype)
            for total, own in zip(received, summed, strict=True)
        ]
    return [
        _add_up_rows(gradient)
        if isinstance(gradient, tf.IndexedSlices)
        else gradient
        for gradient in summed
    ]


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
