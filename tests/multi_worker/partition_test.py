"""The network between two workers is cut: both say so, and end."""

import contextlib
import shutil
import subprocess
import sys

import pytest

from tests.launch.train_test import SECONDS, command, environment
from tests.multi_worker.processes import end

OURS, THEIRS = "198.18.0.1", "198.18.0.2"  # addresses for tests of networks
LINK = f"""
set -e
ip link add name ours type veth peer name theirs
ip address add {OURS}/24 dev ours
ip link set ours up
ip link set theirs netns $0
nsenter --target $0 --net sh -ec '
    ip address add {THEIRS}/24 dev theirs
    ip link set theirs up
    ip link set lo up'
"""


@pytest.fixture
def other_host():
    """A prefix that runs a command in a network with a link to this one."""
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` of iproute2")
    host = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec sleep 600"],
        stdout=subprocess.PIPE,
    )
    try:
        host.stdout.readline()  # it is there
        linked = subprocess.run(
            ["sh", "-c", LINK, str(host.pid)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if linked.returncode != 0:
            pytest.skip(f"networks cannot be linked: {linked.stderr}")
        yield ["nsenter", "--target", str(host.pid), "--net"]
    finally:
        host.kill()
        host.communicate()


def test_each_side_names_the_other_and_ends(tmp_path, other_host):
    flags = [
        f"--workers={OURS}:12000,{THEIRS}:12000",
        "--epochs=100000",
        "--heartbeat_timeout=3",
        "--collective_timeout=60",
    ]
    workers = [
        subprocess.Popen(
            [*prefix, *command(*flags, f"--task_index={index}")],
            cwd=tmp_path,
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, prefix in enumerate([[], other_host])
    ]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.kill)
        for line in workers[0].stdout:
            if line.startswith("Epoch 2"):
                cut = ["ip", "link", "set", "ours", "down"]
                subprocess.run(cut, check=True, timeout=SECONDS)
                break
        results = end(workers)
    for index, (status, _, errors) in enumerate(results):
        assert status == 129, errors
        other = f"worker {1 - index} ({(THEIRS, OURS)[index]}:12000)"
        said = f"{other} was lost: it gave no sign of life for 3 s"
        assert said in errors


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
