"""Whether every worker reaches every other one, and whose clock is wrong.

For after the roll call and before TensorFlow's servers take the ports: each
worker listens on its own, dials all others, and worker 0 gathers what they
found and tells all. Standard library only; the messages are lines of JSON, as
open to strangers as those of the roll call.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dist_amp import rendezvous
from dist_amp.cluster import ClusterSpec, split_address

_GREETING = "dist_amp reachability 1"
_MAX_BYTES = 2**24
_NUM_ROUND_TRIPS = 5
_NUM_DIALS_AT_ONCE = 32
_SECONDS_TO_CONNECT = 3.0
_SECONDS_TO_ANSWER = 5.0
_SECONDS_BETWEEN_TRIES = 0.1


@dataclasses.dataclass(frozen=True)
class Reach:
    """What one worker found when it dialled the others.

    Attributes:
        unreachable: Why a worker was not reached, by its index.
        round_trip: Seconds to the farthest of the others and back, over an
            open connection; None if none was reached.
        clock_ahead: Seconds that this worker's clock is ahead of worker 0's,
            within half a round trip; None if worker 0 was not reached.
        news: What the worker wanted the others to know.
    """

    unreachable: dict[int, str]
    round_trip: float | None
    clock_ahead: float | None
    news: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call to a worker: what is wrong, or how long it took."""

    error: str = ""
    seconds: float = 0.0
    ahead: float = 0.0  # the other's clock


def dial_all(
    cluster: ClusterSpec,
    *,
    news: Mapping[str, Any] | None = None,
    timeout: float = 30.0,
    patience: float = 5.0,
) -> list[Reach | None]:
    """Dials all workers and hears what they found; all workers call it.

    Args:
        cluster: The workers, and which of them this one is.
        news: What the others may want to know.
        timeout: Seconds until a worker that has not reported is left out.
        patience: Seconds to try a worker that does not answer.

    Returns:
        What each worker found, in their order, the same on every worker;
        None where a worker did not report in time.

    Raises:
        RendezvousError: This worker's port is taken, or worker 0, which
            gathers, is not there.
    """
    deadline = time.monotonic() + timeout
    with (
        rendezvous.listen(cluster) as server,
        _Station(cluster, deadline).open(server) as station,
    ):
        calls = _dial_others(cluster, min(deadline, _in(patience)))
        found = _reach(cluster, calls, dict(news or {}))
        mine = dataclasses.asdict(found)
        if cluster.is_chief:
            reports = station.gather(0, mine)
        else:
            reports = _ask_for_all(cluster, mine, deadline)
    return [None if report is None else _parsed(report) for report in reports]


def _in(seconds: float) -> float:
    return time.monotonic() + seconds


def _reach(
    cluster: ClusterSpec, calls: Mapping[int, _Call], news: dict[str, Any]
) -> Reach:
    reached = {i: call for i, call in calls.items() if not call.error}
    ahead = -reached[0].ahead if 0 in reached else None
    return Reach(
        unreachable={i: call.error for i, call in calls.items() if call.error},
        round_trip=max((c.seconds for c in reached.values()), default=None),
        clock_ahead=0.0 if cluster.is_chief else ahead,
        news=news,
    )


def _parsed(report: dict[str, Any]) -> Reach:
    """JSON's keys are texts."""
    unreachable = {int(i): why for i, why in report["unreachable"].items()}
    return Reach(**{**report, "unreachable": unreachable})


# ------------------------------------------------------------------ answering


