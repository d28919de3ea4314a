"""Who am I: this process's place among the workers of a job.

Read from `TF_CONFIG`, an explicit list, Slurm, or MPI's launcher. Standard
library only, so that a mistake is found before TensorFlow starts.
"""

import collections
import dataclasses
import itertools
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Mpi:
    """The variables that an MPI launcher sets."""

    name: str
    rank: str
    size: str
    local_size: str
    job: str


_OPEN_MPI = _Mpi(
    "Open MPI",
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    job="PMIX_NAMESPACE",
)
_MPICH = _Mpi(
    "MPICH",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_size="MPI_LOCALNRANKS",
    job="PMI_JOBID",
)

# Where a launcher gives every process its number.
_INDEX_VARIABLES = (
    "JOB_COMPLETION_INDEX",  # a Kubernetes Indexed Job
    _OPEN_MPI.rank,
    "SLURM_PROCID",
    _MPICH.rank,  # and its relatives
)

# Derived ports lie below the range that Linux gives to outgoing connections
# (32768 and up). Jobs with neighbouring numbers do not overlap on a host.
_FIRST_PORT, _NUM_JOBS, _PORTS_PER_JOB = 15_000, 1_000, 16

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]+):(\d{1,5})")


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The workers of a job and which of them this process is.

    Attributes:
        workers: "host:port" of every worker, in task order; worker 0 is the
            chief.
        task_index: Index of this process in `workers`.
        source: Where this was read, for the log.
        may_wait_for_names: Whether a host's name may appear later, as those
            of Kubernetes do when its pod starts.

    Raises:
        ValueError: An address is malformed or comes twice, or the index is
            none of a worker.
    """

    workers: tuple[str, ...]
    task_index: int
    source: str
    may_wait_for_names: bool = False

    def __post_init__(self) -> None:
        for index, address in enumerate(self.workers):
            _check_address(index, address, self.source)
        index = self.task_index
        is_index = isinstance(index, int) and not isinstance(index, bool)
        if not is_index or not 0 <= index < len(self.workers):
            raise ValueError(
                f"The task index must be in [0, {len(self.workers)}). "
                f"Received {index!r} from {self.source}."
            )
        counts = collections.Counter(self.workers)
        repeated = [address for address, n in counts.items() if n > 1]
        if repeated:
            raise ValueError(
                "Each worker needs an address of its own. Received "
                f"{', '.join(repeated)} more than once from {self.source}."
            )

    @property
    def num_workers(self) -> int:
        """Number of worker processes."""
        return len(self.workers)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return self.task_index == 0

    @property
    def address(self) -> str:
        """Where this process listens, as host:port."""
        return self.workers[self.task_index]

    def name_of(self, index: int) -> str:
        """A worker as messages name it: its index and its address."""
        return f"worker {index} ({self.workers[index]})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long the workers of a job wait for each other, in seconds.

    Attributes:
        startup: For a worker that has not come.
        collective: For progress, once training runs: longer than the slowest
            compilation, evaluation step or callback.
        heartbeat: For a sign of life of a worker's process.
    """

    startup: float = 300.0
    collective: float = 300.0
    heartbeat: float = 20.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(
                    f"`{field.name}` must be positive, in seconds. Received "
                    f"{getattr(self, field.name)} (--{field.name}_timeout)."
                )


