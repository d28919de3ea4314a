"""No standstill without a name: who was lost, who failed, who holds up whom.

TensorFlow waits for ever for a worker that is alive and does not come, and
says of one that is lost only which socket closed. Here a thread on each worker
tells the others where it is. If nothing goes on for too long, all of them
report who holds up whom, with the stacks of all threads, and end.
"""

import contextlib
import dataclasses
import faulthandler
import itertools
import json
import logging
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from dist_amp import coordination
from dist_amp import strategy as strategy_lib
from dist_amp.beacon import Beacon, Place, explain
from dist_amp.preemption import EXIT_STATUS

_log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_UNTIL_NEWS = 30.0
# In which the others, who look as often as we do, write their reports.
_SECONDS_FOR_REPORTS = 5.0
_HANG = "dist_amp/hang"
_STANDSTILL = "no progress for "
# All workers come to the same ones in the same order.
_partings = itertools.count()
# How TensorFlow says that a worker is not heard, or worker 0 by this one.
_SILENT = "stopped sending heartbeats"
_NO_ANSWER = "CoordinationService/Heartbeat"
_TASK = re.compile(r"/job:worker/(?:replica:0/)?task:(\d+)")


class PeerError(RuntimeError):
    """Another worker failed or was lost, so that this one cannot go on."""


