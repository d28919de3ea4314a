"""Makes an update again, layer by layer, to see what in it was not finite.

Training goes from the newest checkpoint before the update to the update; what
it does is computed from the settings alone, so it is the same again. There the
update's batch is looked at: in the run's precision on each replica, and in
float32 layer by layer.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import data, numerics, reduction, storage
from dist_amp.arrays import ArrayBatches
from dist_amp.stream import DatasetLike, Stream
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


def newest_before(directory: str, step: int) -> tuple[str, int] | None:
    """The newest checkpoint from before an update, with its step.

    Args:
        directory: Of the checkpoints.
        step: Of training, from 1.
    """
    found = {storage.step_of(path): path for path in storage.find(directory)}
    before = [number for number in found if number < step]
    return (found[max(before)], max(before)) if before else None


def replay(
    trainer: Trainer,
    dataset: DatasetLike,
    step: int,
    *,
    checkpoint_dir: str | None = None,
    steps_per_epoch: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Replay:
    """Goes to an update of a run and looks at it.

    Args:
        trainer: As in the run, new: it trains up to the update.
        dataset: As in the run.
        step: Of training, from 1, as the log tells it.
        checkpoint_dir: Of the run; nothing is written there. None, or without
            a checkpoint from before the step: training goes from the start.
        steps_per_epoch: As in the run.
        callbacks: Of the run, those that change the training.

    Raises:
        ValueError: The run is not that long, or the step takes no batch.
    """
    found = newest_before(checkpoint_dir, step) if checkpoint_dir else None
    with tempfile.TemporaryDirectory() as folder:
        begin = 0
        if found:
            path, begin = found
            _copy(path, os.path.join(folder, os.path.basename(path)))
        if begin == step - 1:
            trainer.request_stop("the update is next")
        trainer.fit(
            dataset,
            epochs=step + 1,  # it is stopped before
            steps_per_epoch=steps_per_epoch,
            steps_per_loop=1,
            callbacks=[*callbacks, _StopAt(trainer, step - 1)],
            checkpoint_dir=folder,
            verbose=0,
        )
    if trainer.global_step != step - 1:
        raise ValueError(
            f"`step` must be one of the run's. Received {step}; training ended "
            f"at step {trainer.global_step} (--step)."
        )
    epoch, batch, batches = _next_batches(trainer, dataset, steps_per_epoch)
    return _look(trainer, (step, epoch, batch), batches)


class _StopAt(keras.callbacks.Callback):
    """Ends a fit after an update."""

    def __init__(self, trainer: Trainer, step: int):
        super().__init__()
        self._trainer = trainer
        self._step = step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Asks to stop once the step is reached."""
        if self._trainer.global_step == self._step:
            self._trainer.request_stop("the update is next")


def _copy(source: str, target: str) -> None:
    tf.io.gfile.makedirs(target)
    for folder, _, files in tf.io.gfile.walk(source):
        inner = os.path.join(target, os.path.relpath(folder, source))
        tf.io.gfile.makedirs(inner)
        for name in files:
            tf.io.gfile.copy(
                os.path.join(folder, name), os.path.join(inner, name)
            )


class _Whole:
    """A feed of global batches as they are."""

    def stacks(self, batches_per_step: int = 1) -> ArrayBatches | None:
        """None: a batch at a time."""
        del batches_per_step
        return None

    def split(
        self, batches: tf.data.Dataset, *, is_stacked: bool = False
    ) -> tf.data.Dataset:
        """The batches."""
        del is_stacked
        return batches

    def open(self, make: Any) -> Iterable[Any]:
        """The batches."""
        return make()


def _next_batches(
    trainer: Trainer, dataset: DatasetLike, steps_per_epoch: int | None
) -> tuple[int, int, list[Any]]:
    """Where the next update's batches are, and the batches."""
    epoch, batch = trainer.data_position
    stream = Stream(
        dataset,
        _Whole(),
        batches_per_step=trainer.optimizer.gradient_accumulation_steps or 1,
        steps_per_epoch=steps_per_epoch,
    )
    stream.open(epoch, batch)
    number, per_step = stream.next_call(1)
    if number == 0:
        stream.end_epoch()
        _, per_step = stream.next_call(1)
    batches = [next(stream.iterator) for _ in range(per_step)]
    return stream.epoch, stream.batch, batches


# -------------------------------------------------------------------- looking


def _look(
    trainer: Trainer, place: tuple[int, int, int], batches: Sequence[Any]
) -> Replay:
    step, epoch, batch = place
    scale = float(tf.convert_to_tensor(trainer.optimizer.loss_scale))
    found = [_not_finite(trainer, one) for one in batches]
    guilty = next((i for i, paths in enumerate(found) if any(paths)), 0)
    replicas = found[guilty]
    replica = max(range(len(replicas)), key=lambda i: len(replicas[i]))
    slice_ = _slice_of(trainer, batches[guilty], replica)
    report = numerics.report(trainer, slice_)
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


def _not_finite(trainer: Trainer, batch: Any) -> list[tuple[str, ...]]:
    """Which gradients of each replica are not finite, by path."""
    whole = tf.data.Dataset.from_tensors(batch)
    (slices,) = trainer.feed(whole).split(whole)
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


def _slice_of(trainer: Trainer, batch: Any, replica: int) -> Any:
    """A replica's rows, once for each replica, so that their shares stay."""
    number = trainer.strategy.num_replicas_in_sync
    size = len(tf.nest.flatten(batch)[0])
    begin, end = replica * size // number, (replica + 1) * size // number
    rows = np.tile(np.arange(begin, end), number)
    return tf.nest.map_structure(lambda leaf: tf.gather(leaf, rows), batch)


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