def split_address(address: str) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def find(
    workers: Sequence[str] = (),
    task_index: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> ClusterSpec | None:
    """Looks for the workers of the job, in this order.

    1. `workers`, if given; the index from `task_index`, or from the variable
       in which a Kubernetes Indexed Job, Slurm or MPI tells it.
    2. `TF_CONFIG`, which Kubeflow's TFJob sets.
    3. Open MPI (`mpirun`), if all processes are on this host.
    4. Slurm, within a step of several tasks (`srun`).
    5. MPICH, as Open MPI.

    Args:
        workers: "host:port" of every worker.
        task_index: Which of them this process is.
        environment: `os.environ` by default.

    Returns:
        None for a job of one process.

    Raises:
        ValueError: What was found is malformed or contradicts itself; the
            message says where and how.
    """
    env = os.environ if environment is None else environment
    if task_index is not None and not workers:
        raise ValueError(
            "`task_index` needs `workers`: pass the addresses of all workers "
            "(--workers=host:port,host:port --task_index=0)."
        )
    spec = (
        _from_list(workers, task_index, env)
        or _from_tf_config(env)
        or _from_mpi(env, _OPEN_MPI)
        or _from_slurm(env)
        or _from_mpi(env, _MPICH)
    )
    if spec is None or spec.num_workers < 2:
        _warn_of_lone_tasks(env)
        return None
    may_wait = "KUBERNETES_SERVICE_HOST" in env
    return dataclasses.replace(spec, may_wait_for_names=may_wait)


def expand_hosts(text: str) -> list[str]:
    """The hosts that Slurm's notation stands for, in its order.

    Brackets hold numbers and ranges, the last bracket counts fastest, and
    zeros in front of a range's first number are kept.

    Raises:
        ValueError: The text is malformed.

    Example:
    >>> expand_hosts("n[08-10],rack[1-2]n[3-4]")
    ['n08', 'n09', 'n10', 'rack1n3', 'rack1n4', 'rack2n3', 'rack2n4']
    """
    hosts: list[str] = []
    for item in _split_outside_brackets(text):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if not item or any("[" in part or "]" in part for part in parts):
            raise ValueError(f"Malformed list of hosts: {text!r}.")
        choices = [
            _expand_ranges(part, text) if is_bracket else [part]
            for is_bracket, part in zip(
                itertools.cycle((False, True)), parts, strict=False
            )
        ]
        hosts += ["".join(chosen) for chosen in itertools.product(*choices)]
    return hosts


def expand_counts(text: str) -> list[int]:
    """Tasks on each node: "2(x3),1" is 2, 2, 2, 1.

    Raises:
        ValueError: The text is malformed.
    """
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not found:
            raise ValueError(f"Malformed list of tasks per node: {text!r}.")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


# ------------------------------------------------------------------- sources


def _from_list(
    workers: Sequence[str], task_index: int | None, env: Mapping[str, str]
) -> ClusterSpec | None:
    if not workers:
        return None
    source = "--workers"
    if task_index is None:
        name = next((n for n in _INDEX_VARIABLES if n in env), None)
        if name is None:
            if len(workers) == 1:
                return None
            raise ValueError(
                "`task_index` is needed with `workers` (--task_index=0 on "
                "the first host, 1 on the second, and so on), unless "
                f"{', '.join(_INDEX_VARIABLES)} tells it."
            )
        task_index, source = _number(env, name), f"--workers and {name}"
    return ClusterSpec(tuple(workers), task_index, source)


def _from_tf_config(env: Mapping[str, str]) -> ClusterSpec | None:
    text = env.get("TF_CONFIG")
    if not text:
        return None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"TF_CONFIG must be a JSON object. Received {text!r}: {error}."
        ) from error
    jobs = _member(config, "cluster", text)
    task = _member(config, "task", text)
    if not jobs:
        return None
    _check_jobs(jobs, task)
    workers = jobs.get("worker", [])
    if not isinstance(workers, list):
        raise ValueError(
            "cluster.worker in TF_CONFIG must be a list of host:port. "
            f"Received {workers!r}."
        )
    if len(workers) < 2:
        return None
    if "index" not in task:
        raise ValueError(
            f"TF_CONFIG lists {len(workers)} workers, but task.index, which "
            f"of them this one is, is missing. Received {text!r}."
        )
    return ClusterSpec(tuple(workers), task["index"], "TF_CONFIG")


def _check_jobs(jobs: Mapping[str, Any], task: Mapping[str, Any]) -> None:
    """Only workers: what TensorFlow makes of other tasks is a riddle."""
    if "chief" in jobs and "worker" in jobs:
        raise ValueError(
            "TF_CONFIG lists a chief beside the workers. Worker 0 is the "
            "chief here: put its address first in cluster.worker (in a "
            "TFJob, drop the Chief replica and add a Worker)."
        )
    if "chief" in jobs and len(jobs["chief"]) == 1:
        return  # a job of one process
    others = sorted(set(jobs) - {"worker"})
    if others:
        raise ValueError(
            "Every task in TF_CONFIG must be a worker. Received "
            f"{', '.join(others)}; evaluation runs on the workers."
        )
    kind = task.get("type", "worker")
    if kind != "worker":
        raise ValueError(
            "Every task in TF_CONFIG must be a worker. Received task type "
            f"{kind!r}; list all hosts under cluster.worker."
        )


def _member(config: Any, name: str, text: str) -> Mapping[str, Any]:
    value = config.get(name, {}) if isinstance(config, dict) else None
    if not isinstance(value, dict):
        raise ValueError(
            "TF_CONFIG must be a JSON object with the objects cluster and "
            f"task. Received {text!r}."
        )
    return value


