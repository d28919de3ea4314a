"""A checkpoint as files: whole or absent, and verified before it is used.

    ckpt-120/
      tensors.index, tensors.data-*   every tensor, in TensorFlow's format
      state.json                      plain values, and the tensors' shapes
      manifest.json                   the size and SHA-256 of each file above

The manifest is written last and appears at once, so a process that is killed
at any moment of a save leaves a folder without one, which is no checkpoint.
Paths may be of any file system that TensorFlow knows, `gs://` among them.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
_TENSORS = "tensors"
_LOCK = "lock"
_FORMAT = 1
_NAME = re.compile(r"ckpt-(\d+)(?:\.(\d+))?$")
_DAMAGED_NAME = re.compile(r"ckpt-[\d.]+\.damaged")
_CHUNK = 1 << 22

# What TensorFlow and Python raise where a disk, a network or a byte fails.
IO_ERRORS = (OSError, tf.errors.OpError)


class DamagedError(ValueError):
    """A checkpoint that is not what was written; the message says why."""


class FormatError(ValueError):
    """A checkpoint that another version of this library wrote."""


class LockedError(OSError):
    """Another run writes to the same folder."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without reading its tensors.

    Attributes:
        step: Global step, updates attempted.
        number: How many checkpoints the run had saved, this one included.
        is_finite: Whether the variables that were finite when training began
            still are.
        metrics: Results at the end of the epoch; empty within an epoch.
        created: Seconds since 1970, as the clock of the host told them.
        files: Size in bytes and SHA-256 of each file.
    """

    step: int
    number: int
    is_finite: bool
    metrics: Mapping[str, float]
    created: float
    files: Mapping[str, Mapping[str, Any]]

    @property
    def num_bytes(self) -> int:
        """Size of the checkpoint without the manifest."""
        return sum(entry["size"] for entry in self.files.values())


def path_of(directory: str, step: int, number: int = 0) -> str:
    """The folder of a checkpoint; `number` tells those of a step apart."""
    return _join(directory, f"ckpt-{step}" + (f".{number}" if number else ""))


def new_path(directory: str, step: int) -> str:
    """A folder for a checkpoint of a step, beside any other of that step.

    A whole checkpoint is never written over: the second of step 120 is
    `ckpt-120.1`.
    """
    same = [path for path in find(directory) if step_of(path) == step]
    if not same:
        return path_of(directory, step)
    if not tf.io.gfile.exists(_join(same[-1], MANIFEST)):
        return same[-1]  # cut short: its place is free
    return path_of(directory, step, key_of(same[-1])[1] + 1)


def write(
    path: str,
    tensors: Mapping[str, tf.Tensor],
    state: Mapping[str, Any],
    *,
    step: int,
    number: int = 1,
    metrics: Mapping[str, float] | None = None,
    judged: Collection[str] | None = None,
) -> Manifest:
    """Writes a checkpoint.

    Args:
        path: From `new_path`; what an interrupted save left is replaced.
        tensors: In host memory, by name.
        state: Values that JSON can hold.
        step: See `Manifest`.
        number: See `Manifest`.
        metrics: See `Manifest`.
        judged: Names of the tensors that `is_finite` speaks of; all by
            default.

    Raises:
        OSError, tf.errors.OpError: The disk is full, or the like; what was
            written is no checkpoint.
    """
    remove(path)
    tf.io.gfile.makedirs(path)
    names = sorted(tensors)
    if names:
        tf.raw_ops.SaveV2(
            prefix=_join(path, _TENSORS),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tensors[name] for name in names],
        )
    content = {
        "state": state,
        "tensors": {
            name: [tensor.dtype.name, tensor.shape.as_list()]
            for name, tensor in tensors.items()
        },
    }
    _write_text(_join(path, STATE), json.dumps(content, indent=1) + "\n")
    files = {
        name: _fingerprint(_join(path, name))
        for name in sorted(tf.io.gfile.listdir(path))
    }
    manifest = Manifest(
        step=step,
        number=number,
        is_finite=all(
            is_finite(tensor)
            for name, tensor in tensors.items()
            if judged is None or name in judged
        ),
        metrics=dict(metrics or {}),
        created=time.time(),
        files=files,
    )
    for name in files:
        _flush(_join(path, name))
    _write_manifest(path, manifest)
    return manifest


def read_manifest(path: str) -> Manifest | None:
    """The manifest of a checkpoint; None if its save was cut short.

    Raises:
        DamagedError: There is one and it is not what was written.
        FormatError: It is of another version of the library.
        OSError, tf.errors.OpError: It cannot be read.
    """
    file = _join(path, MANIFEST)
    if not tf.io.gfile.exists(file):
        return None
    with tf.io.gfile.GFile(file, "rb") as stream:
        text = stream.read()
    try:
        content = json.loads(text)
        fields = content["manifest"]
        is_whole = content["sha256"] == _digest_of(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error!r}") from error
    if not is_whole:
        raise DamagedError(f"{MANIFEST} has another checksum than it says")
    if fields.pop("format") != _FORMAT:
        raise FormatError(f"{path} is of another version of dist_amp.")
    return Manifest(**fields)


def check(path: str) -> Manifest | None:
    """Compares every file with the manifest, byte by byte.

    Returns:
        The manifest; None if the save was cut short.

    Raises:
        DamagedError: A file is missing or differs; the message names it.
    """
    manifest = read_manifest(path)
    if manifest is None:
        return None
    for name, expected in manifest.files.items():
        file = _join(path, name)
        if not tf.io.gfile.exists(file):
            raise DamagedError(f"{name} is missing")
        size = tf.io.gfile.stat(file).length
        if size != expected["size"]:
            raise DamagedError(
                f"{name} has {size} bytes instead of {expected['size']}"
            )
        if _fingerprint(file) != expected:
            raise DamagedError(f"{name} has another checksum than it had")
    return manifest


def read_tensors(path: str, prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors of a checkpoint by name, in host memory.

    Args:
        path: The checkpoint's folder.
        prefix: Only those whose names begin so.
    """
    content = json.loads(_read_text(_join(path, STATE)))
    names = [name for name in content["tensors"] if name.startswith(prefix)]
    if not names:
        return {}
    tensors = tf.raw_ops.RestoreV2(
        prefix=_join(path, _TENSORS),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        dtypes=[tf.as_dtype(content["tensors"][name][0]) for name in names],
    )
    return {
        name: tensor.numpy()
        for name, tensor in zip(names, tensors, strict=True)
    }


