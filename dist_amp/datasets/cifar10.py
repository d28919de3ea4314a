"""CIFAR-10 of TFDS, shifted and mirrored.

Sources: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images",
2009, for the images; He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, section 4.2, for the changes.
"""

import tensorflow as tf

from dist_amp import sources
from dist_amp.datasets import images
from dist_amp.loading import LoadedBatches

_MEAN = (0.4914, 0.4822, 0.4465)
_DEVIATION = (0.2470, 0.2435, 0.2616)
_SHIFT = 4  # pixels, at most


def build(
    split: str,
    global_batch_size: int,
    seed: int | None,
    data_dir: str | None,
) -> LoadedBatches:
    """Batches of float32 `[batch, 32, 32, 3]` and labels 0..9.

    Args:
        split: "train", a function of the pass, or "test".
        global_batch_size: Examples in a batch.
        seed: Of order, shifts and mirrors; None keeps order and images.
        data_dir: Where TFDS keeps its data, which it downloads once.
    """
    builder = sources.prepare_tfds("cifar10", data_dir)
    examples = builder.as_dataset(split=split, as_supervised=True)
    return batches(
        examples, global_batch_size, seed if split == "train" else None
    )


def batches(
    examples: tf.data.Dataset, global_batch_size: int, seed: int | None
) -> LoadedBatches:
    """Batches of `(image, label)`, changed where there is a seed."""
    if seed is None:
        return images.unchanged(
            examples,
            lambda image: images.normalized(image, _MEAN, _DEVIATION),
            global_batch_size,
        )
    return images.augmented(
        examples.cache(),
        augment,
        global_batch_size=global_batch_size,
        seed=seed,
        buffer_size=50_000,
    )


def augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Shifts by up to four pixels each way, mirrors half of all images.

    Args:
        image: uint8 `[32, 32, 3]`.
        seed: Integers `[2]`.
    """
    border = [[_SHIFT, _SHIFT], [_SHIFT, _SHIFT], [0, 0]]
    # After the mean is taken off: the border is 0 then.
    padded = tf.pad(images.normalized(image, _MEAN, _DEVIATION), border)
    shifted = tf.image.stateless_random_crop(padded, image.shape, seed)
    return tf.image.stateless_random_flip_left_right(shifted, seed + 1)
