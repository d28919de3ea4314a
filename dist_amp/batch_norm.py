"""Batch normalization of images by TensorFlow's fused kernel.

Keras 3 computes it by some twenty operations, most of which read or write all
activations once more. The kernel reads them twice.
"""

import functools
import types
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

_DTYPES = (tf.float32, tf.float16, tf.bfloat16)

# oneDNN's kernel takes 80 us to start, so that on CPUs it loses on images of
# fewer activations than about 100,000 in a batch, whose size is not known.
_LARGE_ON_CPU = 4096  # in one image


def fuse(layers: Iterable[keras.layers.Layer], *, on_cpu: bool) -> None:
    """Makes Keras' own layers train by the fused kernel, from now on.

    Weights, statistics, configuration and results stay what they are, but for
    rounding. Layers that are subclassed, synchronized, renormalizing or not
    `channels_last` are left alone, and so is inference, where Keras' few
    operations are folded into one multiplication.

    Args:
        layers: Of any kind.
        on_cpu: Whether they run on CPUs, where small images are left alone.
    """
    call = functools.partial(_call, least=_LARGE_ON_CPU if on_cpu else 0)
    for layer in layers:
        is_stock = type(layer) is keras.layers.BatchNormalization
        if is_stock and not (layer.synchronized or layer.renorm):
            layer.call = types.MethodType(call, layer)


def _call(
    layer: keras.layers.BatchNormalization,
    inputs: Any,
    training: bool | None = None,
    mask: Any = None,
    *,
    least: int,
) -> Any:
    """What takes the place of `BatchNormalization.call`."""
    inputs = tf.convert_to_tensor(inputs)
    is_image = inputs.shape.rank == 4 and layer.axis in (-1, 3)
    learns = training and layer.trainable and mask is None
    is_fit = is_image and learns and inputs.dtype in _DTYPES
    if not is_fit or (inputs.shape[1:].num_elements() or least) < least:
        return type(layer).call(layer, inputs, training=training, mask=mask)
    channels = inputs.shape[-1]
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs,
        scale=_float32(layer.gamma) if layer.scale else tf.ones([channels]),
        offset=_float32(layer.beta) if layer.center else tf.zeros([channels]),
        mean=[],
        variance=[],
        epsilon=layer.epsilon,
    )
    # The kernel's is the unbiased estimate, Keras' the mean square.
    number = tf.cast(tf.size(inputs) // channels, tf.float32)
    variance *= (number - 1.0) / number
    for moving, new in (
        (layer.moving_mean, mean),
        (layer.moving_variance, variance),
    ):
        old = _float32(moving) * layer.momentum
        moving.assign(old + new * (1.0 - layer.momentum))
    return tf.cast(outputs, layer.compute_dtype)


def _float32(variable: keras.Variable) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(variable), tf.float32)
