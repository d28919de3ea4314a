"""A data service on this host for as long as training runs.

Standard library only.
"""

import contextlib
import pathlib
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO

from launch.config import ConfigError
from launch.guardian import Guardian, kill_group
from launch.post_mortem import status_in_words
from launch.worker_process import free_ports

_SECONDS_TO_START = 60.0
_READY = "data service: "


class Service:
    """A service that was started, while it runs and afterwards.

    Args:
        process: It.
        address: Of its dispatcher, as "grpc://host:port".
        log: File that its output is added to,
        place: from this byte on.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        address: str,
        *,
        log: pathlib.Path,
        place: int,
    ):
        self._process = process
        self.address = address
        self.log = log
        self._place = place

    @property
    def status(self) -> int | None:
        """As of `subprocess.Popen`; None: it runs."""
        return self._process.poll()

    @property
    def lines(self) -> list[str]:
        """What it has said to its log."""
        try:
            said = self.log.read_bytes()[self._place :]
        except OSError:  # somebody took it away
            return []
        return said.decode(errors="replace").splitlines()

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.status is None

    def wait_until_ready(self) -> None:
        """Until it says so.

        Raises:
            ConfigError: It ended instead, or did not say so in time.
        """
        assert self._process.stdout is not None
        line = _line_of(self._process.stdout)
        if line is not None and line.startswith(_READY):
            return
        what = f"did not start within {_SECONDS_TO_START:g} s"
        if line == "":
            status = self._process.wait()
            what = f"ended at its start ({status_in_words(status)})"
        said = "".join(f": {line}" for line in self.lines[-1:])
        raise ConfigError(
            f"--data_service_workers: the data service {what}{said}; see "
            f"{self.log}."
        )


@contextlib.contextmanager
def running(
    num_workers: int, log: pathlib.Path, guardian: Guardian
) -> Iterator[Service]:
    """Yields a service that is ready; ends it afterwards.

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
        place = errors.tell()
        process = _start(flags, errors, guardian)
        stack.callback(_end, process, guardian)
        address = f"grpc://127.0.0.1:{port}"
        service = Service(process, address, log=log, place=place)
        service.wait_until_ready()
        yield service


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


def _line_of(stdout: IO[bytes]) -> str | None:
    """Its first line; empty: it has ended; None: none came in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        if selector.select(_SECONDS_TO_START):
            return stdout.readline().decode(errors="replace")
    return None


def _end(process: "subprocess.Popen[bytes]", guardian: Guardian) -> None:
    kill_group(process.pid)
    process.wait()
    guardian.forget(process.pid)
    if process.stdout is not None:
        process.stdout.close()
