r"""Writes, checks and submits a Slurm job that trains on several nodes.

  python -m launch.slurm [flags] -- [flags of launch.train]

  python -m launch.slurm --nodes=2 --gpus_per_task=8 --cpus_per_task=64 \
      --time=12:00:00 --partition=gpu --venv=~/venv -- \
      --precision=mixed_bfloat16 --global_batch_size=1024 --run_dir=runs/big
  python -m launch.slurm --nodes=2 --dry_run -- --epochs=90   shows the script

Each task is a worker. Shortly before the time is over, all of them save and
stop, and the job queues again and goes on where it was; so it does when a node
is lost or a process dies. Wrong settings and exceptions end it. --run_dir must
be on storage that all nodes share.

  scancel --signal=USR1 JOB    saves, queues again, goes on
  scancel JOB                  ends it
"""

import dataclasses
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from launch import job as job_lib
from launch.config import ConfigError, TrainConfig, check_positive, flag

# Of sbatch, with the flag here that does it.
_OWN_OPTIONS = {
    "account": "account",
    "cpus-per-task": "cpus_per_task",
    "gpus": "gpus_per_task",
    "gpus-per-node": "gpus_per_task",
    "gpus-per-task": "gpus_per_task",
    "job-name": "job_name",
    "mem": "mem",
    "nodes": "nodes",
    "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "output": "output",
    "partition": "partition",
    "requeue": "max_restarts",
    "no-requeue": "max_restarts",
    "signal": "signal_seconds",
    "time": "time",
}
# What would make the script do something else than it says.
_REFUSED_OPTIONS = ("array", "wrap", "open-mode", "parsable", "test-only")

# Slurm sends its signal up to a minute early.
_MIN_SIGNAL_SECONDS, _MAX_SIGNAL_SECONDS = 60, 65_535

# What an end is told as, so that it outranks a restart: see the script.
_FIRST_END, _MAX_END = 192, 63


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """Every setting of `python -m launch.slurm`; one flag each."""

    nodes: int = flag(1, "Nodes of the job.")
    tasks_per_node: int = flag(1, "Workers on each node.")
    gpus_per_task: int = flag(
        0, "GPUs of each worker, which sees no other; 0: the CPU."
    )
    cpus_per_task: int | None = flag(None, "CPU cores of each worker.")
    mem: str | None = flag(None, "Memory of each node, say 64G.")
    time: str | None = flag(
        None,
        "Time limit as Slurm takes it: minutes, H:MM:SS, D-HH and so on. "
        "Default: the partition's.",
    )
    partition: str | None = flag(None, "Where the job queues.")
    account: str | None = flag(None, "Who pays.")
    job_name: str | None = flag(
        None, "Name of the job. Default: that of --run_dir's folder."
    )
    output: str = flag(
        "slurm-%j.out", "What all workers print goes there; %j is the job."
    )
    sbatch: tuple[str, ...] = flag(
        (),
        "A further option of sbatch, as --sbatch=--qos=high; once for each.",
        is_repeated=True,
    )
    signal_seconds: int = flag(
        300,
        "Seconds before the time limit at which training saves and stops: "
        "more than a checkpoint takes.",
    )
    max_restarts: int = flag(
        job_lib.DEFAULT_RESTARTS,
        "How often the job queues again, at a time limit or after a failure "
        "of a machine.",
    )
    modules: tuple[str, ...] = flag(
        (), "Environment modules to load, as cuda/12.5,nccl."
    )
    venv: str | None = flag(None, "A virtual environment to activate.")
    python: str | None = flag(
        None,
        "The Python to run. Default: the one that runs this, or with "
        "--modules, --venv or --container_image: python.",
    )
    container_image: str | None = flag(
        None, "An image to run in, as Pyxis takes it (srun --container-image)."
    )
    container_mounts: tuple[str, ...] = flag(
        (), "What the container sees of the host, as /data:/data,/runs:/runs."
    )
    env: tuple[str, ...] = flag(
        (),
        "A variable for all workers, as --env=NCCL_SOCKET_IFNAME=ib0; once "
        "for each.",
        is_repeated=True,
    )
    dry_run: bool = flag(False, "Prints the script instead of submitting it.")

    def __post_init__(self) -> None:
        check_positive(
            self, "nodes", "tasks_per_node", "cpus_per_task", "signal_seconds"
        )
        for name in ("gpus_per_task", "max_restarts"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name} must not be negative. Received "
                    f"{getattr(self, name)}."
                )
        job_lib.environment(self.env)
        self._check_lines()
        self._check_time()
        self._check_sbatch()
        if self.container_mounts and not self.container_image:
            raise ConfigError(
                "--container_mounts contradicts no --container_image: pass it."
            )
        if self.container_image and self.venv:
            raise ConfigError(
                "--venv contradicts --container_image, which brings its own "
                "Python: drop it, or pass --python."
            )

    # ------------------------------------------------------------- resolved

    @property
    def num_tasks(self) -> int:
        """Workers of the job."""
        return self.nodes * self.tasks_per_node

    @property
    def num_gpus(self) -> int | None:
        """GPUs of a worker; None if only an option of sbatch tells."""
        has_own = any(option.startswith("--gres") for option in self.sbatch)
        return None if has_own else self.gpus_per_task

    @property
    def interpreter(self) -> str:
        """The Python that trains."""
        if self.python:
            return self.python
        brings_own = self.modules or self.venv or self.container_image
        return "python" if brings_own else sys.executable

    # --------------------------------------------------------------- checks

    def _check_lines(self) -> None:
        """What becomes a line for sbatch, which ends it at a line's end."""
        for name in ("job_name", "partition", "account", "mem", "output"):
            job_lib.check_printable(f"--{name}", getattr(self, name) or "")
        for option in self.sbatch:
            job_lib.check_printable("--sbatch", option)

    def _check_time(self) -> None:
        seconds = self.signal_seconds
        if not _MIN_SIGNAL_SECONDS <= seconds <= _MAX_SIGNAL_SECONDS:
            raise ConfigError(
                f"--signal_seconds must be in [{_MIN_SIGNAL_SECONDS}, "
                f"{_MAX_SIGNAL_SECONDS}]. Received {seconds}."
            )
        limit = None if self.time is None else seconds_of(self.time)
        if limit is not None and limit <= seconds:
            raise ConfigError(
                f"--time must be longer than --signal_seconds ({seconds} s), "
                "or training stops as soon as it starts. Received "
                f"{self.time}, which is {limit} s."
            )

    def _check_sbatch(self) -> None:
        for option in self.sbatch:
            found = re.match(r"--([a-z][a-z-]*)(=|$)", option)
            if not found:
                raise ConfigError(
                    "--sbatch must be a long option of sbatch in one word, as "
                    f"--sbatch=--qos=high. Received {option!r}."
                )
            name = found[1]
            if name in _OWN_OPTIONS:
                raise ConfigError(
                    f"--sbatch={option} contradicts what the script says: "
                    f"pass --{_OWN_OPTIONS[name]}."
                )
            if name in _REFUSED_OPTIONS:
                raise ConfigError(
                    f"--sbatch={option} is not for a job that starts itself "
                    "again: drop it."
                )


