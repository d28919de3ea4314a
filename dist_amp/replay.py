"""Makes an update again, layer by layer, to see what in it was not finite.

Training goes from the newest checkpoint before the update to the update; what
it does is computed from the settings alone, so it is the same again. There the
update's batch is looked at: in the run's precision on each replica, and in
float32 layer by layer.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import data, numerics, reduction, storage
from dist_amp import strategy as strategy_lib
from dist_amp.rollback import RollbackPolicy
from dist_amp.stream import DatasetLike
from dist_amp.trainer import Trainer

_FLOAT16_MAX = 65504.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What was found in an update.

    Attributes:
        step: Of training, from 1.
        epoch: From 1.
        batch: Of the epoch, from 1; the first, if the update takes several.
        loss_scale: Of the update; 1.0 if there is none.
        replicas: For each replica the variables whose gradients are not
            finite in the run's precision.
        loss: In float32, of the slice that `layers` is about.
        activation: The first layer whose output leaves float16's range.
        gradient: The first, from the loss back, whose gradient does, at the
            loss scale.
        report: On all layers, in float32.
    """

    step: int
    epoch: int
    batch: int
    loss_scale: float
    replicas: tuple[tuple[str, ...], ...]
    loss: float | None
    activation: str | None
    gradient: str | None
    report: numerics.Report

    @property
    def is_skipped(self) -> bool:
        """Whether the update is, in the run's precision."""
        return any(self.replicas)


def newest_before(directory: str, step: int) -> str | None:
    """The newest whole checkpoint from before an update.

    Args:
        directory: Of the checkpoints.
        step: Of training, from 1.
    """
    found = reversed(storage.find(directory))
    before = (path for path in found if storage.step_of(path) < step)
    return next(filter(_is_whole, before), None)


def _oldest_from(directory: str, step: int) -> str | None:
    """The first whole checkpoint that an update is in."""
    found = storage.find(directory)
    after = (path for path in found if storage.step_of(path) >= step)
    return next(filter(_is_whole, after), None)


def _is_whole(path: str) -> bool:
    try:
        return storage.check(path) is not None
    except storage.DamagedError:
        return False


def replay(
    trainer: Trainer,
    dataset: DatasetLike,
    step: int,
    *,
    checkpoint_dir: str | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    validation_data: tf.data.Dataset | None = None,
    rollback: RollbackPolicy | None = None,
) -> Replay:
    """Goes to an update of a run and looks at it.

    Where the run went back and passed over batches, so does this: as the next
    checkpoint tells, or, if there is none, by the run's policy.

    Args:
        trainer: As in the run, new: it trains up to the update.
        dataset: As in the run.
        step: Of training, from 1, as the log tells it.
        checkpoint_dir: Of the run; nothing is written there. None, or without
            a checkpoint from before the step: training goes from the start.
        epochs: As in the run.
        steps_per_epoch: As in the run.
        callbacks: Of the run, those that change the training.
        validation_data: As in the run, if a callback goes by its results.
        rollback: As in the run.

    Raises:
        ValueError: The run is not that long, or the step takes no batch.
    """
    found = newest_before(checkpoint_dir, step) if checkpoint_dir else None
    later = _oldest_from(checkpoint_dir, step) if checkpoint_dir else None
    arrival = _Arrival(
        trainer, step - 1, storage.read_state(later) if later else None
    )
    with tempfile.TemporaryDirectory() as folder:
        if found:
            _copy(found, os.path.join(folder, os.path.basename(found)))
        with contextlib.suppress(_ArrivedError):
            trainer.fit(
                dataset,
                epochs=epochs or step + 1,
                steps_per_epoch=steps_per_epoch,
                steps_per_loop=1,
                callbacks=[*callbacks, arrival],
                validation_data=validation_data,
                rollback=rollback,
                checkpoint_dir=folder,
                verbose=0,
            )
    if not arrival.batches:
        raise ValueError(
            f"`step` must be one of the run's. Received {step}; training ended "
            f"at step {trainer.global_step} (--step)."
        )
    return _look(trainer, (step, *arrival.place), arrival.batches)


class _ArrivedError(Exception):
    """Ends a fit right before an update."""


