"""This host as it is, and what is wrong with it, without TensorFlow.

Standard library only, so that it can be told even where TensorFlow cannot be
imported. What is read from `/proc` and `/sys` is read below a root, which
tests put elsewhere.
"""

import collections
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import os
import pathlib
import platform
import re
import resource
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from launch.findings import ERROR, OK, WARNING, Finding

_ROOT = pathlib.Path("/")
_GIB = 2**30

# All of these bring the same folder, `tensorflow`.
_TENSORFLOWS = (
    "intel-tensorflow",
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-gpu",
    "tensorflow-macos",
    "tensorflow-rocm",
    "tensorflow-tpu",
    "tf-nightly",
    "tf-nightly-cpu",
)
_PACKAGES = ("tensorflow", "keras", "numpy", "tensorflow-datasets")
_CPU_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimdhp", "bf16", "sve"),  # ARM
)
_VARIABLES = re.compile(
    r"(TF|CUDA|NVIDIA|NCCL|XLA|KERAS|SLURM|OMPI|PMI|MKL|OMP|ONEDNN)_"
    r"|JOB_COMPLETION_INDEX$|LD_LIBRARY_PATH$|GOOGLE_APPLICATION_CREDENTIALS$"
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|JWT|_KEY$|TF_VAR_", re.IGNORECASE)
# What the driver must be for CUDA of this major version (NVIDIA's table of
# minor-version compatibility).
_MIN_DRIVERS = {"11": (450, 80), "12": (525, 60), "13": (580, 65)}
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized
_NO_LIMIT = 2**60


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the process's control groups allow; None where nothing limits."""

    cpus: float | None = None
    memory: int | None = None


def examine(environment: Mapping[str, str], run_dir: str) -> list[Finding]:
    """Everything about this host that TensorFlow is not needed for.

    Args:
        environment: The variables the process was started with.
        run_dir: Where a run would write.
    """
    return [
        *software(installed(), environment),
        *processor(),
        *kernel_limits(),
        clock(),
        *folder(run_dir),
        *variables(environment),
    ]


# ------------------------------------------------------------------- software

_software = functools.partial(Finding, "software")


def installed() -> set[tuple[str, str]]:
    """Name and version of every installed package."""
    pairs = (
        (found.metadata["Name"], found.version)
        for found in metadata.distributions()
    )
    return {
        (re.sub(r"[-_.]+", "-", name).lower(), version)
        for name, version in pairs
        if name and version  # else: what is left of a broken installation
    }


def software(
    packages: Iterable[tuple[str, str]], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Versions, and packages that overwrite or mislead each other."""
    versions: dict[str, list[str]] = collections.defaultdict(list)
    for name, version in sorted(packages):
        versions[name].append(version)
    libc = " ".join(platform.libc_ver()) or "unknown"
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield _software("Python", platform.python_version())
    yield _software("system", f"{system}, {libc}")
    for package in _PACKAGES:
        if package != "tensorflow":
            yield _package(package, versions[package])
    yield _tensorflow(versions)
    yield from _legacy_keras(versions, environment)


def _package(name: str, versions: list[str]) -> Finding:
    if len(versions) == 1:
        return _software(name, versions[0])
    if not versions:
        return _software(
            name,
            "not installed",
            ERROR,
            "Run `pip install -r requirements.txt`.",
        )
    return _software(
        name,
        " and ".join(versions),
        WARNING,
        "Two versions are on Python's path and the first one found is used: "
        f"run `pip uninstall {name}` until none is left, and install it anew.",
    )


def _tensorflow(versions: Mapping[str, list[str]]) -> Finding:
    """Exactly one package may bring TensorFlow."""
    present = [name for name in _TENSORFLOWS if versions.get(name)]
    if len(present) < 2:
        name = present[0] if present else "tensorflow"
        return _package(name, versions.get(name, []))
    shown = ", ".join(f"{name} {versions[name][0]}" for name in present)
    keep = "tensorflow-tpu" if "tensorflow-tpu" in present else "tensorflow"
    return _software(
        "tensorflow",
        shown,
        ERROR,
        "They overwrite each other's files: run `pip uninstall -y "
        f"{' '.join(present)}`, then install {keep} alone (tensorflow-tpu on "
        "a TPU VM, tensorflow elsewhere).",
    )


def _legacy_keras(
    versions: Mapping[str, list[str]], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Variables that put another Keras in the place of Keras 3."""
    legacy = versions.get("tf-keras")
    if environment.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        yield _software(
            "tf-keras",
            f"in use ({legacy[0] if legacy else 'not installed'})",
            ERROR,
            "TF_USE_LEGACY_KERAS puts Keras 2 in the place of Keras 3: unset "
            "it.",
        )
    elif legacy:
        yield _software("tf-keras", f"{legacy[0]}, not in use")
    backend = environment.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        yield _software(
            "Keras backend",
            backend,
            ERROR,
            "dist_amp needs Keras on TensorFlow: unset KERAS_BACKEND.",
        )


# ----------------------------------------------------------------- processor

_host = functools.partial(Finding, "host")


def processor(root: pathlib.Path = _ROOT) -> Iterator[Finding]:
    """The CPU, and how much of it and of memory this process may use."""
    cpuinfo = _read(root / "proc/cpuinfo")
    model = cpu_model(cpuinfo)
    features = [f for f in _CPU_FEATURES if f in cpu_flags(cpuinfo)]
    lacks_avx = platform.machine() == "x86_64" and "avx" not in features
    yield _host(
        "CPU",
        f"{model}: {' '.join(features) or 'no feature that matters'}",
        ERROR if cpuinfo and lacks_avx else OK,
        "TensorFlow's packages need a CPU with AVX." if lacks_avx else "",
    )
    limits = cgroup_limits(root)
    yield cores(len(os.sched_getaffinity(0)), os.cpu_count() or 1, limits)
    yield memory(_read(root / "proc/meminfo"), limits)


def cpu_model(cpuinfo: str) -> str:
    """The CPU's name out of `/proc/cpuinfo`."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else f"unnamed {platform.machine()}"


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Its instruction sets; ARM calls them features."""
    found = re.search(r"^(?:flags|Features)\s*:(.+)$", cpuinfo, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def cores(usable: int, present: int, limits: Limits) -> Finding:
    """Cores by affinity, and the control group's share of them."""
    value = f"{usable} of {present}"
    if limits.cpus is None or limits.cpus >= usable:
        return _host("cores", value)
    return _host(
        "cores",
        f"{value}, limited to the time of {limits.cpus:g}",
        WARNING,
        "TensorFlow starts a thread a core and is then halted: raise the "
        "container's CPU limit, or set TF_NUM_INTRAOP_THREADS="
        f"{max(1, round(limits.cpus))}.",
    )


def memory(meminfo: str, limits: Limits) -> Finding:
    """Memory of the host and of the control group."""
    kibibytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, re.MULTILINE))
    total = int(kibibytes.get("MemTotal", 0)) * 1024
    free = int(kibibytes.get("MemAvailable", 0)) * 1024
    value = f"{_gib(free)} free of {_gib(total)}"
    usable = free
    if limits.memory is not None and limits.memory < total:
        value += f", limited to {_gib(limits.memory)}"
        usable = min(free, limits.memory)
    if not total:
        return _host("memory", "unknown")
    if usable >= _GIB:
        return _host("memory", value)
    return _host(
        "memory",
        value,
        WARNING,
        "TensorFlow alone takes about half a GiB: end other processes, or "
        "raise the container's limit.",
    )


def cgroup_limits(root: pathlib.Path = _ROOT) -> Limits:
    """The tightest limit of the process's control groups, version 1 and 2."""
    mount = root / "sys/fs/cgroup"
    cpus: list[float] = []
    sizes: list[int] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        names = controllers.split(",")
        for group in _with_parents(mount / controllers, path):
            if "cpu" in names:
                quota = _read(group / "cpu.cfs_quota_us").strip()
                cpus += _quota(f"{quota} {_read(group / 'cpu.cfs_period_us')}")
            if "memory" in names:
                sizes += _numbers(_read(group / "memory.limit_in_bytes"))
            if not controllers:  # version 2: one tree for all
                cpus += _quota(_read(group / "cpu.max"))
                sizes += _numbers(_read(group / "memory.max"))
    sizes = [size for size in sizes if size < _NO_LIMIT]
    return Limits(min(cpus, default=None), min(sizes, default=None))


def _with_parents(mount: pathlib.Path, path: str) -> Iterator[pathlib.Path]:
    """A group and those around it; in a container only the mount may exist."""
    relative = pathlib.PurePosixPath(path.lstrip("/"))
    for part in (relative, *relative.parents):
        yield mount / part


def _quota(text: str) -> list[float]:
    """CPUs out of "200000 100000"; none out of "max 100000" or "-1 100000"."""
    found = re.fullmatch(r"(\d+)\s+([1-9]\d*)\s*", text)
    return [int(found[1]) / int(found[2])] if found else []


def _numbers(text: str) -> list[int]:
    return [int(text)] if text.strip().isdigit() else []


# -------------------------------------------------------------------- kernel


def kernel_limits() -> Iterator[Finding]:
    """Shared memory and open files."""
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        is_small = size < _GIB
        yield _host(
            "/dev/shm",
            _gib(size),
            WARNING if is_small else OK,
            "NCCL passes data between GPUs of a host through it: start the "
            "container with --shm-size=1g or more."
            if is_small
            else "",
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if n < 0 else str(n) for n in (soft, hard)]
    is_low = 0 <= soft < 1024
    yield _host(
        "open files",
        f"{shown[0]}, at most {shown[1]}",
        WARNING if is_low else OK,
        "Data in many files needs more: run `ulimit -n 4096`."
        if is_low
        else "",
    )


def clock() -> Finding:
    """The time, and whether the kernel knows it to be synchronized."""
    now = datetime.datetime.now(datetime.UTC)
    return _host("clock", f"{now:%Y-%m-%d %H:%M:%S} UTC, {_clock_state()}")


def _clock_state() -> str:
    """As the kernel tells, which needs neither network nor a service."""
    with contextlib.suppress(AttributeError, OSError):
        status = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
        if status >= 0:
            is_off = status == _TIME_ERROR
            return "not synchronized" if is_off else "synchronized"
    return "synchronization unknown"


# ------------------------------------------------------------------- storage

_storage = functools.partial(Finding, "storage")


def folder(path: str, flag: str = "run_dir") -> Iterator[Finding]:
    """Whether a run may write where it would, and how much."""
    there = existing_parent(pathlib.Path(path))
    error = try_to_write(there)
    if error:
        yield _storage(
            f"--{flag}",
            f"{path}: {error}",
            ERROR,
            f"Make {there} a folder that this user may write, or pass another "
            f"--{flag}.",
        )
        return
    yield _storage(f"--{flag}", f"{path} can be written")
    usage = shutil.disk_usage(there)
    is_full = usage.free < _GIB
    yield _storage(
        f"disk of --{flag}",
        f"{_gib(usage.free)} free of {_gib(usage.total)}",
        WARNING if is_full else OK,
        f"Checkpoints need room: make some, or pass another --{flag}."
        if is_full
        else "",
    )


def existing_parent(path: pathlib.Path) -> pathlib.Path:
    """The path, or the nearest one above it that is there."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def try_to_write(path: pathlib.Path) -> str:
    """Writes a small file as checkpoints are written; what went wrong."""
    part = path / f".doctor-{uuid.uuid4().hex}.part"
    whole = part.with_suffix(".whole")
    try:
        with open(part, "wb") as file:
            file.write(b"doctor" * 100)
            file.flush()
            os.fsync(file.fileno())
        part.rename(whole)
        whole.unlink()
    except OSError as error:
        for left in (part, whole):
            with contextlib.suppress(OSError):
                left.unlink()
        return error.strerror or str(error)
    return ""


# --------------------------------------------------------------- environment


def variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that change what TensorFlow and its launchers do."""
    for name, value in sorted(environment.items()):
        if _VARIABLES.match(name):
            shown = "(not shown)" if _SECRET.search(name) else value
            yield Finding("environment", name, shown or "(empty)")


# -------------------------------------------------------------------- NVIDIA


def driver_version(root: pathlib.Path = _ROOT) -> str | None:
    """NVIDIA's driver, from the kernel or else from nvidia-smi."""
    text = _read(root / "proc/driver/nvidia/version")
    found = re.search(r"^NVRM version:.*?\s(\d{3}\.\d[\d.]*)\s", text, re.M)
    if found:
        return found[1]
    lines = _nvidia_smi("driver_version")
    return lines[0] if lines else None


def gpus_of_the_driver() -> list[str]:
    """Each GPU's name, memory and what is free of it."""
    return _nvidia_smi("name,memory.total,memory.free")


def driver(version: str, cuda_version: str | None) -> Finding:
    """Whether the driver is new enough for TensorFlow's CUDA."""
    find = functools.partial(Finding, "devices", "NVIDIA driver")
    least = _MIN_DRIVERS.get((cuda_version or "").partition(".")[0])
    parts = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if least is None or parts >= least:
        return find(version)
    return find(
        version,
        ERROR,
        f"TensorFlow was built for CUDA {cuda_version}, which needs driver "
        f"{least[0]}.{least[1]} or newer: update it.",
    )


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


# ------------------------------------------------------------------- private


def _read(path: pathlib.Path) -> str:
    """The text of a file of the kernel; empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.3g} GiB"
