"""One start of all workers on this host, until all have ended.

Standard library only.
"""

import contextlib
import functools
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from launch import job as job_lib
from launch.guardian import Guardian
from launch.worker_process import Ending, Start, Worker

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SECONDS_BETWEEN_LOOKS = 0.2
# In which the worker that failed first may end, too, and say so.
_SECONDS_TO_FOLLOW = 3.0
_SECONDS_FOR_STACKS = 2.0
_SECONDS_BETWEEN_REMINDERS = 5.0
_SECONDS_OF_A_PAUSE = 5.0
# In which workers heed a second Ctrl-C.
_SECONDS_TO_QUIT = 3.0


class Attempt:
    """Starts workers, shows what they say, and ends all once one has failed.

    Args:
        guardian: Ends the workers if this process is killed.
        hang_timeout: Seconds without progress, and
        silence_timeout: without a sign of life, until a worker counts as hung.
        leave_timeout: Seconds for the others to end by themselves.

    Attributes:
        asked: The signal that asked this process to stop; None if none did.
        hung: Index of a worker that was found hanging; None if none was.
        why: What was found of it.
        has_lost_service: Whether what serves the workers ended before them.
    """

    def __init__(
        self,
        guardian: Guardian,
        *,
        hang_timeout: float,
        silence_timeout: float,
        leave_timeout: float,
    ):
        self._guardian = guardian
        self._hang_timeout = hang_timeout
        self._silence_timeout = silence_timeout
        self._leave_timeout = leave_timeout
        self._workers: list[Worker] = []
        self._screen = _Screen()
        self._schedule: list[tuple[float, int]] | None = None
        self._next_reminder = 0.0
        self._is_served: Callable[[], bool] = lambda: True
        self.asked: int | None = None
        self.hung: int | None = None
        self.why = ""
        self.has_lost_service = False

    def run(
        self,
        starts: Sequence[Start],
        is_served: Callable[[], bool] | None = None,
    ) -> list[Ending]:
        """Starts all, and waits until all have ended.

        Args:
            starts: How to start each.
            is_served: Whether what serves them still runs; None: nothing does.

        Returns:
            How each worker ended.
        """
        self._is_served = is_served or self._is_served
        with (
            selectors.DefaultSelector() as selector,
            self._passing_on_signals(),
        ):
            try:
                for start in starts:
                    if self.asked is None:
                        self._workers.append(self._start(start))
                        self._workers[-1].watch(selector)
                self._watch(selector)
            except BaseException:
                for worker in self._workers:
                    worker.kill("the launcher failed")
                raise
        return [w.ending for w in self._workers if w.ending is not None]

    def _watch(self, selector: selectors.BaseSelector) -> None:
        """Until the last worker has ended."""
        looked_at = time.monotonic()
        while True:
            for key, _ in selector.select(_SECONDS_BETWEEN_LOOKS):
                key.data.read(key.fd, selector)
            now = time.monotonic()
            # Looked for first: workers fail of it.
            if self._schedule is None and not self._is_served():
                self._end_all_for_lost_service(now)
            running = [w for w in self._workers if not w.reap(selector)]
            if not running:
                return
            # One that was stopped itself has not read yet what came meanwhile.
            if now - looked_at < _SECONDS_OF_A_PAUSE:
                self._look(running, now)
            looked_at = now

    def _start(self, start: Start) -> Worker:
        is_on_terminal = start.index == 0 and sys.stdout.isatty()
        return Worker(
            start,
            self._guardian,
            functools.partial(self._screen.show, start.index),
            terminal=self._screen.copy if is_on_terminal else None,
        )

    def _look(self, running: Sequence[Worker], now: float) -> None:
        """Does what is due now."""
        if self.asked == signal.SIGTERM and now >= self._next_reminder:
            # A worker that was still starting may have missed it.
            self._next_reminder = now + _SECONDS_BETWEEN_REMINDERS
            _send(running, signal.SIGTERM)
        if self._schedule is None:
            self._look_for_hung(running)
            self._look_for_failed(now)
        while self._schedule and now >= self._schedule[0][0]:
            number = self._schedule.pop(0)[1]
            if number != signal.SIGKILL:
                _send(running, number)
                continue
            for worker in running:
                worker.kill("it did not leave when it was told to")

    def _end_all_for_lost_service(self, now: float) -> None:
        """Whoever still has batches may save; the others cannot."""
        self.has_lost_service = True
        self._schedule = [
            (now, signal.SIGTERM),
            (now + self._leave_timeout, signal.SIGKILL),
        ]

    def _look_for_failed(self, now: float) -> None:
        """Sets a limit to the others once one has failed."""
        statuses = [w.ending.status for w in self._workers if w.ending]
        failed = {s for s in statuses if s and s not in job_lib.STOPPED}
        if self.hung is not None:
            begin = now
        elif failed:
            is_peer = failed == {job_lib.PEER}
            begin = now + (_SECONDS_TO_FOLLOW if is_peer else 0.0)
        else:
            return
        stacks_at = begin + self._leave_timeout
        self._schedule = [
            (begin, signal.SIGTERM),
            (stacks_at, signal.SIGUSR2),
            (stacks_at + _SECONDS_FOR_STACKS, signal.SIGKILL),
        ]

    def _look_for_hung(self, running: Sequence[Worker]) -> None:
        for worker in running:
            why = self._why_hung(worker)
            if why:
                self.hung, self.why = worker.index, why
                return

    def _why_hung(self, worker: Worker) -> str:
        """Empty if it is not."""
        silent, beat = worker.silent_seconds, worker.beat
        if silent >= self._silence_timeout:
            return (
                f"no sign of life for {silent:.0f} s (--silence_timeout)"
                f"{worker.describe_silence()}"
            )
        if beat.must_end and beat.seconds >= self._hang_timeout:
            return (
                f"no progress for {beat.seconds:.0f} s (--collective_timeout)"
            )
        return ""

    @contextlib.contextmanager
    def _passing_on_signals(self) -> Iterator[None]:
        def pass_on(number: int, _: object) -> None:
            now = time.monotonic()
            if number == signal.SIGHUP:  # the terminal was closed
                number = signal.SIGTERM
            if number == self.asked == signal.SIGINT:  # a second Ctrl-C
                self._schedule = [
                    (now + _SECONDS_TO_QUIT, signal.SIGUSR2),
                    (now + 2 * _SECONDS_TO_QUIT, signal.SIGKILL),
                ]
            self.asked = self.asked or number
            self._next_reminder = now + _SECONDS_BETWEEN_REMINDERS
            _send(self._workers, number)

        heard = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _send(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        worker.send(number)


class _Screen:
    """What the user sees: worker 0's progress, and the others' lines."""

    def __init__(self) -> None:
        self._is_within_line = False

    def show(self, index: int, stream: int, line: str) -> None:
        """A line of a worker."""
        with contextlib.suppress(OSError):  # nobody looks any more
            if index == 0 and stream == 1:
                print(line, flush=True)
                return
            if self._is_within_line:
                print(flush=True)
                self._is_within_line = False
            print(f"[worker {index}] {line}", file=sys.stderr, flush=True)

    def copy(self, data: bytes) -> None:
        """What worker 0 writes to its terminal."""
        if data:
            self._is_within_line = not data.endswith(b"\n")
            with contextlib.suppress(OSError):
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