class _Arrival(keras.callbacks.Callback):
    """Takes the batches of an update before it is made.

    Args:
        trainer: Of the fit.
        step: Updates before that one.
        later: What the run's next checkpoint tells.

    Attributes:
        batches: Of the update; a slice for each replica of each.
        place: Epoch, and batch of it, from 0.
    """

    def __init__(
        self, trainer: Trainer, step: int, later: Mapping[str, Any] | None
    ):
        super().__init__()
        self._trainer = trainer
        self._step = step
        self._later = later
        self.batches: list[tuple[data.Batch, ...]] = []
        self.place = (0, 0)

    def on_train_begin(self, logs: Any = None) -> None:
        """Does as the run did after the checkpoint, if a later one tells."""
        if self._later:
            self._trainer.take_rollbacks(self._later)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Ends the fit there; not where data of unknown length have ended."""
        if self._trainer.global_step != self._step:
            return
        self.place = self._trainer.data_position
        self.batches = self._trainer.peek()
        if self.batches:
            raise _ArrivedError


def _copy(source: str, target: str) -> None:
    tf.io.gfile.makedirs(target)
    for folder, _, files in tf.io.gfile.walk(source):
        inner = os.path.join(target, os.path.relpath(folder, source))
        tf.io.gfile.makedirs(inner)
        for name in files:
            tf.io.gfile.copy(
                os.path.join(folder, name), os.path.join(inner, name)
            )


# -------------------------------------------------------------------- looking


def _look(
    trainer: Trainer,
    place: tuple[int, int, int],
    batches: Sequence[tuple[data.Batch, ...]],
) -> Replay:
    step, epoch, batch = place
    scale = float(tf.convert_to_tensor(trainer.optimizer.loss_scale))
    with _statistics_kept(trainer):
        found = [_not_finite(trainer, slices) for slices in batches]
    guilty = next((i for i, paths in enumerate(found) if any(paths)), 0)
    replicas = found[guilty]
    replica = max(range(len(replicas)), key=lambda i: len(replicas[i]))
    report = numerics.report(trainer, _alone(trainer, batches[guilty][replica]))
    return Replay(
        step=step,
        epoch=epoch + 1,
        batch=batch + 1,
        loss_scale=scale,
        replicas=tuple(replicas),
        loss=report.loss,
        activation=_first_activation(report),
        gradient=_first_gradient(report, scale),
        report=report,
    )


@contextlib.contextmanager
def _statistics_kept(trainer: Trainer) -> Iterator[None]:
    """What a forward pass in training assigns is put back."""
    copies = [
        copy
        for variable in trainer.model.non_trainable_variables
        for copy in strategy_lib.local_copies(variable)
    ]
    before = [tf.convert_to_tensor(copy) for copy in copies]
    try:
        yield
    finally:
        for copy, value in zip(copies, before, strict=True):
            copy.assign(value)


def _not_finite(
    trainer: Trainer, slices: tuple[data.Batch, ...]
) -> list[tuple[str, ...]]:
    """Which gradients of each replica are not finite, by path."""
    strategy = trainer.strategy
    variables = trainer.model.trainable_variables
    present: list[str] = []

    def in_replica(slice_: data.Batch) -> tf.Tensor:
        _, _, gradients = trainer.compute_gradients(slice_)
        pairs = zip(variables, gradients, strict=True)
        some = {v.path: g for v, g in pairs if g is not None}
        present[:] = some
        return reduction.finite_flags(list(some.values()))

    @tf.function(autograph=False)
    def flags() -> Any:
        local = iter(slices)
        values = strategy.experimental_distribute_values_from_function(
            lambda context: next(local)
        )
        results = strategy.run(in_replica, args=(values,))
        return strategy.experimental_local_results(results)

    return [
        tuple(
            path
            for path, is_finite in zip(present, of_replica.numpy(), strict=True)
            if not is_finite
        )
        for of_replica in flags()
    ]


def _alone(trainer: Trainer, slice_: data.Batch) -> tuple[Any, ...]:
    """A replica's rows, once for each replica, so that their shares stay."""
    number = trainer.strategy.num_replicas_in_sync
    rows = np.tile(np.arange(slice_.weight.shape[0]), number)
    weights = slice_.weight * slice_.normalizer

    def tiled(leaf: tf.Tensor) -> tf.Tensor:
        return tf.gather(leaf, rows)

    parts = (slice_.x,) if slice_.y is None else (slice_.x, slice_.y, weights)
    return tf.nest.map_structure(tiled, parts)


def _first_activation(report: numerics.Report) -> str | None:
    for layer in report.layers:
        if layer.only_passes_on or layer.output is None:
            continue
        if layer.output.num_over or not layer.output.is_finite:
            return (
                f"{layer.path} (its output reaches {layer.output.largest:.3g})"
            )
        if layer.float16_error == float("inf"):
            return f"{layer.path} (it overflows within, in float16)"
    return None


def _first_gradient(report: numerics.Report, scale: float) -> str | None:
    """From the loss back; by what flows through layers, then by variable."""
    for layer in reversed(report.layers):
        gradient = layer.output_gradient
        if layer.only_passes_on or gradient is None:
            continue
        if not gradient.is_finite or gradient.largest * scale > _FLOAT16_MAX:
            return (
                f"{layer.path} (the gradient of its output reaches "
                f"{gradient.largest * scale:.3g})"
            )
    for variable in reversed(report.variables):
        found = variable.gradient
        if found is not None and found.largest * scale > _FLOAT16_MAX:
            return f"{variable.path} (reaches {found.largest * scale:.3g})"
    return None
