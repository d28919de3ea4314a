"""A worker that is slow is named while all of them train."""

import subprocess
import sys

import pytest

from tests.launch.train_test import SECONDS, environment

JOB = "tests.multi_worker.slow_job"
FLAGS = [
    f"--model={JOB}:model",
    f"--dataset={JOB}:data",
    "--precision=float32",
    "--steps=320",
    "--eval_steps=1",
]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("compute", "Its input is not the reason"),
        ("input", "its input is slow."),
    ],
)
def test_a_slow_worker_is_named(tmp_path, what, reason):
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", "--", *FLAGS],
        cwd=tmp_path,
        env=environment(SLOW=what),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    (said,) = [x for x in done.stderr.splitlines() if " is slow: " in x]
    assert said.startswith("[worker 0] worker 1 (127.0.0.1:")
    assert reason in said


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
