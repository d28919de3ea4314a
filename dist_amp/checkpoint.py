"""Checkpointer: the state of a training run, on disk and back."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf


class Checkpointer:
    """Saves and restores groups of variables and a few counters.

    Variables are keyed by group and position, not by Keras' automatic names,
    which differ between a notebook's second model and a fresh process. (Keras'
    own `tf.train.Checkpoint(model=...)` leaves out the seeds of random
    layers.)

    Args:
        directory: Where `ckpt-<step>` files go; made when first saved to.
        groups: Variables by group, say `{"model": model.variables}`.
        per_replica: Variables that differ between replicas and are added up
            when read: metrics. Each replica gets back what it had; on
            another number of replicas, the first one gets the sum.
        counters: Names of the integers that are saved along.
        max_to_keep: Checkpoints kept; older ones are deleted.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        groups: Mapping[str, Sequence[keras.Variable]],
        *,
        per_replica: Sequence[keras.Variable] = (),
        counters: Sequence[str],
        max_to_keep: int = 3,
    ):
        self._counters = {
            name: tf.Variable(0, dtype=tf.int64) for name in counters
        }
        state = {
            f"{group}_{index:04d}": variable.value
            for group, variables in groups.items()
            for index, variable in enumerate(variables)
        }
        self._per_replica = list(per_replica)
        self._stacks = {
            f"per_replica_{index:04d}": _make_stack(variable)
            for index, variable in enumerate(self._per_replica)
        }
        self._manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(**state, **self._stacks, **self._counters),
            str(directory),
            max_to_keep=max_to_keep,
        )

    def save(self, step: int, counters: Mapping[str, int]) -> str:
        """Writes `ckpt-<step>`; returns its path.

        Args:
            step: Global step, part of the name.
            counters: A value for each of the counters.
        """
        for name, variable in self._counters.items():
            variable.assign(counters[name])
        for variable, stack in self._pairs():
            stack.assign(tf.stack([c.numpy() for c in _copies(variable)]))
        return self._manager.save(checkpoint_number=step)

    def restore(self) -> dict[str, int] | None:
        """Restores the newest checkpoint; None if there is none.

        Returns:
            The counters as they were saved.

        Raises:
            ValueError: The checkpoint holds other variables than this model
                and optimizer have.
        """
        path = self._manager.latest_checkpoint
        if path is None:
            return None
        try:
            status = self._manager.checkpoint.restore(path)
            status.assert_existing_objects_matched()
            status.assert_consumed()
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"The checkpoint {path} is of another model or optimizer: "
                "start with the settings that it was made with, or in a new "
                f"directory (--run_dir, --resume=never). TensorFlow says: "
                f"{str(error).splitlines()[0]}"
            ) from error
        for variable, stack in self._pairs():
            _unstack(stack.numpy(), _copies(variable))
        return {
            name: int(variable.numpy())
            for name, variable in self._counters.items()
        }

    def _pairs(self) -> Iterable[tuple[keras.Variable, tf.Variable]]:
        return zip(self._per_replica, self._stacks.values(), strict=True)

    @property
    def latest(self) -> str | None:
        """Path of the newest checkpoint."""
        return self._manager.latest_checkpoint


def _copies(variable: keras.Variable) -> Sequence[tf.Variable]:
    """A variable on each replica of this host."""
    return getattr(variable.value, "values", (variable.value,))


def _make_stack(variable: keras.Variable) -> tf.Variable:
    """Room for the values of any number of replicas."""
    shape = tuple(variable.shape)
    return tf.Variable(
        tf.zeros([1, *shape], variable.dtype),
        shape=tf.TensorShape([None, *shape]),
        trainable=False,
    )


def _unstack(values: np.ndarray, copies: Sequence[tf.Variable]) -> None:
    if len(values) != len(copies):
        total = np.zeros((len(copies), *values.shape[1:]), values.dtype)
        total[0] = values.sum(axis=0)
        values = total
    for value, copy in zip(values, copies, strict=True):
        copy.assign(value)
