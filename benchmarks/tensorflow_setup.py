"""What the contenders on TensorFlow share: devices, data, and who waits."""

from typing import Any

import keras
import tensorflow as tf

import dist_amp.data
from benchmarks import records
from benchmarks.passes import Passes, Setting
from dist_amp import strategy as strategy_lib


def devices(setting: Setting) -> list[str]:
    """Names of GPUs if there are any, else of as many logical CPUs."""
    replicas = setting.replicas
    tf.config.experimental.enable_tensor_float_32_execution(setting.allows_tf32)
    if tf.config.list_physical_devices("GPU"):
        return [f"GPU:{i}" for i in range(replicas)]
    return strategy_lib.use_logical_cpus(replicas)


def stock_strategy(setting: Setting) -> tf.distribute.Strategy:
    """TensorFlow's own choice for so many replicas."""
    names = devices(setting)
    if setting.replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(names)


def dataset(setting: Setting) -> tf.data.Dataset:
    """Shuffled batches without end, the same for every contender.

    Made by the fastest way that we know, so that what differs is training.
    """
    work = setting.work
    if setting.records:
        return records.read(work, setting.records)
    of_pass = dist_amp.data.from_arrays(
        work.make_arrays(), work.batch_size, shuffle_seed=0
    )
    passes = tf.data.Dataset.range(2**40)
    batches = passes.flat_map(of_pass).map(
        lambda x, y: (
            tf.ensure_shape(x, [work.batch_size, *x.shape[1:]]),
            tf.ensure_shape(y, [work.batch_size, *y.shape[1:]]),
        )
    )
    return batches.prefetch(tf.data.AUTOTUNE)


class TakeTurns(keras.callbacks.Callback):
    """Makes each epoch of a `fit` one pass."""

    def __init__(self, passes: Passes):
        super().__init__()
        self._passes = passes

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Waits for its turn; ends the process after the last pass."""
        del epoch, logs
        if not self._passes.wait():
            raise SystemExit

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Tells the loss."""
        del epoch
        self._passes.done(float((logs or {})["loss"]), device_bytes())


def device_bytes() -> int:
    """Peak of the memory in use on the first GPU; 0 without one."""
    if not tf.config.list_logical_devices("GPU"):
        return 0
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]