class _Station:
    """Answers those who dial this worker; at worker 0 gathers the reports.

    Args:
        cluster: The workers.
        deadline: Until when reports are waited for, by `time.monotonic`.
    """

    def __init__(self, cluster: ClusterSpec, deadline: float):
        self._cluster = cluster
        self._deadline = deadline
        self._reports: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._is_closing = threading.Event()
        self._gatherings: list[threading.Thread] = []

    @contextlib.contextmanager
    def open(self, server: socket.socket) -> Iterator["_Station"]:
        """Answers on the socket until the end of the block."""
        server.settimeout(_SECONDS_BETWEEN_TRIES)
        thread = threading.Thread(target=self._serve, args=[server])
        thread.start()
        try:
            yield self
        finally:
            # Those who asked for the reports hang up first: else the port
            # stays busy for a while, and TensorFlow needs it at once.
            for gathering in self._gatherings:
                gathering.join(_SECONDS_TO_ANSWER)
            self._is_closing.set()
            thread.join()

    def gather(
        self, index: int, report: dict[str, Any]
    ) -> list[dict[str, Any] | None]:
        """Hands in a worker's report; waits for those of all."""
        number = self._cluster.num_workers
        with self._changed:
            self._reports[index] = report
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: len(self._reports) == number,
                max(0.0, self._deadline - time.monotonic()),
            )
            return [self._reports.get(i) for i in range(number)]

    def _serve(self, server: socket.socket) -> None:
        while not self._is_closing.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                threading.Thread(
                    target=self._answer, args=[connection], daemon=True
                ).start()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_SECONDS_TO_ANSWER)
        with (
            connection,
            contextlib.suppress(OSError, ValueError),
            connection.makefile("rwb") as stream,
        ):
            while line := stream.readline(_MAX_BYTES):
                answer = self._answer_to(json.loads(line))
                if answer is None:
                    return
                _write(stream, {"greeting": _GREETING, **answer})

    def _answer_to(self, request: Any) -> dict[str, Any] | None:
        """None for a stranger."""
        if not isinstance(request, dict) or request.get("to") != _GREETING:
            return None
        if "report" not in request:
            return {"index": self._cluster.task_index, "clock": time.time()}
        self._gatherings.append(threading.current_thread())
        return {"reports": self.gather(request["index"], request["report"])}


def _write(stream: Any, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


# -------------------------------------------------------------------- dialling


def _dial_others(cluster: ClusterSpec, deadline: float) -> dict[int, _Call]:
    others = [i for i in range(cluster.num_workers) if i != cluster.task_index]
    with concurrent.futures.ThreadPoolExecutor(_NUM_DIALS_AT_ONCE) as pool:
        calls = pool.map(lambda i: _dial(cluster, i, deadline), others)
        return dict(zip(others, calls, strict=True))


def _dial(cluster: ClusterSpec, index: int, deadline: float) -> _Call:
    """Tries until the deadline: the other may come a little later."""
    while True:
        try:
            with _connect(cluster, index, deadline) as stream:
                return _talk(stream, index)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            why = why or type(error).__name__
        if time.monotonic() >= deadline:
            return _Call(error=why)
        time.sleep(_SECONDS_BETWEEN_TRIES)


@contextlib.contextmanager
def _connect(
    cluster: ClusterSpec, index: int, deadline: float
) -> Iterator[Any]:
    left = max(0.1, deadline - time.monotonic())
    with (
        socket.create_connection(
            split_address(cluster.workers[index]),
            timeout=min(_SECONDS_TO_CONNECT, left),
        ) as connection,
        connection.makefile("rwb") as stream,
    ):
        connection.settimeout(left + _SECONDS_TO_ANSWER)
        yield stream


def _talk(stream: Any, index: int) -> _Call:
    """Some round trips; the fastest tells most of the other's clock."""
    calls = []
    for _ in range(_NUM_ROUND_TRIPS):
        clock, begin = time.time(), time.perf_counter()
        answer = _ask(stream, {})
        seconds = time.perf_counter() - begin
        if answer["index"] != index:
            raise ValueError(f"worker {answer['index']} answers there")
        ahead = answer["clock"] - (clock + seconds / 2)
        calls.append(_Call(seconds=seconds, ahead=ahead))
    return min(calls, key=lambda call: call.seconds)


def _ask(stream: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    _write(stream, {"to": _GREETING, **request})
    answer = json.loads(stream.readline(_MAX_BYTES) or b"{}")
    if not isinstance(answer, dict) or answer.get("greeting") != _GREETING:
        raise ValueError("what answers there is no worker of dist_amp")
    return answer


def _ask_for_all(
    cluster: ClusterSpec, report: Mapping[str, Any], deadline: float
) -> list[dict[str, Any] | None]:
    """Hands the report to worker 0 and waits for those of all."""
    request = {"index": cluster.task_index, "report": report}
    why: BaseException | None = None
    while why is None or time.monotonic() < deadline:
        try:
            with _connect(cluster, 0, deadline) as stream:
                return _ask(stream, request)["reports"]
        except (OSError, ValueError) as error:
            why = error
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise rendezvous.RendezvousError(
        f"{cluster.name_of(0)} did not gather what the workers found: {why}."
    )
