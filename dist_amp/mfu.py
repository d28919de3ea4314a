"""Model FLOPs utilization: the share of the devices' peak."""

import logging
import os
import re
from typing import Any

import tensorflow as tf

from dist_amp import plan
from dist_amp import strategy as strategy_lib
from dist_amp.callbacks import StatelessCallback
from dist_amp.stream import DatasetLike
from dist_amp.trainer import Trainer

_log = logging.getLogger(__name__)

# Dense FLOP/s in bfloat16 or float16, by a part of the device's name; the
# first that fits holds. From NVIDIA's data sheets, whose numbers with sparsity
# are halved.
GPU_PEAKS = {
    r"H200 NVL": 836e12,
    r"H200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 836e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"V100S": 130e12,
    r"V100-PCIE": 112e12,
    r"V100": 125e12,
    r"\bL4\b": 121e12,
    r"\bT4\b": 65e12,
}
# Of a chip, in bfloat16, and what the number in an accelerator type counts of
# it. From Cloud TPU's documentation of each version.
TPU_PEAKS = {
    "v2": (45e12, 2),
    "v3": (123e12, 2),
    "v4": (275e12, 2),
    "v5litepod": (197e12, 1),
    "v5p": (459e12, 2),
    "v6e": (918e12, 1),
}


def peak_of_gpu(name: str) -> float | None:
    """Dense peak in FLOP/s; None if it is not known.

    Nor is it of a MIG instance, which has a part of the GPU.

    Args:
        name: As the driver tells it, say "NVIDIA H100 80GB HBM3".
    """
    if re.search(r"\bMIG\b", name):
        return None
    return next((p for k, p in GPU_PEAKS.items() if re.search(k, name)), None)


def peak_of_replica(accelerator_type: str, num_replicas: int) -> float | None:
    """Peak of a replica's part of a TPU in FLOP/s; None if it is not known.

    Args:
        accelerator_type: Of the whole TPU, say "v5litepod-4" or "v3-8".
        num_replicas: That share it.
    """
    version, _, number = accelerator_type.partition("-")
    if version not in TPU_PEAKS or not number.isdecimal():
        return None
    peak, parts = TPU_PEAKS[version]
    return peak * int(number) / parts / num_replicas


def peak_of(strategy: tf.distribute.Strategy) -> float | None:
    """Peak of each replica in FLOP/s; None for CPUs, and if it is not known.

    A TPU's type is what its VM says in TPU_ACCELERATOR_TYPE.
    """
    if isinstance(strategy, tf.distribute.TPUStrategy):
        kind = os.environ.get("TPU_ACCELERATOR_TYPE", "")
        return peak_of_replica(kind, strategy.num_replicas_in_sync)
    used = {
        name.upper().rpartition("DEVICE:")[2]
        for name in strategy.extended.worker_devices
    }
    for device in tf.config.list_physical_devices("GPU"):
        if device.name.upper().rpartition("DEVICE:")[2] in used:
            details = tf.config.experimental.get_device_details(device)
            return peak_of_gpu(details.get("device_name", ""))
    return None


class Mfu(StatelessCallback):
    """Adds `mfu` to the logs of each epoch, where the peak is known.

    The FLOPs of a step, read off a trace of it (matrix products and
    convolutions, forward and backward), by the time of a step, by the peak of
    the devices: dense, in bfloat16 or float16, whatever the precision. Traces
    once, when training begins. A last batch that is smaller than the others
    counts as a whole one. On several workers all need this callback, at the
    same place.

    Args:
        trainer: That trains.
        dataset: As in `Trainer.fit`.
        per_replica_batch_size: Examples of each replica in a batch, of one
            part of an update if it accumulates.
        peak_flops_per_sec: Of a replica; looked up by default.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: DatasetLike,
        *,
        per_replica_batch_size: int,
        peak_flops_per_sec: float | None = None,
    ):
        super().__init__()
        self._trainer, self._dataset = trainer, dataset
        self._rows = per_replica_batch_size
        self._peak = peak_flops_per_sec or peak_of(trainer.strategy)
        self._flops: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Counts the FLOPs of a step, if there is a peak to compare with."""
        # The workers of a job trace alike: collectives are numbered there.
        is_alone = strategy_lib.num_workers(self._trainer.strategy) == 1
        if self._peak is None and (is_alone or self._trainer.is_on("CPU")):
            return
        try:
            self._flops = plan.flops_of_replica(
                self._trainer, self._dataset, self._rows
            )
        except Exception as error:  # what is only looked at must not end it
            _log.warning("`mfu` is not told, the trace failed: %s", error)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds it to the logs."""
        if self._flops and self._peak and logs and "steps_per_sec" in logs:
            flops_per_sec = self._flops * logs["steps_per_sec"]
            logs["mfu"] = flops_per_sec / self._peak
