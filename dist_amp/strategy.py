"""The one place that builds a `tf.distribute.Strategy`."""

import atexit
import faulthandler
import functools
import hashlib
import pathlib
import platform
import socket
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import cluster as cluster_lib
from dist_amp import coordination, rendezvous
from dist_amp import tpu as tpu_lib
from dist_amp.cluster import Timeouts

KINDS = ("auto", "one_device", "mirrored", "multi_worker", "tpu")
ALL_REDUCES = ("auto", "nccl", "ring", "hierarchical_copy", "one_device")

_SECONDS_TO_EXIT = 60

_timeouts: weakref.WeakKeyDictionary[tf.distribute.Strategy, Timeouts] = (
    weakref.WeakKeyDictionary()
)


def make_strategy(
    kind: str = "auto",
    *,
    devices: Sequence[str] | None = None,
    all_reduce: str = "auto",
    cluster: cluster_lib.ClusterSpec | None = None,
    tpu: str | None = None,
    tpu_zone: str | None = None,
    tpu_project: str | None = None,
    timeouts: Timeouts | None = None,
    facts: Mapping[str, str] | None = None,
) -> tf.distribute.Strategy:
    """Picks and builds the strategy for the devices at hand.

    Args:
        kind: "one_device", "mirrored" (several devices of this host),
            "multi_worker", "tpu", or "auto": see `choose`.
        devices: Devices of this host to use, say `["GPU:0", "GPU:1"]` or
            `["CPU:0", "CPU:1"]`; by default every GPU, else CPU 0, or every
            logical CPU if `kind` is "mirrored".
        all_reduce: How gradients travel: "nccl", "ring" (gRPC),
            "hierarchical_copy", "one_device" (sum on one device, copy back),
            or "auto": what TensorFlow prefers on GPUs, "one_device" on CPUs.
        cluster: The workers of the job; `cluster.find()` by default.
        tpu: Name or `grpc://` address of a Cloud TPU, or "local" on a TPU VM.
        tpu_zone: Of a named TPU; on a machine of Google's, its own by default.
        tpu_project: Of a named TPU; likewise.
        timeouts: How long workers wait for each other, or for a TPU.
        facts: What must be the same on all workers, say the settings by
            name; versions and the code of this library are compared anyway.

    Returns:
        The strategy; build the model in its scope (`dist_amp.scope`).

    Raises:
        ValueError: An argument is unknown, contradicts another, or names
            devices that this host does not have. Never falls back to a CPU.
        RendezvousError: A worker does not come, or they do not agree; a
            `ValueError` that says who and in what.
        CloudTpuError: A TPU is not there or cannot be used; a `ValueError`
            that says what to try.

    Example:
    >>> strategy = dist_amp.make_strategy("one_device")
    >>> strategy.num_replicas_in_sync
    1
    """
    _check_arguments(kind, devices, all_reduce, tpu)
    _check_place_of_tpu(kind, tpu, tpu_zone=tpu_zone, tpu_project=tpu_project)
    if cluster is not None and kind not in ("auto", "multi_worker"):
        raise ValueError(
            f"`cluster` needs `kind='multi_worker'`. Received kind={kind!r}."
        )
    if kind in ("auto", "multi_worker"):
        cluster = cluster or cluster_lib.find()
    if kind == "tpu" or tpu:
        return tpu_lib.connect(
            tpu or tpu_lib.LOCAL,
            zone=tpu_zone,
            project=tpu_project,
            timeout=(timeouts or Timeouts()).startup,
        )
    if kind == "multi_worker" or cluster:
        # First of all: nothing may have touched a device before it.
        return _multi_worker_strategy(
            all_reduce, cluster, devices, timeouts or Timeouts(), facts or {}
        )
    found = find_devices(devices, all_cpus=kind == "mirrored")
    kind, _ = choose(kind, devices=found)
    if kind == "one_device":
        return _one_device_strategy(found, all_reduce)
    return tf.distribute.MirroredStrategy(
        found, cross_device_ops=_cross_device_ops(all_reduce, found)
    )