class Watchdog:
    """Watches what several workers do together, as one `fit`; on one, nothing.

    Args:
        strategy: Whose workers they are.
        beacon: Where this worker is.
        report_dir: Where a standstill is written down; None: only logged.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        beacon: Beacon,
        *,
        report_dir: str | pathlib.Path | None = None,
    ):
        self._beacon = beacon
        self._index = strategy_lib.task_index(strategy)
        self._names = strategy_lib.worker_names(strategy)
        timeouts = strategy_lib.timeouts_of(strategy)
        self._limit, self._silence = timeouts.collective, timeouts.heartbeat
        self._report_dir = report_dir
        self._news_at = min(_SECONDS_UNTIL_NEWS, self._limit / 2)
        self._next_news = self._news_at
        self._declared: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it no worker waits for ever, and errors say whose they are.

        Raises:
            PeerError: Another worker failed or was lost.
        """
        if len(self._names) == 1:
            yield
            return
        self._beacon.start()
        is_over = threading.Event()
        thread = threading.Thread(
            target=self._watch, args=(is_over,), daemon=True
        )
        thread.start()
        try:
            yield
            self._part()
        except BaseException as error:
            cause = self._cause_of(error)
            if self._declared or (cause or "").startswith(_STANDSTILL):
                self._declared = self._declared or cause
                thread.join()  # it reports and ends the process
            self._tell_why(error, cause)
        finally:
            is_over.set()

    def _part(self) -> None:
        """Nobody leaves before all are done.

        The last all-reduce of another worker may still need something of this
        one, or the chief may be writing a checkpoint: whoever watches the
        processes would take an end for a failure.
        """
        number = next(_partings)
        keys = [f"dist_amp/done/{number}/{i}" for i in range(len(self._names))]
        coordination.publish(keys[self._index], "")
        for key in keys:
            if not coordination.wait_for(key):
                return  # worker 0 was done, and is gone

    # ------------------------------------------------------------- failures

    def _tell_why(self, error: BaseException, cause: str | None) -> None:
        """Passes an error on to the others, and raises what it means here."""
        me, place = self._names[self._index], self._beacon.read()
        if cause is None:
            where = f"at step {place.step}"
            if place.is_outside:
                where = f"while {place.doing}"
            coordination.fail(f"{me} failed {where}: {gist_of(error)}")
            raise error
        coordination.fail(cause)  # who hears only of us should know, too
        raise PeerError(f"{cause}. {me} cannot go on alone.") from error

    def _cause_of(self, error: BaseException) -> str | None:
        """Which other worker is to blame; None if it is this one's own."""
        if not isinstance(error, tf.errors.OpError):
            return None
        text = str(error)
        if coordination.FAILURE in text:
            said = text.partition(coordination.FAILURE)[2]
            return said.partition("\nThe error could be")[0].strip()
        if "ollective" not in text and "oordination" not in text:
            return None
        silence = (
            f"it gave no sign of life for {self._silence:.0f} s "
            "(--heartbeat_timeout)"
        )
        if _NO_ANSWER in text and _SILENT not in text:
            return f"{self._names[0]} was lost: {silence}"
        found = _TASK.search(text[max(0, text.find(_SILENT)) :])
        if found is None:
            return None
        aborted = re.search(r"aborted by: (?!.*aborted by: )(.*)", text)
        why = aborted[1] if aborted else text.splitlines()[0]
        if _SILENT in text:
            why = silence
        return f"{self._names[int(found[1])]} was lost: {why}"

    # ----------------------------------------------------------- standstills

    def _watch(self, is_over: threading.Event) -> None:
        interval = min(_SECONDS_BETWEEN_LOOKS, self._limit / 4)
        while not is_over.wait(interval):
            place = self._beacon.read()
            # The coordination service may be lost itself: never wait for it.
            _within(2.0, self._publish, place)
            heard = _within(2.0, coordination.look_up, _HANG, 0.01)
            self._declared = self._declared or heard
            if self._declared:
                self._report(self._declared)
                self._finish()
            limit = self._limit * place.patience
            is_too_long = place.must_end and place.seconds >= limit
            if is_too_long and not is_over.is_set():
                self._declare(place)
            self._tell_news(place)

    def _publish(self, place: Place) -> None:
        coordination.publish(
            f"dist_amp/place/{self._index}",
            json.dumps(dataclasses.asdict(place)),
        )

    def _places(self) -> list[Place | None]:
        """Of all workers; None for one that tells nothing new."""
        before = self._published()
        time.sleep(2 * _SECONDS_BETWEEN_LOOKS)
        _within(2.0, self._publish, self._beacon.read())
        return [
            Place(**json.loads(now)) if now and now != earlier else None
            for now, earlier in zip(self._published(), before, strict=True)
        ]

    def _published(self) -> list[str | None]:
        keys = [f"dist_amp/place/{i}" for i in range(len(self._names))]
        return [_within(2.0, coordination.look_up, key, 0.5) for key in keys]

    def _tell_news(self, place: Place) -> None:
        """A standstill that has not lasted long enough to end the job."""
        if place.seconds < self._news_at:
            self._next_news = self._news_at
        elif place.seconds >= self._next_news and self._index == 0:
            self._next_news *= 2
            said = explain(self._places(), self._names)
            _log.warning("%s%.0f s: %s", _STANDSTILL, place.seconds, said)

    def _declare(self, place: Place) -> None:
        """This worker finds first that nothing goes on."""
        times = f"{place.patience} times " if place.patience > 1 else ""
        said = (
            f"{_STANDSTILL}{self._limit * place.patience:.0f} s "
            f"({times}--collective_timeout): "
            f"{explain(self._places(), self._names)}"
        )
        self._declared = said
        _within(2.0, coordination.publish, _HANG, said)
        self._report(said)
        time.sleep(_SECONDS_FOR_REPORTS)
        _within(2.0, coordination.fail, said)
        self._finish()

    def _report(self, said: str) -> None:
        """To the log and to a file, with the stacks of all threads."""
        me = self._names[self._index]
        _log.error("%s. Stacks of %s follow.", said, me)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self._report_dir is None:
            return
        path = pathlib.Path(self._report_dir) / f"hang-worker-{self._index}.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"{said}\n\nStacks of {me}:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _finish(self) -> None:
        """The main thread cannot be asked: it hangs in a collective."""
        for stream in (sys.stdout, sys.stderr):
            _within(2.0, stream.flush)
        os._exit(EXIT_STATUS["hang"])


def watching(
    strategy: tf.distribute.Strategy,
) -> contextlib.AbstractContextManager[None]:
    """Watches what comes before training, where workers make their models.

    One that fails there is named by the others, as `Watchdog` does it.

    Raises:
        PeerError: Another worker failed or was lost.
    """
    return Watchdog(strategy, Beacon()).watching()


def gist_of(error: BaseException) -> str:
    """Kind and first words of an error, past what TensorFlow puts before."""
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    if isinstance(error, tf.errors.OpError):
        raised = [x for x in lines if re.match(r"[\w.]*(Error|Exception):", x)]
        preamble = (" ", "Graph execution error:", "Detected at node", "<stack")
        rest = [x for x in lines if x.strip() and not x.startswith(preamble)]
        lines = raised or rest
    return f"{kind}: {lines[0]}" if lines else kind


def _within(seconds: float, function: Callable[..., Any], *args: object) -> Any:
    """What the function returns; None if it takes longer or fails."""
    results: list[Any] = []

    def call() -> None:
        with contextlib.suppress(Exception):
            results.append(function(*args))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
