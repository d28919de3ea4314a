"""Two models with an optimizer each: a generative adversarial network.

A generator makes points of noise, a critic tells them from those on a circle.
`train_step` updates both, `state` puts both into checkpoints.

    python examples/gan.py --replicas=2
"""

import argparse
from typing import Any

import keras
import tensorflow as tf

import dist_amp
from dist_amp import data
from dist_amp import strategy as strategy_lib
from dist_amp.models import mlp


class GanTrainer(dist_amp.Trainer):
    """Of a generator and a critic; `batch.x` is noise, `batch.y` is real."""

    def __init__(self, generator: Any, critic: Any, first: Any, second: Any):
        super().__init__(generator, first)
        self.critic, self.critic_optimizer = critic, second

    def state(self) -> dict[str, Any]:
        """What checkpoints hold: all that `train_step` changes."""
        own = {"critic": self.critic, "second": self.critic_optimizer}
        return super().state() | {n: x.variables for n, x in own.items()}

    def train_step(self, batch: data.Batch) -> None:
        """An update of both, by one look at the batch; in a replica."""
        with tf.GradientTape(persistent=True) as tape:
            fake = self.model(batch.x, training=True)
            loss, of_critic = (self.judge(batch, fake, x) for x in (1.0, 0.0))
            of_critic += self.judge(batch, batch.y, 1.0)
            scaled_loss = self.optimizer.scale_loss(loss)
            scaled_of_critic = self.critic_optimizer.scale_loss(of_critic)
        variables = self.critic.trainable_variables
        gradients = tape.gradient(scaled_of_critic, variables)
        self.critic_optimizer.apply(gradients, variables)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(scaled_loss, variables), variables)
        self.metrics.update(batch, loss, fake)

    def judge(self, batch: Any, points: Any, wanted: float) -> tf.Tensor:
        """How far the critic is from saying 1 (real) or 0 (fake)."""
        logits = self.critic(points, training=True)[:, 0]
        losses = tf.math.softplus(logits) - wanted * logits  # cross-entropy
        return tf.reduce_sum(batch.weight * losses)


def main(replicas: int = 0, precision: str = "auto", epochs: int = 80) -> Any:
    """Trains on points of the unit circle."""
    keras.utils.set_random_seed(0)
    devices = strategy_lib.use_logical_cpus(replicas) if replicas else None
    strategy = dist_amp.make_strategy("auto", devices=devices)
    with dist_amp.scope(strategy, precision):
        generator, critic = mlp.build(2, hidden=32), mlp.build(1, hidden=32)
        critic.build((None, 2))
        adam = [keras.optimizers.Adam(2e-3, beta_1=0.5) for _ in range(2)]
        first, second = map(dist_amp.wrap_optimizer, adam)
        second.build(critic.trainable_variables)
    trainer = GanTrainer(generator, critic, first, second)
    noise, points = tf.random.stateless_normal([2, 1000, 4], seed=[0, 1])
    circle = tf.math.l2_normalize(points[:, :2], axis=1)
    trainer.fit(data.from_arrays((noise, circle), 100, 0), epochs=epochs)
    radii = tf.norm(generator(noise), axis=1).numpy()
    print(f"radius {radii.mean():.2f}, of real points 1.00")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    main(**vars(parser.parse_args()))