def choose(
    kind: str,
    *,
    devices: Sequence[str],
    cluster: cluster_lib.ClusterSpec | None = None,
    tpu: str | None = None,
) -> tuple[str, str]:
    """Resolves "auto" to a kind of strategy and says why.

    Args:
        kind: One of `KINDS`.
        devices: The devices that were asked for or found.
        cluster: The workers of the job, if it has several.
        tpu: The TPU that was named, if any.

    Returns:
        `(kind, reason)`, where kind is not "auto".
    """
    if kind != "auto":
        return kind, "asked for"
    if tpu:
        return "tpu", f"a TPU was named ({tpu})"
    if cluster:
        return "multi_worker", (
            f"{cluster.source} lists {cluster.num_workers} workers"
        )
    if len(devices) > 1:
        return "mirrored", f"{len(devices)} devices"
    return "one_device", f"one device ({devices[0]})"


def find_devices(
    devices: Sequence[str] | None = None, *, all_cpus: bool = False
) -> list[str]:
    """The devices that `make_strategy` uses, as "GPU:0" and the like.

    Args:
        devices: As in `make_strategy`.
        all_cpus: Without a GPU, whether every logical CPU counts, or one.

    Raises:
        ValueError: A device that was asked for is missing.
    """
    gpus, cpus = _names("GPU"), _names("CPU")
    if devices is None:
        return gpus or (cpus if all_cpus else cpus[:1])
    return _checked(devices, gpus + cpus)


def _checked(devices: Sequence[str], present: Sequence[str]) -> list[str]:
    canonical = [_canonical(device) for device in devices]
    missing = [device for device in canonical if device not in present]
    if missing or not canonical:
        raise ValueError(
            f"`devices` must be devices of this host: {list(present)}. "
            f"Received {list(devices)} (--devices, --num_logical_cpus)."
        )
    if len(set(canonical)) != len(canonical):
        raise ValueError(
            f"`devices` must differ. Received {list(devices)} (--devices)."
        )
    return canonical


def use_logical_cpus(number: int) -> list[str]:
    """Splits the CPU into logical devices "CPU:0", "CPU:1" and so on.

    For trying several replicas on one machine. Call it before TensorFlow has
    touched a device.

    Args:
        number: How many, at least 1.

    Returns:
        Their names.

    Raises:
        RuntimeError: TensorFlow has initialized its devices already.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * number
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"`use_logical_cpus({number})` comes too late: TensorFlow has "
            "initialized its devices, as the first tensor does. Call it before "
            "anything else, in a new process."
        ) from error
    return [f"CPU:{index}" for index in range(number)]


def num_workers(strategy: tf.distribute.Strategy) -> int:
    """Processes that run the program together; 1 on a TPU."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    return len(strategy.cluster_resolver.cluster_spec().as_dict()["worker"])


def task_index(strategy: tf.distribute.Strategy) -> int:
    """Index of this process among the workers; 0 is the chief."""
    if num_workers(strategy) == 1:
        return 0
    return strategy.cluster_resolver.task_id


def worker_names(strategy: tf.distribute.Strategy) -> list[str]:
    """What messages call each worker: its index and its address."""
    if num_workers(strategy) == 1:
        return ["worker 0"]
    workers = strategy.cluster_resolver.cluster_spec().as_dict()["worker"]
    return [f"worker {i} ({address})" for i, address in enumerate(workers)]


def timeouts_of(strategy: tf.distribute.Strategy) -> Timeouts:
    """What `make_strategy` was given."""
    return _timeouts.get(strategy, Timeouts())


def local_copies(variable: Any) -> Sequence[tf.Variable]:
    """A Keras or TensorFlow variable on each replica of this process."""
    inner = variable if isinstance(variable, tf.Variable) else variable.value
    return getattr(inner, "values", (inner,))


