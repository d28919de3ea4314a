"""Losses that Keras lacks."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="dist_amp")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy with integer labels and label smoothing.

    The target gives `1 - smoothing` to the label and spreads `smoothing`
    evenly over all classes, the label among them. In float32. Source: Szegedy
    et al., "Rethinking the Inception Architecture for Computer Vision", CVPR
    2016. Keras' `CategoricalCrossentropy(label_smoothing=...)` is the same for
    labels that are vectors.

    Args:
        smoothing: In [0, 1).
        from_logits: Whether predictions are logits, else probabilities.
        reduction: As in `keras.losses.Loss`.
        name: As in `keras.losses.Loss`.

    Raises:
        ValueError: `smoothing` is out of range.

    Example:
    >>> loss = SmoothedCrossentropy(0.2)
    >>> round(float(loss([1], [[0.0, 2.0]])), 4)
    0.3269
    """

    def __init__(
        self,
        smoothing: float,
        *,
        from_logits: bool = True,
        reduction: str = "sum_over_batch_size",
        name: str = "smoothed_crossentropy",
    ):
        super().__init__(name=name, reduction=reduction)
        if not 0 <= smoothing < 1:
            raise ValueError(
                f"`smoothing` must be in [0, 1). Received {smoothing} "
                "(--label_smoothing)."
            )
        self.smoothing = smoothing
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """Loss of each label.

        Args:
            y_true: Integers `[...]` or `[..., 1]`.
            y_pred: `[..., classes]`.

        Returns:
            `[...]`, float32.
        """
        scores = tf.cast(y_pred, tf.float32)
        labels = tf.cast(y_true, tf.int32)
        if labels.shape.rank == scores.shape.rank:
            labels = tf.squeeze(labels, axis=-1)
        if not self.from_logits:
            scores = tf.math.log(tf.maximum(scores, keras.config.epsilon()))
        of_label = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels, scores
        )
        of_all = -tf.reduce_mean(tf.nn.log_softmax(scores), axis=-1)
        return of_label + self.smoothing * (of_all - of_label)

    def get_config(self) -> dict[str, Any]:
        """Keras configuration."""
        return super().get_config() | {
            "smoothing": self.smoothing,
            "from_logits": self.from_logits,
        }
