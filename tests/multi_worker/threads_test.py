"""A long job needs no more threads than a short one."""

import sys

import pytest

from tests.multi_worker.processes import end, start

SCRIPT = """
import os
import dist_amp
from dist_amp import strategy as strategy_lib

strategy = dist_amp.make_strategy("multi_worker")
def num_threads(num_collectives):
    for _ in range(num_collectives):
        strategy_lib.gather_workers(strategy, [1])
    return len(os.listdir("/proc/self/task"))
before = num_threads(20)
after = num_threads(100)
print(after - before, flush=True)
os._exit(0)
"""


def test_collectives_leave_no_threads_behind():
    workers = start([sys.executable, "-c", SCRIPT])
    for status, output, errors in end(workers):
        assert status == 0, errors
        assert int(output) < 20, output


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