def gather_replicas(
    strategy: tf.distribute.Strategy, copies: Sequence[tf.Tensor]
) -> np.ndarray:
    """Each replica's value on every worker; all workers must call it.

    Args:
        strategy: Whose replicas they are.
        copies: A value for each replica of this worker, equal in shape.

    Returns:
        Array `[num_replicas, ...]` in the order of the replicas.
    """
    if num_workers(strategy) == 1:
        return np.stack([copy.numpy() for copy in copies])
    dtype = copies[0].dtype  # collectives know no unsigned integers
    wire = tf.int64 if dtype.is_integer or dtype.is_bool else dtype
    local = iter(copies)
    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.cast(next(local), wire)
    )
    return tf.cast(_gather_function(strategy)(values), dtype).numpy()


@functools.cache
def _gather_function(strategy: tf.distribute.Strategy) -> Callable[..., Any]:
    """Traced once a shape; `strategy.gather` would be at each call."""

    def in_replica(value: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        rows = tf.range(strategy.num_replicas_in_sync)
        is_mine = rows == context.replica_id_in_sync_group
        is_mine = tf.reshape(is_mine, [-1, *[1] * value.shape.rank])
        mine = tf.where(is_mine, value[tf.newaxis], tf.zeros_like(value))
        return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

    @tf.function
    def gather(values: Any) -> tf.Tensor:
        results = strategy.run(in_replica, args=(values,))
        return strategy.experimental_local_results(results)[0]

    return gather


def gather_workers(
    strategy: tf.distribute.Strategy, numbers: Sequence[int]
) -> np.ndarray:
    """Each worker's integers on every worker; all workers must call it.

    Args:
        strategy: Whose workers they are.
        numbers: This worker's, as many as the others'.

    Returns:
        int64 `[num_workers, len(numbers)]`; on one worker without any
        communication.
    """
    mine = tf.constant(list(numbers), tf.int64)
    if num_workers(strategy) == 1:
        return mine.numpy()[np.newaxis]
    num_local = strategy.num_replicas_in_sync // num_workers(strategy)
    return gather_replicas(strategy, [mine] * num_local)[::num_local]


def _check_arguments(
    kind: str,
    devices: Sequence[str] | None,
    all_reduce: str,
    tpu: str | None,
) -> None:
    for name, value, accepted in (
        ("kind", kind, KINDS),
        ("all_reduce", all_reduce, ALL_REDUCES),
    ):
        if value not in accepted:
            raise ValueError(
                f"`{name}` must be one of {', '.join(accepted)}. "
                f"Received {value!r}."
            )
    if tpu and kind not in ("auto", "tpu"):
        raise ValueError(
            f"`tpu` needs `kind='tpu'`. Received tpu={tpu!r} with "
            f"kind={kind!r} (--strategy=tpu)."
        )
    if devices is not None and (kind == "tpu" or tpu):
        raise ValueError(
            "`devices` cannot be chosen on a TPU: all its cores are used. "
            f"Received {list(devices)} (--devices)."
        )
    if all_reduce != "auto" and (kind == "tpu" or tpu):
        raise ValueError(
            f"`all_reduce={all_reduce}` would be ignored on a TPU, whose "
            "compiler decides; leave it at 'auto' (--all_reduce)."
        )
    if kind == "one_device" and devices is not None and len(devices) != 1:
        raise ValueError(
            "`kind='one_device'` takes one device. Received "
            f"{list(devices)}; pass kind='mirrored' (--strategy=mirrored)."
        )


def _check_place_of_tpu(
    kind: str, tpu: str | None, **place: str | None
) -> None:
    for name, value in place.items():
        if value is not None and kind != "tpu" and tpu is None:
            raise ValueError(
                f"`{name}` needs a TPU. Received {value!r} with kind={kind!r}; "
                f"pass `tpu` (--tpu, --{name})."
            )


def _names(kind: str) -> list[str]:
    return [
        _canonical(device.name)
        for device in tf.config.list_logical_devices(kind)
    ]


def _canonical(device: str) -> str:
    """Makes "GPU:0" of "/device:GPU:0" and of "gpu:0"."""
    return ":".join(device.upper().split(":")[-2:]).lstrip("/")


def _one_device_strategy(
    devices: Sequence[str], all_reduce: str
) -> tf.distribute.Strategy:
    if all_reduce != "auto":
        raise ValueError(
            f"`all_reduce={all_reduce}` would be ignored on one device; "
            "leave it at 'auto' (--all_reduce)."
        )
    return tf.distribute.OneDeviceStrategy(devices[0])


def _multi_worker_strategy(
    all_reduce: str,
    cluster: cluster_lib.ClusterSpec | None,
    devices: Sequence[str] | None,
    timeouts: Timeouts,
    facts: Mapping[str, str],
) -> tf.distribute.Strategy:
    if cluster is None:
        raise ValueError(
            "`kind='multi_worker'` needs the list of workers: start the "
            "program with srun or mpirun, set TF_CONFIG on each host, or pass "
            "`cluster` (--workers=host:port,host:port --task_index=0)."
        )
    names = {"auto": "AUTO", "nccl": "NCCL", "ring": "RING"}
    if all_reduce not in names:
        raise ValueError(
            "`all_reduce` must be auto, nccl or ring with several workers. "
            f"Received {all_reduce!r} (--all_reduce)."
        )
    local = configured_devices(devices)
    if all_reduce == "nccl" and local[0].startswith("CPU"):
        raise ValueError(
            f"`all_reduce=nccl` needs GPUs. Received devices {local}; pass "
            "ring (--all_reduce)."
        )
    rendezvous.meet(
        cluster,
        {**own_facts(), "devices on each worker": str(len(local)), **facts},
        news={"host": socket.gethostname(), "devices": local},
        timeout=timeouts.startup,
    )
    # Without its `timeout_seconds`, for which TensorFlow 2.21 starts a thread
    # at every collective that lives as long; the watchdog has the time limit.
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=getattr(
            tf.distribute.experimental.CommunicationImplementation,
            names[all_reduce],
        )
    )
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.workers)}),
        task_type="worker",
        task_id=cluster.task_index,
        rpc_layer="grpc",
    )
    # TensorFlow's teardown may wait for workers that are gone.
    atexit.register(
        faulthandler.dump_traceback_later, _SECONDS_TO_EXIT, exit=True
    )
    coordination.configure(cluster.num_workers, timeouts)
    with coordination.local_devices(local):
        strategy = tf.distribute.MultiWorkerMirroredStrategy(
            cluster_resolver=resolver, communication_options=options
        )
    _timeouts[strategy] = timeouts
    return strategy


