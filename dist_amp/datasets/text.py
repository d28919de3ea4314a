"""Text files as bytes, in pieces, to predict each byte from those before."""

import pathlib

import tensorflow as tf

from dist_amp.datasets import pieces
from dist_amp.stream import DatasetLike

NUM_TOKENS = 256  # one for each byte, UTF-8 as it is
_TEST_PART = 10  # the last tenth of each file


def build(
    split: str,
    global_batch_size: int,
    seed: int | None,
    data_dir: str | None,
    length: int = pieces.LENGTH,
) -> DatasetLike:
    """Batches of bytes `[batch, length]` and of those that follow, int32.

    Args:
        split: "train", a function of the pass, or "test". They are
            `train.txt` and `test.txt` if the folder has both; else the first
            nine tenths of each `*.txt` and its last tenth.
        global_batch_size: Pieces in a batch.
        seed: Of the order; None keeps it.
        data_dir: The folder of the files.
        length: Of a piece (--dataset_option=length=...).

    Raises:
        FileNotFoundError: There is no such file.
    """
    is_train = split == "train"
    return pieces.batches(
        _parts(pathlib.Path(data_dir or "."), is_train=is_train),
        tf.uint8,
        length=length,
        global_batch_size=global_batch_size,
        seed=seed if is_train else None,
    )


def _parts(folder: pathlib.Path, *, is_train: bool) -> list[pieces.Part]:
    train, test = folder / "train.txt", folder / "test.txt"
    if train.is_file() and test.is_file():
        return [pieces.Part.whole(train if is_train else test)]
    paths = sorted(path for path in folder.glob("*.txt") if path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no .txt: pass as --data_dir the folder of the "
            "text."
        )
    return [_part(path, is_train=is_train) for path in paths]


def _part(path: pathlib.Path, *, is_train: bool) -> pieces.Part:
    size = path.stat().st_size
    border = size - size // _TEST_PART
    if is_train:
        return pieces.Part(path, 0, border)
    return pieces.Part(path, border, size)