def read_verified(path: str, prefix: str = "") -> dict[str, np.ndarray]:
    """The same, once the checksums are found right.

    Raises:
        DamagedError: It is damaged or no whole checkpoint.
    """
    try:
        manifest = check(path)
    except DamagedError as error:
        raise DamagedError(f"{path} is damaged: {error}.") from error
    if manifest is None:
        raise DamagedError(f"{path} is cut short: no checkpoint.")
    return read_tensors(path, prefix)


def read_state(path: str) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return json.loads(_read_text(_join(path, STATE)))["state"]


def is_checkpoint(path: str) -> bool:
    """Whether a path is that of a checkpoint, by its name."""
    return bool(_NAME.search(path.rstrip("/")))


def find(directory: str) -> list[str]:
    """The checkpoints of a folder by step, whole or not, oldest first."""
    names = filter(_NAME.match, _names_in(directory))
    return [_join(directory, name) for name in sorted(names, key=key_of)]


def find_damaged(directory: str) -> list[str]:
    """What `set_aside` has renamed."""
    names = sorted(filter(_DAMAGED_NAME.match, _names_in(directory)))
    return [_join(directory, name) for name in names]


def step_of(path: str) -> int:
    """The step in a checkpoint's name."""
    return key_of(path)[0]


def remove(path: str) -> None:
    """Deletes a checkpoint, its manifest first."""
    if not tf.io.gfile.exists(path):
        return
    if tf.io.gfile.exists(_join(path, MANIFEST)):
        tf.io.gfile.remove(_join(path, MANIFEST))
    tf.io.gfile.rmtree(path)


