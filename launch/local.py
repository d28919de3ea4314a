r"""Trains on several workers on this host; watches and restarts them.

  python -m launch.local --num_workers=2 [flags] -- [flags of launch.train]

Each worker is a process with cores or GPUs of its own. The first one's
progress goes to standard output, every other line to standard error with the
worker's number before it, and all lines of a worker to a log. If a worker dies
or hangs, the others are ended, it is said which one failed first and why, and
all start again from the last checkpoint. Ctrl-C, SIGTERM and SIGUSR1 are
passed on: everything is saved.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import signal
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from launch import host, post_mortem, service_process
from launch import job as job_lib
from launch.attempt import Attempt
from launch.config import ConfigError, check_positive, flag
from launch.guardian import Guardian
from launch.isolation import isolate
from launch.worker_process import Ending, Start, worker_environments

# The workers' own watchdog is to speak first.
_SECONDS_BEYOND_WATCHDOG = 30.0
# What programs say that found no network.
_NETWORK_ERROR = re.compile(
    r"resolv|resolution|unreachable|service not known|urlopen|proxy", re.I
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalJob:
    """Every setting of `python -m launch.local`; one flag each."""

    num_workers: int = flag(2, "Processes, each of them a worker.")
    devices_per_worker: int | None = flag(
        None,
        "GPUs of each worker; without GPUs, logical CPU devices. Default: its "
        "part of all GPUs, or 1.",
    )
    pin_cores: bool = flag(
        True, "Gives each worker CPU cores of its own, if there are enough."
    )
    isolate_network: str = flag(
        "auto",
        "A network of nothing but loopback for the workers, since "
        "TensorFlow's server listens on every interface and lets everyone in. "
        "auto: unless it is not possible, or data or folders are elsewhere.",
        ("auto", "always", "never"),
    )
    data_service_workers: int | None = flag(
        None,
        "Workers of a tf.data service that loads the data of all workers; it "
        "runs on this host for as long as they do. Default: no service.",
    )
    max_restarts: int = flag(
        3, "How often training may start again from the last checkpoint."
    )
    min_workers: int | None = flag(
        None,
        "A restart leaves out the worker that failed, as long as so many are "
        "left. Default: all start again.",
    )
    silence_timeout: float = flag(
        60.0, "Seconds without a sign of life until a process counts as hung."
    )
    leave_timeout: float = flag(
        15.0,
        "Seconds for the other workers to end by themselves; then their "
        "stacks are printed, and they are killed.",
    )
    log_dir: str | None = flag(
        None, "Where the workers' logs go. Default: logs in --run_dir."
    )

    def __post_init__(self) -> None:
        check_positive(
            self,
            "num_workers",
            "devices_per_worker",
            "min_workers",
            "data_service_workers",
            "silence_timeout",
            "leave_timeout",
        )
        if self.max_restarts < 0:
            raise ConfigError(
                "--max_restarts must not be negative. Received "
                f"{self.max_restarts}."
            )
        if (self.min_workers or 1) > self.num_workers:
            raise ConfigError(
                f"--min_workers must be at most --num_workers "
                f"({self.num_workers}). Received {self.min_workers}."
            )


def run() -> None:
    """Entry point of the console command; never returns."""
    _mend_streams()
    status = main(sys.argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)  # without a complaint of a pipe that nobody reads


def main(argv: list[str]) -> int:
    """Trains to the end; returns the exit status of the job."""
    try:
        settings = job_lib.read_settings(argv, LocalJob, __doc__)
        if settings is None:
            return 0
        job, arguments = settings
        plan = make_plan(job, job_lib.read_training(arguments))
        return _train(job, plan)
    except (flags.Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return job_lib.WRONG_SETTINGS
    except KeyboardInterrupt:  # while no worker was running
        return 128 + signal.SIGINT


# ---------------------------------------------------------------- what to run


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is started.

    Attributes:
        training: The flags of each worker.
        gpus: GPUs of each worker, by `CUDA_VISIBLE_DEVICES`; empty: CPUs.
        cores: CPU cores of each worker; empty lists: any.
        logs: Folder of the logs.
    """

    training: job_lib.Training
    gpus: Sequence[Sequence[str]]
    cores: Sequence[Sequence[int]]
    logs: pathlib.Path

    def check(self, num_workers: int, *, restarts: bool) -> None:
        """Whether the settings of training suit so many workers.

        Raises:
            ConfigError: They do not; the message names the flag.
        """
        job_lib.check_training(
            self.training.config,
            num_workers=num_workers,
            num_gpus=len(self.gpus[0]) if self.gpus else 0,
            restarts=restarts,
        )

    def starts(self, slots: Sequence[int]) -> list[Start]:
        """How to start workers in some of the slots."""
        command = [sys.executable, "-m", "launch.train"]
        starts = []
        for index, identity in enumerate(worker_environments(len(slots))):
            slot = slots[index]
            variables = {**identity, "PYTHONUNBUFFERED": "1"}
            if self.gpus:
                variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot])
            starts.append(
                Start(
                    index=index,
                    command=[*command, *self.training.arguments],
                    variables=variables,
                    cores=self.cores[slot],
                    log=self.logs / f"worker-{index}.log",
                )
            )
        return starts


