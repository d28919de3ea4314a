"""launch.doctor as a user calls it on one machine."""

import json
import subprocess
import sys

import pytest

import dist_amp
from tests.launch.train_test import SECONDS, environment

STUCK = """
import sys, threading
from launch import doctor
doctor._SECONDS_BESIDE_STARTUP = 0.5
doctor._try_out = lambda *arguments: threading.Event().wait()
sys.exit(doctor.main(["doctor", "--startup_timeout=0.5"]))
"""


def call(cwd, *arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def doctor(cwd, *flags, **variables):
    return call(cwd, "-m", "launch.doctor", *flags, **variables)


def test_a_machine_that_is_well(tmp_path):
    done = doctor(
        tmp_path, "--num_logical_cpus=2", "--json", TF_GPU_ALLOCATOR="bfc"
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["status"] in ("ok", "warning")  # its disk may be full
    assert (report["worker"], report["num_workers"]) == (0, 1)
    for finding in report["findings"]:
        assert list(finding) == ["section", "name", "value", "status", "mend"]
        assert bool(finding["mend"]) == (finding["status"] != "ok")
    found = {one["name"]: one["value"] for one in report["findings"]}
    assert found["dist_amp"] == dist_amp.__version__
    assert found["TF_GPU_ALLOCATOR"] == "bfc"
    assert "TF_CPP_MIN_LOG_LEVEL" not in found  # the doctor's own
    assert found["--strategy=auto"].startswith("mirrored, 2 replicas")
    assert found["CPU:1 computes"].startswith("right products")
    assert found["sums"].startswith("exact in float32, float16, bfloat16")
    assert report["measured"]["latency_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_in_the_table(tmp_path):
    (tmp_path / "file").touch()
    done = doctor(tmp_path, "--run_dir=file", "--devices=GPU:5", TF_CONFIG="{")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "software"
    assert lines[-1] == "2 errors"
    assert all(len(line) <= 80 for line in lines if " " in line.strip())
    text = " ".join(done.stdout.split())
    assert "error --run_dir file: Not a directory Make" in text
    assert "error workers TF_CONFIG must be a JSON object. Received" in text


def test_a_device_that_is_missing(tmp_path):
    done = doctor(tmp_path, "--devices=GPU:5", "--json")
    assert done.returncode == 1
    (error,) = (
        one
        for one in json.loads(done.stdout)["findings"]
        if one["status"] == "error"
    )
    assert "Received ['GPU:5'] (--devices" in error["value"]


def test_tensorflow_that_cannot_be_imported(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise ImportError('no libcudart')")
    done = doctor(tmp_path, PYTHONPATH=environment()["PYTHONPATH"])
    assert done.returncode == 1
    assert "ImportError: no libcudart" in done.stdout
    assert "pip install" in done.stdout


def test_it_ends_wherever_it_hangs(tmp_path):
    done = call(tmp_path, "-c", STUCK)
    assert done.returncode == 1
    assert "did not end within 1 s" in done.stdout


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--learning_rate=1", "Unknown command line flag 'learning_rate'"),
        ("--task_index=0", "--task_index contradicts no --workers"),
        ("--startup_timeout=0", "--startup_timeout must be positive"),
        ("--workers=here,there", "`task_index` is needed with `workers`"),
        ("--run_dir=gs://b/run", "remote ones are for --checkpoint_dir"),
        ("runs", "flags start with --. Received runs."),
    ],
)
def test_wrong_flags(tmp_path, flag, expected):
    done = doctor(tmp_path, flag)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stdout == ""


def test_help_names_every_flag(tmp_path):
    done = doctor(tmp_path, "--help")
    assert done.returncode == 0
    assert "python -m launch.doctor" in done.stdout
    assert "--startup_timeout\n" in done.stdout
    assert "[30.0]" in done.stdout


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
