"""Compiled code is found again, and only where it fits."""

import os
import sys

import pytest

from dist_amp import sources
from launch import compilation_cache
from tests.launch.train_test import launch


def test_the_next_start_reads_what_the_first_compiled(tmp_path):
    # In the first run, else, whose functions would have other numbers then.
    sources.prepare_tfds("digits", str(tmp_path / "data"))
    cache = tmp_path / "cache"
    flags = [
        f"--data_dir={tmp_path / 'data'}",
        f"--compilation_cache={cache}",
        "--jit_compile",
        "--epochs=1",
        "--resume=never",
    ]
    first = launch(tmp_path, *flags)
    assert first.returncode == 0, first.stderr
    compiled = {p: p.stat().st_mtime_ns for p in cache.glob("*/*.pb")}
    assert compiled
    second = launch(tmp_path, *flags, "--run_dir=second")
    assert second.returncode == 0, second.stderr
    assert "SIGILL" not in second.stderr
    again = {p: p.stat().st_mtime_ns for p in cache.glob("*/*.pb")}
    assert again == compiled  # what is compiled is written


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine's /proc, to change."""
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_auto_jit=1")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    gpu = tmp_path / "proc/driver/nvidia/gpus/0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t NVIDIA H100\nIRQ: 1\n")
    (tmp_path / "proc/cpuinfo").write_text(
        "processor: 0\nmodel name: one\nflags: avx2\n"
        "processor: 1\nmodel name: one\nflags: avx2\n"
    )
    return tmp_path / "proc"


@pytest.mark.parametrize(
    ("file", "old", "new", "is_shared"),
    [
        ("cpuinfo", "processor: 1", "processor: 2", True),
        ("cpuinfo", "avx2", "avx512", False),
        ("driver/nvidia/gpus/0/information", "IRQ: 1", "IRQ: 2", True),
        ("driver/nvidia/gpus/0/information", "H100", "A100", False),
    ],
)
def test_machines_of_one_kind_share_a_folder(
    machine, file, old, new, is_shared
):
    kinds = []
    for text in (machine / file).read_text(), None:
        compilation_cache.enable(str(machine / "cache"), machine.parent)
        kinds.append(len(list((machine / "cache").iterdir())))
        if text:
            (machine / file).write_text(text.replace(old, new))
    assert kinds == [1, 1 if is_shared else 2]


def test_other_flags_of_xla_stay(machine):
    compilation_cache.enable(str(machine / "cache"), machine.parent)
    found = os.environ["TF_XLA_FLAGS"]
    assert found.startswith("--tf_xla_auto_jit=1 --tf_xla_persistent_cache_")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
