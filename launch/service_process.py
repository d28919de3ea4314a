"""A data service on this host for as long as training runs.

Standard library only.
"""

import contextlib
import pathlib
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO

from launch.config import ConfigError
from launch.guardian import Guardian, kill_group
from launch.worker_process import free_ports

_SECONDS_TO_START = 60.0
_READY = "data service: "


@contextlib.contextmanager
def running(
    num_workers: int, log: pathlib.Path, guardian: Guardian
) -> Iterator[str]:
    """Yields the address of a service that is ready; ends it afterwards.

    Args:
        num_workers: Of the service.
        log: File that its output is added to.
        guardian: Ends it if this process is killed.

    Raises:
        ConfigError: It did not start; what it said is in the log.
    """
    (port,) = free_ports(1)
    flags = [f"--num_workers={num_workers}", f"--port={port}"]
    with log.open("a") as errors, contextlib.ExitStack() as stack:
        process = _start(flags, errors, guardian)
        stack.callback(_end, process, guardian)
        assert process.stdout is not None
        if not _is_ready(process.stdout):
            raise ConfigError(
                "--data_service_workers: the data service did not start "
                f"within {_SECONDS_TO_START:g} s; see {log}."
            )
        yield f"grpc://127.0.0.1:{port}"


def _start(
    flags: Sequence[str], errors: IO[str], guardian: Guardian
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "launch.data_service", *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,  # Ctrl-C is for the training
        preexec_fn=guardian.join,
    )


def _is_ready(stdout: IO[bytes]) -> bool:
    """Whether its line came in time."""
    deadline = time.monotonic() + _SECONDS_TO_START
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if selector.select(deadline - time.monotonic()):
                line = stdout.readline().decode(errors="replace")
                return line.startswith(_READY)
    return False


def _end(process: "subprocess.Popen[bytes]", guardian: Guardian) -> None:
    kill_group(process.pid)
    process.wait()
    guardian.forget(process.pid)
    if process.stdout is not None:
        process.stdout.close()
