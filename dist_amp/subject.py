"""A training that is watched step by step, to be compared with another one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import precision as precision_lib
from dist_amp import random_state
from dist_amp import strategy as strategy_lib
from dist_amp.metrics import MetricsLike
from dist_amp.optimizer import (
    DistributedOptimizer,
    layers_of,
    wrap_optimizer,
)
from dist_amp.trainer import Trainer

_NOT_METRICS = (
    "loss",
    "examples",
    "nonfinite_losses",
    "nonfinite_inputs",
    "loss_scale",
    "skipped_updates",
    "learning_rate",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What a training is made of, made anew in each scope.

    Attributes:
        model_fn: Makes the model.
        optimizer_fn: Makes the Keras optimizer, wrapped or not.
        loss: As in `Trainer`.
        metrics: As in `Trainer`.
        trainer: The class, `Trainer` or one that overrides its steps.
        seed: Of weights.
    """

    model_fn: Callable[[], keras.Model]
    optimizer_fn: Callable[[], keras.optimizers.Optimizer]
    loss: Any
    metrics: MetricsLike
    trainer: type[Trainer]
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variation:
    """How a training differs from the plain one on one device.

    Attributes:
        num_replicas: Logical CPUs or GPUs.
        precision: As in `dist_amp.scope`.
        jit_compile: As in `Trainer`.
        accumulation: Batches of an update; None: as the optimizer has it.
        loss_scale: As in `wrap_optimizer`.
        overflows: Whether the last replica's gradients can be made infinite.
    """

    num_replicas: int = 1
    precision: str = "float32"
    jit_compile: bool = False
    accumulation: int | None = None
    loss_scale: str | float | None = "auto"
    overflows: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What one update did.

    Attributes:
        loss: Of its global batch.
        metrics: Of its global batch.
        settings: Learning rate, loss scale, skipped updates.
        gradients: Reduced and unscaled, as they reach the inner optimizer, by
            trainable variable; those of the last update that was applied.
        trainable: After the update, by variable, a copy for each replica.
        others: The model's other variables, likewise.
        optimizer: The optimizer's variables, likewise.
    """

    loss: float
    metrics: dict[str, Any]
    settings: dict[str, float]
    gradients: list[np.ndarray]
    trainable: list[list[np.ndarray]]
    others: list[list[np.ndarray]]
    optimizer: list[list[np.ndarray]]


class Subject:
    """A trainer whose every update is recorded.

    Random layers of Keras that drop out or add noise are turned off: each
    replica draws its own numbers, as it should.

    Args:
        parts: What it is made of.
        variation: How it is made.
        spec: Of the global batches, first dimensions unknown.
        records: Whether its gradients are to be written down.
    """

    def __init__(
        self,
        parts: Parts,
        variation: Variation,
        spec: Any,
        *,
        records: bool = True,
    ):
        self.parts = parts
        self.variation = variation
        self._spec = spec
        keras.utils.set_random_seed(parts.seed)
        # Not 0, with which `shuffle(n, seed=number)` fails (TensorFlow 2.21).
        tf.random.set_seed(parts.seed + 1)
        self.strategy = make_strategy(variation.num_replicas)
        with precision_lib.scope(self.strategy, variation.precision):
            model = parts.model_fn()
            optimizer = _make_optimizer(parts.optimizer_fn(), variation)
        self.trainer = parts.trainer(
            model,
            optimizer,
            loss=parts.loss,
            metrics=parts.metrics,
            jit_compile=variation.jit_compile,
        )
        self._overflow = self._watch_apply() if variation.overflows else None
        self.trainer.build(self.dataset([]))
        self.turned_off = turn_off_noise(self.trainer.model)
        self._probes = self._watch_gradients() if records else []

    @property
    def batches_per_step(self) -> int:
        """Batches that an update takes."""
        return self.trainer.optimizer.gradient_accumulation_steps or 1

    def dataset(self, batches: Sequence[Any]) -> tf.data.Dataset:
        """These global batches, of one type whatever their sizes."""
        return tf.data.Dataset.from_generator(
            lambda: iter(batches), output_signature=self._spec
        )

    # -------------------------------------------------------------- updates

    def step(
        self, batches: Sequence[Any], *, overflows: bool = False
    ) -> Record:
        """One update.

        Args:
            batches: As many as it accumulates.
            overflows: Whether the last replica's gradients are infinite.
        """
        if self._overflow is not None:
            self._overflow.assign(float(overflows))
        self.trainer.metrics.reset()
        logs = self.trainer.train_on(self.dataset(batches))
        return Record(
            loss=logs["loss"],
            metrics={k: v for k, v in logs.items() if k not in _NOT_METRICS},
            settings={
                name: float(logs[name])
                for name in ("learning_rate", "loss_scale", "skipped_updates")
            },
            gradients=[_copies(probe)[0] for probe in self._probes],
            trainable=_all_copies(self.trainer.model.trainable_variables),
            others=_all_copies(self.others),
            optimizer=_all_copies(self.trainer.optimizer.variables),
        )

    @property
    def others(self) -> list[keras.Variable]:
        """The model's variables that no gradient trains, seeds left out."""
        seeds = {id(v) for v in random_state.variables_of(self.trainer.model)}
        return [
            variable
            for variable in self.trainer.model.non_trainable_variables
            if id(variable) not in seeds
        ]

    # ---------------------------------------------------------------- state

    def paths(self) -> list[str]:
        """What the values of `state` are called."""
        return [variable.path for variable in self._stateful()]

    def state(self) -> list[np.ndarray]:
        """Replica 0's values of all that is trained or counted."""
        return [_copies(variable)[0] for variable in self._stateful()]

    def load(self, state: Sequence[np.ndarray]) -> None:
        """Gives every replica the values of another subject's `state`."""
        for variable, value in zip(self._stateful(), state, strict=True):
            for copy in strategy_lib.local_copies(variable):
                copy.assign(value)

    def load_weights(self, other: "Subject") -> None:
        """Takes the model's variables of a subject in any precision."""
        mine, theirs = (
            [*one.trainer.model.trainable_variables, *one.others]
            for one in (self, other)
        )
        for variable, source in zip(mine, theirs, strict=True):
            variable.assign(_copies(source)[0])

    def _stateful(self) -> list[Any]:
        optimizer = self.trainer.optimizer
        rate = optimizer.learning_rate  # a setting, which may differ
        return [
            *self.trainer.model.trainable_variables,
            *self.others,
            *(v for v in optimizer.variables if v is not rate),
        ]

    # ------------------------------------------------------------- watching

    def _watch_gradients(self) -> list[keras.Variable]:
        """Writes down what reaches the inner optimizer."""
        optimizer = self.trainer.optimizer
        variables = self.trainer.model.trainable_variables
        with self.strategy.scope():
            probes = {
                id(variable): keras.Variable(
                    np.zeros(variable.shape, "float32"), trainable=False
                )
                for variable in variables
            }
        update = optimizer._update

        def watched(gradients: Sequence[Any], updated: Sequence[Any]) -> None:
            for gradient, variable in zip(gradients, updated, strict=True):
                dense = tf.cast(tf.convert_to_tensor(gradient), tf.float32)
                if id(variable) in probes:
                    probes[id(variable)].assign(dense)
            update(gradients, updated)

        optimizer._update = watched  # type: ignore
        return [probes[id(variable)] for variable in variables]

    def _watch_apply(self) -> tf.Variable:
        """Makes the last replica's gradients infinite while the flag is 1."""
        optimizer = self.trainer.optimizer
        with self.strategy.scope():
            flag = tf.Variable(0.0, trainable=False)
        apply = optimizer.apply

        @tf.autograph.experimental.do_not_convert
        def poisoned(grads: Sequence[Any], *rest: Any, **named: Any) -> Any:
            context = tf.distribute.get_replica_context()
            last = context.num_replicas_in_sync - 1
            is_last = tf.equal(context.replica_id_in_sync_group, last)
            hit = tf.cast(is_last, tf.float32) * flag
            factor = tf.where(hit > 0, np.float32("inf"), np.float32(1))
            return apply([_times(g, factor) for g in grads], *rest, **named)

        optimizer.apply = poisoned  # type: ignore[method-assign]
        return flag


