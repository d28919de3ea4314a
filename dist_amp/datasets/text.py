"""Text files as bytes, in pieces, to predict each byte from those before."""

import pathlib

import tensorflow as tf

from dist_amp.datasets import pieces
from dist_amp.stream import DatasetLike

NUM_TOKENS = 256  # one for each byte, UTF-8 as it is
_TEST_PART = 10  # the last tenth of each file
_TEST_NAMES = ("test", "val", "valid", "validation")


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
            `train.txt` and `test.txt` (or `val.txt`); of a folder without
            those the first nine tenths of each `*.txt` and its last tenth.
        global_batch_size: Pieces in a batch.
        seed: Of the order; None keeps it.
        data_dir: The folder of the files.
        length: Of a piece (--dataset_option=length=...).

    Raises:
        FileNotFoundError: There is no such file, or but one of the two.
    """
    is_train = split == "train"
    return pieces.batches(
        _parts(data_dir, is_train=is_train),
        tf.uint8,
        length=length,
        global_batch_size=global_batch_size,
        seed=seed if is_train else None,
    )


def _parts(data_dir: str | None, *, is_train: bool) -> list[pieces.Part]:
    found = pathlib.Path(data_dir).glob("*.txt") if data_dir else ()
    paths = {path.stem: path for path in sorted(found) if path.is_file()}
    if not paths:
        raise FileNotFoundError(
            f"{data_dir or 'no folder'} holds no .txt: pass as --data_dir the "
            "folder of the text."
        )
    named = [paths[name] for name in ("train", *_TEST_NAMES) if name in paths]
    if len(named) == 1:
        raise FileNotFoundError(
            f"{data_dir} holds {named[0].name} alone: it takes train.txt and "
            "test.txt, or files of other names, whose last tenths are kept to "
            "test on."
        )
    if named:
        return [pieces.Part.whole(named[0 if is_train else 1])]
    return [_part(path, is_train=is_train) for path in paths.values()]


def _part(path: pathlib.Path, *, is_train: bool) -> pieces.Part:
    size = path.stat().st_size
    border = size - size // _TEST_PART
    if is_train:
        return pieces.Part(path, 0, border)
    return pieces.Part(path, border, size)
