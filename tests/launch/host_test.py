"""What a host tells of itself, from texts that real hosts gave."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from launch import host
from launch.findings import ERROR, OK, WARNING

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C
flags\t\t: fpu sse2 fma avx f16c avx2 avx512f amx_bf16 avx512_bf16 amx_tile
bugs\t\t: spectre_v1
"""
ARM = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd asimdhp sve bf16
CPU implementer\t: 0x41
"""
MEMINFO = """MemTotal:       24684084 kB
MemFree:        22693632 kB
MemAvailable:   23941964 kB
HugePages_Total:       0
"""
NVIDIA = {
    "535.183.01": (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  "
        "Sun May 12 19:39:15 UTC 2024\n"
        "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
    ),
    "550.54.15": (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  "
        "Release Build  (dvs-builder@U16-I3-B03-4-3)  Tue Mar  5 22:15:33 UTC\n"
    ),
}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_cpus():
    assert host.cpu_model(X86) == "Intel(R) Xeon(R) Platinum 8481C"
    assert {"amx_bf16", "avx512_bf16"} <= host.cpu_flags(X86)
    assert "bf16" in host.cpu_flags(ARM)
    assert host.cpu_model(ARM).startswith("unnamed ")
    assert host.cpu_flags("") == frozenset()


def test_a_cpu_without_avx(tmp_path, monkeypatch):
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    write(tmp_path, {"proc/cpuinfo": X86.replace("avx ", "")})
    assert by_name(host.processor(tmp_path))["CPU"].status == ERROR
    write(tmp_path, {"proc/cpuinfo": X86})
    assert by_name(host.processor(tmp_path))["CPU"].status == OK


VERSION_2 = {
    "proc/self/cgroup": "0::/kubepods.slice/pod1.slice/cri-1.scope\n",
    "sys/fs/cgroup/kubepods.slice/cpu.max": "400000 100000\n",
    "sys/fs/cgroup/kubepods.slice/memory.max": "17179869184\n",
    "sys/fs/cgroup/kubepods.slice/pod1.slice/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/kubepods.slice/pod1.slice/cri-1.scope/cpu.max": (
        "max 100000\n"
    ),
    "sys/fs/cgroup/kubepods.slice/pod1.slice/cri-1.scope/memory.max": "max\n",
}
CONTAINER_2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/cpu.max": "200000 100000\n",
    "sys/fs/cgroup/memory.max": "2147483648\n",
}
# Within a container the paths are the host's and are not there.
CONTAINER_1 = {
    "proc/self/cgroup": (
        "9:name=systemd:/docker/ab12\n"
        "4:memory:/docker/ab12\n"
        "3:cpu,cpuacct:/docker/ab12\n"
        "0::/system.slice/containerd.service\n"
    ),
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}
NO_LIMIT_1 = {
    "proc/self/cgroup": "4:memory:/\n1:cpu:/\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        (VERSION_2, host.Limits(1.5, 2**34)),
        (CONTAINER_2, host.Limits(2.0, 2**31)),
        (CONTAINER_1, host.Limits(0.5, 2**29)),
        (NO_LIMIT_1, host.Limits()),
        ({}, host.Limits()),
    ],
)
def test_control_groups(tmp_path, files, limits):
    write(tmp_path, files)
    assert host.cgroup_limits(tmp_path) == limits


def test_cores():
    assert host.cores(4, 8, host.Limits()).value == "4 of 8"
    assert host.cores(4, 8, host.Limits(cpus=4.0)).status == OK
    limited = host.cores(8, 8, host.Limits(cpus=1.5))
    assert limited.value == "8 of 8, limited to the time of 1.5"
    assert limited.status == WARNING
    assert "TF_NUM_INTRAOP_THREADS=2" in limited.mend


def test_memory():
    assert host.memory(MEMINFO, host.Limits()).value == (
        "22.8 GiB free of 23.5 GiB"
    )
    limited = host.memory(MEMINFO, host.Limits(memory=2**29))
    assert limited.value.endswith(", limited to 0.5 GiB")
    assert limited.status == WARNING
    assert host.memory("", host.Limits()).value == "unknown"


@pytest.mark.parametrize("version", NVIDIA)
def test_the_driver_of_the_kernel(tmp_path, version):
    write(tmp_path, {"proc/driver/nvidia/version": NVIDIA[version]})
    assert host.driver_version(tmp_path) == version


def test_nvidia_smi_where_the_kernel_does_not_tell(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert host.driver_version(tmp_path) == "550.54.15"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert host.driver_version(tmp_path) is None
    tool.unlink()
    assert host.driver_version(tmp_path) is None


def test_a_driver_that_is_too_old():
    assert host.driver("535.183.01", "12.5.1").status == OK
    assert host.driver("535.183.01", None).status == OK
    old = host.driver("470.57.02", "12.5.1")
    assert old.status == ERROR
    assert "525.60" in old.mend


GOOD = {
    ("tensorflow", "2.21.0"),
    ("keras", "3.15.1"),
    ("numpy", "2.4.6"),
    ("tensorflow-datasets", "4.9.10"),
}


def problems(packages, **environment):
    return {
        finding.name: (finding.status, finding.value)
        for finding in host.software(packages, environment)
        if finding.status != OK
    }


def test_packages_that_fit():
    assert problems(GOOD) == {}
    assert problems(GOOD | {("tf-keras", "2.21.0")}) == {}


@pytest.mark.parametrize("other", ["tensorflow-tpu", "tensorflow-cpu"])
def test_two_packages_bring_tensorflow(other):
    found = problems(GOOD | {(other, "2.20.0")})
    assert found["tensorflow"][0] == ERROR
    assert f"{other} 2.20.0" in found["tensorflow"][1]


def test_tensorflow_of_a_tpu_alone():
    packages = GOOD - {("tensorflow", "2.21.0")}
    assert problems(packages | {("tensorflow-tpu", "2.20.0")}) == {}
    assert problems(packages)["tensorflow"] == (ERROR, "not installed")


def test_two_versions_on_the_path():
    found = problems(GOOD | {("keras", "2.15.0")})
    assert found == {"keras": (WARNING, "2.15.0 and 3.15.1")}


def test_variables_that_bring_another_keras():
    found = problems(GOOD, TF_USE_LEGACY_KERAS="1")
    assert found["tf-keras"] == (ERROR, "in use (not installed)")
    assert problems(GOOD, TF_USE_LEGACY_KERAS="0") == {}
    found = problems(GOOD, KERAS_BACKEND="jax")
    assert found == {"Keras backend": (ERROR, "jax")}


def test_variables_are_shown_and_secrets_are_not():
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "SLURM_JWT": "eyJ",
        "TF_VAR_db": "hunter2",
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": "/root",
        "JOB_COMPLETION_INDEX": "3",
    }
    shown = {f.name: f.value for f in host.variables(environment)}
    assert shown == {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "SLURM_JWT": "(not shown)",
        "TF_VAR_db": "(not shown)",
        "CUDA_VISIBLE_DEVICES": "(empty)",
        "JOB_COMPLETION_INDEX": "3",
    }


def test_a_folder_that_is_to_be_made(tmp_path):
    found = by_name(host.folder(str(tmp_path / "a" / "b")))
    assert found["--run_dir"].status == OK
    assert "GiB free of" in found["disk of --run_dir"].value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inner", ["", "run/checkpoints"])
def test_a_file_in_the_place_of_a_folder(tmp_path, inner):
    file = tmp_path / "file"
    file.touch()
    found = by_name(host.folder(str(file / inner)))["--run_dir"]
    assert found.status == ERROR
    assert found.value.endswith("Not a directory")
    assert str(file) in found.mend


def test_a_file_system_that_is_read_only(tmp_path):
    """In a mount namespace of its own, where the platform lets us make one."""
    program = f"mount -t tmpfs -o ro none {tmp_path} && exec {sys.executable}"
    code = "from launch import host; print(host.try_to_write({}))"
    code = code.format(f"host.pathlib.Path({str(tmp_path)!r})")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{program} -c "$0"', code],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.strip() == os.strerror(errno.EROFS)


def test_a_disk_that_is_full_leaves_no_file_behind(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(host.os, "fsync", fail)
    assert host.try_to_write(tmp_path) == os.strerror(errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
