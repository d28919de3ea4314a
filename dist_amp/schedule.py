"""Learning rate by applied update: warm-up, then constant or a decay."""

import math
from typing import Any

import keras
import tensorflow as tf

DECAYS = ("constant", "cosine", "linear")


@keras.saving.register_keras_serializable(package="dist_amp")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to `peak`, then stays, or decays to zero.

    The first update is done at `peak / warmup_steps`. Source of the cosine:
    Loshchilov and Hutter, "SGDR", ICLR 2017, without restarts.

    Args:
        peak: The highest learning rate.
        warmup_steps: Updates until the peak is reached; 0 starts at it.
        total_steps: Update at which the decay ends; not used by "constant".
        decay: "constant", "cosine" or "linear".

    Example:
    >>> schedule = WarmupSchedule(1.0, warmup_steps=2, total_steps=4,
    ...                           decay="linear")
    >>> [float(schedule(step)) for step in range(5)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        peak: float,
        *,
        warmup_steps: int = 0,
        total_steps: int = 0,
        decay: str = "constant",
    ):
        if decay not in DECAYS:
            raise ValueError(
                f"`decay` must be one of {', '.join(DECAYS)}. Received "
                f"{decay!r}."
            )
        if decay != "constant" and total_steps <= warmup_steps:
            raise ValueError(
                "`total_steps` must be more than `warmup_steps`. Received "
                f"{total_steps} with {warmup_steps} (--warmup_steps)."
            )
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay = decay

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Learning rate of the update after `step` applied ones, float32."""
        step = tf.cast(step, tf.float32)
        rise = tf.minimum((step + 1.0) / max(self.warmup_steps, 1), 1.0)
        length = max(self.total_steps - self.warmup_steps, 1)
        progress = tf.clip_by_value(
            (step - self.warmup_steps) / length, 0.0, 1.0
        )
        remaining = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + tf.cos(math.pi * progress)),
        }[self.decay]
        return self.peak * rise * remaining

    def get_config(self) -> dict[str, Any]:
        """Keras configuration."""
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "decay": self.decay,
        }
