"""The folder of a run: what is in it, and whether a new run may go on."""

import dataclasses
import itertools
import json
import pathlib
import platform
import sys
from importlib import metadata
from typing import Any

from launch.config import ConfigError, TrainConfig

# Which devices a run has, and how they find each other.
OF_DEVICES = (
    "data_service",
    "strategy",
    "devices",
    "num_logical_cpus",
    "all_reduce",
    "tpu",
    "tpu_zone",
    "tpu_project",
    "workers",
    "task_index",
    "startup_timeout",
    "collective_timeout",
    "heartbeat_timeout",
)
# What a run keeps and where, and when it goes back to that.
OF_KEEPING = (
    "run_dir",
    "resume",
    "checkpoint_dir",
    "save_every_epochs",
    "save_every_steps",
    "save_every_minutes",
    "keep_checkpoints",
    "keep_best",
    "keep_every",
    "rollback_on",
    "max_rollbacks",
    "rollback_lower",
    "rollback_factor",
)
# Settings that may differ when a run goes on.
_FREE = (
    *OF_KEEPING,
    "dry_run",
    "initial_weights",
    "max_minutes",
    "epochs",
    "steps_per_loop",
    "eval_steps",
    "data_dir",
    "compilation_cache",
    "profile_steps",
    "tensorboard_graph",
    "histogram_every_epochs",
    *OF_DEVICES,
)
# What of a run's settings is about updates, and about devices that the run had:
# not for what its model is asked later, maybe elsewhere.
_OF_UPDATES = (
    *OF_DEVICES,
    "loss_scale",
    "loss_scale_initial",
    "loss_scale_growth_interval",
    "loss_scale_min",
    "loss_scale_max",
    "wire_dtype",
    "wire_check_interval",
    "wire_error_bound",
    "jit_compile",
    "compilation_cache",
    "gradient_accumulation_steps",
)
# What earlier versions wrote for settings that nobody had given.
_ONCE_DEFAULTS = {"max_rollbacks": 3, "rollback_factor": 0.5}
_PACKAGES = ("tensorflow", "keras", "numpy", "tensorflow-datasets")


class RunDir:
    """Paths of a run's results.

    Args:
        path: The folder.
        checkpoints: Where checkpoints go, if not in the folder.
    """

    def __init__(self, path: str, checkpoints: str | None = None):
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = checkpoints or str(self.path / "checkpoints")
        self.model = self.path / "model.keras"

    def check(self, config: TrainConfig) -> None:
        """Whether this run may write here; touches no device.

        Raises:
            ConfigError: There is nothing to resume and there must be, or the
                folder holds a run with other settings.
        """
        if "://" in self.checkpoints:
            return  # only TensorFlow can look there
        manifests = pathlib.Path(self.checkpoints).glob("ckpt-*/manifest.json")
        self.check_resume(config, has_checkpoint=any(manifests))

    def check_resume(
        self, config: TrainConfig, *, has_checkpoint: bool
    ) -> None:
        """The same, once it is known whether there is a checkpoint."""
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

    def move_aside(self) -> pathlib.Path | None:
        """Renames an earlier run's folder; returns its new path, if any."""
        if not self.path.exists():
            return None
        paths = (
            self.path.with_name(f"{self.path.name}.{number}")
            for number in itertools.count(1)
        )
        moved = next(path for path in paths if not path.exists())
        self.path.rename(moved)
        return moved

    def write_config(
        self, config: TrainConfig, **resolved: Any
    ) -> dict[str, Any]:
        """Writes `config.json`: settings, what they became, versions.

        Returns:
            What was written.
        """
        content = {
            "settings": dataclasses.asdict(config),
            "resolved": resolved,
            "versions": _versions(),
        }
        text = json.dumps(content, indent=2)
        part = self.config.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(self.config)
        return content

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


def settings_of(run_dir: str) -> TrainConfig:
    """The settings that a run was started with.

    Raises:
        ConfigError: The folder holds none.
    """
    settings = _content_of(run_dir)["settings"]
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if (name, value) not in _ONCE_DEFAULTS.items()
    }
    known = TrainConfig.__dataclass_fields__
    unknown = [f"--{name}" for name in values if name not in known]
    if unknown:
        raise ConfigError(
            f"--run_dir={run_dir} holds a run of another version, with "
            f"{', '.join(unknown)}: use that version."
        )
    return TrainConfig(**{**values, "run_dir": run_dir})


def num_replicas_of(run_dir: str) -> int:
    """The replicas that a run was trained on.

    Raises:
        ConfigError: The folder holds no run.
    """
    return _content_of(run_dir)["resolved"]["num_replicas"]


def settings_to_infer(run_dir: str, **own: Any) -> TrainConfig:
    """The run's model, data, loss, metrics and precision, on other devices.

    Args:
        run_dir: The run's folder.
        **own: Settings of devices and of batches; None: as the run has it.

    Raises:
        ConfigError: The folder holds no run, or they do not go together.
    """
    config = settings_of(run_dir)
    precision = config.precision
    if precision == "auto":  # what it became where the run was
        precision = _content_of(run_dir)["resolved"]["precision"]
    defaults = {
        name: TrainConfig.__dataclass_fields__[name].default
        for name in _OF_UPDATES
    }
    given = {name: value for name, value in own.items() if value is not None}
    return dataclasses.replace(
        config,
        **{
            **defaults,
            "global_batch_size": config.batch_size,
            "precision": precision,
            **given,
        },
    )


def _content_of(run_dir: str) -> dict[str, Any]:
    path = RunDir(run_dir).config
    try:
        content = json.loads(path.read_text())
        content["settings"], content["resolved"]["precision"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--run_dir={run_dir} holds no run: {path} cannot be read."
        ) from error
    return content


def _versions() -> dict[str, str]:
    versions = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **versions}


def _version(package: str) -> str:
    """Of what is imported: on a TPU, tensorflow comes as tensorflow-tpu."""
    module = sys.modules.get(package.replace("-", "_"))
    return getattr(module, "__version__", None) or metadata.version(package)
