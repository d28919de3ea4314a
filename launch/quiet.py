"""Keeps TensorFlow's start-up chatter off standard error."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

# Informational lines of its C++ side, which no environment variable silences
# since TensorFlow logs through Abseil, and the failed search for a GPU.
_CHATTER = re.compile(
    rb"WARNING: All log messages before absl"
    rb"|I0000 00:00:|[WE]0000 00:00:.*"
    rb"(cuInit|cuda_platform|computation_placer|oneDNN supports DT_HALF only)"
)


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Filters what is written to standard error, line by line.

    Every other line goes through at once, a crash report too.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    stderr = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)
    pump = threading.Thread(target=_pump, args=(read_end, stderr), daemon=True)
    pump.start()
    try:
        yield
    finally:
        os.dup2(stderr, 2)  # closes the pipe, which ends the thread
        pump.join()
        os.close(stderr)


def start_tensorflow() -> None:
    """Imports it and looks for devices, for programs that train nothing."""
    with quiet_start():
        import tensorflow as tf

        tf.config.list_logical_devices()


def _pump(read_end: int, stderr: int) -> None:
    with open(read_end, "rb") as lines:
        for line in lines:
            if not _CHATTER.match(line):
                os.write(stderr, line)
