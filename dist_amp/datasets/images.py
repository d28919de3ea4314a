"""Images that each pass over the data changes anew."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dist_amp import data
from dist_amp.loading import LoadedBatches, for_each


def augmented(
    examples: tf.data.Dataset,
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    *,
    global_batch_size: int,
    seed: int,
    buffer_size: int,
) -> LoadedBatches:
    """Batches of images that are changed where they are trained on.

    Order and changes depend on the seed, the pass and the examples' indices
    only, so that a run that goes on sees what it would have seen.

    Args:
        examples: `(image, label)`, always in the same order; images of one
            shape, or encoded.
        augment: From an image and a seed, int64 `[2]`, to the changed image.
        global_batch_size: Examples in a batch; the last one may be smaller.
        seed: Of all passes.
        buffer_size: As in `data.shuffled`.
    """

    def make(number: tf.Tensor) -> tf.data.Dataset:
        of_pass = data.seed_of_pass(seed, number)

        @tf.autograph.experimental.do_not_convert
        def with_seed(index: tf.Tensor, example: Any) -> Any:
            return example, tf.stack([of_pass, index])

        order = data.shuffled(examples.enumerate(), of_pass, buffer_size)
        return order.map(with_seed).batch(global_batch_size)

    @tf.autograph.experimental.do_not_convert
    def change(example: Any, seed: tf.Tensor) -> Any:
        image, label = example
        return augment(image, seed), label

    return LoadedBatches(make, for_each(change))


def unchanged(
    examples: tf.data.Dataset,
    read: Callable[[tf.Tensor], tf.Tensor],
    global_batch_size: int,
) -> LoadedBatches:
    """Batches of images in order, read where they are looked at.

    Args:
        examples: As in `augmented`.
        read: From an image to what the model takes.
        global_batch_size: Examples in a batch; the last one may be smaller.
    """

    @tf.autograph.experimental.do_not_convert
    def load(image: tf.Tensor, label: tf.Tensor) -> Any:
        return read(image), label

    return LoadedBatches(examples.batch(global_batch_size), for_each(load))


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
