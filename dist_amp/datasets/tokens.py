"""A long text as tokens, in pieces, to predict each token from those before."""

import pathlib

import tensorflow as tf

from dist_amp.datasets import pieces
from dist_amp.stream import DatasetLike


def build(
    split: str,
    global_batch_size: int,
    seed: int | None,
    data_dir: str | None,
    length: int = pieces.LENGTH,
) -> DatasetLike:
    """Batches of tokens `[batch, length]` and of those that follow, int32.

    Args:
        split: "train", a function of the pass that reads `train.bin`, or
            "test", which reads `val.bin`. The files are nothing but tokens,
            each an unsigned number of two bytes, the lower one first.
        global_batch_size: Pieces in a batch.
        seed: Of the order; None keeps it.
        data_dir: The folder of the files.
        length: Of a piece (--dataset_option=length=...).

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
    return pieces.batches(
        [pieces.Part.whole(path)],
        tf.uint16,
        length=length,
        global_batch_size=global_batch_size,
        seed=seed if split == "train" else None,
    )
