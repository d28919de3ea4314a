"""A loss over the global batch: each example against all those of all replicas.

Two noisy views of a point shall be closer to each other than to the views of
other points. A replica has some of the examples, so it gathers the embeddings
of all; their gradients travel back to the replicas that they came from. The
weights are the same on one replica and on two.

    python examples/contrastive.py --replicas=2
"""

import argparse
from typing import Any

import keras
import tensorflow as tf

import dist_amp
from dist_amp import data
from dist_amp import strategy as strategy_lib

TEMPERATURE = 0.1


class ContrastiveTrainer(dist_amp.Trainer):
    """InfoNCE of the model's outputs "one" and "other", rows `[batch, size]`.

    Source: van den Oord et al., "Representation Learning with Contrastive
    Predictive Coding", 2018.
    """

    def compute_loss(self, batch: Any, predictions: Any) -> tf.Tensor:
        """This replica's examples against the other views of all examples."""
        one, other = predictions["one"], predictions["other"]
        logits = tf.matmul(one, gather(other), transpose_b=True) / TEMPERATURE
        own = tf.reduce_sum(one * other, axis=1) / TEMPERATURE
        per_example = tf.reduce_logsumexp(logits, axis=1) - own
        return tf.reduce_sum(batch.weight * per_example)


def gather(rows: tf.Tensor) -> tf.Tensor:
    """The rows of all replicas, in order; call it in a replica.

    Backwards a replica gets the sum of what all losses say of its rows.
    """
    context = tf.distribute.get_replica_context()
    is_alone = context.num_replicas_in_sync == 1
    return rows if is_alone else context.all_gather(rows, axis=0)


def make_model(size: int) -> keras.Model:
    """Embeds two views by the same layers, in float32 at the end."""
    views = {name: keras.Input((size,), name=name) for name in ("one", "other")}
    hidden = keras.layers.Dense(32, activation="gelu")
    last = keras.layers.Dense(8, dtype="float32")
    unit = keras.layers.UnitNormalization(dtype="float32")
    embed = keras.Sequential([hidden, last, unit])
    return keras.Model(views, {name: embed(x) for name, x in views.items()})


def main(replicas: int = 0, precision: str = "auto", epochs: int = 10) -> Any:
    """Trains on noisy views of random points."""
    keras.utils.set_random_seed(0)
    devices = strategy_lib.use_logical_cpus(replicas) if replicas else None
    strategy = dist_amp.make_strategy("auto", devices=devices)
    with dist_amp.scope(strategy, precision):
        model = make_model(size=16)
        optimizer = dist_amp.wrap_optimizer(keras.optimizers.Adam(1e-3))
    trainer = ContrastiveTrainer(model, optimizer)
    points, a, b = tf.random.stateless_normal([3, 480, 16], seed=[0, 0])
    views = {"one": points + 0.3 * a, "other": points + 0.3 * b}
    trainer.fit(data.from_arrays(views, 48, shuffle_seed=0), epochs=epochs)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--precision", default="auto")
    main(**vars(parser.parse_args()))
