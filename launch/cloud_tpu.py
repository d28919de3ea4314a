r"""Creates a Cloud TPU, waits for it, trains on it, deletes it.

  python -m launch.cloud_tpu COMMAND [flags] [-- flags of launch.train]

  status   what the API says of the TPU; exit status 0 if it can be used
  wait     until it can; ends at once if it was preempted or terminated
  create   a TPU VM, or with --queued a request that waits for capacity
  run      copies this code and your modules, installs, trains
  delete   the TPU, and with --queued the request

status and wait ask the API. The others are commands of gcloud, Google's
command line program: --dry_run prints them, one a line, to be read or pasted.

  python -m launch.cloud_tpu create --tpu=first --tpu_zone=us-west4-a --spot
  python -m launch.cloud_tpu run --tpu=first --tpu_zone=us-west4-a -- \
      --global_batch_size=1024 --checkpoint_dir=gs://my-bucket/first

On a TPU with one host training runs there with --tpu=local. Of a larger one
the first host drives all: there it runs with --tpu=NAME, and the code is on
every host. Exit status: 0 done; 1 the TPU cannot be used; 2 wrong settings;
what gcloud said, if it failed.
"""

import dataclasses
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from launch import job as job_lib
from launch.config import ConfigError, TrainConfig, check_positive, flag
from launch.quiet import quiet_start

# The folder on the hosts, in the home of who logs in.
_FOLDER = "dist_amp_run"

# Images without TensorFlow by kind of TPU.
_IMAGES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# More cores (v2 to v5p) or chips (v5litepod, v6e) are on several hosts.
_MOST_ON_ONE_HOST = 8

# tensorflow-tpu replaces tensorflow, which requirements.txt asks for.
_INSTALL = (
    "sudo apt-get update && sudo apt-get install --yes python3.11-venv && "
    "python3.11 -m venv .venv && "
    ".venv/bin/pip install tensorflow-tpu==2.20.0 'libtpu<=0.0.30' && "
    "grep -v '^tensorflow~' requirements.txt | "
    ".venv/bin/pip install -r /dev/stdin"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CloudTpuJob:
    """Every setting of `python -m launch.cloud_tpu`; one flag each."""

    tpu: str = flag("", "The TPU's name; always needed.")
    tpu_zone: str | None = flag(
        None,
        "Where it is, as us-west4-a. Default: as gcloud is configured; for "
        "status and wait this machine's, if it is one of Google Cloud.",
    )
    tpu_project: str | None = flag(None, "The project's id. Default: likewise.")
    accelerator_type: str = flag(
        "v5litepod-4", "Kind and size, for create and run."
    )
    runtime_version: str | None = flag(
        None,
        "The image that create puts on the hosts. Default: one without "
        "TensorFlow that suits --accelerator_type.",
    )
    spot: bool = flag(
        False, "Creates it cheaper; Google may take it back at any time."
    )
    queued: bool = flag(
        False,
        "Creates or deletes a request that waits for capacity, of the TPU's "
        "name; wait is patient while there is no TPU yet.",
    )
    install: str | None = flag(
        None,
        "The command that run gives to a shell on every host, where this code "
        "is. It leaves a virtual environment in .venv. Default: "
        "tensorflow-tpu, and requirements.txt without tensorflow.",
    )
    timeout: float = flag(1200.0, "Seconds for wait.")
    interval: float = flag(10.0, "Seconds between two questions of wait.")
    dry_run: bool = flag(False, "Prints the commands instead of running them.")

    def __post_init__(self) -> None:
        check_positive(self, "timeout", "interval")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.tpu):
            raise ConfigError(
                "--tpu must be a TPU's name: small letters, digits and -. "
                f"Received {self.tpu!r}."
            )
        if not re.fullmatch(r"[a-z]\w*-[1-9]\d*", self.accelerator_type):
            raise ConfigError(
                "--accelerator_type must be a kind and a number, as "
                f"v5litepod-4. Received {self.accelerator_type}."
            )

    @property
    def has_several_hosts(self) -> bool:
        """Whether the TPU is more than one host holds."""
        number = self.accelerator_type.rpartition("-")[2]
        return int(number) > _MOST_ON_ONE_HOST