def seconds_of(text: str) -> int:
    """A time limit in seconds, from any of the forms that Slurm takes.

    Raises:
        ConfigError: It has none of them.

    Example:
    >>> [seconds_of(t) for t in ("90", "1:30", "1:30:00", "2-12", "1-0:30")]
    [5400, 90, 5400, 216000, 88200]
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise ConfigError(
            "--time must be minutes, minutes:seconds, hours:minutes:seconds, "
            "days-hours, days-hours:minutes or days-hours:minutes:seconds. "
            f"Received {text!r}."
        )
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


# --------------------------------------------------------------- the program


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Prints or submits the script; returns the exit status."""
    try:
        read = job_lib.read_settings(argv, SlurmJob, __doc__)
        if read is None:
            return 0
        job, arguments = read
        training = job_lib.read_training(
            arguments, is_elsewhere=bool(job.container_image)
        )
        check(job, training)
        script = render(job, training)
        if job.dry_run:
            print(script, end="")
            return 0
        print(_submit(job, training, script))
        return 0
    except (flags.Error, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return job_lib.WRONG_SETTINGS


def check(job: SlurmJob, training: job_lib.Training) -> None:
    """Whether job and training suit each other.

    Raises:
        ConfigError: They do not; the message names the flag.
    """
    config = training.config
    job_lib.check_training(
        config,
        num_workers=job.num_tasks,
        num_gpus=job.num_gpus,
        restarts=job.max_restarts > 0,
    )
    if job.time and config.max_minutes:
        limit = (seconds_of(job.time) - job.signal_seconds) / 60
        if config.max_minutes > limit:
            raise ConfigError(
                f"--max_minutes={config.max_minutes:g} would never be "
                f"reached: --time={job.time} --signal_seconds="
                f"{job.signal_seconds} stops training after {limit:g} "
                "minutes. Drop it."
            )
    if job.container_image:
        _check_mounts(job, config)


def render(job: SlurmJob, training: job_lib.Training) -> str:
    """The script for sbatch."""
    shell = "/bin/bash -l" if job.modules else "/bin/bash"
    folder = pathlib.Path(training.config.directory).name
    name = job.job_name or re.sub(r"[^\w.-]+", "-", folder)
    lines = [f"#!{shell}", *_directives(job, name), "", *_preparation(job), ""]
    program = f"{shlex.quote(job.interpreter)} -m launch.train"
    lines.append(
        _SRUN.format(
            srun=_CONTINUED.join(_srun(job)),
            train=_CONTINUED.join(
                [program, *map(shlex.quote, training.arguments)]
            ),
        )
    )
    lines.append(_CONCLUSION.format(max_restarts=job.max_restarts))
    return "\n".join(lines)


# -------------------------------------------------------------------- private

_CONTINUED = " \\\n    "
_RESTART = " | ".join(map(str, job_lib.RESTART))

# The shell around each worker outlives the signals that tell the worker to
# save, and waits for it.
_SRUN = f"""\
# Each worker's status passes through a shell, since srun tells the highest one
# of all, and ends the others (143) as soon as one has failed. So what is not
# worth a new start comes out as {_FIRST_END} and more; and of workers that were
# asked to stop, worker 0, which may still be saving, has the last word.
{{srun}} \\
    sh -c '
        trap : TERM USR1 INT
        "$@"
        status=$?
        case $SLURM_PROCID-$status in
            [1-9]*-{" | [1-9]*-".join(map(str, job_lib.STOPPED))}) exit 0 ;;
        esac
        case $status in
            0 | {_RESTART}) exit $status ;;
        esac
        echo "worker $SLURM_PROCID ended with exit status $status" >&2
        [ $status -le {_MAX_END} ] || status={_MAX_END}
        exit $((status + {_FIRST_END}))
    ' worker \\
    {{train}}"""

_CONCLUSION = f"""status=$?

if [ $status -ge {_FIRST_END} ]; then
    exit $((status - {_FIRST_END}))
fi
restarts=${{{{SLURM_RESTART_COUNT:-0}}}}
case $status in
    {_RESTART})
        if [ "$restarts" -lt {{max_restarts}} ]; then
            echo "exit status $status: queues again" \\
                "($((restarts + 1)) of {{max_restarts}})"
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "exit status $status after $restarts restarts: that is it"
        fi
        ;;
esac
exit $status
"""


def _directives(job: SlurmJob, name: str) -> Iterator[str]:
    options = {
        "job-name": name,
        "partition": job.partition,
        "account": job.account,
        "nodes": job.nodes,
        "ntasks": job.num_tasks,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": job.cpus_per_task,
        "gpus-per-task": job.gpus_per_task or None,
        "mem": job.mem,
        "time": job.time,
        "signal": f"USR1@{job.signal_seconds}",
        "output": job.output,
        "open-mode": "append",
    }
    for option, value in options.items():
        if value is not None:
            yield f"#SBATCH --{option}={_quoted(str(value))}"
    yield f"#SBATCH --{'requeue' if job.max_restarts else 'no-requeue'}"
    for option in job.sbatch:
        name, equals, value = option.partition("=")
        yield f"#SBATCH {name}{equals}{_quoted(value) if equals else ''}"


def _quoted(value: str) -> str:
    r"""As sbatch reads its lines: # begins a comment, \\ escapes in quotes."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _preparation(job: SlurmJob) -> Iterator[str]:
    yield "unset TF_CONFIG  # of the machine that submitted; Slurm tells"
    yield "export PYTHONUNBUFFERED=1"
    for name, value in job_lib.environment(job.env).items():
        yield f"export {name}={shlex.quote(value)}"
    if job.modules:
        names = " ".join(map(shlex.quote, job.modules))
        yield f"module load {names} || exit"
    if job.venv:
        activate = f"{os.path.expanduser(job.venv)}/bin/activate"
        yield f"source {shlex.quote(activate)} || exit"


def _srun(job: SlurmJob) -> Iterator[str]:
    yield "srun --kill-on-bad-exit=1 --wait=0 --distribution=block"
    if job.cpus_per_task:  # srun does not take it from sbatch
        yield f"--cpus-per-task={job.cpus_per_task}"
    if job.container_image:
        yield f"--container-image={shlex.quote(job.container_image)}"
    if job.container_mounts:
        mounts = ",".join(job.container_mounts)
        yield f"--container-mounts={shlex.quote(mounts)}"


def _check_mounts(job: SlurmJob, config: TrainConfig) -> None:
    """A container's own files are gone with it."""
    parts = [mount.split(":") for mount in job.container_mounts]
    folders = [pathlib.PurePosixPath(part[:2][-1]) for part in parts]
    path = pathlib.PurePosixPath(config.directory)
    if not any(path.is_relative_to(folder) for folder in folders):
        raise ConfigError(
            "--run_dir must be in a folder of --container_mounts, or it is "
            "gone with the container. Received "
            f"{config.directory}; pass --container_mounts=/runs:/runs and, "
            "after --, --run_dir=/runs/NAME."
        )


def _submit(job: SlurmJob, training: job_lib.Training, script: str) -> str:
    if job.venv:
        activate = pathlib.Path(job.venv).expanduser() / "bin" / "activate"
        if not activate.is_file():
            raise ConfigError(f"--venv: there is no {activate}.")
    answer = job_lib.submit(
        ["sbatch", "--parsable"],
        script,
        mend="submit from a login node of the cluster",
    )
    number = answer.partition(";")[0]
    where = training.config.directory
    if not job.container_image:
        where = os.path.abspath(where)
    return "\n".join(
        [
            f"submitted job {number}: {_shape(job)}",
            f"results go to {where}, which all nodes must share",
            f"output goes to {job.output.replace('%j', number)}",
        ]
    )


def _shape(job: SlurmJob) -> str:
    parts: Sequence[tuple[int, str]] = (
        (job.nodes, "node"),
        (job.tasks_per_node, "task"),
        (job.gpus_per_task, "GPU"),
    )
    return " x ".join(f"{n} {unit}{'s' * (n != 1)}" for n, unit in parts if n)


if __name__ == "__main__":
    run()
