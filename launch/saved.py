"""What a run has saved, by what a user calls it: a step, a file, the newest."""

import pathlib
from typing import Any

from launch.config import ConfigError, TrainConfig
from launch.run_dir import RunDir


def folder_of(run_dir: str) -> str:
    """Where the checkpoints are: in the folder, or in its `checkpoints`.

    Raises:
        ValueError: There is none.
    """
    from dist_amp import storage

    inner = f"{run_dir.rstrip('/')}/checkpoints"
    for folder in (inner, run_dir):
        if storage.find(folder) or storage.find_damaged(folder):
            return folder
    raise ValueError(f"there is no checkpoint in {run_dir} or {inner}.")


def whole(run_dir: str) -> list[str]:
    """Its whole checkpoints, oldest first."""
    from dist_amp.checkpoint import whole_manifests

    return list(whole_manifests(folder_of(run_dir)))


def newest(run_dir: str) -> str:
    """Its newest whole checkpoint.

    Raises:
        ValueError: There is none.
    """
    found = whole(run_dir)
    if not found:
        raise ValueError(f"there is no whole checkpoint in {run_dir}.")
    return found[-1]


def path_of(run_dir: str, which: str) -> str:
    """A step of the run, or a checkpoint by its path.

    Raises:
        ValueError: There is no such step.
    """
    if not which.isdigit():
        return which
    found = whole(run_dir)
    paths = [
        path
        for path in found
        if path.rpartition("/")[2].split(".")[0] == f"ckpt-{which}"
    ]
    if not paths:
        steps = ", ".join(p.rpartition("-")[2] for p in found)
        raise ValueError(f"there is no step {which}, but {steps}.")
    return paths[-1]


def weights_of(config: TrainConfig, which: str | None) -> str:
    """The file or the checkpoint that holds a run's weights.

    Args:
        config: Of the run.
        which: A step, a path, "best" (in --keep_best), or None: the newest
            checkpoint, or model.keras if the run has written it since (with
            --ema it holds averages).

    Raises:
        ConfigError: There is none.
    """
    from dist_amp.checkpoint import whole_manifests

    run_dir = RunDir(config.directory, config.checkpoint_dir)
    if which == "best":
        return _best(config, run_dir.checkpoints)
    if which is not None:
        try:
            return path_of(run_dir.checkpoints, which)
        except ValueError as error:
            raise ConfigError(f"--checkpoint={which}: {error}") from error
    found = list(whole_manifests(run_dir.checkpoints).items())
    if run_dir.model.exists():
        written = run_dir.model.stat().st_mtime
        if not found or found[-1][1].created <= written:
            return str(run_dir.model)
    if not found:
        raise ConfigError(
            f"--run_dir={config.run_dir} holds neither a checkpoint nor "
            "model.keras: nothing was saved yet."
        )
    return found[-1][0]


def _best(config: TrainConfig, directory: str) -> str:
    from dist_amp.checkpoint import SavePolicy, whole_manifests
    from launch.run_record import is_less_better

    name = config.keep_best
    if name is None:
        raise ConfigError(
            "--checkpoint=best: the run had no --keep_best; name a step."
        )
    mode = "min" if is_less_better(name) else "max"
    found = whole_manifests(directory)
    best = SavePolicy(keep_best=name, mode=mode).best(found.values())
    paths = [path for path, manifest in found.items() if manifest == best]
    if not paths:
        raise ConfigError(
            f"--checkpoint=best: no checkpoint in {directory} has {name}."
        )
    return paths[0]


def load(trainer: Any, config: TrainConfig, source: str) -> None:
    """Gives the trainer's model a run's weights, and its layers in float32.

    Args:
        trainer: Built.
        config: Of the run.
        source: From `weights_of`.

    Raises:
        ValueError: They are of another model, or damaged.
        OSError, tf.errors.OpError: They cannot be read.
    """
    from dist_amp import auto_layers, storage, weights
    from dist_amp.checkpoint import whole_manifests

    if config.precision == "auto_layers":
        run_dir = RunDir(config.directory, config.checkpoint_dir)
        checkpoint = source
        if not storage.is_checkpoint(source):
            checkpoint = [*whole_manifests(run_dir.checkpoints), source][-2:][0]
        if storage.is_checkpoint(checkpoint):
            auto_layers.pin_as_saved(trainer, storage.read_state(checkpoint))
    weights.load(trainer.model, source)


def short_name(source: str) -> str:
    """The last part of its path."""
    return pathlib.PurePath(source).name
