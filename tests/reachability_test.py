"""Workers dial each other; whom one does not reach is known to all."""

import json
import socket
import sys
import threading
import time

import pytest

from dist_amp import reachability, rendezvous
from dist_amp.rendezvous import RendezvousError
from tests.rendezvous_test import free_addresses, run, spec

SECONDS = 20.0


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    monkeypatch.setattr(reachability, "_SECONDS_TO_ANSWER", 1.0)


def worker(addresses, index, *, timeout=SECONDS, patience=5.0):
    return lambda: reachability.dial_all(
        spec(addresses, index),
        news={"index": index},
        timeout=timeout,
        patience=patience,
    )


@pytest.mark.parametrize("number", [2, 4])
def test_all_reach_all(number):
    addresses = free_addresses(number)
    results = run(*(worker(addresses, i) for i in range(number)))
    assert all(found == results[0] for found in results)
    assert [found.news for found in results[0]] == [
        {"index": i} for i in range(number)
    ]
    for found in results[0]:
        assert found.unreachable == {}
        assert 0 < found.round_trip < 1
        assert abs(found.clock_ahead) < 0.5


def test_it_follows_the_roll_call_and_leaves_the_ports_free():
    addresses = free_addresses(3)

    def both(index):
        rendezvous.meet(spec(addresses, index), timeout=SECONDS)
        found = worker(addresses, index)()
        rendezvous.meet(spec(addresses, index), timeout=SECONDS)
        return found

    for _ in range(2):
        results = run(*(lambda i=i: both(i) for i in range(3)))
        assert all(r.unreachable == {} for r in results[0]), results
        for address in addresses:
            host, port = address.split(":")
            socket.create_server((host, int(port))).close()


def test_a_pair_that_does_not_reach_each_other(monkeypatch):
    """A firewall between workers 1 and 2, which both reach worker 0."""
    addresses = free_addresses(3)
    connect = reachability._connect

    def connect_unless_forbidden(cluster, index, deadline):
        if {cluster.task_index, index} == {1, 2}:
            raise TimeoutError("timed out")
        return connect(cluster, index, deadline)

    monkeypatch.setattr(reachability, "_connect", connect_unless_forbidden)
    results = run(*(worker(addresses, i, patience=0.2) for i in range(3)))
    assert [found.unreachable for found in results[0]] == [
        {},
        {2: "timed out"},
        {1: "timed out"},
    ]
    assert results[1] == results[0]


def test_a_worker_that_does_not_report_is_left_out():
    addresses = free_addresses(3)
    results = run(
        worker(addresses, 0, timeout=1.0, patience=0.2),
        worker(addresses, 1, patience=0.2),
    )
    assert results[0] == results[1]
    zero, one, two = results[0]
    assert two is None
    assert zero.unreachable == one.unreachable == {2: "Connection refused"}


def test_worker_0_is_gone():
    addresses = free_addresses(2)
    (error,) = run(worker(addresses, 1, timeout=0.5, patience=0.2))
    assert isinstance(error, RendezvousError)
    assert f"worker 0 ({addresses[0]}) did not gather" in str(error)


def test_a_clock_that_is_wrong(monkeypatch):
    """Worker 1's answers come from a clock that is an hour ahead."""
    addresses = free_addresses(2)
    answer_to = reachability._Station._answer_to

    def from_a_wrong_clock(self, request):
        answer = answer_to(self, request)
        if self._cluster.is_chief and "clock" in answer:
            answer["clock"] = time.time() - 3600
        return answer

    monkeypatch.setattr(reachability._Station, "_answer_to", from_a_wrong_clock)
    results = run(*(worker(addresses, i) for i in range(2)))
    assert results[0][0].clock_ahead == 0
    assert results[0][1].clock_ahead == pytest.approx(3600, abs=1)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\n", "Expecting value"),
        (b"[]\n", "what answers there is no worker of dist_amp"),
        (b"", "what answers there is no worker of dist_amp"),
        (
            json.dumps(
                {"greeting": reachability._GREETING, "index": 7, "clock": 0}
            ).encode()
            + b"\n",
            "worker 7 answers there",
        ),
    ],
)
def test_who_answers_is_not_the_one_who_was_dialled(said, expected):
    addresses = free_addresses(2)
    host, port = addresses[1].split(":")
    with socket.create_server((host, int(port))) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(said)

        call, _ = run(
            lambda: reachability._dial(spec(addresses, 0), 1, 0.0), answer
        )
    assert expected in call.error


def test_strangers_are_ignored():
    addresses = free_addresses(2)
    host, port = addresses[0].split(":")

    def disturb():
        found = []
        for said in (b"GET / HTTP/1.1\n", b"[1]\n", b"{}\n"):
            for _ in range(100):
                try:
                    one = socket.create_connection((host, int(port)))
                    break
                except ConnectionRefusedError:
                    threading.Event().wait(0.05)
            with one:
                one.sendall(said)
                found.append(one.recv(100))
        return found, worker(addresses, 1)()

    zero, (heard, one) = run(worker(addresses, 0), disturb)
    assert heard == [b"", b"", b""]
    assert zero == one
    assert None not in zero


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
