"""The roll call of a job's workers, before TensorFlow starts its servers.

TensorFlow answers a worker that never comes, or that has another list of
workers, with an hour of silence. So all workers meet first: each holds its own
port, worker 0 listens on its own, the others come and tell who they are, and
all hear the verdict. Standard library only.

The messages are lines of JSON. Nothing in them is executed, but neither are
they encrypted nor authenticated: like TensorFlow's own server, these ports
belong behind a firewall.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dist_amp.cluster import ClusterSpec, split_address

_log = logging.getLogger(__name__)

_GREETING = "dist_amp rendezvous 1"
_MAX_BYTES = 2**20
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_BETWEEN_NEWS = 10.0
_SECONDS_TO_ANSWER = 10.0
_SECONDS_TO_LINGER = 3.0


class RendezvousError(ValueError):
    """The workers did not all come, or do not agree."""


class AbsentError(RendezvousError):
    """A worker did not come, or could not: the next time it may be there."""


@dataclasses.dataclass
class _Guest:
    """A connection to worker 0, and what has come through it."""

    connection: socket.socket
    received: bytes = b""
    index: int | None = None
    greeting: dict[str, Any] = dataclasses.field(default_factory=dict)


def meet(
    cluster: ClusterSpec,
    facts: Mapping[str, str] | None = None,
    *,
    news: Mapping[str, Any] | None = None,
    timeout: float = 300.0,
) -> list[dict[str, Any]]:
    """Waits for all workers and compares what they were started with.

    Args:
        cluster: The workers, and which of them this one is.
        facts: What must be the same everywhere, say each flag's value.
        news: What the others may want to know, say this host's name.
        timeout: Seconds to wait for a worker.

    Returns:
        The `news` of each worker, in their order, on every worker.

    Raises:
        AbsentError: A worker did not come, its host has no address yet, or
            this worker's port is taken.
        RendezvousError: A host has no address, or lists of workers or facts
            differ. Both say whose, on every worker that came.
    """
    deadline = time.monotonic() + timeout
    _resolve_all(cluster, deadline)
    greeting = {
        "greeting": _GREETING,
        "index": cluster.task_index,
        "workers": list(cluster.workers),
        "facts": dict(facts or {}),
        "news": dict(news or {}),
    }
    with listen(cluster) as server:
        if cluster.is_chief:
            verdict = _Host(cluster, greeting, server, deadline).run()
        else:
            verdict = _visit(cluster, greeting, deadline, timeout)
    if verdict["error"]:
        is_absent = verdict.get("is_absent", False)
        kind = AbsentError if is_absent else RendezvousError
        raise kind(verdict["error"])
    return verdict["news"]


def decline(
    cluster: ClusterSpec, reason: str, *, timeout: float = 300.0
) -> None:
    """Comes to the roll call only to say that this worker cannot take part.

    The `meet` of every other worker then raises with the reason, where it
    would wait until its time is over.

    Args:
        cluster: The workers, and which of them this one is.
        reason: Why not, in words for the others' logs.
        timeout: Seconds to wait for those who shall hear it.

    Raises:
        RendezvousError: They could not be told; says why.
    """
    deadline = time.monotonic() + timeout
    greeting = {
        "greeting": _GREETING,
        "index": cluster.task_index,
        "workers": list(cluster.workers),
        "facts": {},
        "news": {},
        "declines": reason,
    }
    if cluster.is_chief:
        with listen(cluster) as server:
            _Host(cluster, greeting, server, deadline).run()
    else:
        _visit(cluster, greeting, deadline, timeout)


def listen(cluster: ClusterSpec) -> socket.socket:
    """Holds this worker's port, so that a second process there is noticed.

    Raises:
        RendezvousError: The port is taken.
    """
    host, port = split_address(cluster.address)
    family, *_, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    )[0]
    # As TensorFlow's server: the name may stand for an address that only
    # others see, behind a service or NAT.
    ip = str(address[0])
    is_loopback = ip == "::1" or ip.startswith("127.")
    try:
        return socket.create_server(
            (ip if is_loopback else "", port), family=family
        )
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise AbsentError(
            f"Port {port} of {cluster.name_of(cluster.task_index)} is taken "
            "on this host: a worker of an earlier run may still be there, or "
            "another process has this worker's index."
        ) from error


# ------------------------------------------------------------- before it all


def _resolve_all(cluster: ClusterSpec, deadline: float) -> None:
    """Every host must have an address; Kubernetes gives it with the pod."""
    hosts = {
        split_address(address)[0]: index
        for index, address in enumerate(cluster.workers)
    }
    for host, index in hosts.items():
        while True:
            try:
                socket.getaddrinfo(host, None)
                break
            except OSError as error:
                if not cluster.may_wait_for_names or _is_over(deadline):
                    waits = cluster.may_wait_for_names
                    kind = AbsentError if waits else RendezvousError
                    raise kind(
                        f"The host of {cluster.name_of(index)} has no "
                        f"address: {error.strerror}. Read from "
                        f"{cluster.source}."
                    ) from error
            time.sleep(_SECONDS_BETWEEN_TRIES)


def _is_over(deadline: float) -> bool:
    return time.monotonic() >= deadline


# -------------------------------------------------------------- worker 0


class _Host:
    """Worker 0: hears everyone, compares, and tells everyone.

    Args:
        cluster: The workers.
        greeting: Worker 0's own.
        server: Listens on its address.
        deadline: When to give up, by `time.monotonic`.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        greeting: dict[str, Any],
        server: socket.socket,
        deadline: float,
    ):
        self._cluster = cluster
        self._own = greeting
        self._server = server
        self._deadline = deadline
        self._guests: list[_Guest] = []
        self._present: dict[int, _Guest] = {}
        self._error: str | None = None
        self._is_absent = False

    def run(self) -> dict[str, Any]:
        """Returns the verdict that everyone was told."""
        with selectors.DefaultSelector() as selector:
            self._server.setblocking(False)
            selector.register(self._server, selectors.EVENT_READ)
            self._wait_for_all(selector)
            self._error = self._error or self._refusal(0, self._own)
            present = [self._present[i] for i in sorted(self._present)]
            news = [self._own["news"], *(g.greeting["news"] for g in present)]
            verdict = {
                "error": self._error,
                "is_absent": self._is_absent,
                "news": news,
            }
            self._tell_all(selector, verdict)
        return verdict

    def _missing(self) -> list[int]:
        others = range(1, self._cluster.num_workers)
        return [i for i in others if i not in self._present]

    def _wait_for_all(self, selector: selectors.BaseSelector) -> None:
        begin = time.monotonic()
        next_news = begin + _SECONDS_BETWEEN_NEWS
        while self._missing():
            now = time.monotonic()
            if self._error:  # some are still on their way: tell them too
                self._deadline = min(self._deadline, now + _SECONDS_TO_LINGER)
            if now >= self._deadline:
                if self._error is None:
                    self._is_absent = True
                    self._error = (
                        f"Not all workers came within {now - begin:.0f} s "
                        "(--startup_timeout). Missing: "
                        f"{self._names(self._missing())}."
                    )
                return
            if now >= next_news:
                next_news = now + _SECONDS_BETWEEN_NEWS
                _log.info("waiting for %s", self._names(self._missing()))
            wake = min(self._deadline, next_news) - now
            for key, _ in selector.select(wake):
                self._handle(selector, key)

    def _names(self, indices: Sequence[int]) -> str:
        return ", ".join(map(self._cluster.name_of, indices))

    def _handle(
        self, selector: selectors.BaseSelector, key: selectors.SelectorKey
    ) -> None:
        if key.data is None:
            connection, _ = self._server.accept()
            connection.setblocking(False)
            guest = _Guest(connection)
            self._guests.append(guest)
            selector.register(connection, selectors.EVENT_READ, guest)
            return
        guest = key.data
        data = _receive(guest.connection)
        if not data:
            self._drop(selector, guest)
            return
        guest.received += data
        if len(guest.received) > _MAX_BYTES:
            self._drop(selector, guest)
        elif guest.received.endswith(b"\n") and guest.index is None:
            self._welcome(selector, guest)

    def _drop(self, selector: selectors.BaseSelector, guest: _Guest) -> None:
        """Forgets one who hung up, or who is no worker."""
        selector.unregister(guest.connection)
        guest.connection.close()
        self._guests.remove(guest)
        if guest.index is not None and self._present.get(guest.index) is guest:
            del self._present[guest.index]

    def _welcome(self, selector: selectors.BaseSelector, guest: _Guest) -> None:
        greeting = _parsed(guest.received)
        if greeting is None:
            self._drop(selector, guest)
            return
        index = guest.index = greeting["index"]
        guest.greeting = greeting
        complaint = self._complaint(index, greeting)
        self._error = self._error or complaint
        if complaint is None:
            self._present[index] = guest

    def _complaint(self, index: int, greeting: dict[str, Any]) -> str | None:
        """What is wrong with a worker that has come."""
        refusal = self._refusal(index, greeting)
        if refusal:
            return refusal
        own, other = self._own["workers"], greeting["workers"]
        if own != other:
            return (
                f"Worker {index} has another list of workers than worker 0: "
                f"{', '.join(other)} there, {', '.join(own)} here."
            )
        if not 0 < index < len(own) or index in self._present:
            return (
                f"Two processes say that they are {self._names([index])}: "
                "give each its own task index."
            )
        names = {**self._own["facts"], **greeting["facts"]}
        different = [
            f"{name}: {_short(greeting, name)} there, "
            f"{_short(self._own, name)} here"
            for name in names
            if greeting["facts"].get(name) != self._own["facts"].get(name)
        ]
        if different:
            return (
                f"{self._names([index])} was started differently from worker "
                f"0. {'; '.join(different)}."
            )
        return None

    def _refusal(self, index: int, greeting: dict[str, Any]) -> str | None:
        reason = greeting.get("declines")
        if not reason or index not in range(self._cluster.num_workers):
            return None
        return f"{self._names([index])} cannot take part: {reason}"

    def _tell_all(
        self, selector: selectors.BaseSelector, verdict: dict[str, Any]
    ) -> None:
        """Sends the verdict and lets the others hang up first.

        Whoever hangs up first keeps the port busy for a while, and TensorFlow
        needs this one at once.
        """
        line = json.dumps(verdict).encode() + b"\n"
        for guest in list(self._guests):
            selector.unregister(guest.connection)
            with guest.connection as one, contextlib.suppress(OSError):
                if guest.index is not None:
                    one.settimeout(_SECONDS_TO_ANSWER)
                    one.sendall(line)
                    one.recv(1)