# What each command heeds besides --tpu, --tpu_zone and --tpu_project.
_HEEDED = {
    "status": (),
    "wait": ("queued", "timeout", "interval"),
    "create": (
        "accelerator_type",
        "runtime_version",
        "spot",
        "queued",
        "dry_run",
    ),
    "run": ("accelerator_type", "install", "dry_run"),
    "delete": ("queued", "dry_run"),
}


# --------------------------------------------------------------- the program


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Does what the first argument says; returns the exit status."""
    program, *arguments = argv
    has_command = bool(arguments) and not arguments[0].startswith("-")
    command = arguments.pop(0) if has_command else ""
    try:
        if command not in _HEEDED and not {"--help", "-h"} & set(arguments):
            *names, last = _HEEDED
            raise ConfigError(
                f"the first argument must be {', '.join(names)} or {last}. "
                f"Received {command!r}."
            )
        read = job_lib.read_settings(
            [program, *arguments], CloudTpuJob, __doc__
        )
        if read is None:
            return 0
        job, rest = read
        check(command, job, rest)
        if command in ("status", "wait"):
            return _ask(command, job)
        commands = render(command, job, rest)
        if job.dry_run:
            print("\n".join(map(shlex.join, commands)))
            return 0
        return _call(commands)
    except (flags.Error, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return job_lib.WRONG_SETTINGS
    except KeyboardInterrupt:
        return 130


def check(command: str, job: CloudTpuJob, arguments: Sequence[str]) -> None:
    """Whether the command heeds every setting.

    Raises:
        ConfigError: It does not.
    """
    if arguments and command != "run":
        raise ConfigError(
            f"flags after -- are for run. Received {command} with "
            f"{' '.join(arguments)}."
        )
    heeded = ("tpu", "tpu_zone", "tpu_project", *_HEEDED[command])
    for field in dataclasses.fields(job):
        is_given = getattr(job, field.name) != field.default
        if is_given and field.name not in heeded:
            raise ConfigError(
                f"--{field.name} would be ignored by {command}: drop it."
            )


def render(
    command: str, job: CloudTpuJob, arguments: Sequence[str]
) -> list[list[str]]:
    """The commands of gcloud, in order.

    Args:
        command: "create", "run" or "delete".
        job: The settings.
        arguments: Flags of launch.train, for "run".

    Raises:
        ConfigError: Settings contradict each other; the message names them.
    """
    if command == "create":
        return [_create(job)]
    if command == "delete":
        return [_delete(job)]
    return list(_run(job, arguments))


# -------------------------------------------------------------------- private


def _ask(command: str, job: CloudTpuJob) -> int:
    """What the API says; 0 if training may start."""
    with quiet_start():
        from dist_amp import cloud_tpu  # and TensorFlow, which is not needed

    try:
        if command == "wait":
            cloud_tpu.wait_until_usable(
                job.tpu,
                zone=job.tpu_zone,
                project=job.tpu_project,
                timeout=job.timeout,
                interval=job.interval,
                is_queued=job.queued,
                tell=lambda line: print(line, flush=True),
            )
            return 0
        node = cloud_tpu.look_up(
            job.tpu, zone=job.tpu_zone, project=job.tpu_project
        )
        print(node.describe(), flush=True)
        cloud_tpu.check_usable(node)
        return 0
    except cloud_tpu.CloudTpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _call(commands: Sequence[Sequence[str]]) -> int:
    """Runs the commands, each of which is shown, until one fails."""
    if shutil.which("gcloud") is None:
        raise ConfigError(
            "there is no gcloud on this machine: install Google Cloud's "
            "command line program, or pass --dry_run to see the commands."
        )
    for command in commands:
        print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
        status = subprocess.run(command).returncode
        if status != 0:
            print(f"error: exit status {status}", file=sys.stderr)
            return 128 - status if status < 0 else status
    return 0


def _create(job: CloudTpuJob) -> list[str]:
    kind = job.accelerator_type.rpartition("-")[0]
    image = job.runtime_version or _IMAGES.get(kind)
    if job.runtime_version is None and job.has_several_hosts:
        raise ConfigError(
            f"--accelerator_type={job.accelerator_type} has several hosts, "
            "which need an image that starts TensorFlow's TPU server: pass "
            "--runtime_version, as tpu-vm-tf-2.17.1-pod-pjrt."
        )
    if image is None:
        raise ConfigError(
            "--runtime_version is needed for --accelerator_type="
            f"{job.accelerator_type}: no default is known."
        )
    size = f"--accelerator-type={job.accelerator_type}"
    if job.queued:
        return [
            *_gcloud("queued-resources", "create", job, job.tpu),
            f"--node-id={job.tpu}",
            size,
            f"--runtime-version={image}",
            *(["--spot"] if job.spot else []),
        ]
    return [
        *_gcloud("tpu-vm", "create", job, job.tpu),
        size,
        f"--version={image}",
        *(["--spot"] if job.spot else []),
    ]


def _delete(job: CloudTpuJob) -> list[str]:
    if job.queued:  # --force: with its TPU
        command = _gcloud("queued-resources", "delete", job, job.tpu)
        return [*command, "--force", "--quiet"]
    return [*_gcloud("tpu-vm", "delete", job, job.tpu), "--quiet"]


def _run(job: CloudTpuJob, arguments: Sequence[str]) -> Iterator[list[str]]:
    if job.has_several_hosts and job.install is None:
        raise ConfigError(
            f"--accelerator_type={job.accelerator_type} has several hosts, "
            "which need the TensorFlow of their image's TPU server: pass "
            "--install."
        )
    train = _training(job, arguments)
    sources = [str(path) for path in _sources(job, train.config)]
    yield _on_hosts(job, f"mkdir -p {_FOLDER}")
    yield [
        *_gcloud("tpu-vm", "scp", job, *sources, f"{job.tpu}:{_FOLDER}"),
        "--recurse",
        "--worker=all",
    ]
    yield _on_hosts(job, f"cd {_FOLDER} && {job.install or _INSTALL}")
    program = [".venv/bin/python", "-m", "launch.train", *train.arguments]
    # Of several hosts the servers hold the chips, which the program must not.
    variable = "TPU_LOAD_LIBRARY=0 " if job.has_several_hosts else ""
    yield [
        *_gcloud("tpu-vm", "ssh", job, job.tpu),
        "--worker=0",
        "--ssh-flag=-t",  # Ctrl-C reaches training, which saves
        f"--command=cd {_FOLDER} && {variable}{shlex.join(program)}",
    ]


def _on_hosts(job: CloudTpuJob, command: str) -> list[str]:
    ssh = _gcloud("tpu-vm", "ssh", job, job.tpu)
    return [*ssh, "--worker=all", f"--command={command}"]


def _gcloud(group: str, verb: str, job: CloudTpuJob, *names: str) -> list[str]:
    command = ["gcloud", "compute", "tpus", group, verb, *names]
    if job.tpu_zone:
        command.append(f"--zone={job.tpu_zone}")
    if job.tpu_project:
        command.append(f"--project={job.tpu_project}")
    return command


def _training(job: CloudTpuJob, arguments: Sequence[str]) -> job_lib.Training:
    """The flags of training there, checked as it would itself."""
    training = job_lib.read_training(arguments)
    job_lib.check_training(
        training.config, num_workers=1, num_gpus=None, restarts=False
    )
    where = ["--tpu=local"]
    if job.has_several_hosts:
        place = {"tpu_zone": job.tpu_zone, "tpu_project": job.tpu_project}
        where = [f"--tpu={job.tpu}"]
        where += [f"--{name}={value}" for name, value in place.items() if value]
    return job_lib.read_training([*where, *training.arguments])


def _sources(job: CloudTpuJob, config: TrainConfig) -> Iterator[pathlib.Path]:
    """This code, and modules of the user's in the current folder."""
    here = pathlib.Path.cwd()
    root = pathlib.Path(__file__).resolve().parent.parent
    requirements = root / "requirements.txt"
    if not requirements.exists() and job.install is None:
        raise ConfigError(
            f"there is no {requirements} to install from: call this from a "
            "checkout of the project, or pass --install."
        )
    paths = [root / "dist_amp", root / "launch"]
    if requirements.exists():
        paths.append(requirements)
    for name in ("model", "dataset", "parse", "loss"):
        module, colon, _ = (getattr(config, name) or "").partition(":")
        if colon:
            top = module.partition(".")[0]
            paths += [here / top, here / f"{top}.py"]
    for path in dict.fromkeys(paths):
        if path.exists():
            is_here = path.is_relative_to(here)
            yield path.relative_to(here) if is_here else path


if __name__ == "__main__":
    run()