def make_strategy(num_replicas: int) -> tf.distribute.Strategy:
    """One device, or several of this host: GPUs if there are enough.

    Raises:
        ValueError: There are not so many logical devices.
    """
    if num_replicas == 1:
        return strategy_lib.make_strategy("one_device")
    devices = strategy_lib.find_devices()
    if len(devices) < num_replicas:
        devices = strategy_lib.find_devices(
            [f"CPU:{i}" for i in range(num_replicas)]
        )
    return strategy_lib.make_strategy(
        "mirrored", devices=devices[:num_replicas]
    )


def turn_off_noise(model: keras.Model) -> list[str]:
    """Sets rates of dropout and standard deviations of noise to 0.

    Returns:
        Paths of the layers that had any.
    """
    found = []
    for layer in layers_of(model):
        if not type(layer).__module__.startswith("keras."):
            continue  # a user's `rate` may be anything
        for name in _NOISE:
            value = vars(layer).get(name)  # no property, as of LSTM
            if isinstance(value, float) and value:
                setattr(layer, name, 0.0)
                found.append(layer.path)
    return list(dict.fromkeys(found))


# Of keras.layers: Dropout and its kin, GaussianNoise, recurrent cells.
_NOISE = ("rate", "stddev", "dropout", "recurrent_dropout")


def _make_optimizer(
    optimizer: keras.optimizers.Optimizer, variation: Variation
) -> DistributedOptimizer:
    """The user's, wrapped as the variation wants it, with an exact wire."""
    inner = optimizer
    if isinstance(optimizer, DistributedOptimizer):
        inner = optimizer.inner_optimizer
        inner.gradient_accumulation_steps = (
            optimizer.gradient_accumulation_steps
        )
    if variation.accumulation is not None:
        inner.gradient_accumulation_steps = variation.accumulation
    return wrap_optimizer(inner, loss_scale=variation.loss_scale)


def _times(gradient: Any, factor: tf.Tensor) -> Any:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(
            gradient.values * tf.cast(factor, gradient.dtype),
            gradient.indices,
            gradient.dense_shape,
        )
    return gradient * tf.cast(factor, gradient.dtype)


def _copies(variable: Any) -> list[np.ndarray]:
    return [copy.numpy() for copy in strategy_lib.local_copies(variable)]


def _all_copies(variables: Sequence[Any]) -> list[list[np.ndarray]]:
    return [_copies(variable) for variable in variables]
