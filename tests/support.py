"""What the tests share: tolerances, replicas, small models, and fits of them.

Three ways to train one model on one dataset, from one seed:

* `fit_reference`: plain Keras on one device, without anything of ours;
* `fit_trainer`: `dist_amp.Trainer` on some replicas;
* `fit_keras`: `model.compile` and `fit` with a wrapped optimizer on some.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import dist_amp
from dist_amp import random_state
from dist_amp.strategy import local_copies as copies_of

NUM_LOGICAL_CPUS = 4
NUM_REPLICAS = (1, 2, 4)
GLOBAL_BATCH = 8
NUM_FEATURES = 6
NUM_CLASSES = 3


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far the weights of equal runs may be apart."""

    rtol: float
    atol: float


TOLERANCES = {
    "float32": Tolerance(rtol=1e-5, atol=1e-6),
    "mixed_float16": Tolerance(rtol=1e-3, atol=1e-4),
    "mixed_bfloat16": Tolerance(rtol=1e-2, atol=5e-3),
}
PRECISIONS = tuple(TOLERANCES)

# Every number of replicas and every precision, each met at least once.
FEW_CASES = [(1, "float32"), (4, "float32"), (2, "mixed_float16")]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model after a fit, with what trained it."""

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    history: dict[str, list[float]]
    trainer: dist_amp.Trainer | None = None

    @property
    def weights(self) -> list[np.ndarray]:
        """The trainable and the non-trainable floats of the model."""
        return read(v for v in self.model.variables if "float" in v.dtype)


# ------------------------------------------------------------------ replicas


def make_strategy(num_replicas: int) -> tf.distribute.Strategy:
    """One device, or a mirrored strategy over logical CPUs."""
    kind = "one_device" if num_replicas == 1 else "mirrored"
    devices = [f"CPU:{index}" for index in range(num_replicas)]
    return dist_amp.make_strategy(kind, devices=devices)


def local_copies(variable: keras.Variable) -> list[np.ndarray]:
    """A variable's value on each replica."""
    copies = getattr(variable.value, "values", (variable.value,))
    return [copy.numpy() for copy in copies]


def local_copies_of_state(trainer: dist_amp.Trainer) -> list[tf.Variable]:
    """Every replica's random states."""
    return [
        copy
        for variable in random_state.variables_of(trainer.model)
        for copy in copies_of(variable)
    ]


def read(variables: Iterable[keras.Variable]) -> list[np.ndarray]:
    """Replica 0's value of each variable."""
    return [local_copies(variable)[0] for variable in variables]


def assign(variables: Sequence[keras.Variable], values: Sequence[Any]) -> None:
    """Gives every replica these values."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def assert_same_on_replicas(variables: Iterable[keras.Variable]) -> None:
    """Holds bit by bit; seeds are left out, which differ by intent."""
    for variable in variables:
        if variable.name == "seed_generator_state":
            continue
        first, *others = local_copies(variable)
        for other in others:
            np.testing.assert_array_equal(other, first, variable.path)


def assert_close(
    actual: Sequence[Any], expected: Sequence[Any], precision: str = "float32"
) -> None:
    """Compares lists of arrays within the tolerance of a precision."""
    tolerance = TOLERANCES[precision]
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            one, other, rtol=tolerance.rtol, atol=tolerance.atol
        )


def assert_parity(
    actual: Trained, expected: Trained, precision: str = "float32"
) -> None:
    """Same weights and losses as expected, on every replica alike."""
    assert_close(actual.weights, expected.weights, precision)
    assert_close(
        [actual.history["loss"]], [expected.history["loss"]], precision
    )
    assert_same_on_replicas(actual.model.variables)
    assert_same_on_replicas(actual.optimizer.variables)


# ------------------------------------------------------------ data and models


def make_arrays(
    num_examples: int, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Features `[num_examples, 6]` and one of three classes for each.

    Fewer examples are the first ones of more.
    """
    features, classes = np.random.default_rng(seed).spawn(2)
    x = features.normal(size=(num_examples, NUM_FEATURES))
    y = classes.integers(0, NUM_CLASSES, size=num_examples)
    return x.astype("float32"), y.astype("int32")


def make_dataset(
    num_examples: int = 3 * GLOBAL_BATCH, batch_size: int = GLOBAL_BATCH
) -> tf.data.Dataset:
    """Batches of `make_arrays`, in order; the last one may be smaller."""
    return batched(make_arrays(num_examples), batch_size)