def make_plan(job: LocalJob, training: job_lib.Training) -> Plan:
    """Divides the devices, and checks what can be checked beforehand.

    Raises:
        ConfigError: The settings do not suit each other or this host.
    """
    gpus, config = _divided_gpus(job), training.config
    if job.data_service_workers and config.data_service:
        raise ConfigError(
            "--data_service_workers contradicts --data_service: drop one of "
            "them."
        )
    if job.data_service_workers:
        _with_service(training, "grpc://127.0.0.1:1")  # whether one suits it
    number = job.devices_per_worker
    if not gpus and number and (config.devices or config.num_logical_cpus):
        raise ConfigError(
            "--devices_per_worker contradicts --devices and "
            "--num_logical_cpus: drop one of them."
        )
    if not gpus and (number or 1) > 1:
        more = f"--num_logical_cpus={number}"
        training = job_lib.read_training([*training.arguments, more])
    logs = pathlib.Path(job.log_dir or f"{config.directory}/logs")
    plan = Plan(training, gpus, _divided_cores(job), logs)
    plan.check(job.num_workers, restarts=job.max_restarts > 0)
    if config.resume == "never" and logs.is_relative_to(config.directory):
        raise ConfigError(
            "--resume=never moves --run_dir aside, and the workers' logs with "
            "it: pass a new --run_dir, or --log_dir=FOLDER elsewhere."
        )
    return plan


def _divided_gpus(job: LocalJob) -> list[list[str]]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = [str(i) for i, _ in enumerate(host.gpus_of_the_driver())]
    else:  # as CUDA reads it: up to the first that there is not
        names = [name.strip() for name in visible.split(",")]
        is_none = [
            not n or n.startswith("-") or n == "NoDevFiles" for n in names
        ]
        found = names[: [*is_none, True].index(True)]
    if not found:
        return []
    each = job.devices_per_worker or len(found) // job.num_workers
    if each == 0 or each * job.num_workers > len(found):
        raise ConfigError(
            f"--num_workers={job.num_workers} times --devices_per_worker="
            f"{max(each, 1)} is more than the {len(found)} GPUs of this host: "
            "lower one of them, or set CUDA_VISIBLE_DEVICES= (nothing) to "
            "train on the CPU."
        )
    return [found[i * each : (i + 1) * each] for i in range(job.num_workers)]


def _divided_cores(job: LocalJob) -> list[list[int]]:
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // job.num_workers
    if not job.pin_cores or each == 0 or job.num_workers == 1:
        return [[] for _ in range(job.num_workers)]
    return [cores[i * each : (i + 1) * each] for i in range(job.num_workers)]


def _isolate(job: LocalJob, training: job_lib.Training) -> bool:
    """Whether the workers have a network of their own; says if not."""
    if job.isolate_network == "never" or job.num_workers == 1:
        return False
    elsewhere = what_is_elsewhere(training)
    if job.isolate_network == "auto" and elsewhere:
        why = f"{elsewhere} may need the network"
    else:
        refusal = isolate()
        if refusal is None:
            return True
        why = f"this system does not allow a network of their own: {refusal}"
        if job.isolate_network == "always":
            raise ConfigError(f"--isolate_network=always: {why}.")
    _say(
        f"the ports of the workers are open to whoever reaches this host "
        f"({why}): see to a firewall"
    )
    return False


def what_is_elsewhere(training: job_lib.Training) -> str | None:
    """The flag whose data or folder may be on another host; None: none is."""
    config = training.config
    for argument in training.arguments:
        if "://" in argument:
            return argument
    if ":" in config.dataset or config.dataset == "digits":
        return None
    folder = pathlib.Path(config.data_dir or "~/tensorflow_datasets")
    path = folder / config.dataset
    if config.data_kind == "records":
        path = pathlib.Path(config.pattern_of("train")).parent
    if path.expanduser().is_dir():
        return None
    return f"--dataset={config.dataset}"


