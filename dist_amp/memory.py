"""How much memory training has taken."""

import resource
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def peak_bytes(strategy: tf.distribute.Strategy) -> int:
    """Most bytes in use at any time so far.

    On GPUs and TPUs those of the fullest device of this process; on CPUs those
    of the process, TensorFlow's own included.
    """
    devices = {
        ":".join(device.upper().split(":")[-2:])
        for device in strategy.extended.worker_devices
    }
    others = [device for device in devices if not device.startswith("CPU")]
    if not others:
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return 1024 * kibibytes
    info = tf.config.experimental.get_memory_info
    return max(info(device)["peak"] for device in others)


def bytes_of(variables: Iterable[Any]) -> int:
    """Size of the values of Keras or TensorFlow variables, a copy each."""
    return sum(
        (tf.TensorShape(variable.shape).num_elements() or 0)
        * tf.as_dtype(variable.dtype).size
        for variable in variables
    )
