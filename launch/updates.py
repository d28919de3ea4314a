"""From a config to the optimizer, its learning rate and its loss scale."""

from typing import Any

import keras

import dist_amp
from dist_amp import lars
from dist_amp import schedule as schedule_lib
from dist_amp.stream import length_of, one_pass
from launch.config import ConfigError, TrainConfig
from launch.inputs import Data
from launch.options import read_options

_GENERIC_OPTIONS = (
    "weight_decay",
    "global_clipnorm",
    "clipnorm",
    "clipvalue",
    "ema_overwrite_frequency",
)


# Of an optimizer's arguments, those that have flags or mean nothing here.
_OPTIMIZER_FLAGS = (
    *_GENERIC_OPTIONS,
    "learning_rate",
    "momentum",
    "exclude",
    "use_ema",
    "ema_momentum",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "name",
)


def make_optimizer(
    config: TrainConfig, data: Data
) -> dist_amp.DistributedOptimizer:
    """The optimizer of the flags, wrapped; call it in a scope."""
    per_epoch = updates_per_epoch(config, data)
    total_steps = None if per_epoch is None else per_epoch * config.num_epochs
    optimizer_class = _optimizer_class(config)
    options = {
        name: getattr(config, name)
        for name in (*_GENERIC_OPTIONS, "momentum")
        if getattr(config, name) is not None
    }
    if config.ema is not None:
        options |= {"use_ema": True, "ema_momentum": config.ema}
    if config.gradient_accumulation_steps > 1:
        options["gradient_accumulation_steps"] = (
            config.gradient_accumulation_steps
        )
    options |= read_options(
        "optimizer_option",
        config.optimizer_option,
        optimizer_class,
        reserved=_OPTIMIZER_FLAGS,
    )
    if optimizer_class is lars.LARS:
        options["exclude"] = config.not_decayed
    inner = optimizer_class(_learning_rate(config, total_steps), **options)
    if config.not_decayed and optimizer_class is not lars.LARS:
        # By the variable's own name; a layer's is not looked at.
        inner.exclude_from_weight_decay(var_names=list(config.not_decayed))
    return dist_amp.wrap_optimizer(
        inner,
        loss_scale=_loss_scale(config.loss_scale),
        **_wire_options(config),
        **_loss_scale_options(config),
    )


def _optimizer_class(config: TrainConfig) -> Any:
    if config.optimizer == "lars":
        return lars.LARS
    # Not keras.optimizers.get, which knows no lamb (Keras 3.15).
    names = {name.lower(): name for name in dir(keras.optimizers)}
    return getattr(keras.optimizers, names[config.optimizer])


def _wire_options(config: TrainConfig) -> dict[str, Any]:
    options = {
        "wire_dtype": config.wire_dtype,
        "wire_check_interval": config.wire_check_interval,
        "wire_error_bound": config.wire_error_bound,
    }
    is_float32 = config.wire_dtype == "float32"
    return {
        name: value
        for name, value in options.items()
        if value is not None and not is_float32
    }


def _loss_scale(text: str) -> str | float | None:
    if text in ("auto", "dynamic"):
        return text
    return None if text == "none" else float(text)


def _loss_scale_options(config: TrainConfig) -> dict[str, Any]:
    options = {
        "initial_scale": config.loss_scale_initial,
        "growth_interval": config.loss_scale_growth_interval,
        "min_scale": config.loss_scale_min,
        "max_scale": config.loss_scale_max,
    }
    return {name: v for name, v in options.items() if v is not None}


def _learning_rate(config: TrainConfig, total_steps: int | None) -> Any:
    if config.schedule == "constant" and not config.warmup_steps:
        return config.peak_learning_rate
    if config.schedule != "constant" and total_steps is None:
        raise ConfigError(
            f"--schedule={config.schedule} needs to know how long training "
            "is: pass --steps or --steps_per_epoch."
        )
    return schedule_lib.WarmupSchedule(
        config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps or 0,
        decay=config.schedule,
    )


def updates_per_epoch(config: TrainConfig, data: Data) -> int | None:
    """Updates in an epoch; None if the length of the data is unknown."""
    length = length_of(one_pass(data.train))
    if config.num_steps_per_epoch or length is None:
        return config.num_steps_per_epoch
    return -(-length // config.gradient_accumulation_steps)
