"""Pieces of long files of tokens, to predict each token from those before."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_amp import data
from dist_amp.stream import DatasetLike

LENGTH = 1024  # of GPT-2


@dataclasses.dataclass(frozen=True)
class Part:
    """Some bytes of a file.

    Attributes:
        path: Of the file.
        begin: Its first byte, from 0.
        end: The byte after its last one.
    """

    path: pathlib.Path
    begin: int
    end: int

    @classmethod
    def whole(cls, path: pathlib.Path) -> "Part":
        """All of a file."""
        return cls(path, 0, path.stat().st_size)

    def num_pieces(self, size: int) -> int:
        """Pieces of so many bytes that fit in it."""
        return (self.end - self.begin) // size


def batches(
    parts: Sequence[Part],
    dtype: Any,
    *,
    length: int,
    global_batch_size: int,
    seed: int | None,
) -> DatasetLike:
    """Batches of `(tokens, those that follow)`, int32 `[batch, length]`.

    No piece crosses from one part to the next, and what is left of a part
    makes none. Up to 1 GiB is kept in memory and shuffled as a whole.

    Args:
        parts: Of files that are nothing but tokens.
        dtype: Of a token in the files, `tf.uint8` or `tf.uint16`, the lower
            byte first.
        length: Of a piece; the token after it is read as well.
        global_batch_size: Pieces in a batch.
        seed: Shuffles, a function of the pass; None keeps the order.

    Raises:
        ValueError: There is not one whole piece.
    """
    dtype = tf.as_dtype(dtype)
    size = dtype.size * (length + 1)
    num_pieces = sum(part.num_pieces(size) for part in parts)
    if length < 1 or not num_pieces:
        names = ", ".join(str(part.path) for part in parts)
        raise ValueError(
            f"`length` must be positive and leave a whole piece of {names}. "
            f"Received {length} (--dataset_option=length=...)."
        )
    if num_pieces * size <= data.MAX_BYTES_IN_MEMORY:
        make: Any = data.from_arrays(
            _in_memory(parts, dtype, length + 1), global_batch_size, seed
        ).map(_shifted)
    else:
        make = _from_files(parts, dtype, length + 1, global_batch_size, seed)
    return make(tf.constant(0, tf.int64)) if seed is None else make


def _in_memory(
    parts: Sequence[Part], dtype: tf.DType, tokens: int
) -> np.ndarray:
    """All pieces, `[num_pieces, tokens]`."""
    plain = np.dtype(dtype.as_numpy_dtype).newbyteorder("<")
    arrays = [
        np.fromfile(
            part.path,
            plain,
            count=part.num_pieces(plain.itemsize * tokens) * tokens,
            offset=part.begin,
        ).reshape(-1, tokens)
        for part in parts
    ]
    return np.concatenate(arrays).astype(dtype.as_numpy_dtype, copy=False)


def _shifted(pieces: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    tokens = tf.cast(pieces, tf.int32)
    return tokens[..., :-1], tokens[..., 1:]


def _from_files(
    parts: Sequence[Part],
    dtype: tf.DType,
    tokens: int,
    global_batch_size: int,
    seed: int | None,
) -> Any:
    """The same, for what does not fit in memory: shuffled in a buffer."""
    size = dtype.size * tokens
    datasets = [
        tf.data.FixedLengthRecordDataset(
            [str(part.path)],
            size,
            header_bytes=part.begin,
            footer_bytes=part.path.stat().st_size
            - part.begin
            - size * part.num_pieces(size),
        )
        for part in parts
    ]
    pieces = datasets[0]
    for dataset in datasets[1:]:
        pieces = pieces.concatenate(dataset)
    num_pieces = sum(part.num_pieces(size) for part in parts)
    pieces = pieces.apply(tf.data.experimental.assert_cardinality(num_pieces))

    def decode(piece: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        raw = tf.io.decode_raw(piece, dtype)
        return _shifted(tf.ensure_shape(raw, [tokens]))

    def make(number: tf.Tensor) -> tf.data.Dataset:
        order = pieces
        if seed is not None:
            order = data.shuffled(pieces, data.seed_of_pass(seed, number))
        return order.map(decode, num_parallel_calls=tf.data.AUTOTUNE).batch(
            global_batch_size
        )

    return make
