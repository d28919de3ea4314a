"""What is told of workers that are not well."""

import sys

import pytest

from dist_amp.cluster import ClusterSpec
from dist_amp.reachability import Reach
from launch import cluster_diagnosis
from launch.diagnosis import duration, text_of
from launch.findings import ERROR, OK, WARNING, Finding, Report, describe_errors

CLUSTER = ClusterSpec(("zero:1", "one:1", "two:1"), 0, "a test")

# TensorFlow 2.21 on worker 0 when worker 1 was killed, and when it was halted.
KILLED = """Graph execution error:

Detected at node CollectiveReduceV2_1 defined at (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main

  File "dist_amp/preflight.py", line 216, in everywhere

Collective ops is aborted by: recvmsg:Connection reset by peer
Additional GRPC error information from remote target /job:worker/replica:0/\
task:1 while calling /tensorflow.WorkerService/RecvBuf:
The error could be from a previous operation. Restart your program to reset.
"""
HALTED = """Graph execution error:

Detected at node CollectiveReduceV2 defined at (most recent call last):
  File "dist_amp/preflight.py", line 216, in everywhere

Collective ops is aborted by: Error reported from /job:worker/task:1: The \
following tasks are unhealthy (stopped sending heartbeats):
/job:worker/replica:0/task:1
The tasks have crashed. Check the task logs for an earlier error.
"""
TOLD = """Graph execution error:

Detected at node CollectiveReduceV2 defined at (most recent call last):
  File "dist_amp/preflight.py", line 216, in everywhere

Collective ops is aborted by: Error reported from /job:worker/task:1: \
dist_amp: worker 1 (one:1) failed in devices: out of memory
The error could be from a previous operation.
"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (KILLED, "Collective ops is aborted by: recvmsg:Connection reset"),
        (HALTED, "Collective ops is aborted by: Error reported from"),
        (TOLD, "worker 1 (one:1) failed in devices: out of memory"),
    ],
)
def test_tensorflows_messages_in_short(message, expected):
    error = RuntimeError(message)
    assert text_of(error).startswith(expected)
    assert "\n" not in text_of(error)
    assert cluster_diagnosis._blame(CLUSTER, error) == (
        "See the log of worker 1 (one:1): it ended or hangs."
    )
    assert text_of(RuntimeError()) == "RuntimeError"


def news(**facts):
    facts = {"TensorFlow": "2.21.0", "devices": "1", **facts}
    return {"host": "h", "facts": facts, "errors": []}


def test_other_versions_are_named():
    told = list(
        cluster_diagnosis._presence(
            CLUSTER, [news(), news(), news(TensorFlow="2.20.0")]
        )
    )
    (error,) = (one for one in told if one.status == ERROR)
    assert error.value == (
        "TensorFlow is 2.20.0 on worker 2 (two:1) and 2.21.0 on worker 0"
    )
    report = Report()
    report.share(told)
    assert not cluster_diagnosis._may_go_on(report)
    assert report.findings[-1].value == "not tried (versions)"


def test_errors_of_another_host_are_told_here():
    other = {**news(), "errors": [("--run_dir", "full", "Make room.")]}
    told = list(cluster_diagnosis._presence(CLUSTER, [news(), other, news()]))
    (error,) = (one for one in told if one.status == ERROR)
    assert (error.name, error.value) == ("--run_dir of worker 1", "full")
    report = Report()
    report.share(told)
    assert cluster_diagnosis._may_go_on(report)


def test_each_pair_that_fails_is_named():
    report = Report()
    found = [
        Reach({1: "timed out", 2: "timed out"}, None, 0.0, {}),
        Reach({2: "Connection refused"}, 0.001, 0.0, {}),
        None,
    ]
    report.share(cluster_diagnosis._reachability(report, CLUSTER, found))
    assert [one.value for one in report.shared_errors] == [
        "worker 2 (two:1) did not report",
        "worker 0 (zero:1) does not reach worker 1 (one:1): timed out",
        "worker 0 (zero:1) does not reach worker 2 (two:1): timed out",
        "worker 1 (one:1) does not reach worker 2 (two:1): Connection refused",
    ]
    assert not cluster_diagnosis._may_go_on(report)
    assert report.measured["round_trip_seconds"] == [None, 0.001, None]


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (0.25, (OK, "at most 250 ms apart")),
        (1.5, (WARNING, "worker 1 (one:1) is 1.5 s ahead of worker 0")),
        (-90.0, (WARNING, "worker 1 (one:1) is 90 s behind worker 0")),
    ],
)
def test_clocks(ahead, expected):
    found = [Reach({}, 0.001, one, {}) for one in (0.0, ahead, 0.0)]
    told = list(cluster_diagnosis._reachability(Report(), CLUSTER, found))
    assert (told[-1].status, told[-1].value) == expected
    assert told[0].value.endswith("1 ms there and back at most")


def test_durations():
    assert [duration(s) for s in (1e-5, 2.5e-3, 12.0)] == [
        "10 µs",
        "2.5 ms",
        "12 s",
    ]


def test_a_worker_tells_its_own_errors_only():
    report = Report()
    report.add(
        [
            Finding("a", "mine", "bad.", ERROR, "Mend it."),
            Finding("a", "b", "c"),
        ]
    )
    report.share([Finding("a", "all", "bad", ERROR)])
    assert describe_errors(report.own_errors) == "error: mine: bad. Mend it."
    assert report.status == ERROR


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
