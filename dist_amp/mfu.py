"""Model FLOPs utilization: the share of the devices' peak."""

import logging
import os
import re
from typing import Any

import keras
import tensorflow as tf

from dist_amp import plan
from dist_amp import strategy as strategy_lib
from dist_amp.stream import DatasetLike
from dist_amp.trainer import Trainer

_log = logging.getLogger(__name__)

# Dense FLOP/s in bfloat16 or float16, by a part of the device's name; the
# first that fits holds. NVIDIA's: of the data sheets, whose numbers with
# sparsity are halved. Cloud TPU's: of its documentation of system
# architectures, for a chip.
PEAK_FLOPS_PER_SEC = {
    r"H200 NVL": 836e12,
    r"H200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 836e12,
    r"H100": 989e12,
    r"A100": 312e12,
    r"V100": 125e12,
    r"\bL4\b": 121e12,
    r"\bT4\b": 65e12,
    r"TPU v2": 45e12,
    r"TPU v3": 123e12,
    r"TPU v4": 275e12,
    r"TPU v5 ?(lite|e)": 197e12,
    r"TPU v5p": 459e12,
    r"TPU v6e": 918e12,
}
# Of a Cloud TPU VM's variable TPU_ACCELERATOR_TYPE, as "v5litepod-8".
_TPU_TYPE = re.compile(r"(v\d+)(litepod|p|e)?-")
# TensorFlow has a device for each TensorCore, of which these have two a chip.
_TWO_CORES = ("TPU v2", "TPU v3", "TPU v4", "TPU v5p")


def peak_of(name: str) -> float | None:
    """Dense peak of a device in FLOP/s; None if it is not known.

    Args:
        name: As the driver tells it, say "NVIDIA H100 80GB HBM3".
    """
    for pattern, peak in PEAK_FLOPS_PER_SEC.items():
        if re.search(pattern, name):
            return peak / 2 if name.startswith(_TWO_CORES) else peak
    return None


def device_name(strategy: tf.distribute.Strategy) -> str:
    """Of the first device of a strategy on this host; "" for a CPU."""
    if isinstance(strategy, tf.distribute.TPUStrategy):
        found = _TPU_TYPE.match(os.environ.get("TPU_ACCELERATOR_TYPE", ""))
        if not found:
            return ""
        kind = {"litepod": " lite"}.get(found[2] or "", found[2] or "")
        return f"TPU {found[1]}{kind}"
    used = {
        name.upper().rpartition("DEVICE:")[2]
        for name in strategy.extended.worker_devices
    }
    for device in tf.config.list_physical_devices("GPU"):
        if device.name.upper().rpartition("DEVICE:")[2] in used:
            details = tf.config.experimental.get_device_details(device)
            return details.get("device_name", "")
    return ""


class Mfu(keras.callbacks.Callback):
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
        per_replica_batch_size: Examples of each replica in a step, all parts
            of an update together.
        peak_flops_per_sec: Of a device; looked up by its name by default.
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
        self._peak = peak_flops_per_sec or peak_of(
            device_name(trainer.strategy)
        )
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

    def get_state(self) -> dict[str, Any]:
        """Nothing: it is traced again."""
        return {}

    def set_state(self, state: Any) -> None:
        """Does nothing."""
