"""The tutorial's model: two dense layers on a flattened image."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="dist_amp")
class MyModel(keras.Model):
    """Flatten, Dense(hidden, relu), Dense(num_classes).

    The logits are float32 in every precision: softmax and cross-entropy need
    the mantissa.

    Args:
        num_classes: Number of logits.
        hidden: Units of the hidden layer.
        **kwargs: Of `keras.Model`.
    """

    def __init__(self, num_classes: int = 10, hidden: int = 64, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.flatten = keras.layers.Flatten()
        self.hidden = keras.layers.Dense(hidden, activation="relu")
        self.logits = keras.layers.Dense(num_classes, dtype="float32")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Returns logits `[batch, num_classes]` for images `[batch, ...]`."""
        return self.logits(self.hidden(self.flatten(x)))

    def get_config(self) -> dict[str, Any]:
        """Keras configuration."""
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "hidden": self.hidden.units,
        }


def build(num_classes: int = 10, hidden: int = 64) -> keras.Model:
    """Returns a `MyModel`; call it in `dist_amp.scope`.

    Args:
        num_classes: Number of logits.
        hidden: Units of the hidden layer.
    """
    return MyModel(num_classes=num_classes, hidden=hidden)
