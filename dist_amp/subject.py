"""A training that is watched step by step, to be compared with another one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import precision as precision_lib
from dist_amp import random_state
from dist_amp import strategy as strategy_lib
from dist_amp import wire as wire_lib
from dist_amp.auto_layers import pin_as_saved
from dist_amp.layer_tree import LayerTree
from dist_amp.metrics import MetricsLike
from dist_amp.optimizer import (
    DistributedOptimizer,
    LossScaleOptimizer,
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
        trainer: Makes a `Trainer`, or one that overrides its steps.
        seed: Of weights.
        precision: The one that is verified; the optimizer is made for it in
            every variation, since its arguments may be for it alone.
        devices: One for each replica, as many as the largest number takes.
        pinned: Layers that compute in float32, as `AutoLayers.get_state`
            tells them; None: as the model has it.
        first_scale: The loss scale that `AutoLayers` chose; None: the
            optimizer's own.
    """

    model_fn: Callable[[], keras.Model]
    optimizer_fn: Callable[[], keras.optimizers.Optimizer]
    loss: Any
    metrics: MetricsLike
    trainer: Callable[..., Trainer]
    seed: int
    precision: str
    devices: Sequence[str]
    pinned: dict[str, Any] | None = None
    first_scale: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variation:
    """How a training differs from the plain one on one device.

    Attributes:
        num_replicas: How many of the devices are used.
        precision: As in `dist_amp.scope`.
        jit_compile: As in `Trainer`.
        accumulation: Batches of an update; None: as the optimizer has it.
        loss_scale: "auto": as the optimizer has it; "dynamic": that, or a
            dynamic one if it has none; None: none.
        overflows: Whether the last replica's gradients can be made infinite.
    """

    num_replicas: int = 1
    precision: str = "float32"
    jit_compile: bool = False
    accumulation: int | None = None
    loss_scale: str | None = "auto"
    overflows: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What one update did.

    Attributes:
        loss: Of its global batch; NaN if a replica's part was not finite.
        metrics: Of its global batch.
        num_examples: In it.
        settings: Learning rate, loss scale, skipped updates.
        gradients: Reduced and unscaled, as they reach the inner optimizer, by
            trainable variable; those of the last update that was applied.
        trainable: After the update, by variable, a copy for each replica.
        others: The model's other variables, likewise.
        optimizer: The optimizer's variables, likewise, but the rate.
        extras: What else `Trainer.state` holds, likewise.
        is_skipped: Whether the loss scale had this update skipped.
    """

    loss: float
    metrics: dict[str, Any]
    num_examples: float
    settings: dict[str, float]
    gradients: list[np.ndarray]
    trainable: list[list[np.ndarray]]
    others: list[list[np.ndarray]]
    optimizer: list[list[np.ndarray]]
    extras: list[list[np.ndarray]]
    is_skipped: bool


class Subject:
    """A trainer whose every update is recorded.

    Random layers of Keras that drop out, add noise or augment are turned off:
    each replica draws its own numbers, as it should.

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
        self.strategy = make_strategy(parts.devices[: variation.num_replicas])
        with precision_lib.scope(self.strategy, variation.precision):
            model = parts.model_fn()
        with precision_lib.scope(self.strategy, parts.precision):
            optimizer = _make_optimizer(parts.optimizer_fn(), variation)
        self.trainer = parts.trainer(
            model,
            optimizer,
            loss=parts.loss,
            metrics=parts.metrics,
            jit_compile=variation.jit_compile,
        )
        self.scales_loss = False
        self._watch_scale()
        self._overflow = self._watch_apply() if variation.overflows else None
        self.trainer.build(self.dataset([]))
        self.turned_off = turn_off_noise(self.trainer.model)
        self._pin()
        self.extras = list(self._find_extras())
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
        skipped = self.num_skipped
        logs = self.trainer.train_on(self.dataset(batches))
        return Record(
            loss=float("nan") if logs["nonfinite_losses"] else logs["loss"],
            metrics={k: v for k, v in logs.items() if k not in _NOT_METRICS},
            num_examples=float(logs["examples"]),
            settings={
                name: float(logs[name])
                for name in ("learning_rate", "loss_scale", "skipped_updates")
            },
            gradients=[_copies(probe)[0] for probe in self._probes],
            trainable=_all_copies(self.trainer.model.trainable_variables),
            others=_all_copies(self.others),
            optimizer=_all_copies(self.slots),
            extras=_all_copies([variable for _, variable in self.extras]),
            is_skipped=self.num_skipped > skipped,
        )

    @property
    def num_skipped(self) -> int:
        """Updates that were skipped so far."""
        skipped = self.trainer.optimizer.skipped_updates
        return int(tf.convert_to_tensor(skipped))

    @property
    def slots(self) -> list[keras.Variable]:
        """The optimizer's variables, but the rate: a setting."""
        optimizer = self.trainer.optimizer
        rate = optimizer.learning_rate
        return [v for v in optimizer.variables if v is not rate]

    def owners_of_slots(self) -> list[int | None]:
        """For each of `slots` the number of the trainable variable it is for.

        Keras' optimizers keep a kind of slots in a list as long as that of
        the variables they were built with.
        """
        number = len(self.trainer.model.trainable_variables)
        optimizer = self.trainer.optimizer
        owners = {
            id(slot): index
            for one in (optimizer, optimizer.inner_optimizer)
            for slots in vars(one).values()
            if isinstance(slots, list) and len(slots) == number
            for index, slot in enumerate(slots)
        }
        return [owners.get(id(slot)) for slot in self.slots]

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
        return [path_of(variable) for variable in self._stateful()]

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
        return [
            *self.trainer.model.trainable_variables,
            *self.others,
            *self.slots,
            *(variable for _, variable in self.extras),
        ]

    def _find_extras(self) -> Iterator[tuple[str, Any]]:
        """What a class adds to `Trainer.state`, with the name of its group."""
        trainer = self.trainer
        known = {
            id(variable)
            for variables in (
                trainer.model.variables,
                trainer.optimizer.variables,
                random_state.variables_of(trainer.model),
            )
            for variable in variables
        }
        for group, variables in trainer.state().items():
            for variable in variables:
                is_random = variable.name.partition(":")[0] in _GENERATORS
                if id(variable) not in known and not is_random:
                    known.add(id(variable))
                    yield group, variable

    def _pin(self) -> None:
        """Has the layers in float32 that `AutoLayers` chose."""
        if self.variation.precision != "auto_layers":
            return
        if self.parts.pinned is not None:
            saved = [("AutoLayers", self.parts.pinned)]
            pin_as_saved(self.trainer, {"callbacks": saved})
        optimizer = self.trainer.optimizer
        has_scale = isinstance(optimizer, LossScaleOptimizer)
        if has_scale and self.parts.first_scale is not None:
            optimizer.set_loss_scale(self.parts.first_scale)

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

    def _watch_scale(self) -> None:
        """Notes in `scales_loss` whether a step that is traced scales."""
        scale_loss = self.trainer.optimizer.scale_loss

        def watched(loss: tf.Tensor) -> tf.Tensor:
            self.scales_loss = True
            return scale_loss(loss)

        self.trainer.optimizer.scale_loss = watched  # type: ignore

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


