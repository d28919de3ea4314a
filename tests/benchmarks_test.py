"""The benchmarks run and tell what they should; figures are not judged."""

import json
import math
import subprocess
import sys

import pytest

from benchmarks import contest, gpu, report
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


def test_the_gpu_benchmark_runs_its_smallest_sizes(tmp_path):
    done = run(
        "gpu",
        "--tiny",
        *("--contenders", "dist_amp, XLA"),
        *("--inputs", "records", "text"),
        *("--precisions", "mixed_float16"),
        *("--passes", "1", "--steps", "1"),
        *("--out", str(tmp_path / "gpu")),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    images, text = rows
    assert images["loss"] == pytest.approx(math.log(10), rel=0.5)
    assert text["loss"] == pytest.approx(math.log(64), rel=0.1)
    assert "| contender | images/s | MFU |" in done.stdout
    assert "| contender | tokens/s | MFU |" in done.stdout


@pytest.mark.parametrize(
    ("name", "precision", "allows_tf32", "tera"),
    [
        ("NVIDIA H200, 143771 MiB, 143162 MiB", "mixed_bfloat16", True, 989),
        ("NVIDIA H100 80GB HBM3", "float32", True, 495),
        ("NVIDIA A100-SXM4-40GB", "float32", False, 19.5),
        ("Tesla T4", "mixed_float16", True, 65),
        ("NVIDIA L4", "mixed_float16", True, 121),
    ],
)
def test_peaks_by_the_name_that_the_driver_tells(
    name, precision, allows_tf32, tera
):
    setting = Setting("gpt2", precision=precision, allows_tf32=allows_tf32)
    assert gpu.peak_of(name, setting) == tera * 1e12
    assert gpu.peak_of("another", setting) is None
    assert gpu.peak_of(None, setting) is None


def test_mfu_and_percentiles_of_passes():
    """A hundred steps of ten examples a second, of passes of other lengths."""
    result = Result([100.0] * 8 + [50.0] * 2)
    setting = Setting("gpt2", precision="mixed_bfloat16", batch_size=10)
    *_, row = gpu.table({"ours": result}, setting, "NVIDIA H100").splitlines()
    mfu = 100 * 10 * setting.work.sizes.flops / 989e12
    assert row.startswith(f"| ours | 1,024,000 | {mfu:.1%} | 10.0 | 20.0 |")


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
    "module", ["accuracy", "gpu", "growth", "overheads", "scaling", "startup"]
)
def test_every_figure_has_a_help_text(module):
    done = run(module, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: benchmarks.{module}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