def set_aside(path: str) -> str:
    """Renames a damaged checkpoint, so that nothing takes it for a whole one.

    Returns:
        Its new path; the old one where the folder cannot be written.
    """
    target, number = f"{path}.damaged", 1
    while tf.io.gfile.exists(target):
        target, number = f"{path}.damaged.{number}", number + 1
    try:
        tf.io.gfile.rename(path, target)
    except IO_ERRORS as error:
        _log.warning("%s cannot be renamed: %s", path, error)
        return path
    return target


@contextlib.contextmanager
def lock(directory: str) -> Iterator[None]:
    """Keeps other processes from writing to a folder; makes the folder.

    The kernel lifts it when the process ends, however it ends. Remote file
    systems have no locks, and none is taken there.

    Raises:
        LockedError: Another process, or this one, holds it.
        OSError: The folder cannot be written.
    """
    if not _is_local(directory):
        tf.io.gfile.makedirs(directory)
        yield
        return
    os.makedirs(directory, exist_ok=True)
    with open(pathlib.Path(directory, _LOCK), "a+") as file:
        try:
            _take(file)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                _log.warning("%s cannot be locked: %s", directory, error)
                yield
                return
            file.seek(0)
            raise LockedError(
                f"{directory} is in use by another run ({file.read().strip()})."
                " Wait for its end, or write to another folder (--run_dir)."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_locked(directory: str) -> bool:
    """Whether a process, this one included, holds the folder's lock.

    False on remote file systems, which have none.
    """
    file = pathlib.Path(directory, _LOCK)
    if not _is_local(directory) or not file.exists():
        return False
    with open(file) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False


# ------------------------------------------------------------------- private


def _take(file: Any) -> None:
    """Takes a lock that `is_locked` of others may hold for an instant."""
    for is_last in (False, False, True):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_last:
                raise
            time.sleep(0.05)
        else:
            return


def key_of(path: str) -> tuple[int, int]:
    """Step and number among those of the same step."""
    match = _NAME.search(path)
    if match is None:
        raise ValueError(f"A checkpoint is named ckpt-STEP. Received {path}.")
    return int(match[1]), int(match[2] or 0)


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"


def _names_in(directory: str) -> list[str]:
    if not tf.io.gfile.exists(directory):
        return []
    return [name.rstrip("/") for name in tf.io.gfile.listdir(directory)]


def _is_local(path: str) -> bool:
    return "://" not in path


def _read_text(path: str) -> str:
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read().decode()


def _write_text(path: str, text: str) -> None:
    with tf.io.gfile.GFile(path, "w") as file:
        file.write(text)


def _write_manifest(path: str, manifest: Manifest) -> None:
    fields = {"format": _FORMAT, **dataclasses.asdict(manifest)}
    content = {"manifest": fields, "sha256": _digest_of(fields)}
    file = _join(path, MANIFEST)
    _write_text(f"{file}.part", json.dumps(content, indent=1) + "\n")
    _flush(f"{file}.part")
    _flush(path)
    tf.io.gfile.rename(f"{file}.part", file, overwrite=True)
    _flush(path)
    _flush(path.rpartition("/")[0] or ".")


def _digest_of(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(path: str) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with tf.io.gfile.GFile(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def _flush(path: str) -> None:
    """Onto the disk, so that a power cut does not undo it."""
    if not _is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_finite(tensor: tf.Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor infinity."""
    if not tensor.dtype.is_floating:
        return True
    if tensor.dtype.size == 1:  # float8: no kernel
        tensor = tf.cast(tensor, tf.float32)
    return bool(tf.reduce_all(tf.math.is_finite(tensor)))
