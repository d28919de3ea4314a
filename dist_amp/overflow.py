"""Which replica's gradients of which variables were not finite, and when.

Written down where an update is skipped, and only there, so that good updates
pay nothing for it. The host reads it after the compiled call.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import strategy as strategy_lib

_MOST_NAMES = 5  # in a line
_MOST_LINES = 50  # in a run

_log_lines = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Overflow:
    """The last update that was skipped.

    Attributes:
        attempt: Updates that were attempted before it, skipped ones included.
        loss_scale: That it was computed with.
        paths: For each local replica, the variables whose gradients were not
            finite; empty for a replica without fault.
        num_variables: Of the model.
    """

    attempt: int
    loss_scale: float
    paths: tuple[tuple[str, ...], ...]
    num_variables: int

    def describe(self, replica_ids: Sequence[int], num_replicas: int) -> str:
        """Which replicas and which variables, in words.

        Args:
            replica_ids: Indices of the local replicas.
            num_replicas: Of all workers.
        """
        guilty = [
            replica_id
            for replica_id, paths in zip(replica_ids, self.paths, strict=True)
            if paths
        ]
        names = list(dict.fromkeys(p for paths in self.paths for p in paths))
        if not guilty:
            return "not finite on replicas of other workers, or on the way"
        shown = ", ".join(names[:_MOST_NAMES])
        more = len(names) - _MOST_NAMES
        return (
            f"not finite on replica {', '.join(map(str, guilty))} of "
            f"{num_replicas}: {shown}{f' and {more} more' if more > 0 else ''} "
            f"({len(names)} of {self.num_variables} variables)"
        )


class OverflowLog:
    """Remembers the last skipped update, on each replica its own part.

    Make it in the strategy's scope.

    Args:
        variables: The model's trainable variables.
    """

    def __init__(self, variables: Sequence[keras.Variable]):
        self._paths = [variable.path for variable in variables]
        self._flags = _variable(np.zeros(len(variables), "float32"))
        self._attempt = _variable(np.zeros((), "int64"))
        self._scale = _variable(np.zeros((), "float32"))

    @property
    def variables(self) -> list[keras.Variable]:
        """Its state, which is no part of the optimizer's."""
        return [self._flags, self._attempt, self._scale]

    def write(
        self,
        are_finite: tf.Tensor,
        places: Sequence[int],
        attempt: tf.Tensor,
        scale: tf.Tensor,
    ) -> None:
        """Writes down an update that is skipped; call it in the replica.

        Args:
            are_finite: Of this replica's gradients, bool.
            places: Index of each one's variable.
            attempt: Updates attempted before it.
            scale: The loss scale.
        """
        flags = tf.scatter_nd(
            tf.constant(places)[:, tf.newaxis],
            tf.cast(~are_finite, tf.float32),
            [len(self._paths)],
        )
        self._flags.assign(flags)
        self._attempt.assign(attempt)
        self._scale.assign(scale)

    def read(self) -> Overflow:
        """The last update that was skipped, as far as this host knows."""
        paths = tuple(
            tuple(
                path
                for path, flag in zip(self._paths, copy.numpy(), strict=True)
                if flag
            )
            for copy in strategy_lib.local_copies(self._flags)
        )
        attempt, scale = (
            strategy_lib.local_copies(variable)[0].numpy()
            for variable in (self._attempt, self._scale)
        )
        return Overflow(int(attempt), float(scale), paths, len(self._paths))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the data a compiled call began, and what it took.

    Attributes:
        epoch: From 0.
        batch: Of the epoch, from 0.
        num_steps: Updates of the call.
        per_step: Batches of each.
        bad_inputs: Slices of its batches with NaN or infinite numbers.
    """

    epoch: int
    batch: int
    num_steps: int
    per_step: int
    bad_inputs: int = 0


class SkipReporter:
    """Tells of skipped updates in the log, so that one can replay them.

    Args:
        log: Of the optimizer.
        iterations: Tells the updates that were applied.
        skipped: Updates skipped so far.
        replica_ids: Indices of the local replicas.
        num_replicas: Of all workers.
    """

    def __init__(
        self,
        log: OverflowLog,
        iterations: Callable[[], int],
        skipped: int,
        *,
        replica_ids: Sequence[int],
        num_replicas: int,
    ):
        self._log = log
        self._iterations = iterations
        self._skipped = skipped
        self._replica_ids = replica_ids
        self._num_replicas = num_replicas
        self._told = 0

    def tell(self, read: Mapping[str, Any], step: int, place: Place) -> None:
        """Logs the last update that a call has skipped, if it has.

        Args:
            read: The logs after the call.
            step: Of training, after the call.
            place: Where the call began.
        """
        total = int(read["skipped_updates"])
        new, self._skipped = total - self._skipped, total
        if new <= 0 or self._told == _MOST_LINES:
            return
        self._told += 1
        found = self._log.read()
        behind = self._iterations() + total - found.attempt
        batch = place.batch + (place.num_steps - behind) * place.per_step
        _log_lines.warning(
            "step %d skipped%s: %s; loss scale %g, now %g; batch %d of epoch "
            "%d%s%s%s",
            step - behind + 1,
            f", and {new - 1} before it" if new > 1 else "",
            found.describe(self._replica_ids, self._num_replicas),
            found.loss_scale,
            read["loss_scale"],
            batch + 1,
            place.epoch + 1,
            "; the data hold NaN or infinite numbers, clean them"
            if place.bad_inputs
            else "",
            f". If it goes on: {advise(step - behind + 1)}"
            if self._told == 1 and not place.bad_inputs
            else "",
            " (no more lines like this)" if self._told == _MOST_LINES else "",
        )


def advise(step: int) -> str:
    """How to find, and to mend, a layer that float16 cannot hold.

    Args:
        step: That was skipped, from 1.
    """
    return (
        f"`python -m launch.replay --step={step}` names the layer of a run, "
        "`python -m launch.numerics` looks at all layers "
        "(`dist_amp.numerics.report`), and `--precision=auto_layers` "
        "(`dist_amp.AutoLayers`) has those that need it compute in float32."
    )


def _variable(value: np.ndarray) -> keras.Variable:
    return keras.Variable(value, trainable=False, dtype=value.dtype.name)
