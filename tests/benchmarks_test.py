"""The benchmarks run and tell what they should; figures are not judged."""

import json
import math
import subprocess
import sys

import pytest

from benchmarks import contest, report
from benchmarks.contest import Contender, Result
from benchmarks.passes import Setting
from benchmarks.workloads import WORKLOADS

SECONDS = 240


def run(module, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *flags],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_contenders_train_the_same_in_turn(tmp_path):
    names = [contest.OURS, contest.LIMIT, "Keras fit"]
    done = run(
        "run",
        *("--workloads", "tiny_gpt"),
        *("--contenders", *names),
        *("--passes", "1", "--steps", "1"),
        *("--out", str(tmp_path / "speed")),
    )
    rows = json.loads((tmp_path / "speed.json").read_text())
    assert {row["contender"] for row in rows} == set(names), done.stderr
    assert [row["error"] for row in rows] == [None] * 3, rows
    # From the same loss: all start as a uniform guess of 64 tokens.
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(64), rel=0.1)
        assert len(row["steps_per_sec"]) == 1
    assert f"| {contest.OURS} |" in done.stdout
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_a_contender_that_fails_is_a_row_of_the_table():
    broken = Contender("broken", "bare_step", {"precision": "float12"})
    results = contest.hold(Setting("tiny_gpt"), [broken], passes=1, warm_up=0)
    assert "float12" in results["broken"].error
    assert "| broken | failed:" in report.table(results)


def test_ratios_are_of_the_same_round():
    ours, theirs = Result([4.0, 9.0, 10.0]), Result([1.0, 3.0, 5.0])
    assert report.ratio(ours, theirs) == 3.0


@pytest.mark.parametrize(
    ("name", "giga"),
    [("resnet50", 24.5), ("gpt2", 875.2)],  # 6 x 4.1 GMAC; 6 x 124 M x 1024
)
def test_flops_are_those_of_the_literature(name, giga):
    assert WORKLOADS[name].sizes.flops / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize(
    "module", ["growth", "overheads", "scaling", "startup"]
)
def test_every_figure_has_a_help_text(module):
    done = run(module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: benchmarks.{module}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
