"""What training loses by fewer bits: in each precision, on some replicas.

python -m benchmarks.accuracy
python -m benchmarks.accuracy --tasks lm --seeds 2 --settings float32 int8

The exit status is 1 if a setting is further from float32 on one device than
float32's own seeds are from each other.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

import dist_amp
import dist_amp.data
from benchmarks import keras_models, report
from benchmarks.workloads import WORKLOADS
from dist_amp import strategy as strategy_lib
from dist_amp.models import mlp

# The precision, and what gradients travel in.
SETTINGS = {
    "float32": ("float32", None),
    "mixed_bfloat16": ("mixed_bfloat16", None),
    "mixed_float16": ("mixed_float16", None),
    "auto_layers": ("auto_layers", None),
    "float16 wire": ("float32", "float16"),
    "bfloat16 wire": ("float32", "bfloat16"),
    "int8 wire": ("float32", "int8"),
}
EXACT = ("float32", 1)
_BATCH = 32
Arrays: TypeAlias = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        make_model: Called in the strategy's scope.
        make_arrays: To train on and to test on.
        steps: Updates.
        result: What of the test is compared, "accuracy" or "loss".
    """

    make_model: Callable[[], keras.Model]
    make_arrays: Callable[[], tuple[Arrays, Arrays]]
    steps: int
    result: str


def digits() -> tuple[Arrays, Arrays]:
    """Every fifth of scikit-learn's handwritten digits is a test."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = found.images[..., np.newaxis].astype("float32") / 16
    labels = found.target.astype("int32")
    is_test = np.arange(len(labels)) % 5 == 0
    return (
        (images[~is_test], labels[~is_test]),
        (images[is_test], labels[is_test]),
    )


def make_convolutional() -> keras.Model:
    """Two convolutions with batch normalization."""
    layers = keras.layers

    def block(width: int) -> list[keras.layers.Layer]:
        return [
            layers.Conv2D(width, 3, padding="same", use_bias=False),
            layers.BatchNormalization(synchronized=True),
            layers.ReLU(),
            layers.MaxPooling2D(),
        ]

    return keras.Sequential(
        [
            *block(16),
            *block(32),
            layers.Flatten(),
            layers.Dense(10, dtype="float32"),
        ]
    )


_LM = dataclasses.replace(  # what two cores train in seconds
    WORKLOADS["lm"].sizes, vocabulary=128, length=16, width=64, blocks=1
)


def sentences() -> tuple[Arrays, Arrays]:
    """Each of 64 tokens is followed by one of four: at best the loss is ln 4.

    Random text, as in the other benchmarks, would teach nothing.
    """
    generator = np.random.default_rng(0)
    followers = generator.integers(0, 64, (64, 4))

    def make(number: int) -> Arrays:
        tokens = np.zeros((number, _LM.length + 1), np.int32)
        tokens[:, 0] = generator.integers(0, 64, number)
        for place in range(_LM.length):
            which = generator.integers(0, 4, number)
            tokens[:, place + 1] = followers[tokens[:, place], which]
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()

    return make(4096), make(256)


TASKS = {
    "MyModel": Task(mlp.build, digits, 1350, "accuracy"),
    "convnet": Task(make_convolutional, digits, 900, "accuracy"),
    "lm": Task(lambda: keras_models.build(keras, _LM), sentences, 300, "loss"),
}


def train(
    task: Task, setting: str, num_replicas: int, seed: int
) -> tuple[float, float]:
    """The result on the test, and what the last check of the wire said."""
    precision, wire_dtype = SETTINGS[setting]
    keras.utils.set_random_seed(seed)
    kind = "mirrored" if num_replicas > 1 else "one_device"
    devices = [f"CPU:{index}" for index in range(num_replicas)]
    strategy = dist_amp.make_strategy(kind, devices=devices)
    options: dict[str, Any] = {}
    if wire_dtype:
        options = {"wire_dtype": wire_dtype, "loss_scale": "dynamic"}
    with dist_amp.scope(strategy, precision) as resolved:
        model = task.make_model()
        optimizer = dist_amp.wrap_optimizer(
            keras.optimizers.Adam(1e-3), **options
        )
    trainer = dist_amp.Trainer(
        model,
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    arrays, test = task.make_arrays()
    examples = dist_amp.data.from_arrays(arrays, _BATCH, shuffle_seed=seed)
    callbacks = []
    if resolved.adapts_layers:
        callbacks = [dist_amp.AutoLayers(trainer, examples)]
    history = trainer.fit(
        examples, steps_per_epoch=task.steps, callbacks=callbacks, verbose=0
    ).history
    dataset = tf.data.Dataset.from_tensor_slices(test).batch(_BATCH)
    error = history["wire_error"][-1] if wire_dtype else 0.0
    return trainer.evaluate(dataset)[task.result], error


@dataclasses.dataclass(frozen=True)
class Cell:
    """The results of one setting.

    Attributes:
        setting: Its name.
        num_replicas: That shared each batch.
        results: For each seed.
        wire_error: The largest; 0 where sums are exact.
    """

    setting: str
    num_replicas: int
    results: tuple[float, ...]
    wire_error: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.results)

    @property
    def spread(self) -> float:
        """Of the seeds: highest less lowest."""
        return max(self.results) - min(self.results)

    def is_like(self, exact: "Cell") -> bool:
        """Whether it differs by no more than seeds do."""
        return abs(self.mean - exact.mean) <= exact.spread


def cell(task: Task, setting: str, num_replicas: int, seeds: int) -> Cell:
    """Trains once for each seed."""
    pairs = [train(task, setting, num_replicas, seed) for seed in range(seeds)]
    results, errors = zip(*pairs, strict=True)
    return Cell(setting, num_replicas, results, max(errors))


def row(name: str, found: Cell, exact: Cell) -> str:
    """A row of the table."""
    if TASKS[name].result == "accuracy":
        mean, spread = f"{found.mean:.2%}", f"{100 * found.spread:.2f} points"
        change = f"{100 * (found.mean - exact.mean):+.2f} points"
    else:
        mean, spread = f"{found.mean:.4f}", f"{found.spread:.4f}"
        change = f"{found.mean / exact.mean - 1:+.2%}"
    error = f"{found.wire_error:.2g}" if found.wire_error else ""
    verdict = "" if found.is_like(exact) else " **more than seeds do**"
    return (
        f"| {name} | {found.setting} | {found.num_replicas} | {mean} "
        f"| {spread} | {change}{verdict} | {error} |"
    )


def main() -> int:
    """Prints a table; returns the exit status."""
    parser = argparse.ArgumentParser("benchmarks.accuracy")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS]
    )
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="instead of each task's own")
    arguments = parser.parse_args()
    strategy_lib.use_logical_cpus(max(arguments.replicas))
    print(report.heading())
    print(
        "| model | setting | replicas | test | spread | change | wire error |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    is_like = True
    for name in arguments.tasks:
        task = TASKS[name]
        if arguments.steps:
            task = dataclasses.replace(task, steps=arguments.steps)
        exact = cell(task, *EXACT, arguments.seeds)
        for setting in arguments.settings:
            for number in arguments.replicas:
                if SETTINGS[setting][1] and number == 1:
                    continue  # nothing travels
                found = exact
                if (setting, number) != EXACT:
                    found = cell(task, setting, number, arguments.seeds)
                is_like &= found.is_like(exact)
                print(row(name, found, exact), flush=True)
    return 0 if is_like else 1


if __name__ == "__main__":
    sys.exit(main())
