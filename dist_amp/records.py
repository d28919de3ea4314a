"""Files of records: which there are, how many they hold, any of them.

A TFRecord file can only be read from its start; its records are counted by
their lengths, without reading them. An ArrayRecord file holds an index, so
that any record is read at once, by the array_record package.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_NUM_THREADS = 16
# Nothing is read ahead: the next record is anywhere.
_READER_OPTIONS = "readahead_buffer_size:0"
_READER_BUFFER = 2**15  # bytes


def find(pattern: str) -> list[str]:
    """The files of a pattern, sorted, so that all workers agree.

    Args:
        pattern: With `*`, `?` or `[...]`; on any of TensorFlow's file systems.

    Raises:
        ValueError: There is none.
    """
    paths = sorted(tf.io.gfile.glob(os.path.expanduser(pattern)))
    if not paths:
        raise ValueError(
            f"There is no file {pattern}: name files of records, with * for "
            "what differs among them, where every worker can read them."
        )
    return paths


def are_array_records(paths: Sequence[str]) -> bool:
    """Whether the files are ArrayRecord, by their names.

    Raises:
        ValueError: Some are and some are not.
    """
    found = {".array_record" in os.path.basename(path) for path in paths}
    if len(found) > 1:
        raise ValueError(
            f"Files must be either TFRecord or ArrayRecord. Received both, as "
            f"{paths[0]} and {paths[-1]}."
        )
    return found.pop()


def num_bytes(paths: Sequence[str]) -> int:
    """Size of all files."""
    return sum(tf.io.gfile.stat(path).length for path in paths)


def count(paths: Sequence[str]) -> int | None:
    """Records in TFRecord files; None if they are not on this host's disks.

    Reads eight bytes a record: a second for some 100,000 of them.

    Raises:
        ValueError: A file is damaged or something else.
    """
    if any("://" in path for path in paths):
        return None
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        return sum(pool.map(_count_in, paths))


def _count_in(path: str) -> int:
    """A record is its length in 8 bytes, 4 of checksum, itself, 4 again."""
    size, place, number = os.path.getsize(path), 0, 0
    with open(path, "rb", buffering=0) as file:
        while place + 8 <= size:
            (length,) = struct.unpack("<Q", os.pread(file.fileno(), 8, place))
            place += 8 + 4 + length + 4
            number += 1
    if place != size:
        raise ValueError(
            f"{path} is no TFRecord file, or compressed, or cut short: after "
            f"{number} records it does not end where the last one does."
        )
    return number


@dataclasses.dataclass(frozen=True)
class Piece:
    """Records of a file.

    Attributes:
        path: Of the file.
        first: The first one of them.
        number: How many there are.
    """

    path: str
    first: int
    number: int


class ArrayRecords:
    """Records of ArrayRecord files, by their place among all of them.

    Args:
        pieces: One after the other.

    Raises:
        ValueError: The files are not on this host's disks.
    """

    def __init__(self, pieces: Iterable[Piece]):
        self._pieces = [piece for piece in pieces if piece.number]
        for path in {one.path for one in self._pieces}:
            _check_is_local(path)
        self._ends = list(itertools.accumulate(p.number for p in self._pieces))
        self._readers: dict[str, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def of_files(cls, paths: Iterable[str]) -> "ArrayRecords":
        """All records of some files.

        Raises:
            ValueError: A file cannot be read.
        """
        pieces = []
        for path in paths:
            reader = _open(path)
            pieces.append(Piece(path, 0, reader.num_records()))
            reader.close()
        return cls(pieces)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, places: np.ndarray) -> np.ndarray:
        """Some records, `[n]` bytes, by their places, int64 `[n]`.

        Safe in several threads.
        """
        by_piece: dict[int, list[tuple[int, int]]] = {}
        for row, place in enumerate(places.tolist()):
            piece = bisect.bisect_right(self._ends, place)
            by_piece.setdefault(piece, []).append((row, place))
        # Not from a list, of which NumPy would make strings without their
        # trailing zeros.
        found = np.empty(len(places), object)
        for rows, some in self._pool.map(self._read_of, by_piece.items()):
            for row, record in zip(rows, some, strict=True):
                found[row] = record
        return found

    def _read_of(
        self, wanted: tuple[int, list[tuple[int, int]]]
    ) -> tuple[list[int], list[bytes]]:
        index, rows_and_places = wanted
        piece = self._pieces[index]
        shift = piece.first - (self._ends[index] - piece.number)
        rows = [row for row, _ in rows_and_places]
        places = [place + shift for _, place in rows_and_places]
        return rows, self._reader(piece.path).read(places)

    def _reader(self, path: str) -> Any:
        with self._lock:
            if path not in self._readers:
                self._readers[path] = _open(path)
            return self._readers[path]

    @functools.cached_property
    def _pool(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)


def _check_is_local(path: str) -> None:
    if "://" in path:
        raise ValueError(
            "ArrayRecord files are read by a package that knows local files "
            f"only. Received {path}: mount or copy them, or use TFRecord files."
        )


def _open(path: str) -> Any:
    """A reader; the package is imported only where it is needed."""
    _check_is_local(path)
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package array_record, which exists for Linux "
            "and macOS: pip install array_record; or use TFRecord files."
        ) from error
    reader = array_record_module.ArrayRecordReader(
        path,
        options=_READER_OPTIONS,
        file_reader_buffer_size=_READER_BUFFER,
    )
    if not reader.ok():
        try:
            reader.read([0])
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
    return reader
