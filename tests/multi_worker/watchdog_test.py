"""Whatever one worker does, the other says what it was, and both end."""

import re
import signal
import subprocess
import sys

import pytest

from launch.worker_process import worker_environments
from tests.launch.train_test import environment
from tests.multi_worker.processes import end


def run(folder, fault):
    """Exit status, output and errors of both workers."""
    return end(
        [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.multi_worker.faulty_worker",
                    str(folder),
                    fault,
                ],
                env=environment(**variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for variables in worker_environments(2)
        ]
    )


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("exception", 1, "failed at step \\d+: ValueError: a mistake"),
        ("input raises", 1, "failed at step .*ValueError: bad record"),
        ("kill", -signal.SIGKILL, "was lost: "),
    ],
)
def test_a_worker_that_fails_is_named_by_the_other(
    tmp_path, fault, status, said
):
    chief, faulty = run(tmp_path, fault)
    assert faulty[0] == status, faulty
    assert chief[0] == 129, chief
    assert re.search(rf"worker 1 \(127.0.0.1:\d+\) {said}", chief[1]), chief


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("input hangs", "has been waiting for input, at step 51, for"),
        ("callback hangs", "has been in callbacks or other code"),
    ],
)
def test_a_standstill_ends_and_says_who_waits_for_whom(tmp_path, fault, said):
    results = run(tmp_path, fault)
    assert [status for status, _, _ in results] == [142, 142], results
    for index, (_, _, errors) in enumerate(results):
        report = (tmp_path / f"hang-worker-{index}.txt").read_text()
        for text in (report, errors):
            assert "no progress for 6 s (--collective_timeout): worker 1" in (
                text
            )
            assert said in text
            assert "waits for it in the all-reduce of step" in text
        assert "most recent call first" in report


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
