"""How long a worker waits for the others in each all-reduce."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


class Stopwatch:
    """Measures from the moment that a replica's gradients are there.

    What is measured ends when their sum is there. The worker that all wait
    for waits the least. The first replica of a worker stands for all of them:
    TensorFlow would take the times of several one after another.

    On a GPU the host is done with an operation as soon as it is queued, so a
    number is copied from there: of the first and of the last variable, one of
    which a backward pass comes to at its end.

    Args:
        replica_id: Of this worker's first replica.
        on_gpu: Whether the replicas are on GPUs.
    """

    def __init__(self, replica_id: int, *, on_gpu: bool):
        self._replica_id, self._on_gpu = replica_id, on_gpu
        with tf.device("CPU:0"):
            self._total = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            self._arrived = tf.Variable(0.0, trainable=False)

    @property
    def variables(self) -> list[tf.Variable]:
        """Its state, which is no part of the model's or the optimizer's."""
        return [self._total, self._arrived]

    def seconds(self) -> float:
        """What was measured in all."""
        return float(self._total.numpy())

    def start(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor | None:
        """The moment when these are there; call it in each replica.

        Args:
            gradients: Of this replica.

        Returns:
            For `stop`.
        """
        context = tf.distribute.get_replica_context()
        replica = tf.get_static_value(context.replica_id_in_sync_group)
        is_first = int(replica) == self._replica_id
        return self._time_after(gradients) if is_first else None

    def stop(self, begin: tf.Tensor | None, sums: Sequence[tf.Tensor]) -> None:
        """Adds the time from `begin` until these are there.

        Args:
            begin: From `start`.
            sums: Over all replicas.
        """
        if begin is None:
            return
        end = self._time_after(sums)
        with tf.device("CPU:0"):
            self._total.assign_add(end - begin)

    def _time_after(self, tensors: Sequence[tf.Tensor]) -> tf.Tensor:
        """Seconds since 1970 at the moment when these are there."""
        ready: Sequence[Any] = tensors
        if self._on_gpu:
            ends = [tf.reshape(t, [-1])[:1] for t in (tensors[0], tensors[-1])]
            number = tf.add_n(
                [tf.reduce_sum(tf.cast(end, tf.float32)) for end in ends]
            )
            with tf.device("CPU:0"):  # an assignment is not optimized away
                ready = [self._arrived.assign(number)]
        with tf.device("CPU:0"), tf.control_dependencies(ready):
            return tf.timestamp()


def is_allowed() -> bool:
    """Whether TensorFlow tells the time: not where operations must repeat."""
    try:
        tf.timestamp()
    except tf.errors.FailedPreconditionError:
        return False
    return True
