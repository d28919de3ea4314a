"""A Trainer whose callback on one worker fails or hangs: both end and say so.

What else may happen to a worker is in local_faults_test.py.
"""

import re
import sys

import pytest

from tests.multi_worker.processes import end, start


def run(folder, fault):
    """Exit status, output and errors of both workers."""
    program = "tests.multi_worker.faulty_worker"
    return end(start([sys.executable, "-m", program, str(folder), fault]))


def test_a_worker_that_fails_is_named_by_the_other(tmp_path):
    chief, faulty = run(tmp_path, "raises")
    assert faulty[0] == 1, faulty
    assert chief[0] == 129, chief
    said = r"worker 1 \(127.0.0.1:\d+\) failed at step \d+: ValueError: a mis"
    assert re.search(said, chief[1]), chief


def test_a_standstill_ends_and_says_who_waits_for_whom(tmp_path):
    results = run(tmp_path, "hangs")
    assert [status for status, _, _ in results] == [142, 142], results
    for index, (_, _, errors) in enumerate(results):
        report = (tmp_path / f"hang-worker-{index}.txt").read_text()
        for text in (report, errors):
            assert "no progress for 6 s (--collective_timeout): worker 1" in (
                text
            )
            assert "has been in callbacks or other code" in text
            assert "waits for it in the all-reduce of step" in text
        assert "most recent call first" in report


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