# ------------------------------------------------------------------- running


def _train(job: LocalJob, plan: Plan) -> int:
    """Starts the workers, and again where they fail."""
    try:
        plan.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the logs cannot be written: {error}.") from error
    is_isolated = _isolate(job, plan.training)
    guardian = Guardian()
    slots = list(range(job.num_workers))
    num_restarts = 0
    while True:
        attempt = _make_attempt(job, plan, guardian)
        with _service(job, plan, guardian) as (served, service):
            is_served = service.is_running if service else None
            endings = attempt.run(served.starts(slots), is_served)
        first = post_mortem.first_to_fail(endings, attempt.hung)
        if first is None:
            return 0
        if attempt.asked is not None:
            return 128 + attempt.asked
        status = post_mortem.exit_status(first)
        if service and attempt.has_lost_service:
            status = job_lib.PEER
            _say(_describe_end(service))
        elif first.status in job_lib.STOPPED and attempt.hung is None:
            return status
        else:
            _explain(first, endings, attempt, plan)
            if is_isolated:
                _explain_network(first)
        if status not in job_lib.RESTART:
            return status
        if num_restarts == job.max_restarts:
            _say(f"restarted {num_restarts} times (--max_restarts): that is it")
            return status
        num_restarts += 1
        # Of a peer or the service, no worker is known to be at fault.
        failed = None if status == job_lib.PEER else first.index
        slots = slots_left(job, plan, slots, failed)
        _say(
            f"starts again from the last checkpoint on {len(slots)} workers "
            f"({num_restarts} of {job.max_restarts})"
        )


@contextlib.contextmanager
def _service(
    job: LocalJob, plan: Plan, guardian: Guardian
) -> Iterator[tuple[Plan, service_process.Service | None]]:
    """The plan with the flag of a service that runs meanwhile, if any does."""
    if job.data_service_workers is None:
        yield plan, None
        return
    with service_process.running(
        job.data_service_workers, plan.logs / "data-service.log", guardian
    ) as service:
        training = _with_service(plan.training, service.address)
        yield dataclasses.replace(plan, training=training), service


def _with_service(training: job_lib.Training, address: str) -> job_lib.Training:
    return job_lib.read_training(
        [*training.arguments, f"--data_service={address}"]
    )


def _describe_end(service: service_process.Service) -> str:
    assert service.status is not None
    return post_mortem.describe_service(
        service.status, service.lines, log=str(service.log)
    )


def _explain(
    first: Ending, endings: Sequence[Ending], attempt: Attempt, plan: Plan
) -> None:
    """Says which worker failed first."""
    log = str(plan.logs / f"worker-{first.index}.log")
    _say(post_mortem.describe(first, endings, why=attempt.why, log=log))


def _make_attempt(job: LocalJob, plan: Plan, guardian: Guardian) -> Attempt:
    limit = plan.training.config.collective_timeout
    return Attempt(
        guardian,
        hang_timeout=limit + _SECONDS_BEYOND_WATCHDOG,
        silence_timeout=job.silence_timeout,
        leave_timeout=job.leave_timeout,
    )


def slots_left(
    job: LocalJob, plan: Plan, slots: list[int], failed: int | None
) -> list[int]:
    """Whose cores or GPUs the next attempt's workers have.

    Args:
        job: The settings.
        plan: What is started.
        slots: Those of this attempt, by the worker's index.
        failed: The worker that failed first; None: none is to blame.
    """
    left = [slot for index, slot in enumerate(slots) if index != failed]
    while len(left) >= (job.min_workers or job.num_workers):
        with contextlib.suppress(ConfigError):
            plan.check(len(left), restarts=True)
            return left
        left.pop()
    return slots


def _explain_network(first: Ending) -> None:
    """Says why there was no network, if that may be why a worker failed."""
    if _NETWORK_ERROR.search("\n".join(post_mortem.excerpt(first.lines))):
        _say(
            "the workers had a network of nothing but loopback; if they need "
            "more, pass --isolate_network=never"
        )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody looks any more
        print(text, file=sys.stderr, flush=True)


def _mend_streams() -> None:
    """Makes something of closed ones, and prints whatever workers print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    run()