def configured_devices(devices: Sequence[str] | None) -> list[str]:
    """This host's devices for `make_strategy`, without touching one.

    Several workers must be made known to TensorFlow before it initializes its
    devices, and it does so when it is asked for logical ones.
    """
    gpus = [
        f"GPU:{index}"
        for index in range(len(tf.config.list_physical_devices("GPU")))
    ]
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = tf.config.get_logical_device_configuration(cpu) or [None]
    cpus = [f"CPU:{index}" for index in range(len(parts))]
    if devices is None:
        return gpus or cpus[:1]
    return _checked(devices, gpus + cpus)


@functools.cache
def own_facts() -> dict[str, str]:
    """Versions, and a hash of this library's code."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "code of dist_amp": digest.hexdigest()[:16],
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "NumPy": np.__version__,
    }


def _cross_device_ops(
    all_reduce: str, devices: Sequence[str]
) -> tf.distribute.CrossDeviceOps | None:
    if all_reduce == "auto":
        # TensorFlow's default on CPUs, collectives, aborts the process when
        # a second strategy has another number of replicas.
        on_cpu = devices[0].startswith("CPU")
        return tf.distribute.ReductionToOneDevice() if on_cpu else None
    if all_reduce == "ring":
        raise ValueError(
            "`all_reduce=ring` is for several workers; on one host pass "
            "nccl, hierarchical_copy or one_device (--all_reduce)."
        )
    if all_reduce == "nccl" and devices[0].startswith("CPU"):
        raise ValueError(
            "`all_reduce=nccl` needs GPUs. Received devices "
            f"{list(devices)}; pass one_device (--all_reduce)."
        )
    return {
        "nccl": tf.distribute.NcclAllReduce,
        "hierarchical_copy": tf.distribute.HierarchicalCopyAllReduce,
        "one_device": tf.distribute.ReductionToOneDevice,
    }[all_reduce]()
