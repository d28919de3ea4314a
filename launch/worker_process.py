"""One worker on this host: its process, its output, its signs of life.

Standard library only.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import pty
import random
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from launch import heartbeat
from launch.guardian import Guardian, kill_group
from launch.heartbeat import Beat

_LINES_KEPT = 400
_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Start:
    """How a worker is started.

    Attributes:
        index: Its task index.
        command: Program and arguments.
        variables: What is added to the environment.
        cores: CPU cores that it may use; empty: any.
        log: File that its output is added to.
    """

    index: int
    command: Sequence[str]
    variables: Mapping[str, str]
    cores: Sequence[int]
    log: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a worker ended.

    Attributes:
        index: Its task index.
        status: Exit status; minus the number of the signal that killed it.
        seconds: From the start of the attempt.
        beat: Its last sign of life,
        silent_seconds: which was so long before.
        killed: Why the launcher killed it; empty if it did not.
        lines: The last lines of its output.
    """

    index: int
    status: int
    seconds: float
    beat: Beat
    silent_seconds: float
    killed: str
    lines: Sequence[str]


class Worker:
    """A running worker.

    Args:
        start: How to start it.
        guardian: Ends it if this process is killed.
        show: Takes `(stream, line)` of its output; stream 1 or 2.
        terminal: Takes its standard output as it comes, which then thinks it
            is on a terminal; None: that is shown by lines as well.
    """

    def __init__(
        self,
        start: Start,
        guardian: Guardian,
        show: Callable[[int, str], None],
        *,
        terminal: Callable[[bytes], None] | None = None,
    ):
        self.index = start.index
        self.beat = Beat("starting")
        self.ending: Ending | None = None
        self._guardian, self._show = guardian, show
        self._lines: collections.deque[str] = collections.deque(
            maxlen=_LINES_KEPT
        )
        self._log: IO[str] | None = None
        with contextlib.suppress(OSError):  # a full disk stops no training
            self._log = start.log.open("a", buffering=1, errors="replace")
            self._log.write(f"--- {time.strftime('%FT%T%z')}\n")
        self._begin = self._beat_at = time.monotonic()
        self._killed = ""
        beats, beats_end = os.pipe()
        out, out_end = os.pipe() if terminal is None else pty.openpty()
        errors, errors_end = os.pipe()
        ends = (beats_end, out_end, errors_end)

        def prepare() -> None:
            """In the child, before the program."""
            guardian.join()
            if start.cores:
                os.sched_setaffinity(0, start.cores)

        self._process = subprocess.Popen(
            start.command,
            env={
                **os.environ,
                **start.variables,
                heartbeat.VARIABLE: str(beats_end),
            },
            stdin=subprocess.DEVNULL,
            stdout=out_end,
            stderr=errors_end,
            pass_fds=[beats_end],
            start_new_session=True,
            preexec_fn=prepare,
        )
        for end in ends:
            os.close(end)
        self._pipes = {
            beats: _Lines(self._hear),
            out: _Lines(functools.partial(self._take, 1), terminal),
            errors: _Lines(functools.partial(self._take, 2)),
        }
        self._has_terminal = terminal is not None

    @property
    def silent_seconds(self) -> float:
        """Since its last sign of life."""
        return time.monotonic() - self._beat_at

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Registers its pipes; `read` is to be called when one is ready."""
        for pipe in self._pipes:
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ, self)

    def read(self, pipe: int, selector: selectors.BaseSelector) -> None:
        """Takes what has come through a pipe."""
        try:
            data = os.read(pipe, _BYTES)
        except BlockingIOError:
            return
        except OSError:  # how a terminal ends
            data = b""
        self._pipes[pipe].add(data)
        if not data:
            self._close(pipe, selector)

    def _close(self, pipe: int, selector: selectors.BaseSelector) -> None:
        selector.unregister(pipe)
        os.close(pipe)
        del self._pipes[pipe]

    def _write_log(self, line: str) -> None:
        """Adds a line to its log, and to what is kept of its output."""
        self._lines.append(line)
        with contextlib.suppress(OSError):
            if self._log is not None:
                self._log.write(line + "\n")

    def send(self, number: int) -> None:
        """Sends a signal to the worker's process."""
        if self.ending is None:  # Popen's own would reap it
            os.kill(self._process.pid, number)

    def kill(self, why: str) -> None:
        """Ends it for certain."""
        self._killed = why + self.describe_silence()
        self.send(signal.SIGKILL)

    def reap(self, selector: selectors.BaseSelector) -> bool:
        """Whether it has ended; ends what it left behind, if so."""
        if self.ending is not None:
            return True
        done = os.waitid(
            os.P_PID,
            self._process.pid,
            os.WEXITED | os.WNOHANG | os.WNOWAIT,
        )
        if done is None:
            return False
        kill_group(self._process.pid)
        for pipe in list(self._pipes):
            while pipe in self._pipes and _is_readable(pipe):
                self.read(pipe, selector)
        for pipe in list(self._pipes):  # a child of its own still has it
            self._pipes[pipe].add(b"")
            self._close(pipe, selector)
        status = self._process.wait()
        self._guardian.forget(self._process.pid)
        self.ending = Ending(
            self.index,
            status,
            time.monotonic() - self._begin,
            self.beat,
            self.silent_seconds,
            self._killed,
            list(self._lines),
        )
        with contextlib.suppress(OSError):
            if self._log is not None:
                self._log.close()
        return True

    def describe_silence(self) -> str:
        """What the kernel says of a process that is silent."""
        try:
            stat = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return ""
        state = stat.rpartition(")")[2].split()[0]
        states = {
            "T": "; it is stopped, as by SIGSTOP",
            "D": "; it waits for a disk or a device",
        }
        return states.get(state, "")

    def _hear(self, line: bytes) -> None:
        beat = heartbeat.parsed(line)
        if beat is not None:
            self.beat, self._beat_at = beat, time.monotonic()

    def _take(self, stream: int, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip("\r")
        line = line.rpartition("\r")[2]
        self._write_log(line)
        if stream == 2 or not self._has_terminal:
            self._show(stream, line)


class _Lines:
    """Cuts what comes through a pipe into lines.

    Args:
        take: Takes each line.
        copy: Takes everything as it comes.
    """

    def __init__(
        self,
        take: Callable[[bytes], None],
        copy: Callable[[bytes], None] | None = None,
    ):
        self._take, self._copy = take, copy
        self._rest = b""

    def add(self, data: bytes) -> None:
        """Takes bytes; none at the pipe's end."""
        if self._copy is not None:
            self._copy(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._take(line)


def _is_readable(pipe: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(0))


# ------------------------------------------------------------ who they are


def worker_environments(number: int) -> list[dict[str, str]]:
    """TF_CONFIG of each worker on this host; nothing for a single one."""
    if number == 1:
        return [{}]
    workers = [f"127.0.0.1:{port}" for port in free_ports(number)]
    return [
        {
            "TF_CONFIG": json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": index},
                }
            )
        }
        for index in range(number)
    ]


def free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now.

    Below those that Linux gives to outgoing connections, one of which could
    take a port before its worker does.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(range(10_000, 32_768), 1000 + number):
            with contextlib.suppress(OSError):
                one = socket.create_server(("127.0.0.1", port))
                stack.enter_context(one)
                ports.append(port)
            if len(ports) == number:
                return ports
    raise OSError(f"{number} ports of 127.0.0.1 are not to be had")
