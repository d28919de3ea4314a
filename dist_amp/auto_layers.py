"""AutoLayers: puts the layers in float32 that float16 fails, while training."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_amp import numerics
from dist_amp import optimizer as optimizer_lib
from dist_amp import strategy as strategy_lib
from dist_amp.advice import Advice
from dist_amp.layer_tree import LayerTree
from dist_amp.ranges import Window
from dist_amp.stream import DatasetLike, one_pass
from dist_amp.trainer import Trainer

_log = logging.getLogger(__name__)


class AutoLayers(keras.callbacks.Callback):
    """Puts those layers of a model in float32 that float16 fails.

    Before the first epoch `numerics.report` looks at some batches; the layers
    that its advice names compute in float32 from then on, and the loss scale
    starts within its window. After each epoch in which updates were skipped
    it looks again, and pins what it finds. Checkpoints hold what is pinned; a
    run that goes on has it pinned before its first update. On several workers
    worker 0 decides for all.

    The weights are float32 in either case, so nothing else changes.

    Args:
        trainer: The one that trains, its model made in mixed_float16. Give it
            all workers.
        dataset: As given to `fit`. Some batches are read right here, in every
            run alike; of a function of the pass also at an epoch's end.
        num_batches: How many global batches to look at: at one replica's
            part of each.
        max_error: See `numerics.report`.
        max_lost: See `numerics.report`.

    Attributes:
        pinned: Paths of the layers that were put in float32.

    Raises:
        ValueError: No layer of the model computes in float16.

    Example:
    >>> strategy = dist_amp.make_strategy("one_device")
    >>> with dist_amp.scope(strategy, "auto_layers"):
    ...     model = keras.Sequential([
    ...         keras.Input((2,)), keras.layers.Rescaling(1e6, name="large"),
    ...         keras.layers.LayerNormalization(name="norm"),
    ...         keras.layers.Dense(1)])
    ...     optimizer = dist_amp.wrap_optimizer(keras.optimizers.Adam(1e-3))
    >>> trainer = dist_amp.Trainer(model, optimizer, loss="mean_squared_error")
    >>> dataset = tf.data.Dataset.from_tensor_slices(
    ...     (tf.random.normal([8, 2]), tf.zeros([8, 1]))).batch(4)
    >>> auto_layers = dist_amp.AutoLayers(trainer, dataset)
    >>> _ = trainer.fit(dataset, callbacks=[auto_layers], verbose=0)
    >>> auto_layers.pinned
    ['large', 'norm']
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: DatasetLike,
        *,
        num_batches: int = 2,
        max_error: float = 0.05,
        max_lost: float = 0.05,
    ):
        super().__init__()
        if not optimizer_lib.computes_in_float16(trainer.model):
            raise ValueError(
                "`AutoLayers` would be ignored: no layer of the model computes "
                "in float16. Make the model in `dist_amp.scope(strategy, "
                "'auto_layers')` (--precision=auto_layers)."
            )
        self.pinned: list[str] = []
        self._trainer = trainer
        self._dataset = dataset
        self._num_batches = num_batches
        self._options = {"max_error": max_error, "max_lost": max_lost}
        self._first = self._read(one_pass(dataset))
        self._indices: list[int] = []
        self._is_calibrated = False
        self._skipped = 0

    def on_epoch_begin(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Looks at the first batches, before the first epoch of a run."""
        del epoch, logs
        if not self._is_calibrated:
            self._is_calibrated = True
            self._adapt(self._first, is_first=True)

    def on_epoch_end(
        self, epoch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Looks again, if updates were skipped in this epoch."""
        skipped = int((logs or {}).get("skipped_updates", 0))
        if skipped > self._skipped:
            batches = self._first
            if not isinstance(self._dataset, tf.data.Dataset):
                number = tf.constant(epoch, tf.int64)
                batches = self._read(self._dataset(number))
            self._adapt(batches, is_first=False)
        self._skipped = skipped

    def get_state(self) -> dict[str, Any]:
        """For checkpoints: which layers are pinned, by number and path."""
        return {
            "is_calibrated": self._is_calibrated,
            "skipped": self._skipped,
            "indices": self._indices,
            "pinned": self.pinned,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Pins what was pinned; what is pinned already stays so."""
        self._is_calibrated = state["is_calibrated"]
        self._skipped = state["skipped"]
        if self._pin(state["indices"]):
            _log.info("float32 as before: %s", ", ".join(self.pinned))

    # ------------------------------------------------------------ private

    def _read(self, dataset: tf.data.Dataset) -> list[Any]:
        return list(dataset.take(self._num_batches))

    def _adapt(self, batches: Sequence[Any], *, is_first: bool) -> None:
        advice = numerics.report(
            self._trainer,
            iter(batches),
            loss_scales=self._loss_scales(),
            has_errors=is_first,
            **self._options,
        ).advice
        indices, exponent = self._agreed(advice, is_first=is_first)
        found = self._pin(indices)
        scale = self._set_scale(exponent) if found or is_first else None
        for note in advice.notes:
            _log.warning("%s", note)
        if not found:
            return
        reasons = {pin.index: pin.reasons[0] for pin in advice.pins}
        tree = LayerTree(self._trainer.model)
        _log.info(
            "float32 from here on: %s%s",
            ", ".join(
                f"{tree.path_of(tree.layers[index])} "
                f"({reasons.get(index, 'worker 0 says so')})"
                for index in found
            ),
            f"; loss scale {scale:g}" if scale else "",
        )

    def _loss_scale(self) -> float:
        return float(tf.convert_to_tensor(self._trainer.optimizer.loss_scale))

    def _loss_scales(self) -> Window:
        optimizer = self._trainer.optimizer
        if isinstance(optimizer, optimizer_lib.LossScaleOptimizer):
            rule = optimizer.rule
            return Window(rule.min_scale, rule.max_scale)
        return Window(1.0, 1.0)

    def _agreed(
        self, advice: Advice, *, is_first: bool
    ) -> tuple[list[int], int | None]:
        """What worker 0 would pin, and the power of two of its loss scale.

        None if the scale is to stay. After skips it starts again as in a new
        run: an overflow that was a layer's fault has lowered it for nothing.
        """
        strategy, optimizer = self._trainer.strategy, self._trainer.optimizer
        indices = [pin.index for pin in advice.pins]
        now = self._loss_scale()
        scale = now if is_first else getattr(optimizer, "initial_scale", now)
        if advice.window is not None:
            scale = advice.window.nearest(scale)
        exponent = round(math.log2(scale)) if scale != now else None
        if strategy_lib.num_workers(strategy) == 1:
            return indices, exponent
        layers = LayerTree(self._trainer.model).layers
        flags = [int(index in indices) for index in range(len(layers))]
        missing = 2**20
        numbers = [missing if exponent is None else exponent, *flags]
        first, *flags = strategy_lib.gather_workers(strategy, numbers)[0]
        agreed = [index for index, flag in enumerate(flags) if flag]
        return agreed, None if first == missing else int(first)

    def _pin(self, indices: Sequence[int]) -> list[int]:
        """Pins what is not yet; returns what that is."""
        new = [index for index in indices if index not in self._indices]
        if not new:
            return []
        tree = LayerTree(self._trainer.model)
        units = [tree.layers[index] for index in new]
        self._trainer.pin(
            [layer for unit in units for layer in tree.members_of(unit)]
        )
        self._indices += new
        self.pinned += [tree.path_of(unit) for unit in units]
        self._check_model()
        return new

    def _check_model(self) -> None:
        """Whether the model still runs, in two dtypes."""
        first = self._first[0]
        x = first[0] if isinstance(first, tuple) else first
        model = self._trainer.model
        try:
            model(tf.nest.map_structure(lambda leaf: leaf[:1], x))
        except (tf.errors.OpError, TypeError, ValueError) as error:
            raise ValueError(
                f"{', '.join(self.pinned)} cannot compute in float32 while the "
                "others compute in float16: the model mixes what they return. "
                "Use keras.ops or keras.layers.Add for it, which cast, or make "
                "them one layer. TensorFlow says: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _set_scale(self, exponent: int | None) -> float | None:
        """Sets the loss scale; returns it if it was another."""
        optimizer, before = self._trainer.optimizer, self._loss_scale()
        if exponent is None or not isinstance(
            optimizer, optimizer_lib.LossScaleOptimizer
        ):
            return None
        optimizer.set_loss_scale(2.0**exponent)
        scale = self._loss_scale()
        return scale if scale != before else None


def pin_as_saved(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Pins what `AutoLayers` of a run had pinned, for a model of that run.

    Args:
        trainer: Of a built model.
        state: Of a checkpoint, from `storage.read_state`.
    """
    tree = LayerTree(trainer.model)
    units = [
        tree.layers[index]
        for kind, saved in state.get("callbacks", ())
        if kind == AutoLayers.__name__
        for index in saved["indices"]
    ]
    if units:
        trainer.pin([x for unit in units for x in tree.members_of(unit)])
