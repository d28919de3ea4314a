"""The newest reduced gradient, kept to be looked at."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from dist_amp import reduction
from dist_amp import strategy as strategy_lib


class GradientLog:
    """Keeps the gradient of the last update that was applied.

    It is that of the loss of the global batch: summed over the replicas, mean
    over accumulated parts, without the loss scale, not yet clipped. Each
    replica has a copy, float32, and copies every update's into it.

    Make it in the strategy's scope.

    Args:
        variables: The model's trainable variables.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self._paths = [variable.path for variable in variables]
        self._gradients = [
            _variable(variable.shape, f"kept_gradient_{variable.name}")
            for variable in variables
        ]
        self._is_kept = _variable((), "is_gradient_kept")
        self._places: set[int] = set()

    @property
    def variables(self) -> list[keras.Variable]:
        """Its state, which is no part of the optimizer's."""
        return [*self._gradients, self._is_kept]

    def write(
        self, gradients: Sequence[reduction.Gradient], places: Sequence[int]
    ) -> None:
        """Keeps an update's gradients; call it in the replica.

        Args:
            gradients: Reduced and unscaled.
            places: Index of each one's variable.
        """
        for gradient, place in zip(gradients, places, strict=True):
            # Rows of embeddings that come twice are added up.
            dense = tf.cast(tf.convert_to_tensor(gradient), tf.float32)
            self._gradients[place].assign(dense)
        self._is_kept.assign(1.0)
        self._places.update(places)

    def read(self) -> dict[str, np.ndarray]:
        """By the variable's path; empty if no update was applied yet.

        Variables that the loss does not depend on are left out.
        """
        if not self._value(self._is_kept):
            return {}
        return {
            self._paths[place]: self._value(self._gradients[place])
            for place in sorted(self._places)
        }

    @staticmethod
    def _value(variable: keras.Variable) -> np.ndarray:
        return strategy_lib.local_copies(variable)[0].numpy()


def _variable(shape: Sequence[int], name: str) -> keras.Variable:
    return keras.Variable(
        "zeros", shape=shape, dtype="float32", trainable=False, name=name
    )
