"""What Keras callbacks lack: a progress line, JSON lines, state to save."""

import copy
import json
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import keras
import numpy as np

TRAIN_ONLY = (
    "loss_scale",
    "skipped_updates",
    "examples_per_sec",
    "steps_per_sec",
    "learning_rate",
)


class JsonLines(keras.callbacks.Callback):
    """Appends a line for "train" and one for "test" after each epoch.

    A train line holds `step`, `epoch` (from 1), `split`, `loss`, each metric
    by its name, `loss_scale`, `skipped_updates`, `examples_per_sec`,
    `steps_per_sec`, `learning_rate` and `time` (seconds since 1970); a test
    line holds `step`, `epoch`, `split`, `loss`, the metrics and `time`.

    Args:
        path: The file; lines of epochs that are trained again after an
            interruption are replaced.
        global_step: Tells the number of updates attempted.
    """

    def __init__(
        self, path: str | pathlib.Path, global_step: Callable[[], int]
    ):
        super().__init__()
        self._path = pathlib.Path(path)
        self._global_step = global_step
        self._next_epoch: int | None = None

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
        lines = [{**head, "split": "train", **logs, "time": time.time()}]
        if test:
            lines.append({**head, "split": "test", **test, "time": time.time()})
        with self._path.open("a") as file:
            for line in lines:
                plain = {name: _plain(name, v) for name, v in line.items()}
                file.write(json.dumps(plain) + "\n")
        self._next_epoch = epoch + 1

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Drops lines of this epoch and later ones: they come again."""
        if self._next_epoch is not None and epoch >= self._next_epoch:
            return
        self._next_epoch = epoch
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.open().readlines() if self._path.exists() else []
        kept = [line for line in lines if _epoch_of(line) <= epoch]
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text("".join(kept))
        part.replace(self._path)

    def get_state(self) -> dict[str, Any]:
        """Nothing: the file itself is the state."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Does nothing."""


class CallbackStates:
    """What callbacks have learned since training began, to save and restore.

    Of each callback, the attributes that are not what they were when training
    began, where they are numbers, strings, lists or dicts of them, or arrays:
    `EarlyStopping.best`, its `best_weights`, a counter of your own. A callback
    that has `get_state()` and `set_state(state)`, a dict that JSON can hold,
    speaks for itself.

    Args:
        callbacks: Right after `on_train_begin`.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]):
        self._callbacks = list(callbacks)
        self._at_begin = [_plain_attributes(c) for c in self._callbacks]

    def read(self) -> tuple[list[Any], dict[str, np.ndarray]]:
        """Plain values, and arrays by name; what `write` takes."""
        states: list[Any] = []
        arrays: dict[str, np.ndarray] = {}
        pairs = zip(self._callbacks, self._at_begin, strict=True)
        for index, (callback, at_begin) in enumerate(pairs):
            kind = type(callback).__name__
            if hasattr(callback, "get_state"):
                states.append([kind, callback.get_state()])
                continue
            now = _plain_attributes(callback)
            changed = {
                n: v for n, v in now.items() if n not in at_begin
                or json.dumps(v) != json.dumps(at_begin[n])
            }  # fmt: skip
            states.append([kind, changed])
            for name, value in _array_attributes(callback).items():
                for place, array in enumerate(value):
                    arrays[f"callbacks/{index}/{name}/{place:05d}"] = array
        return states, arrays

    def write(
        self, states: Sequence[Any], arrays: Mapping[str, np.ndarray]
    ) -> list[str]:
        """Gives callbacks what `read` returned, by kind and order.

        Returns:
            The kinds that were saved and are not here.
        """
        left_out, callbacks = [], list(enumerate(self._callbacks))
        for old_index, (kind, state) in enumerate(states):
            matches = [c for c in callbacks if type(c[1]).__name__ == kind]
            if not matches:
                left_out.append(kind)
                continue
            callbacks.remove(matches[0])
            index, callback = matches[0]
            if hasattr(callback, "set_state"):
                callback.set_state(state)
                continue
            prefix = f"callbacks/{old_index}/"
            for name, value in {**self._at_begin[index], **state}.items():
                setattr(callback, name, copy.deepcopy(value))
            for name in {
                k.split("/")[2] for k in arrays if k.startswith(prefix)
            }:
                values = [v for k, v in sorted(arrays.items())
                          if k.startswith(f"{prefix}{name}/")]  # fmt: skip
                setattr(callback, name, values)
        return left_out


class Progress(keras.callbacks.Callback):
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

    def get_state(self) -> dict[str, Any]:
        """Nothing: what is on the screen is no state of the run."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Does nothing."""

    def _progress_line(self, step: int, logs: Mapping[str, Any]) -> str:
        total = self.params.get("steps")
        done = (
            f"{step}/{total} {_bar(step, total)}" if total else f"step {step}"
        )
        rate = logs.get("steps_per_sec", math.nan)
        shown = [
            f"{name} {_short(value)}"
            for name, value in _loss_first(logs).items()
            if name == "loss_scale"
            or not (name in TRAIN_ONLY or name.startswith("val_"))
        ]
        return f"epoch {self._epoch + 1} {done} {rate:.0f} steps/s " + (
            " ".join(shown)
        )

    def _show(self, line: str) -> None:
        if self._is_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            padding = " " * max(0, self._width - len(line))
            self._stream.write(f"\r{line}{padding}")
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def _plain_attributes(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Attributes that JSON can hold, and gives back as they were."""
    found = {}
    for name, value in vars(callback).items():
        value = value.item() if isinstance(value, np.generic) else value
        if name not in ("params", "validation_data") and _is_plain(value):
            found[name] = copy.deepcopy(value)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(
            isinstance(k, str) and _is_plain(v) for k, v in value.items()
        )
    return value is None or isinstance(value, bool | int | float | str)


def _array_attributes(
    callback: keras.callbacks.Callback,
) -> dict[str, list[np.ndarray]]:
    """Lists of arrays, like the best weights."""
    return {
        name: value
        for name, value in vars(callback).items()
        if isinstance(value, list)
        and value
        and all(isinstance(one, np.ndarray) for one in value)
    }


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


def _epoch_of(line: str) -> float:
    """Of a line of JSON; infinite if the process was killed writing it."""
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError):
        return math.inf


def _plain(name: str, value: Any) -> Any:
    """A value for JSON, which has no NaN; Keras makes floats of counts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return int(value) if name == "skipped_updates" else value
