"""TensorFlow's tutorial on automatic mixed precision, in this library.

A subclassed `MyModel`, Adam, a loss and an accuracy that start afresh each
epoch, a line an epoch, and a checkpoint to go on from: what the tutorial
writes by hand, with the loss scale, the strategy and the clean-up that it
leaves to the reader. Run it, interrupt it, run it again: it goes on.

    python examples/tutorial.py --precision=mixed_float16 --replicas=2
"""

import argparse
from collections.abc import Sequence

import keras
import tensorflow as tf
from sklearn import datasets

import dist_amp
from dist_amp import data, preemption
from dist_amp import strategy as strategy_lib


class MyModel(keras.Model):
    """Two dense layers; the logits are float32 in every precision."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(64, activation="relu")
        self.logits = keras.layers.Dense(10, dtype="float32")

    def call(self, pixels: tf.Tensor) -> tf.Tensor:
        """Logits `[batch, 10]` of pixels `[batch, 64]`."""
        return self.logits(self.hidden(pixels))


def make_trainer(devices: Sequence[str], precision: str) -> dist_amp.Trainer:
    """Model and optimizer in the scope, and the trainer around them."""
    strategy = dist_amp.make_strategy("auto", devices=devices)
    with dist_amp.scope(strategy, precision):
        model = MyModel()
        optimizer = dist_amp.wrap_optimizer(keras.optimizers.Adam(1e-2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return dist_amp.Trainer(model, optimizer, loss=loss, metrics=["accuracy"])


def main(
    replicas: int = 0,
    precision: str = "auto",
    epochs: int = 5,
    checkpoints: str = "runs/tutorial",
) -> dist_amp.Trainer:
    """Trains on handwritten digits, from the last checkpoint if there is."""
    keras.utils.set_random_seed(0)
    devices = strategy_lib.use_logical_cpus(replicas) if replicas else None
    trainer = make_trainer(devices, precision)
    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    train = data.from_arrays((x[:1400], y[:1400]), 32, shuffle_seed=0)
    test = tf.data.Dataset.from_tensor_slices((x[1400:], y[1400:])).batch(32)

    with preemption.watch(trainer.request_stop):  # Ctrl-C saves everything
        trainer.fit(
            train,
            epochs=epochs,
            validation_data=test,
            checkpoint_dir=checkpoints,
        )
    print(trainer.evaluate(test))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--checkpoints", default="runs/tutorial")
    main(**vars(parser.parse_args()))
