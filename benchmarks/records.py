"""Images as JPEG in TFRecord files, as ImageNet is kept.

python -m benchmarks.records resnet50 FOLDER
"""

import pathlib
import sys

import numpy as np
import tensorflow as tf

from benchmarks.workloads import WORKLOADS, ResNet, Workload

_FILES = 8
_FEATURES = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "label": tf.io.FixedLenFeature([], tf.int64),
}


def write(work: Workload, directory: pathlib.Path) -> None:
    """Writes the examples of a workload of images.

    Args:
        work: Its sizes are those of a `ResNet`.
        directory: An empty folder.
    """
    generator = np.random.default_rng(0)
    side = _side(work)
    coarse = (work.num_examples, side // 8, side // 8, 3)
    images = generator.integers(0, 256, coarse, np.uint8)
    labels = generator.integers(0, work.sizes.classes, work.num_examples)
    for file in range(_FILES):
        path = str(directory / f"images-{file}.tfrecord")
        with tf.io.TFRecordWriter(path) as writer:
            for i in range(file, work.num_examples, _FILES):
                # As smooth as photographs: noise takes longer to decode.
                image = tf.image.resize(images[i], (side, side), "bicubic")
                writer.write(_example(image, int(labels[i])))


def _side(work: Workload) -> int:
    assert isinstance(work.sizes, ResNet)
    return work.sizes.side


def _example(image: tf.Tensor, label: int) -> bytes:
    jpeg = tf.io.encode_jpeg(tf.saturate_cast(image, tf.uint8)).numpy()
    features = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(
        features=tf.train.Features(feature=features)
    ).SerializeToString()


def read(work: Workload, directory: str) -> tf.data.Dataset:
    """Shuffled batches of images in [0, 1] and labels, without end."""
    side = _side(work)

    def decode(example: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = tf.io.parse_single_example(example, _FEATURES)
        image = tf.io.decode_jpeg(parsed["image"], channels=3)
        image = tf.ensure_shape(image, [side, side, 3])
        image = tf.image.random_flip_left_right(image)
        return tf.cast(image, tf.float32) / 255.0, parsed["label"]

    files = tf.data.Dataset.list_files(f"{directory}/*.tfrecord", seed=0)
    examples = files.interleave(
        tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE
    )
    return (
        examples.cache()  # encoded
        .shuffle(work.num_examples, seed=0)
        .repeat()
        .map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(work.batch_size, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
    )


if __name__ == "__main__":
    write(WORKLOADS[sys.argv[1]], pathlib.Path(sys.argv[2]))
