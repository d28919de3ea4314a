"""The preflight of several workers: what they find out together."""

import contextlib
import functools
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

import dist_amp
from dist_amp import cluster as cluster_lib
from dist_amp import coordination, reachability, rendezvous
from dist_amp import strategy as strategy_lib
from dist_amp.cluster import ClusterSpec
from dist_amp.reachability import Reach
from launch.diagnosis import (
    FAILURES,
    all_reduces,
    choices,
    devices_work,
    duration,
    text_of,
)
from launch.findings import ERROR, WARNING, Finding, Report
from launch.shared_folder import SharedFolder

_cluster = functools.partial(Finding, "cluster")

_SECONDS_FOR_NEWS = 20.0  # once all workers are there
_MAX_CLOCK_DIFFERENCE = 1.0

_News = list[dict[str, Any]]


def find_cluster(
    workers: Sequence[str], task_index: int | None
) -> tuple[ClusterSpec | None, Finding]:
    """The workers of the job, and where they were read."""
    try:
        cluster = cluster_lib.find(workers, task_index)
    except ValueError as error:
        return None, _cluster(
            "workers",
            str(error),
            ERROR,
            "Mend what was read, or pass --workers=host:port,host:port "
            "--task_index=0.",
        )
    if cluster is None:
        return None, _cluster("workers", "this process alone")
    return cluster, _cluster(
        "workers",
        f"{cluster.num_workers}, read from {cluster.source}; this is "
        f"{cluster.name_of(cluster.task_index)}",
    )


def try_workers(
    report: Report,
    cluster: ClusterSpec,
    *,
    devices: Sequence[str] | None,
    timeouts: cluster_lib.Timeouts,
    folder: tuple[str, str],
) -> None:
    """The preflight of several workers; all of them call it.

    Args:
        report: Takes the findings.
        cluster: The workers, and which of them this one is.
        devices: Of this host to use; None: see `make_strategy`.
        timeouts: How long the workers wait for each other.
        folder: A flag, and the folder it named, which all must share.
    """
    try:
        local = strategy_lib.configured_devices(devices)
        rendezvous.listen(cluster).close()
    except (OSError, ValueError) as error:
        report.stage = "this worker"
        report.add([_cluster(report.stage, str(error), ERROR)])
        with contextlib.suppress(rendezvous.RendezvousError, OSError):
            rendezvous.decline(cluster, str(error), timeout=timeouts.startup)
        return
    report.add([_cluster("port", f"{cluster.address} is free")])
    try:
        _meet(report, cluster, local, timeouts, folder)
        if _may_go_on(report):
            _try_all_reduces(report, cluster, devices, timeouts)
    except rendezvous.RendezvousError as error:
        mend = (
            "See the logs of the workers that are named, and start the doctor "
            "on every host at about the same time."
        )
        report.add([_cluster(report.stage, str(error), ERROR, mend)])


def _meet(
    report: Report,
    cluster: ClusterSpec,
    local: Sequence[str],
    timeouts: cluster_lib.Timeouts,
    folder: tuple[str, str],
) -> None:
    """What is done before TensorFlow's servers take the ports."""
    flag, path = folder
    shared = SharedFolder(cluster, path, flag)
    with shared.open() as token:
        report.stage = "roll call"
        news = rendezvous.meet(
            cluster,
            news={
                "host": socket.gethostname(),
                "facts": {
                    **strategy_lib.own_facts(),
                    "number of devices": str(len(local)),
                },
                "errors": [
                    (e.name, e.value, e.mend) for e in report.own_errors
                ],
                "token": token,
            },
            timeout=timeouts.startup,
        )
        report.share(_presence(cluster, news))
        report.stage = "reachability"
        found = reachability.dial_all(cluster, timeout=_SECONDS_FOR_NEWS)
        report.share(_reachability(report, cluster, found))
        report.stage = "storage"
        chief = news[0]["token"]
        report.share(
            shared.findings(chief, shared.try_out(_SECONDS_FOR_NEWS, chief))
        )


def _may_go_on(report: Report) -> bool:
    """Whether TensorFlow's servers would find each other; all decide alike."""
    broken = {one.name for one in report.shared_errors}
    hindrances = sorted(broken & {"versions", "reachability"})
    if hindrances:
        told = f"not tried ({', '.join(hindrances)})"
        mend = "Mend that first, and start the doctor again."
        report.share([_cluster("all-reduce", told, WARNING, mend)])
    return not hindrances


