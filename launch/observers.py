"""From a config to what watches a training, and writes down what it sees."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

import dist_amp
from dist_amp import memory, mfu, profiler
from dist_amp.callbacks import (
    Histograms,
    JsonLines,
    TensorBoard,
    describe_epoch,
)
from launch.config import TrainConfig
from launch.hardware import Devices
from launch.inputs import Data
from launch.run_dir import RunDir


def make_callbacks(
    run_dir: RunDir, trainer: dist_amp.Trainer
) -> list[keras.callbacks.Callback]:
    """TensorBoard, and a line of `metrics.jsonl` for each epoch and split."""
    return [
        TensorBoard(str(run_dir.tensorboard), write_graph=False),
        JsonLines(
            run_dir.metrics,
            lambda: trainer.global_step,
            lambda: {
                "memory_bytes": memory.bytes_in_use(trainer.strategy),
                "peak_memory_bytes": memory.peak_bytes(trainer.strategy),
            },
        ),
    ]


def make_histograms(
    config: TrainConfig,
    devices: Devices,
    run_dir: RunDir,
    trainer: dist_amp.Trainer,
) -> list[keras.callbacks.Callback]:
    """What `--histogram_every_epochs` asks for; the trainer must be built.

    Every worker runs the same step; the chief writes.
    """
    if config.histogram_every_epochs is None:
        return []
    log = trainer.keep_gradients()
    if not devices.is_chief:
        return []
    made = Histograms(
        run_dir.tensorboard / "histograms",
        gradients=log.read,
        global_step=lambda: trainer.global_step,
        every_epochs=config.histogram_every_epochs,
    )
    return [made]


def write_graph(
    config: TrainConfig,
    devices: Devices,
    run_dir: RunDir,
    data: Data,
    trainer: dist_amp.Trainer,
) -> None:
    """What `--tensorboard_graph` asks for; every worker calls it."""
    if not config.tensorboard_graph:
        return
    graph = trainer.step_graph(data.train)
    if devices.is_chief:
        file = tf.summary.create_file_writer(str(run_dir.tensorboard / "train"))
        with file.as_default(), contextlib.closing(file):
            tf.summary.graph(graph)


def make_profiler(
    config: TrainConfig, run_dir: RunDir
) -> profiler.Profiler | None:
    """What `--profile_steps` asks for; TensorBoard finds it."""
    if config.profile_steps is None:
        return None
    first, end = map(int, config.profile_steps.split(":"))
    return profiler.Profiler(first, end, run_dir.tensorboard)


def make_mfu(
    config: TrainConfig, data: Data, trainer: dist_amp.Trainer
) -> mfu.Mfu:
    """Each worker needs it, before what writes the logs."""
    replicas = trainer.strategy.num_replicas_in_sync
    return mfu.Mfu(
        trainer,
        data.train,
        per_replica_batch_size=-(-config.batch_size // replicas),
    )


def make_auto_layers(
    devices: Devices, data: Data, trainer: dist_amp.Trainer
) -> list[keras.callbacks.Callback]:
    """What `--precision=auto_layers` needs on each worker."""
    if not devices.precision.adapts_layers:
        return []
    return [dist_amp.AutoLayers(trainer, data.train)]


def describe_average(results: dict[str, Any]) -> str:
    """The line on the moving average of the weights, which is what is saved."""
    named = {f"val_{name}": value for name, value in results.items()}
    return describe_epoch(0, named).replace("Epoch 1", "Averaged weights")