def _from_slurm(env: Mapping[str, str]) -> ClusterSpec | None:
    """A step that `srun` started; a batch script alone is one process."""
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return None
    nodes = _text(env, "SLURM_STEP_NODELIST")
    hosts = expand_hosts(nodes)
    counts = expand_counts(_text(env, "SLURM_STEP_TASKS_PER_NODE"))
    index = _number(env, "SLURM_PROCID")
    source = f"Slurm (job {env.get('SLURM_JOB_ID', '?')}, {nodes})"
    if len(hosts) != len(counts):
        raise ValueError(
            f"Slurm names {len(hosts)} nodes in SLURM_STEP_NODELIST={nodes} "
            f"and {len(counts)} in SLURM_STEP_TASKS_PER_NODE."
        )
    layout = env.get("SLURM_DISTRIBUTION", "block")
    places = _places(counts, is_cyclic=layout.startswith("cyclic"))
    node, local = _number(env, "SLURM_NODEID"), _number(env, "SLURM_LOCALID")
    if index >= len(places) or places[index] != (node, local):
        raise ValueError(
            f"Slurm put task {index} on node {node} as its task {local}, "
            f"which is not how a {layout} distribution does: start it with "
            "`srun --distribution=block`."
        )
    ports = _slurm_ports(env, max(counts))
    workers = tuple(f"{hosts[n]}:{ports[at]}" for n, at in places)
    return ClusterSpec(workers, index, source)


def _slurm_ports(env: Mapping[str, str], number: int) -> list[int]:
    """One for each task of a node: reserved ones, or from the job's number."""
    reserved = env.get("SLURM_STEP_RESV_PORTS")
    if reserved:
        ports = [int(port) for port in _expand_ranges(reserved, reserved)]
        if len(ports) < number:
            raise ValueError(
                f"Slurm reserved {len(ports)} ports ({reserved}) for "
                f"{number} tasks on a node: pass --resv-ports={number}."
            )
        return ports
    job = int(env.get("SLURM_JOB_ID", "0"))
    return _derived_ports(job, number)


def _places(counts: Sequence[int], *, is_cyclic: bool) -> list[tuple[int, int]]:
    """Node and place on it of every task, as Slurm numbers them."""
    filled = [
        (node, local) for node, n in enumerate(counts) for local in range(n)
    ]
    if is_cyclic:  # a task to each node, then a second one to each
        filled.sort(key=lambda place: place[::-1])
    return filled


def _from_mpi(env: Mapping[str, str], mpi: _Mpi) -> ClusterSpec | None:
    if mpi.rank not in env or _number(env, mpi.size) < 2:
        return None
    number = _number(env, mpi.size)
    if _number(env, mpi.local_size) != number:
        raise ValueError(
            f"{mpi.name} started {number} processes on several hosts and does "
            "not tell their addresses: pass --workers=host:port,... in the "
            f"order of the ranks; {mpi.rank} tells the index."
        )
    job = env.get(mpi.job) or str(os.getppid())  # the launcher's, on one host
    ports = _derived_ports(zlib.crc32(job.encode()), number)
    workers = tuple(f"127.0.0.1:{port}" for port in ports)
    return ClusterSpec(workers, _number(env, mpi.rank), mpi.name)


def _warn_of_lone_tasks(env: Mapping[str, str]) -> None:
    """One of several tasks that would train alone, in everyone's folder."""
    num_tasks = env.get("SLURM_NTASKS", "1")
    if num_tasks != "1" and "SLURM_STEP_ID" not in env:
        _log.warning(
            "this Slurm job has %s tasks, but this process was not started by "
            "srun: it trains alone",
            num_tasks,
        )
    if "JOB_COMPLETION_INDEX" in env and "TF_CONFIG" not in env:
        _log.warning(
            "this pod is one of an Indexed Job, but no --workers were given: "
            "it trains alone"
        )


def _derived_ports(job: int, number: int) -> list[int]:
    """Ports that a job's processes on one host agree on without talking."""
    begin = _FIRST_PORT + job % _NUM_JOBS * _PORTS_PER_JOB
    return list(range(begin, begin + number))


# -------------------------------------------------------------------- checks


def _check_address(index: int, address: Any, source: str) -> None:
    found = isinstance(address, str) and _ADDRESS.fullmatch(address)
    if not found or not 0 < int(found[2]) < 2**16:
        raise ValueError(
            "Addresses of workers must be host:port (IPv6: [host]:port). "
            f"Received {address!r} for worker {index} from {source}."
        )


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        raise ValueError(f"{name} is not set, though its launcher runs this.")
    return env[name]


def _number(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    if not text.isdigit():
        raise ValueError(f"{name} must be a number. Received {text!r}.")
    return int(text)


def _split_outside_brackets(text: str) -> Iterable[str]:
    return re.split(r",(?![^\[]*\])", text)


def _expand_ranges(text: str, whole: str) -> list[str]:
    """Makes 01, 02, 03, 7 of "01-03,7"."""
    numbers: list[str] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if not found:
            raise ValueError(f"Malformed list of hosts: {whole!r}.")
        first, last = found[1], found[2] or found[1]
        if int(last) < int(first):
            raise ValueError(f"Malformed list of hosts: {whole!r}.")
        width = len(first)
        numbers += [
            f"{number:0{width}d}" for number in range(int(first), int(last) + 1)
        ]
    return numbers
