"""Trainings that several workers and one device do alike; a worker's program.

As a program: `python -m tests.multi_worker.parity_cases FOLDER NUM_DEVICES
CASE...` trains each case as the worker that TF_CONFIG tells, and leaves its
weights, optimizer and history in the folder.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import dist_amp
from dist_amp import data
from dist_amp import strategy as strategy_lib
from dist_amp.meter import MEASURED
from tests import support

# Three batches of 8 and one of 3: some replicas get no example of it.
NUM_EXAMPLES = 27


def make_adam(**options):
    return keras.optimizers.Adam(
        0.01, epsilon=1e-4, weight_decay=0.1, global_clipnorm=0.05, **options
    )


def make_synchronized():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(synchronized=True),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def make_embedding():
    return keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(12, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def make_convolutional():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Reshape((2, 3, 1)),
            keras.layers.Conv2D(4, 2, padding="same", activation="tanh"),
            keras.layers.MaxPooling2D((1, 2)),
            keras.layers.Flatten(),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def make_large():
    """Two kernels of 4.8 MB: the gradients travel in several packs."""
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            *(keras.layers.Dense(1100, activation="tanh") for _ in range(3)),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def plain():
    return support.make_dataset(NUM_EXAMPLES)


def weighted():
    x, y = support.make_arrays(NUM_EXAMPLES)
    weights = np.linspace(0.0, 2.0, NUM_EXAMPLES).astype("float32")
    return support.batched((x, y, weights))


def tokens():
    _, y = support.make_arrays(NUM_EXAMPLES)
    x = np.random.default_rng(2).integers(0, 6, size=(NUM_EXAMPLES, 3))
    return support.batched((x.astype("int32"), y))


def fewer_tokens():
    """A last batch of 4, then of 2: as many on each worker, but not always."""
    all_batches = tokens()
    last = all_batches.skip(NUM_EXAMPLES // support.GLOBAL_BATCH)
    smaller = last.unbatch().take(2).batch(2)
    four = all_batches.take(1).unbatch().take(4).batch(4)
    return all_batches.take(2).concatenate(four).concatenate(smaller)


def poisoned(row):
    """An input of the second batch is infinite in float16."""

    def make():
        x, y = support.make_arrays(NUM_EXAMPLES)
        x[support.GLOBAL_BATCH + row] = 1e30
        return support.batched((x, y))

    return make


def without_worker_1(first):
    """From this of five batches on, worker 1's rows count for nothing."""

    def make():
        x, y = support.make_arrays(5 * support.GLOBAL_BATCH)
        weights = np.ones((5, 2, support.GLOBAL_BATCH // 2), "float32")
        weights[first:, 1] = 0
        return support.batched((x, y, weights.ravel()))

    return make


def worker_1_has(num_batches, *, is_known=True):
    """The same as two workers have it, one with so many of five batches."""

    def of_worker(index):
        all_batches = support.make_dataset(5 * support.GLOBAL_BATCH)
        own = all_batches.take(num_batches if index == 1 else 5)
        return own if is_known else own.filter(lambda x, y: True)

    return of_worker


def stacked():
    return data.from_arrays(
        support.make_arrays(NUM_EXAMPLES), support.GLOBAL_BATCH
    )


def unknown_length():
    return plain().filter(lambda x, y: True)


def small_batches():
    return support.make_dataset(NUM_EXAMPLES, 4)


@dataclasses.dataclass(frozen=True)
class Case:
    """What to train, and how; by how many replicas, to compare with."""

    dataset: Callable[[], tf.data.Dataset] = plain
    make_model: Callable[[], keras.Model] = support.make_mlp
    make_optimizer: Callable[[], keras.optimizers.Optimizer] = make_adam
    precision: str = "float32"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)
    validation: Callable[[], tf.data.Dataset] | None = None
    of_worker: Callable[[int], tf.data.Dataset] | None = None
    num_replicas: int = 1
    tolerance: str | None = None  # as of this precision; else its own
    predicts: bool = False

    def data(
        self, index: int | None
    ) -> tuple[tf.data.Dataset, tf.data.Dataset | None]:
        """To train and to validate on, where a worker's own differ too."""
        if self.of_worker and index is not None:
            return self.of_worker(index), self.of_worker(index)
        validation = self.dataset if self.of_worker else self.validation
        return self.dataset(), validation and validation()


def wired(dtype, **options):
    """Gradients lose something on their way; each third update is checked."""
    wire = {"wire_dtype": dtype, "wire_check_interval": 3}
    return {"loss_scale_options": wire | options}


SCALED = {"loss_scale_options": {"initial_scale": 2.0**10}}
CASES = {
    "float32": Case(options={"metrics": ["accuracy"]}, predicts=True),
    "float16": Case(precision="mixed_float16", options=SCALED),
    "bfloat16": Case(precision="mixed_bfloat16"),
    "weights": Case(
        weighted,
        fit={"class_weight": {0: 0.5, 2: 3.0}},
        options={
            "loss": support.make_loss(reduction="mean_with_sample_weight")
        },
    ),
    "synchronized": Case(make_model=make_synchronized),
    "embedding": Case(
        tokens,
        make_embedding,
        lambda: support.make_sgd(0.5, clipnorm=0.05),
    ),
    "embedding, fewer tokens": Case(fewer_tokens, make_embedding),
    "accumulation": Case(
        small_batches,
        make_optimizer=lambda: make_adam(gradient_accumulation_steps=2),
        precision="mixed_float16",
        options=SCALED,
    ),
    "average": Case(
        make_optimizer=lambda: support.make_sgd(
            use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
        ),
    ),
    "overflow first": Case(
        poisoned(0), precision="mixed_float16", options=SCALED
    ),
    "overflow last": Case(
        poisoned(7), precision="mixed_float16", options=SCALED
    ),
    "compiled": Case(options={"jit_compile": True}),
    "unknown length": Case(unknown_length),
    "validation": Case(validation=unknown_length, predicts=True),
    "uneven": Case(without_worker_1(3), of_worker=worker_1_has(3)),
    "uneven, unknown length": Case(
        without_worker_1(3), of_worker=worker_1_has(3, is_known=False)
    ),
    "uneven, none at all": Case(without_worker_1(0), of_worker=worker_1_has(0)),
    "uneven, none, unknown length": Case(
        without_worker_1(0),
        make_convolutional,
        of_worker=worker_1_has(0, is_known=False),
    ),
    "stacks": Case(stacked),
    "several packs": Case(make_model=make_large),
    "bfloat16 between": Case(options=wired("bfloat16"), num_replicas=2),
    "int8 between": Case(options=wired("int8"), num_replicas=2),
    "int8 between, embedding": Case(  # which stays sparse on one worker
        fewer_tokens,
        make_embedding,
        options=wired("int8"),
        num_replicas=2,
        tolerance="mixed_bfloat16",
    ),
    "overflow, int8 between": Case(
        poisoned(7),
        precision="mixed_float16",
        options=wired("int8", initial_scale=2.0**10),
        num_replicas=2,
    ),
}


def train(
    case: Case,
    strategy: tf.distribute.Strategy | None = None,
    index: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Variables of model and optimizer, predictions, and the history."""
    trainer = support.make_trainer(
        case.make_model,
        case.make_optimizer,
        strategy=strategy,
        num_replicas=case.num_replicas,
        precision=case.precision,
        **case.options,
    )
    dataset, validation = case.data(index)
    history = trainer.fit(
        dataset,
        epochs=2,
        validation_data=validation,
        verbose=0,
        **case.fit,
    ).history
    for variables in trainer.model.variables, trainer.optimizer.variables:
        support.assert_same_on_replicas(variables)
    arrays = {
        f"{group}/{index:03d}": support.read([variable])[0]
        for group, variables in trainer.state().items()
        for index, variable in enumerate(variables)
        if variable.name != "seed_generator_state"
    }
    if case.predicts:
        arrays["predictions"] = trainer.predict(validation or dataset)
    return arrays, {n: v for n, v in history.items() if n not in MEASURED}


def main(folder: str, num_devices: str, *names: str) -> None:
    devices = None
    if int(num_devices) > 1:
        devices = strategy_lib.use_logical_cpus(int(num_devices))
    strategy = dist_amp.make_strategy("multi_worker", devices=devices)
    index = strategy_lib.task_index(strategy)
    for name in names:
        arrays, history = train(CASES[name], strategy, index)
        path = pathlib.Path(folder) / f"{name}-{index}"
        np.savez(path, **arrays)
        path.with_suffix(".json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(*sys.argv[1:])
