"""What training loses by what gradients travel in: two replicas, some seeds.

python -m benchmarks.accuracy
python -m benchmarks.accuracy --tasks lm --seeds 1 --steps 20
"""

import argparse
import dataclasses
import statistics
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

WIRES = (None, "float16", "bfloat16", "int8")
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
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
        ]

    return keras.Sequential(
        [*block(16), *block(32), layers.Flatten(), layers.Dense(10)]
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
    task: Task, wire_dtype: str | None, seed: int, devices: list[str]
) -> dict[str, float]:
    """Results on the test, and what the last check of the wire said."""
    keras.utils.set_random_seed(seed)
    strategy = dist_amp.make_strategy("mirrored", devices=devices)
    wire: dict[str, Any] = {"wire_dtype": wire_dtype} if wire_dtype else {}
    with dist_amp.scope(strategy, "float32"):
        model = task.make_model()
        optimizer = dist_amp.wrap_optimizer(
            keras.optimizers.Adam(1e-3), loss_scale="dynamic", **wire
        )
    trainer = dist_amp.Trainer(
        model,
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    arrays, test = task.make_arrays()
    history = trainer.fit(
        dist_amp.data.from_arrays(arrays, _BATCH, shuffle_seed=seed),
        steps_per_epoch=task.steps,
        verbose=0,
    ).history
    dataset = tf.data.Dataset.from_tensor_slices(test).batch(_BATCH)
    error = history["wire_error"][-1] if wire else 0.0
    return {**trainer.evaluate(dataset), "wire_error": error}


def row(
    name: str,
    wire: str | None,
    results: list[dict[str, float]],
    exact: list[dict[str, float]],
) -> str:
    """A row of the table; there is a result for each seed."""
    kind = TASKS[name].result
    values = [each[kind] for each in results]
    mean = statistics.fmean(values)
    usual = statistics.fmean(each[kind] for each in exact)
    if kind == "accuracy":
        value, change = f"{mean:.2%}", f"{100 * (mean - usual):+.2f} points"
    else:
        value, change = f"{mean:.4f}", f"{mean / usual - 1:+.2%}"
    error = max(each["wire_error"] for each in results)
    return (
        f"| {name} | {wire or 'float32'} | {value} "
        f"| {min(values):.4f} - {max(values):.4f} "
        f"| {change if wire else ''} | {f'{error:.2g}' if wire else ''} |"
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser("benchmarks.accuracy")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of each task's own")
    arguments = parser.parse_args()
    devices = strategy_lib.use_logical_cpus(2)
    print(report.heading())
    print("| model | wire | test | lowest - highest | change | wire error |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in arguments.tasks:
        task = TASKS[name]
        if arguments.steps:
            task = dataclasses.replace(task, steps=arguments.steps)
        exact: list[dict[str, float]] = []
        for wire in WIRES:
            results = [
                train(task, wire, seed, devices)
                for seed in range(arguments.seeds)
            ]
            exact = exact or results
            print(row(name, wire, results, exact), flush=True)


if __name__ == "__main__":
    main()
