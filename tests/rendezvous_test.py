"""Workers meet, or each of them is told why they do not."""

import concurrent.futures
import json
import socket
import sys
import threading

import pytest

from dist_amp import cluster, rendezvous
from dist_amp.cluster import ClusterSpec
from dist_amp.rendezvous import RendezvousError, meet

SECONDS = 20.0


@pytest.fixture(autouse=True)
def _impatience(monkeypatch):
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_LINGER", 0.5)
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_ANSWER", 2.0)


def free_addresses(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return tuple(addresses)


def spec(addresses, index):
    return ClusterSpec(addresses, index, "a test")


def run(*calls):
    """What each of the calls, all at once, returns or raises."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    return [f.exception() or f.result() for f in futures]


def connect(address):
    """To one that may not listen yet."""
    for _ in range(100):
        try:
            return socket.create_connection(
                cluster.split_address(address), SECONDS
            )
        except ConnectionRefusedError:
            threading.Event().wait(0.05)
    raise AssertionError(f"nobody listens at {address}")


def greeting_of_worker_1(addresses):
    """What a process sends that says it is worker 1."""
    greeting = {
        "greeting": "dist_amp rendezvous 1",
        "index": 1,
        "workers": list(addresses),
        "facts": {},
        "news": {},
    }
    return json.dumps(greeting).encode() + b"\n"


def worker(addresses, index, timeout=SECONDS, **facts):
    return lambda: meet(
        spec(addresses, index), facts, news={"index": index}, timeout=timeout
    )


@pytest.mark.parametrize("number", [2, 4])
def test_all_hear_the_news_of_all(number):
    addresses = free_addresses(number)
    results = run(*(worker(addresses, i, seed="1") for i in range(number)))
    assert results == [[{"index": i} for i in range(number)]] * number


def test_the_ports_are_free_again_at_once():
    addresses = free_addresses(3)
    for _ in range(3):
        run(*(worker(addresses, i) for i in range(3)))
        for address in addresses:
            host, port = address.split(":")
            socket.create_server((host, int(port))).close()


def test_who_does_not_come_is_named():
    addresses = free_addresses(4)
    results = run(worker(addresses, 0, 0.5), worker(addresses, 2))
    expected = f"Missing: worker 1 ({addresses[1]}), worker 3 ({addresses[3]})"
    for error in results:
        assert isinstance(error, RendezvousError)
        assert expected in str(error)
        assert "--startup_timeout" in str(error)


def test_worker_0_does_not_come():
    addresses = free_addresses(2)
    (error,) = run(worker(addresses, 1, 0.5))
    assert f"worker 0 ({addresses[0]}) did not answer" in str(error)
    assert "refused" in str(error)


def test_a_worker_with_another_list():
    addresses = free_addresses(3)
    other = (addresses[0], addresses[2], addresses[1])
    results = run(worker(addresses, 0), worker(addresses, 1), worker(other, 1))
    assert all(isinstance(error, RendezvousError) for error in results[:2])
    told = [str(error) for error in results if "another list" in str(error)]
    assert len(told) >= 2
    assert ", ".join(other) in told[0]


def test_a_worker_with_other_facts_is_told_which():
    addresses = free_addresses(3)
    same = {"--seed": "0", "--model": "mlp"}
    results = run(
        worker(addresses, 0, **same),
        worker(addresses, 1, **same),
        worker(addresses, 2, **{**same, "--seed": "5"}),
    )
    for error in results:
        assert isinstance(error, RendezvousError)
        assert f"worker 2 ({addresses[2]}) was started differently" in str(
            error
        )
        assert "--seed: 5 there, 0 here." in str(error)
        assert "--model" not in str(error)


def test_a_fact_that_only_one_knows():
    addresses = free_addresses(2)
    results = run(worker(addresses, 0), worker(addresses, 1, code="abc"))
    assert "code: abc there, nothing here" in str(results[0])


def test_two_processes_with_one_index():
    """On two hosts: on one the port is taken already."""
    addresses = free_addresses(3)
    heard = []

    def twin():
        with connect(addresses[0]) as one:
            one.sendall(greeting_of_worker_1(addresses))
            heard.append(one.makefile().readline())

    results = run(worker(addresses, 0), worker(addresses, 1), twin)
    assert isinstance(results[0], RendezvousError)
    expected = f"Two processes say that they are worker 1 ({addresses[1]})"
    assert expected in str(results[0])
    assert expected in str(results[1])
    assert expected in heard[0]


def test_a_taken_port():
    addresses = free_addresses(2)
    host, port = addresses[1].split(":")
    with socket.create_server((host, int(port))):
        (error,) = run(worker(addresses, 1))
    assert f"Port {port} of worker 1" in str(error)
    assert "is taken" in str(error)


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_without_an_address(index):
    addresses = (free_addresses(1)[0], "no-such-host.invalid:1")
    (error,) = run(worker(addresses, index))
    assert "worker 1 (no-such-host.invalid:1) has no address" in str(error)
    assert "a test" in str(error)


def test_a_host_whose_address_comes_later(monkeypatch):
    addresses = free_addresses(2)
    late = (addresses[0], addresses[1].replace("127.0.0.1", "late.invalid"))
    asked = []
    resolve = socket.getaddrinfo

    def resolve_late(host, *args, **kwargs):
        if host == "late.invalid":
            asked.append(host)
            if len(asked) < 4:
                raise socket.gaierror(-2, "Name or service not known")
            host = "127.0.0.1"
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_late)
    calls = [
        lambda index=index: meet(
            ClusterSpec(late, index, "a test", may_wait_for_names=True),
            timeout=SECONDS,
        )
        for index in range(2)
    ]
    assert run(*calls) == [[{}, {}]] * 2


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_that_cannot_take_part_says_so(index):
    addresses = free_addresses(3)
    calls = [worker(addresses, i) for i in range(3)]
    calls[index] = lambda: rendezvous.decline(
        spec(addresses, index), "no GPU.", timeout=SECONDS
    )
    results = run(*calls)
    assert results[index] is None
    expected = f"worker {index} ({addresses[index]}) cannot take part: no GPU."
    others = [r for i, r in enumerate(results) if i != index]
    assert [str(error) for error in others] == [expected] * 2


def test_strangers_are_ignored():
    """A port scanner, a browser, and one that never ends its line."""
    addresses = free_addresses(2)
    strangers = []

    def disturb():
        for said in (b"", b"GET / HTTP/1.1\n", b"[1]\n", b"x" * 1000):
            one = connect(addresses[0])
            one.sendall(said)
            strangers.append(one)
        return meet(spec(addresses, 1), timeout=SECONDS)

    assert (
        run(lambda: meet(spec(addresses, 0), timeout=SECONDS), disturb)
        == [[{}, {}]] * 2
    )
    for one in strangers:
        one.close()


def test_what_listens_there_is_no_worker():
    addresses = free_addresses(2)
    host, port = addresses[0].split(":")
    with socket.create_server((host, int(port))) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\n")

        error, _ = run(worker(addresses, 1, 1.0), answer)
    assert "did not answer" in str(error)


def test_a_worker_that_dies_while_it_waits_counts_as_missing():
    addresses = free_addresses(3)

    def die():
        with connect(addresses[0]) as one:
            one.sendall(greeting_of_worker_1(addresses))

    error, _ = run(worker(addresses, 0, 1.0), die)
    assert f"Missing: worker 1 ({addresses[1]}), worker 2" in str(error)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
