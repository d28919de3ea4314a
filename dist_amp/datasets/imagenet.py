"""ImageNet of TFDS, cropped and mirrored.

Sources: Russakovsky et al., "ImageNet Large Scale Visual Recognition
Challenge", IJCV 2015, for the images; Szegedy et al., "Going Deeper with
Convolutions", CVPR 2015, for the crops to train on.
"""

import importlib

import tensorflow as tf

from dist_amp import sources
from dist_amp.datasets import images
from dist_amp.loading import LoadedBatches

SIDE = 224
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_CENTRE = 224 / 256  # of the shorter side, to test on
_BUFFER = 16_384  # JPEGs, some 2 GB; TFDS keeps them shuffled


def build(
    split: str,
    global_batch_size: int,
    seed: int | None,
    data_dir: str | None,
) -> LoadedBatches:
    """Batches of float32 `[batch, 224, 224, 3]` and labels 0..999.

    Args:
        split: "train", a function of the pass, or "test": TFDS' validation.
        global_batch_size: Examples in a batch.
        seed: Of order, crops and mirrors; None keeps the order and takes
            the centre.
        data_dir: Where TFDS keeps its data. It does not download these
            images: put the archives of image-net.org in downloads/manual.
    """
    tfds = importlib.import_module("tensorflow_datasets")  # slow to import
    builder = sources.prepare_tfds("imagenet2012", data_dir)
    examples = builder.as_dataset(
        split="train" if split == "train" else "validation",
        as_supervised=True,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    return batches(
        examples, global_batch_size, seed if split == "train" else None
    )


def batches(
    examples: tf.data.Dataset, global_batch_size: int, seed: int | None
) -> LoadedBatches:
    """Batches of images and labels, changed where there is a seed.

    Args:
        examples: `(JPEG, label)`.
        global_batch_size: Examples in a batch; the last one may be smaller.
        seed: None keeps order and images.
    """
    if seed is None:
        return images.unchanged(examples, centre, global_batch_size)
    return images.augmented(
        examples,
        random_crop,
        global_batch_size=global_batch_size,
        seed=seed,
        buffer_size=_BUFFER,
    )


def random_crop(jpeg: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """A part of 8% to 100% of the image, resized; half of them mirrored.

    Args:
        jpeg: Scalar string.
        seed: Integers `[2]`.
    """
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(jpeg),
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
    )
    window = tf.concat([begin[:2], size[:2]], axis=0)
    return tf.image.stateless_random_flip_left_right(
        _resized(jpeg, window), seed + 1
    )


def centre(jpeg: tf.Tensor) -> tf.Tensor:
    """The middle square, 7/8 of the shorter side, resized."""
    shape = tf.image.extract_jpeg_shape(jpeg)[:2]
    shorter = tf.cast(tf.reduce_min(shape), tf.float32)
    side = tf.cast(tf.round(_CENTRE * shorter), tf.int32)
    window = tf.concat([(shape - side) // 2, [side, side]], axis=0)
    return _resized(jpeg, window)


def _resized(jpeg: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    """Decodes only the window: top, left, height, width."""
    image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
    resized = tf.image.resize(image, [SIDE, SIDE], "bilinear")
    return images.normalized(resized, _MEAN, _DEVIATION)
