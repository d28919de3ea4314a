"""From a config to the trainer, and what it goes on from."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dist_amp
from dist_amp import storage, weights
from dist_amp.checkpoint import readable_size, whole_manifests
from dist_amp.data_service import DataService
from launch.config import (
    MAX_ROLLBACKS,
    ROLLBACK_FACTOR,
    ConfigError,
    TrainConfig,
)
from launch.hardware import Devices, seed
from launch.inputs import Data
from launch.models import (
    check_labels,
    make_loss,
    make_metrics,
    make_model,
    takes_logits,
)
from launch.run_dir import RunDir
from launch.updates import make_optimizer, updates_per_epoch

_log = logging.getLogger(__name__)


def make_trainer(
    config: TrainConfig,
    devices: Devices,
    data: Data,
    *,
    trains: bool = True,
) -> dist_amp.Trainer:
    """Makes model and optimizer in the scope, and the trainer around them.

    Args:
        config: The settings.
        devices: From `make_devices`.
        data: From `load_data` or `load_split`.
        trains: Else the optimizer is one that keeps no state.

    Raises:
        ConfigError: Training is too short for the settings, or the loss does
            not fit the labels.
    """
    if trains:
        _check_length(config, data)
    # Again: what reading data took of the generators must change no weight.
    seed(config)
    with dist_amp.scope(devices.strategy, devices.precision):
        model = make_model(config, data)
        if trains:
            optimizer = make_optimizer(config, data)
        else:
            optimizer = dist_amp.wrap_optimizer(keras.optimizers.SGD())
        loss = make_loss(config, model)
        check_labels(config, data, model, loss)
        metrics = make_metrics(config, loss)
    return dist_amp.Trainer(
        model,
        optimizer,
        loss=loss,
        metrics=metrics,
        jit_compile=config.jit_compile,
        data_service=_data_service(config),
    )


def _data_service(config: TrainConfig) -> DataService | None:
    if config.data_service is None:
        return None
    return DataService(
        config.data_service,
        startup_timeout=config.startup_timeout,
        # Before the watchdog blames a worker that waits for the service.
        timeout=config.collective_timeout / 2,
    )


def _check_length(config: TrainConfig, data: Data) -> None:
    """Refuses what would come after the end of training, if that is known."""
    per_epoch = updates_per_epoch(config, data)
    if per_epoch is not None:
        num_updates = per_epoch * config.num_epochs
        config.check_length(num_updates, f"a training of {num_updates} updates")


def describe(
    config: TrainConfig,
    devices: Devices,
    data: Data,
    trainer: dist_amp.Trainer,
) -> dict[str, Any]:
    """What the settings became on this machine, for `config.json`."""
    trainer.build(data.train)
    optimizer = trainer.optimizer
    has_scale = isinstance(optimizer, dist_amp.LossScaleOptimizer)
    rule = optimizer.get_config()
    inner = rule.pop("inner")
    del rule["name"]
    return {
        "dist_amp": dist_amp.__version__,
        "strategy": devices.strategy_kind,
        "strategy_reason": devices.strategy_reason,
        "num_replicas": devices.strategy.num_replicas_in_sync,
        "devices": list(devices.strategy.extended.worker_devices),
        "precision": devices.precision.name,
        "precision_reason": devices.precision.reason,
        "loss_scale": rule if has_scale else None,
        "epochs": config.num_epochs,
        "steps_per_epoch": updates_per_epoch(config, data),
        "per_replica_batch_size": config.batch_size
        / devices.strategy.num_replicas_in_sync,
        "from_logits": takes_logits(trainer.loss),
        "num_parameters": trainer.model.count_params(),
        "optimizer": inner["config"],
    }


def describe_plan(
    config: TrainConfig,
    devices: Devices,
    data: Data,
    trainer: dist_amp.Trainer,
) -> str:
    """Traces the train step and tells what a run would do."""
    resolved = describe(config, devices, data, trainer)
    num_ops = trainer.trace(data.train)
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    num_bytes = sum(
        int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables
    )
    lines = {
        "strategy": f"{resolved['strategy']} ({resolved['strategy_reason']})",
        "replicas": resolved["num_replicas"],
        "devices": ", ".join(resolved["devices"]),
        "precision": f"{resolved['precision']} "
        f"({resolved['precision_reason']})",
        "loss scale": resolved["loss_scale"] or "none",
        "model": f"{config.model}, {resolved['num_parameters']:,} parameters",
        "model and optimizer": f"{num_bytes / 2**20:.2f} MiB on each replica",
        "batch": f"{config.global_batch_size} examples an update, in "
        f"{config.gradient_accumulation_steps} part(s), "
        f"{resolved['per_replica_batch_size']:g} a replica and part",
        "length": f"{resolved['epochs']} epochs of "
        f"{resolved['steps_per_epoch'] or 'unknown'} steps",
        "train step": f"traced, {num_ops} operations in the compiled loop",
        "results": config.directory,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {v}" for name, v in lines.items())


@contextlib.contextmanager
def open_run_dir(config: TrainConfig, run_dir: RunDir) -> Iterator[None]:
    """Makes the folder, keeps other runs from it, writes to nothing yet.

    Raises:
        ConfigError: Another run has the folder, or it cannot be written.
    """
    path = str(run_dir.path)
    with contextlib.ExitStack() as stack:
        with _as_config_error("run_dir", path):
            if _is_to_be_moved(config, run_dir):
                with storage.lock(path):
                    moved = run_dir.move_aside()
                _log.info("moved earlier results to %s", moved)
            stack.enter_context(storage.lock(path))
        with _as_config_error("checkpoint_dir", run_dir.checkpoints):
            with storage.lock(run_dir.checkpoints):
                pass  # it can be made, and nobody else has it
            _check_checkpoints(config, run_dir)
        yield


@contextlib.contextmanager
def _as_config_error(flag: str, path: str) -> Iterator[None]:
    try:
        yield
    except storage.IO_ERRORS as error:
        raise ConfigError(f"--{flag}={path}: {error}") from error


def _is_to_be_moved(config: TrainConfig, run_dir: RunDir) -> bool:
    """Whether an earlier run's results are in the way of this one's."""
    if not run_dir.path.exists():
        return False
    if config.resume == "never":
        return True
    has_results = (
        run_dir.metrics.exists() and run_dir.metrics.stat().st_size > 0
    )
    if not has_results or storage.find(run_dir.checkpoints):
        return False
    _log.warning(
        "%s holds results but no checkpoint in %s: training starts anew",
        run_dir.path,
        run_dir.checkpoints,
    )
    return not storage.find_damaged(run_dir.checkpoints)


def _check_checkpoints(config: TrainConfig, run_dir: RunDir) -> None:
    """What only TensorFlow can look for, and what was not moved aside."""
    found = storage.find(run_dir.checkpoints)
    if config.resume == "never" and found:
        raise ConfigError(
            f"--resume=never: --checkpoint_dir={run_dir.checkpoints} holds "
            "checkpoints; name an empty folder."
        )
    run_dir.check_resume(
        config, has_checkpoint=bool(whole_manifests(run_dir.checkpoints))
    )


def save_policy(config: TrainConfig) -> dist_amp.SavePolicy:
    """When to save, and what to keep."""
    return dist_amp.SavePolicy(
        every_epochs=config.save_every_epochs or None,
        every_steps=config.save_every_steps,
        every_minutes=config.save_every_minutes,
        max_to_keep=config.keep_checkpoints,
        keep_best=config.keep_best,
        keep_every=config.keep_every,
    )


def rollback_policy(config: TrainConfig) -> dist_amp.RollbackPolicy | None:
    """What to do when training blows up; None: an error."""
    if not config.rollback_on:
        return None
    return dist_amp.RollbackPolicy(
        on=config.rollback_on,
        max_rollbacks=config.max_rollbacks or MAX_ROLLBACKS,
        lower=config.rollback_lower,
        factor=config.rollback_factor or ROLLBACK_FACTOR,
    )


def load_initial_weights(
    config: TrainConfig,
    run_dir: RunDir,
    data: Data,
    trainer: dist_amp.Trainer,
) -> None:
    """Reads `--initial_weights` into the model of a run that is new."""
    trainer.build(data.train)
    is_new = config.resume == "never" or not storage.find(run_dir.checkpoints)
    if config.initial_weights is None or not is_new:
        return
    try:
        weights.load(trainer.model, config.initial_weights)
    except (*storage.IO_ERRORS, ValueError) as error:
        raise ConfigError(
            f"--initial_weights={config.initial_weights}: {error}"
        ) from error
    trainer.spread_seeds()


def describe_checkpoints(directory: str) -> str:
    """How many there are and what they weigh, for the last line of a run."""
    manifests = whole_manifests(directory).values()
    size = readable_size(sum(m.num_bytes for m in manifests))
    number = len(manifests)
    return f"{number} checkpoint{'' if number == 1 else 's'}, {size}"


def save_model(trainer: dist_amp.Trainer, path: pathlib.Path) -> None:
    """Writes `model.keras`, which is whole whenever it is there."""
    part = path.with_name(f"part-{path.name}")
    try:
        trainer.model.save(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} cannot be written: {error}. Make room and start the same "
            "command again, or export the last checkpoint "
            "(launch.checkpoints export)."
        ) from error
