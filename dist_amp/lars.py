"""LARS: a learning rate for each layer, by the norms of weights and gradient.

Source: You, Gitman and Ginsburg, "Large Batch Training of Convolutional
Networks", 2017, algorithm 1. The learning rate's decay there is a schedule
here.
"""

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

NOT_ADAPTED = ("bias", "gamma", "beta", "embeddings")


@keras.saving.register_keras_serializable(package="dist_amp")
class LARS(keras.optimizers.Optimizer):
    """SGD with momentum, each variable at a rate of its own.

    With weights `w`, their gradient `g` and momentum `m`:

        ratio = trust_coefficient * |w| / (|g| + weight_decay * |w|)
        m = momentum * m + learning_rate * ratio * (g + weight_decay * w)
        w = w - m

    The ratio is 1 where a norm is 0. Unlike in other Keras optimizers, weight
    decay is part of the gradient, as the norms need it.

    Args:
        learning_rate: A number or a schedule; far larger than SGD's.
        momentum: Of what was applied.
        weight_decay: None is 0.
        trust_coefficient: How far a variable may move for its norm.
        exclude: Variables with one of these in their name keep ratio 1 and
            do not decay: norms and biases, whose own norm says little.
        name: Of the optimizer.
        **options: Of `keras.optimizers.Optimizer`: clipping, EMA.

    Example:
    >>> weight = keras.Variable([3.0, 4.0])
    >>> optimizer = LARS(1.0, momentum=0.0, trust_coefficient=0.1)
    >>> optimizer.apply([tf.constant([0.0, 2.0])], [weight])
    >>> [round(float(value), 3) for value in weight.numpy()]
    [3.0, 3.5]
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float | None = None,
        trust_coefficient: float = 0.001,
        exclude: Sequence[str] = NOT_ADAPTED,
        name: str = "lars",
        **options: Any,
    ):
        # Keras' own decay would come before the norms.
        super().__init__(learning_rate=learning_rate, name=name, **options)
        if not 0 <= momentum < 1:
            raise ValueError(
                f"`momentum` must be in [0, 1). Received {momentum}."
            )
        self.momentum = momentum
        self.decay = weight_decay or 0.0
        self.trust_coefficient = trust_coefficient
        self.exclude = tuple(exclude)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the momentum of each variable."""
        if self.built:
            return
        super().build(variables)
        self._is_adapted = [
            not any(re.search(part, v.name) for part in self.exclude)
            for v in variables
        ]
        (self._momentums,) = self.add_optimizer_variables(
            variables, ["momentum"]
        )

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """Updates one variable and its momentum."""
        index = self._get_variable_index(variable)
        rate = tf.cast(learning_rate, variable.dtype)
        weights = tf.convert_to_tensor(variable)
        # Dense: the norm of slices needs those of one row added up.
        step = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        if self._is_adapted[index]:
            rate *= self._ratio(weights, step)
            step += self.decay * weights
        momentum = self._momentums[index]
        moved = self.momentum * tf.convert_to_tensor(momentum) + rate * step
        self.assign(momentum, moved)
        self.assign_sub(variable, moved)

    def _ratio(self, weights: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        norm, of_gradient = tf.norm(weights), tf.norm(gradient)
        ratio = tf.math.divide_no_nan(
            self.trust_coefficient * norm, of_gradient + self.decay * norm
        )
        has_norms = (norm > 0) & (of_gradient > 0)
        return tf.where(has_norms, ratio, tf.ones_like(ratio))

    def get_config(self) -> dict[str, Any]:
        """Keras configuration."""
        return super().get_config() | {
            "momentum": self.momentum,
            "weight_decay": self.decay,
            "trust_coefficient": self.trust_coefficient,
            "exclude": list(self.exclude),
        }
