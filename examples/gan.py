"""Two models with an optimizer each: a generative adversarial network.

A generator turns noise into points of the plane, a critic tells them from
points on a circle. A `train_step` of one's own updates both, `state` puts the
second into checkpoints, and `batch.weight` makes all replicas' losses one sum.

    python examples/gan.py --replicas=2
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

import dist_amp
from dist_amp import data
from dist_amp import strategy as strategy_lib


class GanTrainer(dist_amp.Trainer):
    """Of a generator and a critic; `batch.x` is noise, `batch.y` is real."""

    def __init__(self, generator: Any, critic: Any, first: Any, second: Any):
        super().__init__(generator, first)
        self.critic, self.critic_optimizer = critic, second

    def state(self) -> dict[str, Sequence[Any]]:
        """What checkpoints hold: all that `train_step` changes."""
        own = {"critic": self.critic, "second": self.critic_optimizer}
        return super().state() | {n: x.variables for n, x in own.items()}

    def train_step(self, batch: data.Batch) -> None:
        """An update of the critic, then one of the generator; in a replica."""
        fake = self.model(batch.x, training=True)
        with tf.GradientTape() as tape:
            loss = self.judge(batch, batch.y, 1.0) + self.judge(
                batch, fake, 0.0
            )
            scaled_loss = self.critic_optimizer.scale_loss(loss)
        variables = self.critic.trainable_variables
        gradients = tape.gradient(scaled_loss, variables)
        self.critic_optimizer.apply(gradients, variables)

        with tf.GradientTape() as tape:
            fake = self.model(batch.x, training=True)
            loss = self.judge(batch, fake, 1.0)
            scaled_loss = self.optimizer.scale_loss(loss)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(scaled_loss, variables), variables)
        self.metrics.update(batch, loss, fake)

    def judge(self, batch: Any, points: tf.Tensor, wanted: float) -> tf.Tensor:
        """How far the critic is from saying 1 (real) or 0 (fake)."""
        logits = self.critic(points, training=True)[:, 0]
        labels = tf.fill(tf.shape(logits), wanted)
        errors = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(batch.weight * errors)


def make_model(inputs: int, outputs: int) -> keras.Model:
    """A hidden layer; what it returns is float32 in every precision."""
    hidden = keras.layers.Dense(32, activation="relu")
    last = keras.layers.Dense(outputs, dtype="float32")
    return keras.Sequential([keras.Input((inputs,)), hidden, last])


def main(
    replicas: int = 0, precision: str = "auto", epochs: int = 40
) -> GanTrainer:
    """Trains on points of the unit circle."""
    keras.utils.set_random_seed(0)
    devices = strategy_lib.use_logical_cpus(replicas) if replicas else None
    strategy = dist_amp.make_strategy("auto", devices=devices)
    with dist_amp.scope(strategy, precision):
        generator, critic = make_model(4, 2), make_model(2, 1)
        adam = [keras.optimizers.Adam(5e-3, beta_1=0.5) for _ in range(2)]
        first, second = map(dist_amp.wrap_optimizer, adam)
        second.build(critic.trainable_variables)
    trainer = GanTrainer(generator, critic, first, second)
    noise = tf.random.stateless_normal([1000, 4], seed=[0, 1])
    angles = tf.random.stateless_uniform([1000], seed=[0, 2]) * 2 * math.pi
    circle = tf.stack([tf.cos(angles), tf.sin(angles)], axis=1)
    pairs = data.from_arrays((noise, circle), 100, shuffle_seed=0)
    trainer.fit(pairs, epochs=epochs)
    radii = tf.norm(generator(noise), axis=1)
    print(f"radius {tf.reduce_mean(radii):.2f}, of real points 1.00")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    main(**vars(parser.parse_args()))