def find_devices(num_replicas: int) -> list[str]:
    """Devices of one kind for so many replicas: GPUs if there are enough.

    Raises:
        ValueError: There are not so many logical devices.
    """
    found = strategy_lib.find_devices()
    if found[0].startswith("GPU") and len(found) >= num_replicas:
        return found[:num_replicas]
    try:
        return strategy_lib.find_devices(
            [f"CPU:{i}" for i in range(num_replicas)]
        )
    except ValueError as error:
        raise ValueError(
            f"{num_replicas} replicas need as many devices of one kind on this "
            "host. For logical CPUs call `dist_amp.strategy.use_logical_cpus("
            f"{num_replicas})` in a new process before anything else touches "
            f"TensorFlow. Received {len(found)}: {', '.join(found)}."
        ) from error


def make_strategy(devices: Sequence[str]) -> tf.distribute.Strategy:
    """A replica on each of some devices of this host."""
    kind = "one_device" if len(devices) == 1 else "mirrored"
    return strategy_lib.make_strategy(kind, devices=devices)


def path_of(variable: Any) -> str:
    """What a variable of Keras or of TensorFlow is called."""
    return getattr(variable, "path", None) or variable.name.partition(":")[0]


def turn_off_noise(model: keras.Model) -> list[str]:
    """Sets rates of dropout and standard deviations of noise to 0.

    Augmentation does what it does in inference: nothing, or a central crop.

    Returns:
        Paths of the layers that had any.
    """
    tree, found = LayerTree(model), []
    for layer in layers_of(model):
        if not type(layer).__module__.startswith("keras."):
            continue  # a user's `rate` may be anything
        for name in _NOISE:
            value = vars(layer).get(name)  # no property, as of LSTM
            if isinstance(value, float) and value:
                setattr(layer, name, 0.0)
                found.append(tree.path_of(layer))
        if isinstance(vars(layer).get("generator"), keras.random.SeedGenerator):
            _call_in_inference(layer)
            found.append(tree.path_of(layer))
    return list(dict.fromkeys(found))


def _call_in_inference(layer: keras.layers.Layer) -> None:
    """Augmentation has no rate that would turn it off."""
    call = layer.call

    def called(inputs: Any, *_: Any, **named: Any) -> Any:
        return call(inputs, **{**named, "training": False})

    layer.call = called


# States of random generators, as Keras and TensorFlow name them.
_GENERATORS = ("seed_generator_state", "StateVar")

# Of keras.layers: Dropout and its kin, GaussianNoise, recurrent cells.
_NOISE = ("rate", "stddev", "dropout", "recurrent_dropout")


def _make_optimizer(
    optimizer: keras.optimizers.Optimizer, variation: Variation
) -> DistributedOptimizer:
    """The user's, wrapped as the variation wants it, with an exact wire."""
    has_scale = isinstance(optimizer, LossScaleOptimizer)
    wants_scale = {"auto": has_scale, "dynamic": True, None: False}
    is_kept = has_scale == wants_scale[variation.loss_scale]
    if isinstance(optimizer, DistributedOptimizer) and not is_kept:
        parts = optimizer.gradient_accumulation_steps
        optimizer = optimizer.inner_optimizer
        optimizer.gradient_accumulation_steps = parts
    if variation.accumulation is not None:
        optimizer.gradient_accumulation_steps = variation.accumulation
    wrapped = wrap_optimizer(optimizer, loss_scale=variation.loss_scale)
    wrapped.wire = wire_lib.Wire(None)
    return wrapped


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
