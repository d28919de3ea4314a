"""A loop of one's own: learning by playing, with no dataset and no epochs.

A walker in a corridor is to find the right end, and learns it from whether it
came there (REINFORCE). Of this library it takes the strategy, the scope and
the optimizer: `scale_loss` before the gradient, `apply` after it.

    python examples/custom_loop.py --precision=mixed_float16 --replicas=2
"""

import argparse

import keras
import tensorflow as tf

import dist_amp
from dist_amp import strategy as strategy_lib

LENGTH, STEPS, GAMES = 7, 12, 64


def play(policy: keras.Model, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Whether each game was won, and log of the chance of all its steps."""
    place = tf.fill([GAMES], LENGTH // 2)
    chance = tf.zeros([GAMES])
    for step in range(STEPS):
        logits = policy(tf.one_hot(place, LENGTH))
        drawn = tf.random.stateless_uniform([GAMES], seed=[seed, step])
        goes_right = drawn < tf.sigmoid(logits[:, 0])
        sign = tf.where(goes_right, 1.0, -1.0)
        walks = (place > 0) & (place < LENGTH - 1)
        chance += tf.where(walks, tf.math.log_sigmoid(sign * logits[:, 0]), 0.0)
        place += tf.where(walks, tf.cast(sign, tf.int32), 0)
    return tf.cast(place == LENGTH - 1, tf.float32), chance


def main(
    replicas: int = 0, precision: str = "auto", num_updates: int = 100
) -> float:
    """Plays and learns; returns the share of games won at the end."""
    keras.utils.set_random_seed(0)
    devices = strategy_lib.use_logical_cpus(replicas) if replicas else None
    strategy = dist_amp.make_strategy("auto", devices=devices)
    with dist_amp.scope(strategy, precision):
        hidden = keras.layers.Dense(16, activation="tanh")
        logit = keras.layers.Dense(1, dtype="float32")
        policy = keras.Sequential([keras.Input((LENGTH,)), hidden, logit])
        optimizer = dist_amp.wrap_optimizer(keras.optimizers.Adam(0.02))
        optimizer.build(policy.trainable_variables)

    def learn(number: tf.Tensor) -> tf.Tensor:
        """An update; runs in a replica, which plays games of its own."""
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        seed = number * replicas + context.replica_id_in_sync_group
        variables = policy.trainable_variables
        with tf.GradientTape() as tape:
            won, chance = play(policy, seed)
            # `apply` adds up the replicas' gradients: a share of the mean.
            loss = -tf.reduce_mean((won - 0.5) * chance) / replicas
            scaled_loss = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(scaled_loss, variables), variables)
        return tf.reduce_mean(won)

    @tf.function
    def update(number: tf.Tensor) -> tf.Tensor:
        share = strategy.run(learn, args=(number,))
        return strategy.reduce(tf.distribute.ReduceOp.MEAN, share, axis=None)

    for number in range(num_updates):
        share = float(update(tf.constant(number)))
        print(f"update {number}: {share:.0%} won")
    return share


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    main(**vars(parser.parse_args()))
