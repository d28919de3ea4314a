"""The folder of a run: what is in it, and whether a new run may go on."""

import dataclasses
import itertools
import json
import pathlib
import platform
from importlib import metadata
from typing import Any

from launch.config import ConfigError, TrainConfig

# Settings that may differ when a run goes on.
_FREE = (
    "run_dir",
    "resume",
    "dry_run",
    "epochs",
    "steps_per_loop",
    "eval_steps",
    "data_dir",
    "strategy",
    "devices",
    "num_logical_cpus",
    "all_reduce",
    "tpu",
)
_PACKAGES = ("tensorflow", "keras", "numpy", "tensorflow-datasets")


class RunDir:
    """Paths of a run's results.

    Args:
        path: The folder; made by `prepare`.
    """

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model.keras"

    def check(self, config: TrainConfig) -> None:
        """Whether this run may write here; touches no device.

        Raises:
            ConfigError: There is nothing to resume and there must be, or the
                folder holds a run with other settings.
        """
        has_checkpoint = (self.checkpoints / "checkpoint").exists()
        if config.resume == "must" and not has_checkpoint:
            raise ConfigError(
                f"--resume=must: there is no checkpoint in "
                f"{self.checkpoints}; pass another --run_dir or --resume=auto."
            )
        if config.resume == "never" or not has_checkpoint:
            return
        changed = self._changed(config)
        if changed:
            raise ConfigError(
                f"--run_dir={self.path} holds a run with other settings: "
                f"{'; '.join(changed)}. Start with those, pass another "
                "--run_dir, or --resume=never."
            )

    def prepare(self, config: TrainConfig) -> pathlib.Path | None:
        """Makes the folder; with `--resume=never` moves an earlier one aside.

        Returns:
            Where the earlier results are now, if they were moved.
        """
        moved = None
        if config.resume == "never" and self.path.exists():
            paths = (
                self.path.with_name(f"{self.path.name}.{number}")
                for number in itertools.count(1)
            )
            moved = next(path for path in paths if not path.exists())
            self.path.rename(moved)
        self.path.mkdir(parents=True, exist_ok=True)
        return moved

    def write_config(self, config: TrainConfig, **resolved: Any) -> None:
        """Writes `config.json`: settings, what they became, versions."""
        text = json.dumps(
            {
                "settings": dataclasses.asdict(config),
                "resolved": resolved,
                "versions": _versions(),
            },
            indent=2,
        )
        self.config.write_text(text + "\n")

    def _changed(self, config: TrainConfig) -> list[str]:
        if not self.config.exists():
            return []
        before = json.loads(self.config.read_text())["settings"]
        # A number of steps alone is the length of the only epoch.
        free = {*_FREE, "steps"} if config.steps_per_epoch else set(_FREE)
        now = json.loads(json.dumps(dataclasses.asdict(config)))
        return [
            f"--{name}={before[name]} there, {value} here"
            for name, value in now.items()
            if name not in free and name in before and before[name] != value
        ]


def _versions() -> dict[str, str]:
    versions = {package: metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **versions}
