"""What a run has left in its folder: numbers by epoch, settings, versions.

Standard library only; the run may be under way.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.config import ConfigError
from launch.run_dir import RunDir

SPLITS = ("train", "test")
_PLACES = ("step", "epoch", "split", "time")
_PARTS = ("settings", "resolved", "versions")  # of config.json
# Of a metric with a value for each class, this many are shown.
_MAX_PARTS = 8
# As the names of Keras' metrics have it.
_LESS_IS_BETTER = (
    *("loss", "err", "mse", "mae", "mape", "msle", "perplexity"),
    *("entropy", "diverg", "hinge", "poisson", "log_cosh", "logcosh"),
)


@dataclasses.dataclass(frozen=True)
class Series:
    """One split of a run, an entry for each epoch.

    Attributes:
        epoch: From 1.
        step: Updates attempted by its end.
        time: Seconds since 1970.
        values: By field; NaN and infinities too, None where a line lacks it.
    """

    epoch: Sequence[int]
    step: Sequence[int]
    time: Sequence[float]
    values: Mapping[str, Sequence[float | None]]

    def last(self, field: str) -> float | None:
        """The newest value; None if there is none."""
        known = [v for v in self.values.get(field, ()) if v is not None]
        return known[-1] if known else None

    def best(self, field: str) -> tuple[float, int] | None:
        """The best finite value, and its epoch; see `is_less_better`."""
        known = [
            (value, epoch)
            for value, epoch in zip(
                self.values.get(field, ()), self.epoch, strict=False
            )
            if value is not None and math.isfinite(value)
        ]
        sign = 1 if is_less_better(field) else -1
        return min(known, key=lambda one: sign * one[0], default=None)

    def median(self, field: str) -> float | None:
        """Of the finite values; None if there are none."""
        known = [
            value
            for value in self.values.get(field, ())
            if value is not None and math.isfinite(value)
        ]
        return statistics.median(known) if known else None


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run.

    Attributes:
        name: Short, and another than that of the other runs.
        path: Its folder.
        train: What was measured in training,
        test: and in validation; empty where there is none.
        settings: Of `config.json`, which a run writes at its start.
        resolved: What "auto" became, and why.
        versions: Of Python and packages.
        is_finished: Whether it has saved its model.
    """

    name: str
    path: str
    train: Series
    test: Series
    settings: Mapping[str, Any]
    resolved: Mapping[str, Any]
    versions: Mapping[str, str]
    is_finished: bool

    def series(self, split: str) -> Series:
        """Of "train" or "test"."""
        return self.train if split == "train" else self.test

    @property
    def fields(self) -> list[str]:
        """Names of all values, in the order of the file."""
        return list(dict.fromkeys([*self.train.values, *self.test.values]))

    @property
    def num_epochs(self) -> int:
        """Epochs that are done."""
        return self.train.epoch[-1] if self.train.epoch else 0

    @property
    def planned_epochs(self) -> int | None:
        """Epochs to train for, if the run has told."""
        told = self.resolved.get("epochs")
        return told if isinstance(told, int) else None


def is_less_better(field: str) -> bool:
    """Whether a field is better the less it is, as its name tells."""
    return any(part in field for part in _LESS_IS_BETTER)


def read_runs(paths: Sequence[str]) -> list[RunRecord]:
    """Reads the folders of runs; of a folder of such folders all of them.

    Raises:
        ConfigError: One is not there, or holds no run.
    """
    found = [run for path in paths for run in _runs_in(path)]
    return [
        _read(path, name)
        for path, name in zip(found, _names(found), strict=True)
    ]


def _runs_in(path: str) -> list[str]:
    """The path, or the runs in that folder, if it is none itself."""
    folder = pathlib.Path(path)
    if _holds_run(folder) or not folder.is_dir():
        return [path]
    return [str(x) for x in sorted(folder.iterdir()) if _holds_run(x)] or [path]


def _holds_run(folder: pathlib.Path) -> bool:
    run_dir = RunDir(str(folder))
    return run_dir.metrics.exists() or run_dir.config.exists()


def _names(paths: Sequence[str]) -> list[str]:
    """The end of each path, as long as it takes to tell them apart."""
    parts = [pathlib.Path(path).resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"a run is named twice: {' '.join(paths)}.")


def _read(path: str, name: str) -> RunRecord:
    run_dir = RunDir(path)
    if not _holds_run(run_dir.path):
        raise ConfigError(
            f"{path} holds no run: there is neither metrics.jsonl nor "
            "config.json; pass the --run_dir of launch.train."
        )
    config = _config_of(run_dir) if run_dir.config.exists() else {}
    lines = list(_lines(run_dir.metrics))
    train, test = (
        _series([line for line in lines if line["split"] == split])
        for split in SPLITS
    )
    return RunRecord(
        name,
        path,
        train,
        test,
        is_finished=run_dir.model.exists(),
        **{part: config.get(part, {}) for part in _PARTS},
    )


def _config_of(run_dir: RunDir) -> dict[str, Any]:
    """What `RunDir.write_config` wrote."""
    try:
        content = json.loads(run_dir.config.read_text())
        if all(isinstance(content.get(part, {}), dict) for part in _PARTS):
            return content
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(
        f"{run_dir.config} is damaged: move it away to see the run's numbers."
    )


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Whole lines; a run that is writing, or was killed, may leave a part."""
    if not path.exists():
        return
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and _has_place(line):
            yield line


def _has_place(line: Mapping[str, Any]) -> bool:
    """Whether a line tells where in the run it is."""
    counts = [line.get(name) for name in ("step", "epoch")]
    seconds = line.get("time")
    return (
        all(type(count) is int for count in counts)
        and isinstance(seconds, int | float)
        and math.isfinite(seconds)
        and line.get("split") in SPLITS
    )


def _series(lines: Sequence[Mapping[str, Any]]) -> Series:
    rows = [dict(_numbers(line)) for line in lines]
    fields = dict.fromkeys(field for row in rows for field in row)
    if all(row.get("loss_scale") == 1.0 for row in rows):
        fields.pop("loss_scale", None)  # there is none
    return Series(
        epoch=[line["epoch"] for line in lines],
        step=[line["step"] for line in lines],
        time=[line["time"] for line in lines],
        values={field: [row.get(field) for row in rows] for field in fields},
    )


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The values of a line; JSON has no NaN, so it is a word there."""
    for field, value in line.items():
        if field in _PLACES:
            continue
        if not isinstance(value, list):
            yield from _number(field, value)
            continue
        for index, part in enumerate(value[:_MAX_PARTS]):
            yield from _number(f"{field} {index}", part)


def _number(field: str, value: Any) -> Iterator[tuple[str, float]]:
    try:
        yield field, float(value)
    except (TypeError, ValueError, OverflowError):
        return
