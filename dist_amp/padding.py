"""Rows that only fill a slice up to its size count for nothing.

TPUs compile for one shape, so the slices of a smaller last batch are filled up
with copies of their own examples (`data.split`), which weigh nothing in the
loss. CPUs cannot run some layers on no example, so an empty slice is given a
row there. What looks at all rows is told here which of them to leave out.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from dist_amp import optimizer as optimizer_lib
from dist_amp.data import Batch

_weights: contextvars.ContextVar[tf.Tensor | None] = contextvars.ContextVar(
    "weights_of_rows", default=None
)


def weights_of_rows(batch: Batch) -> tf.Tensor | None:
    """1 for an example, 0 for a copy, float32 `[per_replica_batch]`.

    None where no slice is padded.
    """
    if batch.num_examples is None:
        return None
    place = tf.cast(tf.range(batch.weight.shape[0]), tf.float32)
    return tf.cast(place < batch.num_examples, tf.float32)


@contextlib.contextmanager
def heeded(weights: tf.Tensor | None) -> Iterator[None]:
    """Where the layers of `heed` leave out what is no example.

    Args:
        weights: Of `weights_of_rows`.
    """
    token = _weights.set(weights)
    try:
        yield
    finally:
        _weights.reset(token)


def heed(layers: Iterable[keras.layers.Layer]) -> None:
    """Makes batch normalization take its statistics of examples only.

    Args:
        layers: Of any kind; those without batch statistics are left alone.
            Other layers that look across a batch see its copies, too.
    """
    for layer in layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            optimizer_lib.set_moments(layer, _moments)


def _moments(
    layer: keras.layers.BatchNormalization, inputs: tf.Tensor, mask: Any
) -> tuple[tf.Tensor, tf.Tensor] | None:
    """Mean and variance of each channel; None: as Keras takes them."""
    weights = _weights.get()
    if weights is None:
        return None
    rank = inputs.shape.rank
    weights = tf.reshape(weights, [-1, *[1] * (rank - 1)])
    if mask is not None:
        weights *= tf.cast(mask, tf.float32)[..., tf.newaxis]
    weights = tf.broadcast_to(weights, tf.shape(inputs))
    axes = [i for i in range(rank) if i != layer.axis % rank]
    number = tf.reduce_sum(weights, axes)
    total = tf.reduce_sum(weights * inputs, axes)
    context = tf.distribute.get_replica_context()
    if layer.synchronized and context.num_replicas_in_sync > 1:
        squares = tf.reduce_sum(weights * inputs**2, axes)
        number, total, squares = context.all_reduce(
            tf.distribute.ReduceOp.SUM, [number, total, squares]
        )
        mean = total / number
        return mean, tf.nn.relu(squares / number - mean**2)
    mean = tf.math.divide_no_nan(total, number)
    shape = [1 if i in axes else -1 for i in range(rank)]
    distance = weights * (inputs - tf.reshape(mean, shape)) ** 2
    variance = tf.math.divide_no_nan(tf.reduce_sum(distance, axes), number)
    return mean, variance