def _short(greeting: Mapping[str, Any], name: str) -> str:
    """A fact for a message: hashes are long."""
    return str(greeting["facts"].get(name, "nothing"))[:60]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A worker's greeting; None if it is none."""
    try:
        greeting = json.loads(line)
    except ValueError:
        return None
    is_right = (
        isinstance(greeting, dict)
        and greeting.get("greeting") == _GREETING
        and isinstance(greeting.get("index"), int)
        and isinstance(greeting.get("workers"), list)
        and isinstance(greeting.get("facts"), dict)
        and isinstance(greeting.get("news"), dict)
    )
    return greeting if is_right else None


# ------------------------------------------------------------ the others


def _visit(
    cluster: ClusterSpec,
    greeting: dict[str, Any],
    deadline: float,
    timeout: float,
) -> dict[str, Any]:
    """Goes to worker 0 until it answers, and hears the verdict."""
    line = json.dumps(greeting).encode() + b"\n"
    next_news = time.monotonic() + _SECONDS_BETWEEN_NEWS
    why = "it was not tried"
    while not _is_over(deadline):
        try:
            left = max(0.1, deadline - time.monotonic())
            return _ask(cluster, line, left)
        except (OSError, ValueError) as error:
            why = str(error) or type(error).__name__
        if time.monotonic() >= next_news:
            next_news += _SECONDS_BETWEEN_NEWS
            _log.info("waiting for %s: %s", cluster.name_of(0), why)
        time.sleep(_SECONDS_BETWEEN_TRIES)
    raise AbsentError(
        f"{cluster.name_of(0)} did not answer within {timeout:.0f} s "
        f"(--startup_timeout): {why}. Is it started, is the address right, "
        "and is the port open?"
    )


def _ask(cluster: ClusterSpec, line: bytes, seconds: float) -> dict[str, Any]:
    address = split_address(cluster.workers[0])
    with socket.create_connection(address, timeout=min(5, seconds)) as one:
        one.sendall(line)
        # Worker 0 speaks last of all at its own deadline.
        one.settimeout(seconds + _SECONDS_TO_ANSWER)
        received = b""
        while not received.endswith(b"\n"):
            data = one.recv(2**16)
            if not data or len(received) > _MAX_BYTES * cluster.num_workers:
                raise ConnectionError("it hung up without a word")
            received += data
    verdict = json.loads(received)
    if not isinstance(verdict, dict) or "error" not in verdict:
        raise ValueError("what listens there is no worker of dist_amp")
    return verdict


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(2**16)
    except OSError:
        return b""
