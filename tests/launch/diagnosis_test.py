"""What is told of devices and of folders that only TensorFlow reaches."""

import sys

import pytest

from dist_amp import preflight
from launch import diagnosis, host
from launch.findings import ERROR, OK, WARNING, Report
from tests import support


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.mark.parametrize(
    ("version", "visible", "expected"),
    [
        (None, None, OK),
        ("550.54.15", None, ERROR),
        ("550.54.15", "0", ERROR),
        ("550.54.15", "-1", WARNING),
        ("550.54.15", "", WARNING),
    ],
)
def test_a_driver_without_a_gpu(monkeypatch, version, visible, expected):
    """As here, where TensorFlow sees none."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(host, "driver_version", lambda: version)
    monkeypatch.setattr(host, "gpus_of_the_driver", list)
    monkeypatch.setattr(
        diagnosis.tf.config, "list_physical_devices", lambda kind: []
    )
    found = by_name(diagnosis.tensorflow())
    assert found["GPUs"].status == expected
    assert bool(found["GPUs"].mend) == (expected != OK)
    assert ("NVIDIA driver" in found) == (version is not None)


def test_a_gpu_is_described(monkeypatch):
    class Gpu:
        name = "/physical_device:GPU:0"

    monkeypatch.setattr(
        diagnosis.tf.config, "list_physical_devices", lambda kind: [Gpu()]
    )
    monkeypatch.setattr(
        diagnosis.tf.config.experimental,
        "get_device_details",
        lambda gpu: {
            "device_name": "NVIDIA H100 80GB HBM3",
            "compute_capability": (9, 0),
        },
    )
    found = by_name(diagnosis.tensorflow())
    assert found["GPU:0"].value == (
        "NVIDIA H100 80GB HBM3, compute capability 9.0"
    )


def test_a_broken_device_is_an_error_and_broken_xla_a_warning(monkeypatch):
    def check(device, *, jit_compile=False):
        if jit_compile:
            return "no ptxas"
        return "no kernel image" if device == "CPU:1" else ""

    monkeypatch.setattr(preflight, "check_device", check)
    found = by_name(diagnosis.devices_work(["CPU:0", "CPU:1"]))
    assert {name: one.status for name, one in found.items()} == {
        "CPU:0 computes": OK,
        "CPU:1 computes": ERROR,
        "XLA compiles": WARNING,
    }


def test_wrong_sums_are_an_error(monkeypatch):
    monkeypatch.setattr(
        preflight,
        "check_sums",
        lambda strategy: [
            preflight.SumCheck("float32", ()),
            preflight.SumCheck("bfloat16", (0, 2)),
        ],
    )
    report = Report()
    report.add(diagnosis.all_reduces(report, support.make_strategy(2)))
    right, wrong, latency, bandwidth = report.findings
    assert right.value == "exact in float32"
    assert (wrong.status, wrong.value) == (
        ERROR,
        "wrong in bfloat16 on workers 0, 2",
    )
    assert latency.value.endswith("an all-reduce")
    assert "B/s for" in bandwidth.value
    assert report.status == ERROR


def test_a_remote_folder():
    found = diagnosis.remote_folder("ram://doctor/run")
    assert (found.status, found.value) == (
        OK,
        "ram://doctor/run can be written",
    )
    found = diagnosis.remote_folder("nowhere://bucket/run")
    assert found.status == ERROR
    assert "nowhere" in found.value


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