def _presence(cluster: ClusterSpec, news: _News) -> Iterator[Finding]:
    """Who came, with what, and what is wrong on the others' hosts."""
    hosts = sorted({one["host"] for one in news})
    shown = ", ".join(hosts[:8]) + (" and more" if len(hosts) > 8 else "")
    yield _cluster("roll call", f"all {len(news)} came, from {shown}")
    own = news[0]["facts"]
    differences = [
        f"{name} is {other} on {cluster.name_of(index)} and {own.get(name)} "
        "on worker 0"
        for index, one in enumerate(news)
        for name, other in one["facts"].items()
        if other != own.get(name)
    ]
    if not differences:
        yield _cluster("versions", "the same on all workers")
    for difference in differences:
        yield _cluster(
            "versions",
            difference,
            ERROR,
            "Install the same everywhere (requirements_lock.txt), and use as "
            "many devices on each worker (--devices).",
        )
    for index, one in enumerate(news):
        if index != cluster.task_index:
            for name, value, mend in one["errors"]:
                told = f"{name} of worker {index}"
                yield _cluster(told, value, ERROR, mend)


def _reachability(
    report: Report, cluster: ClusterSpec, found: Sequence[Reach | None]
) -> Iterator[Finding]:
    reaches = dict(enumerate(found))
    silent = [index for index, reach in reaches.items() if reach is None]
    pairs = [
        (index, other, why)
        for index, reach in reaches.items()
        for other, why in (reach.unreachable if reach else {}).items()
    ]
    for index in silent:
        yield _cluster(
            "reachability",
            f"{cluster.name_of(index)} did not report",
            ERROR,
            "See its log: it ended or hangs.",
        )
    for index, other, why in pairs:
        yield _cluster(
            "reachability",
            f"{cluster.name_of(index)} does not reach "
            f"{cluster.name_of(other)}: {why}",
            ERROR,
            "Each worker must reach every other one: open the port in the "
            "firewall, and see that the name has the right address there.",
        )
    times = [r.round_trip for r in found if r and r.round_trip is not None]
    report.measured["round_trip_seconds"] = [r and r.round_trip for r in found]
    if not silent and not pairs:
        yield _cluster(
            "reachability",
            f"every worker reaches every other one; {duration(max(times))} "
            "there and back at most",
        )
    report.measured["clock_ahead_seconds"] = [
        r and r.clock_ahead for r in found
    ]
    yield from _clocks(cluster, reaches)


def _clocks(
    cluster: ClusterSpec, reaches: Mapping[int, Reach | None]
) -> Iterator[Finding]:
    ahead = {
        index: reach.clock_ahead
        for index, reach in reaches.items()
        if reach and reach.clock_ahead is not None
    }
    for index, seconds in ahead.items():
        if abs(seconds) > _MAX_CLOCK_DIFFERENCE:
            side = "ahead of" if seconds > 0 else "behind"
            yield _cluster(
                "clocks",
                f"{cluster.name_of(index)} is {duration(abs(seconds))} "
                f"{side} worker 0",
                WARNING,
                "Logs are hard to compare, and credentials may be refused: "
                "start an NTP service on both.",
            )
    difference = max(map(abs, ahead.values()), default=0.0)
    if difference <= _MAX_CLOCK_DIFFERENCE:
        yield _cluster("clocks", f"at most {duration(difference)} apart")


def _try_all_reduces(
    report: Report,
    cluster: ClusterSpec,
    devices: Sequence[str] | None,
    timeouts: cluster_lib.Timeouts,
) -> None:
    """TensorFlow's servers, the strategy and all-reduces over it."""
    report.stage = "strategy"
    try:
        strategy = dist_amp.make_strategy(
            "multi_worker", devices=devices, cluster=cluster, timeouts=timeouts
        )
        choice = strategy_lib.choose("auto", devices=[], cluster=cluster)
        report.share(choices(strategy, *choice))
        report.stage = "devices"
        local = strategy_lib.configured_devices(devices)
        found = list(devices_work(local))
        report.add(found)
        report.stage = "all-reduce"
        report.share(_broken_devices(strategy, cluster, found))
        report.share(all_reduces(report, strategy))
    except FAILURES as error:
        if isinstance(error, rendezvous.RendezvousError):
            raise
        text = text_of(error)
        report.add(
            [_cluster(report.stage, text, ERROR, _blame(cluster, error))]
        )
        if coordination.FAILURE not in str(error):
            name = cluster.name_of(cluster.task_index)
            coordination.fail(f"{name} failed in {report.stage}: {text}")


def _broken_devices(
    strategy: tf.distribute.Strategy,
    cluster: ClusterSpec,
    found: Sequence[Finding],
) -> Iterator[Finding]:
    """The other workers on which a device failed."""
    number = sum(one.status == ERROR for one in found)
    for index, (count,) in enumerate(
        strategy_lib.gather_workers(strategy, [number])
    ):
        if count and index != cluster.task_index:
            yield _cluster(
                f"devices of worker {index}",
                f"{count} failed on {cluster.name_of(index)}",
                ERROR,
                "See its log, or run the doctor there alone.",
            )


def _blame(cluster: ClusterSpec, error: BaseException) -> str:
    """Where to look, by the workers that TensorFlow names."""
    indices = {int(index) for index in re.findall(r"task:(\d+)", str(error))}
    others = sorted(indices - {cluster.task_index})
    if not others:
        return ""
    names = ", ".join(map(cluster.name_of, others))
    return f"See the log of {names}: it ended or hangs."
