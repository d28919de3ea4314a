"""Workers as processes on loopback."""

import contextlib
import subprocess
import time

from launch.worker_process import worker_environments
from tests.launch.train_test import environment

SECONDS = 180


def start(command, number=2, *, cwd=None, **variables):
    """Workers that run a command and know of each other; 0 is the chief."""
    return [
        subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**variables, **identity),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for identity in worker_environments(number)
    ]


def end(workers):
    """Exit status, output and errors of each."""
    try:
        results = [w.communicate(timeout=SECONDS) for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [
        (worker.returncode, *result)
        for worker, result in zip(workers, results, strict=True)
    ]


def assert_gone(pid):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/{pid}/stat") as file,
        ):
            if file.read().rpartition(")")[2].split()[0] != "Z":
                continue
        return
    raise AssertionError(f"process {pid} is still there")


def children_of(pid):
    """Processes that it has started, in that order."""
    path = f"/proc/{pid}/task/{pid}/children"
    with open(path) as file:
        return [int(child) for child in file.read().split()]
