"""Numbers of eight bits that can be added up on their way.

A replica's numbers are cut into blocks. With `m` a block's largest magnitude
and `L` = 127 - ceil(N / 2) for N replicas, all of them agree on

    quantum = sum over replicas of m / L        (an all-reduce of float32)
    q       = round(value / quantum)            (eight bits each)
    total   = sum over replicas of q * quantum  (an all-reduce of integers)

The sum of the magnitudes, not their maximum, is what the quantum is made of:
|q| <= m / quantum + 1/2 on each replica, so that no sum of the q, of all
replicas or of some, is beyond 127, and a replica with small gradients leaves
its share of the 127 to the others. So eight numbers can lie in one integer of
64 bits, and TensorFlow's SUM adds them up without one running into the next.
Sums of integers are the same in any order: no replica can differ.

An inf or a NaN of any replica makes the quantum, and so the block's total,
no finite number on every replica.

A number is off by half a quantum at most. What was lost is known to the
replica that lost it, which can send it with the next numbers. Source:
Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014.
"""

import math

import tensorflow as tf

BLOCK = 256  # numbers that share a quantum; 4 bytes more for 256
MAX_REPLICAS = 32  # where 111 levels are left to share

_LARGEST = 127
# Below it a quantum would lose its precision, or be flushed to zero.
_SMALLEST_TOTAL = 1e-35


def num_levels(num_replicas: int) -> int:
    """What all replicas share: the largest `total / quantum`."""
    return _LARGEST - math.ceil(num_replicas / 2)


def to_blocks(tensor: tf.Tensor) -> tf.Tensor:
    """Any shape to float32 `[num_blocks, BLOCK]`, filled up with zeros.

    Args:
        tensor: Of floats and of a static shape.
    """
    flat = tf.reshape(tf.cast(tensor, tf.float32), [-1])
    missing = -tensor.shape.num_elements() % BLOCK
    if missing:
        flat = tf.pad(flat, [[0, missing]])
    return tf.reshape(flat, [-1, BLOCK])


def from_blocks(blocks: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """The reverse of `to_blocks`, in the shape and dtype of `like`."""
    size = like.shape.num_elements()
    flat = tf.reshape(blocks, [-1])
    if size % BLOCK:
        flat = flat[:size]
    return tf.cast(tf.reshape(flat, like.shape), like.dtype)


def magnitudes(blocks: tf.Tensor) -> tf.Tensor:
    """The largest magnitude of each block, float32 `[num_blocks]`.

    NaN for a block that holds an inf or a NaN: whether a maximum does is not
    the same on all devices.
    """
    largest = tf.reduce_max(tf.abs(blocks), axis=1)
    is_finite = tf.reduce_all(tf.math.is_finite(blocks), axis=1)
    return tf.where(is_finite, largest, math.nan)


def quantum_of(total: tf.Tensor, num_replicas: int) -> tf.Tensor:
    """What one of the eight bits' units is worth.

    Args:
        total: The sum of all replicas' `magnitudes`.
        num_replicas: How many there are.

    Returns:
        float32 `[num_blocks]`; 0 where there is nothing to send.
    """
    quantum = total / num_levels(num_replicas)
    return tf.where(total < _SMALLEST_TOTAL, 0.0, quantum)


def quantize(blocks: tf.Tensor, quantum: tf.Tensor) -> tf.Tensor:
    """Blocks in units of their quanta: whole numbers, in float32.

    Args:
        blocks: This replica's, float32 `[num_blocks, BLOCK]`.
        quantum: From `quantum_of`. Where it is not finite, or 0, all are 0.
    """
    is_usable = tf.math.is_finite(quantum) & (quantum > 0.0)
    per_unit = tf.where(is_usable, quantum, math.inf)[:, tf.newaxis]
    units = tf.round(blocks / per_unit)
    # inf / inf: of a block that no replica will use.
    return tf.where(is_usable[:, tf.newaxis], units, 0.0)


def dequantize(units: tf.Tensor, quantum: tf.Tensor) -> tf.Tensor:
    """The reverse of `quantize`, also of a sum; NaN where `quantum` is."""
    return units * quantum[:, tf.newaxis]


def to_words(units: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Packs whole numbers into integers whose sums are those of each number.

    Of four bytes a, b, c, d in memory the word is a + 256 b + 65536 c +
    16777216 d; eight likewise.

    Args:
        units: Float32 `[num_blocks, BLOCK]` within -127 and 127.
        dtype: `tf.int64`, or `tf.int32` where nothing else is added up.

    Returns:
        Of `dtype`, `[num_words]`.
    """
    signed = tf.reshape(tf.cast(units, tf.int8), [-1, dtype.size])
    bias = _bias(dtype)
    # Signed bytes, but for the highest one, become byte + 128 by `bias`.
    return tf.bitwise.bitwise_xor(tf.bitcast(signed, dtype), bias) - bias


def from_words(words: tf.Tensor) -> tf.Tensor:
    """The reverse of `to_words`, of a sum of them."""
    bias = _bias(words.dtype)
    signed = tf.bitcast(tf.bitwise.bitwise_xor(words + bias, bias), tf.int8)
    return tf.cast(tf.reshape(signed, [-1, BLOCK]), tf.float32)


def _bias(dtype: tf.DType) -> tf.Tensor:
    """128 in each byte but the highest."""
    number = sum(128 << 8 * place for place in range(dtype.size - 1))
    return tf.constant(number, dtype)
