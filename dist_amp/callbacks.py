"""What Keras callbacks lack: a progress line, JSON lines, patience."""

import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import keras
import numpy as np
import tensorflow as tf

from dist_amp import strategy as strategy_lib
from dist_amp.meter import MEASURED

_log = logging.getLogger(__name__)

TRAIN_ONLY = (
    "loss_scale",
    "skipped_updates",
    "learning_rate",
    "wire_error",
    *MEASURED,
)


_COUNTS = ("skipped_updates", "rollbacks")


class StatelessCallback(keras.callbacks.Callback):
    """One that a checkpoint need not know: what it writes is its state."""

    def get_state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Does nothing."""


class JsonLines(StatelessCallback):
    """Appends a line for "train" and one for "test" after each epoch.

    A train line holds `step`, `epoch` (from 1), `split`, `loss`, each metric
    by its name, `loss_scale`, `skipped_updates`, `examples_per_sec`,
    `steps_per_sec`, `learning_rate`, what `Meter.read` could measure, what
    `measure` tells and `time` (seconds since 1970); a test line holds `step`,
    `epoch`, `split`, `loss`, the metrics and `time`.

    Lines are on the disk before the epoch's checkpoint is. A full disk is
    logged, and the lines are written when there is room.

    Args:
        path: The file; lines of epochs that are trained again after an
            interruption are replaced.
        global_step: Tells the number of updates attempted.
        measure: Further numbers of the train line.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        global_step: Callable[[], int],
        measure: Callable[[], Mapping[str, Any]] = dict,
    ):
        super().__init__()
        self._measure = measure
        self._path = pathlib.Path(path)
        self._global_step = global_step
        self._next_epoch: int | None = None
        self._waiting: list[str] = []

    def on_epoch_end(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the lines of one epoch."""
        logs = _loss_first(logs or {})
        head = {"step": self._global_step(), "epoch": epoch + 1}
        test = {
            key.removeprefix("val_"): logs.pop(key)
            for key in list(logs)
            if key.startswith("val_")
        }
        logs |= self._measure()
        for name in logs.keys() & set(_COUNTS):  # Keras makes floats of them
            logs[name] = int(logs[name])
        logs = {k: v for k, v in logs.items() if not _is_unmeasured(k, v)}
        lines = [{**head, "split": "train", **logs, "time": time.time()}]
        if test:
            lines.append({**head, "split": "test", **test, "time": time.time()})
        for line in lines:
            self._waiting.append(as_json(line) + "\n")
        self._next_epoch = epoch + 1
        self._write_waiting()

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Drops lines of this epoch and later ones: they come again."""
        if self._next_epoch is not None and epoch >= self._next_epoch:
            return
        self._next_epoch = epoch
        self._waiting = [w for w in self._waiting if _epoch_of(w) <= epoch]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.open().readlines() if self._path.exists() else []
        kept = [line for line in lines if _epoch_of(line) <= epoch]
        if kept == lines:
            return
        part = self._path.with_name(f"{self._path.name}.part")
        with part.open("w") as file:
            file.writelines(kept)
            _flush(file)
        part.replace(self._path)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Tries once more what there was no room for."""
        self._write_waiting()

    def _write_waiting(self) -> None:
        """All lines that wait, or none of them."""
        if not self._waiting:
            return
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.writelines(self._waiting)
                _flush(file)
        except OSError as error:
            _log.error(
                "%s cannot be written: %s. %d lines wait for the next epoch.",
                self._path,
                error,
                len(self._waiting),
            )
            with contextlib.suppress(OSError):
                os.truncate(self._path, size)
            return
        self._waiting = []


class TensorBoard(keras.callbacks.TensorBoard):
    """Keras' own, but a disk that is full does not end the training."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes the epoch's scalars."""
        with _logging_failures("TensorBoard"):
            super().on_epoch_end(epoch, logs)

    def on_test_end(self, logs: Any = None) -> None:
        """Writes the evaluation's scalars."""
        with _logging_failures("TensorBoard"):
            super().on_test_end(logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Closes the files."""
        with _logging_failures("TensorBoard"):
            super().on_train_end(logs)


class Histograms(StatelessCallback):
    """TensorBoard histograms of each variable and of its newest gradient.

    At a step that counts updates, under `weights/` and `gradients/` by the
    variable's path. A disk that is full does not end the training.

    Args:
        directory: Of its files.
        gradients: Tells the gradients by path: `trainer.keep_gradients().read`.
        global_step: Tells the number of updates attempted.
        every_epochs: Epochs between two of them.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        gradients: Callable[[], Mapping[str, np.ndarray]],
        global_step: Callable[[], int],
        every_epochs: int = 1,
    ):
        super().__init__()
        self._directory = str(directory)
        self._gradients = gradients
        self._global_step = global_step
        self._every_epochs = every_epochs
        self._file: Any = None

    def on_epoch_end(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Writes them, if it is time."""
        if (epoch + 1) % self._every_epochs:
            return
        with _logging_failures("TensorBoard"):
            if self._file is None:
                self._file = tf.summary.create_file_writer(self._directory)
            with self._file.as_default(step=self._global_step()):
                self._write()
            self._file.flush()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Closes the file."""
        if self._file is not None:
            with _logging_failures("TensorBoard"):
                self._file.close()
            self._file = None

    def _write(self) -> None:
        for variable in self.model.trainable_variables:
            value = strategy_lib.local_copies(variable)[0].numpy()
            tf.summary.histogram(f"weights/{variable.path}", value)
        for path, gradient in self._gradients().items():
            tf.summary.histogram(f"gradients/{path}", gradient)


class Progress(StatelessCallback):
    """One line that is rewritten on a terminal; plain lines in a file.

    Shows the step in the epoch, steps/s, the loss, the metrics and the loss
    scale. In a file a line is added every `seconds_between_lines`.

    Args:
        stream: Where to write; standard output by default.
        describe: Makes the line that ends an epoch from `(epoch, logs)`.
        seconds_between_lines: How often a file gets a line within an epoch;
            `math.inf`: neither a file nor a terminal gets one.
        clock: Seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        describe: Callable[[int, Mapping[str, float]], str] | None = None,
        seconds_between_lines: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        self._stream = stream or sys.stdout
        self._describe = describe or describe_epoch
        self._clock = clock
        # One line an epoch is asked for by an infinite interval.
        self._is_terminal = self._stream.isatty() and math.isfinite(
            seconds_between_lines
        )
        self._interval = 0.1 if self._is_terminal else seconds_between_lines
        self._last_shown = self._clock()
        self._epoch = 0
        self._width = 0

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Remembers the epoch."""
        self._epoch = epoch
        self._last_shown = self._clock()

    def on_train_batch_end(
        self, batch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Shows the step, if it is time."""
        if self._clock() - self._last_shown < self._interval:
            return
        self._last_shown = self._clock()
        self._show(self._progress_line(batch + 1, logs or {}))

    def on_epoch_end(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Ends the line with the epoch's results."""
        logs = logs or {}
        if self._is_terminal:
            steps = self.params.get("steps") or 0
            self._show(self._progress_line(steps, logs))
            self._stream.write("\n")
        self._width = 0
        self._stream.write(self._describe(epoch, logs) + "\n")
        self._stream.flush()

    def _progress_line(self, step: int, logs: Mapping[str, Any]) -> str:
        total = self.params.get("steps")
        done = (
            f"{step}/{total} {_bar(step, total)}" if total else f"step {step}"
        )
        rate = logs.get("steps_per_sec", math.nan)
        speed = "" if math.isnan(rate) else f" {rate:.0f} steps/s"
        shown = [
            f"{name} {_short(value)}"
            for name, value in _loss_first(logs).items()
            if name == "loss_scale"
            or not (name in TRAIN_ONLY or name.startswith("val_"))
        ]
        return " ".join([f"epoch {self._epoch + 1} {done}{speed}", *shown])

    def _show(self, line: str) -> None:
        if self._is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            padding = " " * max(0, self._width - len(line))
            self._stream.write(f"\r{line}{padding}")
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def describe_epoch(epoch: int, logs: Mapping[str, float]) -> str:
    """Makes a line like `Epoch 1, Loss: 0.3012, Accuracy: 91.50, ...`."""
    parts = [f"Epoch {epoch + 1}"]
    for name, value in _loss_first(logs).items():
        base = name.removeprefix("val_")
        if base in TRAIN_ONLY:
            continue
        title = base.replace("_", " ").title()
        title = f"Test {title}" if name != base else title
        factor, digits = (100, 2) if "accuracy" in base else (1, 4)
        digits = 0 if base in _COUNTS else digits
        numbers = value if isinstance(value, list) else [value]
        text = " ".join(f"{factor * number:.{digits}f}" for number in numbers)
        parts.append(f"{title}: {text}")
    return ", ".join(parts)


def _loss_first(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The loss, then the metrics, then the same for validation."""

    def place(name: str) -> tuple[bool, bool]:
        is_validation = name.startswith("val_")
        return is_validation, name.removeprefix("val_") != "loss"

    return {name: logs[name] for name in sorted(logs, key=place)}


def _bar(step: int, total: int, width: int = 6) -> str:
    filled = min(width, width * step // total)
    return f"[{'=' * filled}{'.' * (width - filled)}]"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_short, value))
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3f}"


def _flush(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _logging_failures(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        _log.error("%s cannot be written: %s", name, error)


def _epoch_of(line: str) -> float:
    """Of a line of JSON; infinite if the process was killed writing it."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError):
        return math.inf


def _is_unmeasured(name: str, value: Any) -> bool:
    return name in MEASURED and isinstance(value, float) and math.isnan(value)


def as_json(values: Mapping[str, Any]) -> str:
    """Numbers, arrays and texts as JSON; it has no NaN, so "nan" stands for it.

    Args:
        values: By name; may be nested.
    """
    return json.dumps(_plain(values), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | tf.Tensor):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
