"""What programs that submit training to a cluster have in common.

Their own flags come first, those of training after `--`. Everything is checked
here, on the machine that submits: a mistake shows now, not in the queue.
Standard library and absl only.
"""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import TypeVar

from absl import flags

from launch.config import ConfigError, TrainConfig
from launch.flags import define_flags, read_command_line, read_flags

# Another worker was lost; nothing went on.
PEER, HANG = 129, 142
# Statuses that ask to be started again; every other one is an end.
RESTART = (
    PEER,
    134,  # SIGABRT: TensorFlow gave up, often since another worker was lost
    135,  # SIGBUS: storage went away
    137,  # SIGKILL: out of memory, or nobody waited for the end
    138,  # SIGUSR1 or --max_minutes: the time is over, everything is saved
    139,  # SIGSEGV
    HANG,
    143,  # SIGTERM: the machine is wanted back, everything is saved
)
# Of these, what workers say that were asked to stop: they have saved together.
STOPPED = (138, 143)
DEFAULT_RESTARTS = 20
WRONG_SETTINGS = 2

# What names the machines to train on, which a scheduler does.
_NOT_FOR_JOBS = ("workers", "task_index", "tpu", "tpu_zone", "tpu_project")

_Settings = TypeVar("_Settings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What a job runs: the flags of launch.train, and what they say.

    Attributes:
        arguments: As typed, those of a --flagfile in its place.
        config: The settings they make.
    """

    arguments: tuple[str, ...]
    config: TrainConfig


class _ElsewhereConfig(TrainConfig):
    """Settings of a run in an image, whose modules are not here."""

    def _check_modules(self) -> None:
        pass


def read_settings(
    argv: Sequence[str], kind: type[_Settings], usage: str
) -> tuple[_Settings, tuple[str, ...]] | None:
    """The program's own settings, and the arguments after `--`.

    Args:
        argv: The program's name and arguments.
        kind: The dataclass of its settings.
        usage: What --help begins with.

    Returns:
        None if help was asked for and is printed.

    Raises:
        ConfigError: A setting is wrong; the message names the flag.
        flags.Error: A flag is unknown or its value malformed.
    """
    own, rest = _split(list(argv))
    try:
        settings = read_command_line(own, kind, usage, flags.FlagValues())
    except flags.UnrecognizedFlagError as error:
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        if error.flagname in names:
            raise ConfigError(
                f"--{error.flagname} is a flag of launch.train: put it after "
                "-- (two dashes on their own)."
            ) from error
        raise
    return None if settings is None else (settings, tuple(rest))


def read_training(
    arguments: Sequence[str], *, is_elsewhere: bool = False
) -> Training:
    """Checks flags of launch.train as it would itself.

    Args:
        arguments: The flags, without the program's name.
        is_elsewhere: Whether the user's modules are not on this machine, but
            in an image.

    Raises:
        ConfigError: A setting is wrong; the message names the flag.
        flags.Error: A flag is unknown or its value malformed.
    """
    registry = flags.FlagValues()
    define_flags(TrainConfig, registry)
    expanded = registry.read_flags_from_files(list(arguments), force_gnu=False)
    _, *positional = registry(["launch.train", *expanded])
    if positional or registry["help"].value:
        raise ConfigError(
            "after -- come flags of launch.train and nothing else; its own "
            "--help lists them. Received "
            f"{' '.join(positional) or '--help'}."
        )
    kind = _ElsewhereConfig if is_elsewhere else TrainConfig
    return Training(
        arguments=tuple(expanded), config=read_flags(kind, registry)
    )


def check_training(
    config: TrainConfig,
    *,
    num_workers: int,
    num_gpus: int | None,
    restarts: bool,
) -> None:
    """Whether the settings suit a job of so many workers.

    Args:
        config: The settings of training.
        num_workers: Processes of the job.
        num_gpus: GPUs of each process; None if nobody knows.
        restarts: Whether the job may start training again.

    Raises:
        ConfigError: They do not; the message names the flag.
    """
    for name in _NOT_FOR_JOBS:
        if getattr(config, name) not in (None, ()):
            raise ConfigError(
                f"--{name} is not for a job's training: the job itself tells "
                "its processes who they are. Drop the flag."
            )
    is_alone = num_workers == 1
    if config.strategy in ("one_device", "mirrored", "tpu") and not is_alone:
        raise ConfigError(
            f"--strategy={config.strategy} contradicts {num_workers} "
            "processes, each of which would train alone: drop it."
        )
    if config.strategy == "multi_worker" and is_alone:
        raise ConfigError(
            "--strategy=multi_worker contradicts a job of one process: drop it."
        )
    if config.resume == "never" and restarts:
        raise ConfigError(
            "--resume=never contradicts restarts, each of which would begin "
            "anew: drop it and pass a new --run_dir, or --max_restarts=0."
        )
    _check_devices(config, num_workers, num_gpus)


def environment(pairs: Sequence[str]) -> dict[str, str]:
    """The variables of --env.

    Raises:
        ConfigError: One is not NAME=VALUE, or says who a worker is.
    """
    values = named_values("env", pairs, r"[A-Za-z_][A-Za-z0-9_]*")
    if "TF_CONFIG" in values:
        raise ConfigError(
            "--env=TF_CONFIG contradicts the job, which tells its workers "
            "itself who they are: drop it."
        )
    return values


def named_values(
    flag_name: str, pairs: Sequence[str], pattern: str
) -> dict[str, str]:
    """A dictionary of "NAME=VALUE", given as a flag that may be repeated.

    Raises:
        ConfigError: One is malformed, or a name comes twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(pattern, name):
            raise ConfigError(
                f"--{flag_name} must be NAME=VALUE. Received {pair!r}."
            )
        if name in values:
            raise ConfigError(f"--{flag_name} names {name} more than once.")
        values[name] = value
    return values


def check_printable(name: str, text: str) -> None:
    """Whether a text can stand in one line of a file in UTF-8.

    Args:
        name: What an error calls it.
        text: The text.

    Raises:
        ConfigError: It holds a control character, or bytes that are no text.
    """
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise ConfigError(
            f"{name} must be one line of text, without control characters. "
            f"Received {text!r}."
        )


def submit(command: Sequence[str], text: str, *, mend: str) -> str:
    """Gives a job to the program that takes it.

    Args:
        command: The program and its arguments.
        text: What it reads from its standard input.
        mend: What to do if there is no such program here.

    Returns:
        What it printed.

    Raises:
        ConfigError: There is no such program, or it refused the job.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"there is no {command[0]} on this machine: {mend}, or pass "
            "--dry_run to see what would be submitted."
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise ConfigError(f"{command[0]} refused the job: {said}")
    return done.stdout.strip()


# -------------------------------------------------------------------- private


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _check_devices(
    config: TrainConfig, num_workers: int, num_gpus: int | None
) -> None:
    gpus = [d for d in config.devices if "GPU" in d.upper()]
    if num_gpus is not None and len(gpus) > num_gpus:
        raise ConfigError(
            f"--devices names {len(gpus)} GPUs, and each process of the job "
            f"has {num_gpus}: ask for more, or drop --devices."
        )
    num_devices = len(config.devices) or config.num_logical_cpus or num_gpus
    if config.strategy == "one_device" or num_devices == 0:
        num_devices = 1
    if num_devices is None:
        return
    parts = config.gradient_accumulation_steps
    unit = num_workers * num_devices * parts
    if config.global_batch_size % unit:
        lower = config.global_batch_size // unit * unit
        fitting = [size for size in (lower, lower + unit) if size]
        raise ConfigError(
            "--global_batch_size must be a multiple of the job's replicas "
            f"({num_workers} processes x {num_devices} devices) times "
            f"--gradient_accumulation_steps ({parts}); pass "
            f"{' or '.join(map(str, fitting))}. Received "
            f"{config.global_batch_size}."
        )
