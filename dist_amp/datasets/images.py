"""Images that each pass over the data changes anew."""

from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

from dist_amp import data

Pass: TypeAlias = Callable[[tf.Tensor], tf.data.Dataset]


def augmented(
    examples: tf.data.Dataset,
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    *,
    global_batch_size: int,
    seed: int,
    buffer_size: int,
) -> Pass:
    """Batches of changed images, a function of the pass.

    Order and changes depend on the seed, the pass and the examples' indices
    only, so that a run that goes on sees what it would have seen.

    Args:
        examples: `(image, label)`, always in the same order.
        augment: From an image and a seed, int64 `[2]`, to the changed image.
        global_batch_size: Examples in a batch; the last one may be smaller.
        seed: Of all passes.
        buffer_size: As in `data.shuffled`.
    """

    def make(number: tf.Tensor) -> tf.data.Dataset:
        of_pass = data.seed_of_pass(seed, number)

        @tf.autograph.experimental.do_not_convert
        def change(index: tf.Tensor, example: Any) -> Any:
            image, label = example
            return augment(image, tf.stack([of_pass, index])), label

        return (
            data.shuffled(examples.enumerate(), of_pass, buffer_size)
            .map(change, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(global_batch_size)
        )

    return make


def normalized(
    image: tf.Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]
) -> tf.Tensor:
    """Each channel less its mean, by its standard deviation, float32.

    Args:
        image: `[height, width, channels]`, in 0..255.
        mean: Of each channel, of images in [0, 1].
        deviation: Likewise.
    """
    scaled = tf.cast(image, tf.float32) / 255.0
    return (scaled - tf.constant(mean)) / tf.constant(deviation)