def batched(arrays: Any, batch_size: int = GLOBAL_BATCH) -> tf.data.Dataset:
    """Batches of a structure of arrays, in order."""
    return tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)


def make_mlp(**first_layer: Any) -> keras.Model:
    """A small classifier; the keywords are for its first layer."""
    return keras.Sequential(
        [
            keras.Input((NUM_FEATURES,)),
            keras.layers.Dense(8, activation="tanh", **first_layer),
            keras.layers.Dense(NUM_CLASSES, dtype="float32"),
        ]
    )


def make_sgd(
    learning_rate: float = 0.05, **options: Any
) -> keras.optimizers.Optimizer:
    """SGD with momentum, at a rate that moves the small models."""
    return keras.optimizers.SGD(learning_rate, momentum=0.9, **options)


def make_loss(**options: Any) -> keras.losses.Loss:
    """The classifiers' loss."""
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **options
    )


# ----------------------------------------------------------------------- fits


def make_trainer(
    make_model: Callable[[], keras.Model] = make_mlp,
    make_optimizer: Callable[[], keras.optimizers.Optimizer] = make_sgd,
    *,
    num_replicas: int = 1,
    strategy: tf.distribute.Strategy | None = None,
    precision: str = "float32",
    loss_scale_options: dict[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> dist_amp.Trainer:
    """A trainer of a model made in scope; options are the trainer's."""
    keras.utils.set_random_seed(seed)
    strategy = strategy or make_strategy(num_replicas)
    with dist_amp.scope(strategy, precision):
        model = make_model()
        optimizer = dist_amp.wrap_optimizer(
            make_optimizer(), **(loss_scale_options or {})
        )
    return dist_amp.Trainer(
        model, optimizer, **({"loss": make_loss()} | options)
    )


def fit_trainer(
    dataset: tf.data.Dataset,
    make_model: Callable[[], keras.Model] = make_mlp,
    make_optimizer: Callable[[], keras.optimizers.Optimizer] = make_sgd,
    *,
    fit: dict[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Trains two epochs with `Trainer.fit`, which takes the options `fit`."""
    trainer = make_trainer(make_model, make_optimizer, **options)
    history = trainer.fit(
        dataset, **({"epochs": 2, "verbose": 0} | (fit or {}))
    )
    return Trained(trainer.model, trainer.optimizer, history.history, trainer)


def make_compiled(
    make_model: Callable[[], keras.Model] = make_mlp,
    make_optimizer: Callable[[], keras.optimizers.Optimizer] = make_sgd,
    *,
    num_replicas: int = 1,
    precision: str = "float32",
    loss_scale_options: dict[str, Any] | None = None,
    **options: Any,
) -> keras.Model:
    """A compiled model with a wrapped optimizer; options are `compile`'s."""
    keras.utils.set_random_seed(0)
    with dist_amp.scope(make_strategy(num_replicas), precision):
        model = make_model()
        optimizer = dist_amp.wrap_optimizer(
            make_optimizer(), **(loss_scale_options or {})
        )
        optimizer.build(model.trainable_variables)
        model.compile(
            optimizer,
            steps_per_execution=1,
            **({"loss": make_loss()} | options),
        )
    return model


def fit_keras(
    dataset: tf.data.Dataset,
    make_model: Callable[[], keras.Model] = make_mlp,
    make_optimizer: Callable[[], keras.optimizers.Optimizer] = make_sgd,
    **options: Any,
) -> Trained:
    """Trains two epochs with `model.fit` and a wrapped optimizer."""
    model = make_compiled(make_model, make_optimizer, **options)
    history = model.fit(dataset, epochs=2, verbose=0, shuffle=False)
    return Trained(model, model.optimizer, history.history)


def fit_reference(
    dataset: tf.data.Dataset,
    make_model: Callable[[], keras.Model] = make_mlp,
    make_optimizer: Callable[[], keras.optimizers.Optimizer] = make_sgd,
    *,
    precision: str = "float32",
    fit: dict[str, Any] | None = None,
    **options: Any,
) -> Trained:
    """Trains two epochs with plain Keras, on one device, step by step."""
    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        model = make_model()
        options = {"loss": make_loss(), "run_eagerly": True} | options
        model.compile(make_optimizer(), **options)
        history = model.fit(
            dataset,
            **({"epochs": 2, "verbose": 0, "shuffle": False} | (fit or {})),
        )
    finally:
        keras.config.set_dtype_policy(before)
    return Trained(model, model.optimizer, history.history)
