"""The tutorial's `MyModel`: two dense layers on a flattened image."""

import keras


def build(num_classes: int = 10, hidden: int = 64) -> keras.Model:
    """Returns Flatten, Dense(hidden, relu), Dense(num_classes).

    The logits `[batch, num_classes]` are float32 in every precision: softmax
    and cross-entropy need the mantissa. Made of Keras' own layers, so a saved
    model loads without this library.

    Args:
        num_classes: Number of logits.
        hidden: Units of the hidden layer.
    """
    return keras.Sequential(
        [
            keras.layers.Flatten(),
            keras.layers.Dense(hidden, activation="relu"),
            keras.layers.Dense(num_classes, dtype="float32"),
        ],
        name="MyModel",
    )
