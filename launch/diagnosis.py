"""From what TensorFlow tells of devices and all-reduces to findings."""

import functools
import os
import re
import uuid
from collections.abc import Iterator, Sequence

import tensorflow as tf

import dist_amp
from dist_amp import coordination, preflight
from dist_amp import precision as precision_lib
from dist_amp import strategy as strategy_lib
from dist_amp.checkpoint import readable_size
from launch import host
from launch.findings import ERROR, OK, WARNING, Finding, Report

_devices = functools.partial(Finding, "devices")
_storage = functools.partial(Finding, "storage")
_cluster = functools.partial(Finding, "cluster")

# What TensorFlow raises where a device, a worker or the network fails.
FAILURES = (tf.errors.OpError, RuntimeError, ValueError)
_NO_MESSAGE = "Graph execution error:"


# -------------------------------------------------------------------- devices


def tensorflow() -> Iterator[Finding]:
    """What TensorFlow was built for, and the GPUs that it sees."""
    build = tf.sysconfig.get_build_info()
    cuda = build.get("cuda_version")
    yield Finding("software", "dist_amp", dist_amp.__version__)
    built = f"CUDA {cuda}, cuDNN {build.get('cudnn_version')}"
    yield _devices("TensorFlow's build", built if cuda else "CPU only")
    version = host.driver_version()
    if version:
        yield host.driver(version, cuda)
    for text in host.gpus_of_the_driver():
        yield _devices("GPU of the driver", text)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        details = tf.config.experimental.get_device_details(gpu)
        major, minor = details.get("compute_capability", ("?", "?"))
        yield _devices(
            gpu.name.partition(":")[2],
            f"{details.get('device_name', 'unnamed')}, compute capability "
            f"{major}.{minor}",
        )
    if not gpus:
        yield _no_gpus(has_driver=version is not None)


def _no_gpus(*, has_driver: bool) -> Finding:
    """A run on the CPU must be meant."""
    if not has_driver:
        return _devices("GPUs", "none: the CPU trains")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return _devices(
            "GPUs",
            f"hidden by CUDA_VISIBLE_DEVICES={visible}: the CPU trains",
            WARNING,
            "Unset it to train on GPUs.",
        )
    return _devices(
        "GPUs",
        "TensorFlow sees none, though NVIDIA's driver is here",
        ERROR,
        "Install TensorFlow with its CUDA libraries (`pip install "
        "'tensorflow[and-cuda]~=2.21.0'`), and start the container with its "
        "GPUs (--gpus=all). To train on the CPU set CUDA_VISIBLE_DEVICES=-1.",
    )


def one_process(report: Report, devices: Sequence[str] | None) -> None:
    """Tries the devices, and all-reduces if they are several."""
    report.stage = "devices"
    try:
        found = strategy_lib.find_devices(devices)
        strategy = dist_amp.make_strategy("auto", devices=devices)
        choice = strategy_lib.choose("auto", devices=found)
        report.add(choices(strategy, *choice))
        report.add(devices_work(found))
        if strategy.num_replicas_in_sync > 1:
            report.add(all_reduces(report, strategy))
    except FAILURES as error:
        report.add([_devices(report.stage, text_of(error), ERROR)])


def choices(
    strategy: tf.distribute.Strategy, kind: str, reason: str
) -> Iterator[Finding]:
    """What "auto" becomes here, and why."""
    number = strategy.num_replicas_in_sync
    plural = "" if number == 1 else "s"
    yield _devices(
        "--strategy=auto", f"{kind}, {number} replica{plural} ({reason})"
    )
    chosen = precision_lib.resolve("auto", strategy)
    yield _devices("--precision=auto", f"{chosen.name} ({chosen.reason})")


def devices_work(devices: Sequence[str]) -> Iterator[Finding]:
    """Small products on each device, plain and compiled with XLA."""
    for device in devices:
        error = preflight.check_device(device)
        yield _devices(
            f"{device} computes",
            error or "right products in float32, float16, bfloat16",
            ERROR if error else OK,
            "Its driver and CUDA libraries do not fit TensorFlow, or it is "
            "broken."
            if error
            else "",
        )
    error = preflight.check_device(devices[0], jit_compile=True)
    yield _devices(
        "XLA compiles",
        error or "yes",
        WARNING if error else OK,
        "--jit_compile will fail; on GPUs XLA needs ptxas and libdevice, "
        "which tensorflow[and-cuda] brings."
        if error
        else "",
    )


def all_reduces(
    report: Report, strategy: tf.distribute.Strategy
) -> Iterator[Finding]:
    """Sums, latency and bandwidth; the same on every worker."""
    report.stage = "sums"
    checks = preflight.check_sums(strategy)
    exact = [check.dtype for check in checks if not check.wrong_workers]
    if exact:
        yield _cluster("sums", f"exact in {', '.join(exact)}")
    for check in checks:
        if check.wrong_workers:
            workers = ", ".join(map(str, check.wrong_workers))
            yield _cluster(
                "sums",
                f"wrong in {check.dtype} on workers {workers}",
                ERROR,
                "Training would go wrong without a word: try "
                "--all_reduce=ring, and other drivers or network cards.",
            )
    report.stage = "latency"
    tiny = preflight.measure_latency(strategy)
    yield _cluster("latency", f"{duration(tiny.seconds)} an all-reduce")
    report.stage = "bandwidth"
    transfers = preflight.measure_bandwidth(strategy)
    best = max(transfers, key=lambda one: one.algorithm_bandwidth)
    yield _cluster(
        "bandwidth",
        f"{readable_size(best.algorithm_bandwidth)}/s for "
        f"{readable_size(best.num_bytes)} (algorithm bandwidth: size over "
        f"time; {readable_size(best.bus_bandwidth)}/s on the bus)",
    )
    report.measured["latency_seconds"] = tiny.seconds
    report.measured["bandwidth"] = [
        {
            "num_bytes": one.num_bytes,
            "seconds": one.seconds,
            "algorithm_bandwidth": one.algorithm_bandwidth,
            "bus_bandwidth": one.bus_bandwidth,
        }
        for one in transfers
    ]


def remote_folder(folder: str) -> Finding:
    """Whether a folder that only TensorFlow reaches can be written."""
    inner = f"{folder.rstrip('/')}/doctor-{uuid.uuid4().hex}"
    error = preflight.write_token(inner, "token")
    error = error or preflight.read_token(inner, "token")
    preflight.remove_tokens(inner)
    return _storage(
        "--checkpoint_dir",
        f"{folder}: {error}" if error else f"{folder} can be written",
        ERROR if error else OK,
        "Check the name, the credentials and the network, or pass another "
        "--checkpoint_dir."
        if error
        else "",
    )


# -------------------------------------------------------------------- private


def text_of(error: BaseException) -> str:
    """The message, without TensorFlow's trace of where it came from."""
    text = str(getattr(error, "message", None) or error)
    if coordination.FAILURE in text:  # what another worker said
        text = text.partition(coordination.FAILURE)[2]
    after_trace = re.split(r"\n  File .*\n", text)[-1]
    lines = [line.strip() for line in after_trace.splitlines()]
    told = [line for line in lines if line not in ("", _NO_MESSAGE)]
    return (told or [type(error).__name__])[0][:400]


def duration(seconds: float) -> str:
    """Seconds as a person reads them: "1.2 ms"."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
