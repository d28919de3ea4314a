"""launch.doctor on several workers: all is well, or it is said who is not."""

import json
import socket
import subprocess
import sys

import pytest

from launch.worker_process import worker_environments
from tests.launch.train_test import environment
from tests.multi_worker.processes import end


def start(cwds, *flags, environments=None):
    """A worker in each of the folders, and all their addresses."""
    environments = environments or worker_environments(len(cwds))
    config = json.loads(environments[0]["TF_CONFIG"])
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.doctor", *flags],
            cwd=cwd,
            env=environment(PYTHONUNBUFFERED="1", **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for cwd, variables in zip(cwds, environments, strict=False)
    ]
    return workers, config["cluster"]["worker"]


def errors_of(report):
    return [
        one["value"] for one in report["findings"] if one["status"] == "error"
    ]


def test_two_workers_that_are_well(tmp_path):
    workers, _ = start([tmp_path] * 2, "--run_dir=deep/run", "--json")
    results = end(workers)
    assert [status for status, _, _ in results] == [0, 0], results
    report = json.loads(results[0][1])
    assert results[1][1:] == ("", "")
    assert errors_of(report) == []
    assert report["num_workers"] == 2
    found = {one["name"]: one["value"] for one in report["findings"]}
    assert found["sums"] == "exact in float32, float16, bfloat16, int64"
    assert found["storage"] == f"all workers share {tmp_path}/deep/run"
    assert found["versions"] == "the same on all workers"
    assert "multi_worker, 2 replicas" in found["--strategy=auto"]
    measured = report["measured"]
    assert 0 < measured["latency_seconds"] < 1
    assert measured["bandwidth"][0]["num_bytes"] == 2**16
    assert measured["bandwidth"][0]["bus_bandwidth"] > 0
    assert measured["clock_ahead_seconds"][0] == 0
    assert abs(measured["clock_ahead_seconds"][1]) < 1
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_worker_that_does_not_come_is_named(tmp_path):
    """Worker 0's own port is fine, worker 1 comes, worker 2 does not."""
    environments = worker_environments(3)
    workers, addresses = start(
        [tmp_path] * 2, "--startup_timeout=10", environments=environments
    )
    results = end(workers)
    assert [status for status, _, _ in results] == [1, 1], results
    missing = f"Missing: worker 2 ({addresses[2]})."
    table = " ".join(results[0][1].split())
    assert missing in table
    assert table.endswith("1 error")
    assert missing in results[1][2]


def test_a_worker_whose_storage_is_elsewhere_is_named(tmp_path):
    """The same flag on both, but not the same folder."""
    cwds = [tmp_path / "zero", tmp_path / "one"]
    for cwd in cwds:
        cwd.mkdir()
    workers, addresses = start(cwds, "--run_dir=run", "--json")
    results = end(workers)
    assert [status for status, _, _ in results] == [1, 1], results
    report = json.loads(results[0][1])
    assert errors_of(report) == [
        f"worker 1 ({addresses[1]}) does not see what worker 0 wrote in "
        f"{cwds[0]}/run: worker-0 is not there (its own is {cwds[1]}/run)"
    ]
    assert "sums" in {one["name"] for one in report["findings"]}
    assert [list(cwd.iterdir()) for cwd in cwds] == [[], []]


def test_a_worker_that_cannot_take_part_tells_the_others(tmp_path):
    environments = worker_environments(2)
    config = json.loads(environments[1]["TF_CONFIG"])
    host, port = config["cluster"]["worker"][1].split(":")
    with socket.create_server((host, int(port))):
        workers, _ = start([tmp_path] * 2, environments=environments)
        results = end(workers)
    assert [status for status, _, _ in results] == [1, 1], results
    reason = f"Port {port} of worker 1 ({host}:{port}) is taken on this host"
    assert f"cannot take part: {reason}" in " ".join(results[0][1].split())
    assert reason in results[1][2]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
