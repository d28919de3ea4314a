"""A long text as tokens, in pieces, to predict each token from those before."""

import pathlib
from typing import Any

import tensorflow as tf

from dist_amp import data
from dist_amp.stream import DatasetLike

LENGTH = 1024  # of GPT-2
_BYTES = 2  # of a token


def build(
    split: str, global_batch_size: int, seed: int, data_dir: str | None
) -> DatasetLike:
    """Batches of tokens `[batch, 1024]` and of those that follow, int32.

    Args:
        split: "train", a function of the pass that reads `train.bin`, or
            "test", which reads `val.bin`. The files are nothing but tokens,
            each an unsigned number of two bytes, the lower one first.
        global_batch_size: Pieces in a batch.
        seed: Of the order.
        data_dir: The folder of the files.

    Raises:
        FileNotFoundError: There is no such file.
    """
    name = "train.bin" if split == "train" else "val.bin"
    path = pathlib.Path(data_dir or ".") / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: pass as --data_dir the folder of train.bin "
            "and val.bin, tokens of two bytes each."
        )
    return batches(path, global_batch_size, seed if split == "train" else None)


def batches(
    path: pathlib.Path,
    global_batch_size: int,
    seed: int | None,
    length: int = LENGTH,
) -> DatasetLike:
    """Batches of pieces of a file, shuffled where there is a seed.

    Args:
        path: Of tokens, as in `build`.
        global_batch_size: Pieces in a batch.
        seed: None keeps the order.
        length: Of a piece; the token after it is read as well.
    """
    size = _BYTES * (length + 1)
    number_of_pieces = path.stat().st_size // size
    rest = path.stat().st_size % size
    pieces = tf.data.FixedLengthRecordDataset(
        [str(path)], size, footer_bytes=rest
    ).apply(tf.data.experimental.assert_cardinality(number_of_pieces))

    def shift(piece: tf.Tensor) -> Any:
        tokens = tf.cast(tf.io.decode_raw(piece, tf.uint16), tf.int32)
        tokens = tf.ensure_shape(tokens, [length + 1])
        return tokens[:-1], tokens[1:]

    def make(number: tf.Tensor) -> tf.data.Dataset:
        order = pieces
        if seed is not None:
            order = data.shuffled(pieces, data.seed_of_pass(seed, number))
        return order.map(shift, num_parallel_calls=tf.data.AUTOTUNE).batch(
            global_batch_size
        )

    return make(tf.constant(0, tf.int64)) if seed is None else make
