"""How much memory training has taken."""

import pathlib
import resource
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def bytes_in_use(strategy: tf.distribute.Strategy) -> int:
    """Bytes in use now.

    On GPUs and TPUs those of the fullest device of this process; on CPUs those
    of the process, TensorFlow's own included.
    """
    devices = _accelerators(strategy)
    if not devices:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()
    info = tf.config.experimental.get_memory_info
    return max(info(device)["current"] for device in devices)


def peak_bytes(strategy: tf.distribute.Strategy) -> int:
    """Most bytes in use at any time so far; see `bytes_in_use`."""
    devices = _accelerators(strategy)
    if not devices:
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # The kernel brings that up to date now and then only.
        return max(1024 * kibibytes, bytes_in_use(strategy))
    info = tf.config.experimental.get_memory_info
    return max(info(device)["peak"] for device in devices)


def _accelerators(strategy: tf.distribute.Strategy) -> list[str]:
    """This process's devices but for CPUs, say "GPU:0"."""
    devices = {
        ":".join(device.upper().split(":")[-2:])
        for device in strategy.extended.worker_devices
    }
    return [device for device in devices if not device.startswith("CPU")]


def bytes_of(variables: Iterable[Any]) -> int:
    """Size of the values of Keras or TensorFlow variables, a copy each."""
    return sum(
        (tf.TensorShape(variable.shape).num_elements() or 0)
        * tf.as_dtype(variable.dtype).size
        for variable in variables
    )
