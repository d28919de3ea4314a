"""Stock Keras layers in fewer passes over their activations.

Keras 3 computes batch normalization and GELU by some twenty operations, most
of which read or write all activations once more. TensorFlow has a kernel for
the one, XLA makes one for the other.
"""

import contextlib
import contextvars
import functools
import math
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

_DTYPES = (tf.float32, tf.float16, tf.bfloat16)

_may_use_xla = contextvars.ContextVar("may_use_xla", default=False)

# A kernel of oneDNN or XLA takes some 50 to 80 us to start, so that on CPUs
# it loses where a batch, whose size is not known, has few activations.
_LARGE_ON_CPU = 4096  # in one example


def fuse(layers: Iterable[keras.layers.Layer], *, on_cpu: bool) -> None:
    """Makes Keras' own layers use fused kernels where these are faster.

    Weights, statistics, configuration and results stay what they are, but for
    rounding. These are fused, from now on:

    * `BatchNormalization` of images in training, unless it is synchronized,
      renormalizing or not `channels_last`. In inference Keras' operations are
      one multiplication and one addition.
    * `activation="gelu"` (the exact one) of `Dense`, `EinsumDense` and
      `Activation` on CPUs, within `kernels`. It was never tried on GPUs.

    Args:
        layers: Of any kind; subclassed ones are left alone.
        on_cpu: Whether they run on CPUs, where few activations are left
            alone.
    """
    least = _LARGE_ON_CPU if on_cpu else 0
    batch_norm = functools.partial(_batch_norm, least=least)
    for layer in layers:
        if type(layer) is keras.layers.BatchNormalization:
            if not (layer.synchronized or layer.renorm):
                layer.call = types.MethodType(batch_norm, layer)
        elif on_cpu and _ends_with_gelu(layer):
            layer.call = types.MethodType(_with_gelu, layer)


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Where kernels of XLA may be used: not in models that are exported."""
    token = _may_use_xla.set(True)
    try:
        yield
    finally:
        _may_use_xla.reset(token)


# ------------------------------------------------------- batch normalization


def _batch_norm(
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
    can_be_fused = is_image and learns and inputs.dtype in _DTYPES
    numbers = inputs.shape[1:].num_elements()  # None if images vary
    if not can_be_fused or (numbers is not None and numbers < least):
        return type(layer).call(layer, inputs, training=training, mask=mask)
    channels = layer.moving_mean.shape[0]
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs,
        scale=_float32(layer.gamma) if layer.scale else tf.ones([channels]),
        offset=_float32(layer.beta) if layer.center else tf.zeros([channels]),
        mean=[],
        variance=[],
        epsilon=layer.epsilon,
    )
    # The kernel's is the unbiased estimate, Keras' the mean square.
    number = tf.cast(tf.size(inputs, tf.int64) // channels, tf.float32)
    variance = tf.math.multiply_no_nan(variance, (number - 1.0) / number)
    for moving, new in (
        (layer.moving_mean, mean),
        (layer.moving_variance, variance),
    ):
        old = _float32(moving) * layer.momentum
        moving.assign(old + new * (1.0 - layer.momentum))
    return tf.cast(outputs, layer.compute_dtype)


def _float32(variable: keras.Variable) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(variable), tf.float32)


# ---------------------------------------------------------------------- GELU


def _ends_with_gelu(layer: keras.layers.Layer) -> bool:
    layers = keras.layers
    return (
        type(layer) in (layers.Activation, layers.Dense, layers.EinsumDense)
        and layer.activation is keras.activations.gelu
    )


def _with_gelu(layer: keras.layers.Layer, *inputs: Any, **named: Any) -> Any:
    """What takes the place of the `call` of layers that end with GELU."""
    if not (_may_use_xla.get() and _ends_with_gelu(layer)):
        return type(layer).call(layer, *inputs, **named)
    layer.activation = _gelu  # not for longer: it is in the configuration
    try:
        return type(layer).call(layer, *inputs, **named)
    finally:
        layer.activation = keras.activations.gelu


def _gelu(x: tf.Tensor) -> tf.Tensor:
    numbers = x.shape[1:].num_elements()  # XLA compiles for each size
    if x.dtype in _DTYPES and numbers and numbers >= _LARGE_ON_CPU:
        return _fused_gelu(x)
    return keras.activations.gelu(x)


@tf.custom_gradient
def _fused_gelu(
    x: tf.Tensor,
) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """`x * P(X <= x)` of a normal X. Source: Hendrycks and Gimpel, 2016."""
    return _gelu_forward(x), lambda upstream: _gelu_backward(x, upstream)


def _cumulative(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * tf.math.erfc(-x * math.sqrt(0.5))


@tf.function(jit_compile=True, autograph=False)
def _gelu_forward(x: tf.Tensor) -> tf.Tensor:
    number = tf.cast(x, tf.float32)
    return tf.cast(number * _cumulative(number), x.dtype)


@tf.function(jit_compile=True, autograph=False)
def _gelu_backward(x: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    number = tf.cast(x, tf.float32)
    density = tf.exp(-0.5 * number * number) / math.sqrt(2.0 * math.pi)
    slope = _cumulative(number) + number * density
    return tf.cast(tf.cast(upstream, tf.float32) * slope, x.dtype)
