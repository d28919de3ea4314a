"""The dynamic loss-scaling rule: a pure function of three numbers.

    if finite:
        good_steps += 1
        if good_steps == growth_interval:
            scale, good_steps = min(scale * growth_factor, max_scale), 0
    else:
        scale, good_steps = max(scale * backoff_factor, min_scale), 0

Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.
"""

import dataclasses

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class LossScaleRule:
    """When the loss scale grows, when it backs off, and how far.

    A fixed loss scale is the rule whose floor and ceiling are the same value.

    Attributes:
        growth_interval: Finite steps in a row after which the scale grows.
        growth_factor: What the scale is multiplied by when it grows, >= 1.
        backoff_factor: What it is multiplied by after an overflow, in (0, 1].
        min_scale: The floor, > 0.
        max_scale: The ceiling, >= `min_scale`.

    Example:
    >>> rule = LossScaleRule(growth_interval=2)
    >>> scale, good_steps = rule.next_state(8.0, 1, finite=True)
    >>> float(scale), int(good_steps)
    (16.0, 0)
    """

    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**24

    def __post_init__(self) -> None:
        checks = (
            ("growth_interval", self.growth_interval >= 1, "at least 1"),
            ("growth_factor", self.growth_factor >= 1, "at least 1"),
            ("backoff_factor", 0 < self.backoff_factor <= 1, "in (0, 1]"),
            ("min_scale", self.min_scale > 0, "positive"),
            (
                "max_scale",
                self.max_scale >= self.min_scale,
                f"at least `min_scale` ({self.min_scale:g})",
            ),
        )
        for name, is_valid, accepted in checks:
            if not is_valid:
                raise ValueError(
                    f"`{name}` must be {accepted}. "
                    f"Received {getattr(self, name)!r}."
                )

    def next_state(
        self,
        scale: tf.Tensor | float,
        good_steps: tf.Tensor | int,
        finite: tf.Tensor | bool,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the scale and the counter after one attempted update.

        Args:
            scale: Loss scale of this update, scalar float32.
            good_steps: Finite updates since the scale last changed, scalar
                int64.
            finite: Whether every all-reduced gradient was finite, scalar bool.

        Returns:
            The next `(scale, good_steps)`, of the same dtypes.
        """
        scale = tf.convert_to_tensor(scale, tf.float32)
        good_steps = tf.convert_to_tensor(good_steps, tf.int64) + 1
        is_due = good_steps >= self.growth_interval
        grown = tf.minimum(scale * self.growth_factor, self.max_scale)
        backed_off = tf.maximum(scale * self.backoff_factor, self.min_scale)
        next_scale = tf.where(
            finite, tf.where(is_due, grown, scale), backed_off
        )
        keeps_counting = tf.logical_and(finite, tf.logical_not(is_due))
        return next_scale, tf.where(keeps_counting, good_steps, 0)
