"""Batch norm that sees the global batch, however many replicas share it."""

from typing import Any

import keras
import tensorflow as tf

from dist_amp.optimizer import layers_of


def needs_sums(synchronized: bool | None) -> bool:
    """Whether statistics are to be taken over all replicas.

    Layers that do so take Keras' operations instead of one fused kernel, which
    rounds otherwise: to compare one device with several in a half precision,
    as `dist_amp.verify` does, pass True on both.

    Args:
        synchronized: None: where the strategy has several replicas.
    """
    if synchronized is not None:
        return synchronized
    return tf.distribute.get_strategy().num_replicas_in_sync > 1


def batch_norm(
    synchronized: bool | None = None, **options: Any
) -> keras.layers.BatchNormalization:
    """A layer with momentum 0.9 and epsilon 1e-5, as residual nets have it.

    Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015.

    Args:
        synchronized: As in `needs_sums`; call it in the strategy's scope.
        **options: Of `keras.layers.BatchNormalization`.
    """
    return keras.layers.BatchNormalization(
        momentum=0.9,
        epsilon=1e-5,
        synchronized=needs_sums(synchronized),
        **options,
    )


def synchronize(model: keras.Model, synchronized: bool | None = None) -> None:
    """Has all batch norm of a model see the global batch, or its slice.

    For models that others built; call it in the scope, before training.

    Args:
        model: Whose layers are changed.
        synchronized: As in `needs_sums`.
    """
    for layer in layers_of(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = needs_sums(synchronized)
