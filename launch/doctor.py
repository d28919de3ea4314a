"""Examines this machine and, with several workers, all of them together.

Alone it reports versions, devices, limits and storage. Started on every host
like launch.train (TF_CONFIG, srun, mpirun, or --workers and --task_index), it
also tries out what training needs: that all workers come and reach each other,
all-reduces with known sums, their speed, and storage that all share. That ends
within --startup_timeout and half a minute. Nothing is trained.

  python -m launch.doctor
  python -m launch.doctor --run_dir=/mnt/shared/run --json
  srun python -m launch.doctor --run_dir=/mnt/shared/run

Worker 0 prints a table, the others only what is wrong on them. --json prints
one object instead:

  status       ok, warning or error: the worst of all findings
  worker       index of this process; num_workers: how many there are
  findings     a list of section, name, value, status, mend (how to mend it)
  measured     latency_seconds; bandwidth, a list of num_bytes, seconds,
               algorithm_bandwidth and bus_bandwidth (bytes/s, as in NVIDIA's
               nccl-tests); round_trip_seconds of each worker to the farthest
               other one; clock_ahead_seconds of each worker, of worker 0's

Exit status: 0 all well, or warnings only; 1 something is an error; 2 wrong
flags.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from absl import flags

from launch import host
from launch.config import ConfigError, TrainConfig, flag
from launch.findings import (
    ERROR,
    WARNING,
    Finding,
    Report,
    describe_errors,
)
from launch.flags import read_command_line
from launch.quiet import quiet_start

_SECONDS_BESIDE_STARTUP = 30.0
_SECONDS_FOR_IMPORTS = 120.0


def _as_in_training(name: str, default: Any = dataclasses.MISSING) -> Any:
    """The field of this name of `TrainConfig`."""
    field = TrainConfig.__dataclass_fields__[name]
    if default is dataclasses.MISSING:
        default = field.default
    return dataclasses.field(default=default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The settings: those of training that say where it runs."""

    run_dir: str = flag("runs", "Where results would go.")
    checkpoint_dir: str | None = _as_in_training("checkpoint_dir")
    devices: tuple[str, ...] = _as_in_training("devices")
    num_logical_cpus: int = _as_in_training("num_logical_cpus")
    workers: tuple[str, ...] = _as_in_training("workers")
    task_index: int | None = _as_in_training("task_index")
    startup_timeout: float = _as_in_training("startup_timeout", 30.0)
    collective_timeout: float = _as_in_training("collective_timeout", 30.0)
    heartbeat_timeout: float = _as_in_training("heartbeat_timeout")
    json: bool = flag(False, "Prints JSON, not a table.")

    def __post_init__(self) -> None:
        if "://" in self.run_dir:
            raise ConfigError(
                "--run_dir must be a folder of this host; remote ones are for "
                f"--checkpoint_dir. Received {self.run_dir}."
            )
        shared = {field.name for field in dataclasses.fields(TrainConfig)}
        values = dataclasses.asdict(self)
        checked = {n: v for n, v in values.items() if n in shared}
        # A batch that any number of devices can share.
        replicas = len(self.devices) or self.num_logical_cpus or 1
        TrainConfig(**checked, global_batch_size=max(1, replicas))

    @property
    def shared_folder(self) -> tuple[str, str]:
        """The folder that all workers must see, after its flag."""
        if self.checkpoint_dir:
            return "checkpoint_dir", self.checkpoint_dir
        return "run_dir", self.run_dir


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Reads the flags, examines, prints; returns the exit status."""
    environment = dict(os.environ)  # before anything of ours changes it
    try:
        config = read_command_line(argv, DoctorConfig, __doc__)
        if config is None:
            return 0
        report = Report()
        report.worker = config.task_index or 0
        _log_to(report)
        _examine(report, config, environment)
    except (flags.Error, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _tell(report, config, sys.stderr)


def _examine(
    report: Report, config: DoctorConfig, environment: Mapping[str, str]
) -> None:
    """Fills the report."""
    with _ending_in_time(report, config, _SECONDS_FOR_IMPORTS), quiet_start():
        report.stage = "this host"
        report.add(host.examine(environment, config.run_dir))
        report.stage = "import of TensorFlow"
        try:
            from launch import cluster_diagnosis, diagnosis
        except Exception as error:
            report.add([_cannot_import(error)])
            return
        report.add(diagnosis.tensorflow())
        report.stage = "--checkpoint_dir"
        _folder_of_checkpoints(report, config)
        cluster, finding = cluster_diagnosis.find_cluster(
            config.workers, config.task_index
        )
    if finding.status == ERROR and config.workers:
        raise ConfigError(finding.value)
    report.add([finding])
    if finding.status == ERROR:
        return
    seconds = config.startup_timeout + _SECONDS_BESIDE_STARTUP
    with _ending_in_time(report, config, seconds), quiet_start():
        _try_out(report, config, cluster)


def _try_out(report: Report, config: DoctorConfig, cluster: Any) -> None:
    """What needs devices and the other workers."""
    from dist_amp import strategy as strategy_lib
    from dist_amp.cluster import Timeouts
    from launch import cluster_diagnosis, diagnosis

    devices = list(config.devices) or None
    if config.num_logical_cpus:
        cpus = strategy_lib.use_logical_cpus(config.num_logical_cpus)
        devices = devices or cpus
    if cluster is None:
        diagnosis.one_process(report, devices)
        return
    report.worker = cluster.task_index
    report.num_workers = cluster.num_workers
    cluster_diagnosis.try_workers(
        report,
        cluster,
        devices=devices,
        timeouts=Timeouts(
            startup=config.startup_timeout,
            collective=config.collective_timeout,
            heartbeat=config.heartbeat_timeout,
        ),
        folder=config.shared_folder,
    )


def _folder_of_checkpoints(report: Report, config: DoctorConfig) -> None:
    from launch import diagnosis

    path = config.checkpoint_dir
    if path and "://" in path:
        report.add([diagnosis.remote_folder(path)])
    elif path:
        report.add(host.folder(path, "checkpoint_dir"))


def _cannot_import(error: Exception) -> Finding:
    return Finding(
        "software",
        "import",
        f"{type(error).__name__}: {error}",
        ERROR,
        "TensorFlow or a library of it cannot be imported: install them anew "
        "(`pip install -r requirements.txt`) in a fresh environment.",
    )


class _Log(logging.Handler):
    """Warnings become findings; what is waited for goes to standard error."""

    def __init__(self, report: Report):
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one message of the library."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._report.add([Finding("cluster", "log", text, WARNING)])
        else:
            print(text, file=sys.stderr)


def _log_to(report: Report) -> None:
    logger = logging.getLogger("dist_amp")
    logger.addHandler(_Log(report))
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _tell(report: Report, config: DoctorConfig, stderr: TextIO) -> int:
    """Prints the report; returns the exit status."""
    if report.worker == 0:
        print(report.as_json() if config.json else report.as_table())
    elif report.own_errors:
        print(describe_errors(report.own_errors), file=stderr)
    sys.stdout.flush()
    return 1 if report.status == ERROR else 0


@contextlib.contextmanager
def _ending_in_time(
    report: Report, config: DoctorConfig, seconds: float
) -> Iterator[None]:
    """Ends the process if the block does not, wherever it hangs."""

    def end() -> None:
        report.add(
            [
                Finding(
                    "cluster",
                    report.stage,
                    f"did not end within {seconds:.0f} s",
                    ERROR,
                    "See the logs of the other workers, and the storage.",
                )
            ]
        )
        status = _tell(report, config, stderr)
        stderr.flush()
        os._exit(status)

    # Not through a filter that the block puts before standard error.
    with open(os.dup(2), "w") as stderr:
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


if __name__ == "__main__":
    run()
