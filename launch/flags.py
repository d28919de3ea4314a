"""absl flags made from the fields of a config, and back."""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from absl import flags

from launch.config import ConfigError, TrainConfig

_Config = TypeVar("_Config")


def define_flags(
    kind: type = TrainConfig, registry: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines one flag for each field of a config, and --help.

    Args:
        kind: A dataclass whose fields have "help" and "choices" in their
            metadata. A tuple is a list with commas, or with "is_repeated" a
            flag that may come several times.
        registry: Where the flags are defined.
    """
    flags.DEFINE_boolean(
        "help",
        False,
        "Shows all flags.",
        short_name="h",
        flag_values=registry,
    )
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        _define(field, hints[field.name], registry)


def read_command_line(
    argv: Sequence[str],
    kind: type[_Config],
    usage: str,
    registry: flags.FlagValues = flags.FLAGS,
) -> _Config | None:
    """Defines the flags of a config and reads them.

    Args:
        argv: The program's name and arguments.
        kind: As in `define_flags`.
        usage: What --help begins with.
        registry: Where the flags are defined.

    Returns:
        None if help was asked for and is printed.

    Raises:
        ConfigError: A setting is wrong; the message names the flag.
        flags.Error: A flag is unknown or its value malformed.
    """
    define_flags(kind, registry)
    _, *positional = registry(list(argv))
    if registry["help"].value:
        print(help_text(usage, kind))
        return None
    if positional:
        raise ConfigError(
            f"flags start with --. Received {' '.join(positional)}."
        )
    return read_flags(kind, registry)


def config_from_flags() -> TrainConfig:
    """The settings of training on the command line.

    Raises:
        ConfigError: A setting is wrong; the message names the flag.
    """
    return read_flags(TrainConfig, flags.FLAGS)


def read_flags(kind: type[_Config], registry: flags.FlagValues) -> _Config:
    """A config from the flags that `define_flags` made of it.

    Raises:
        ConfigError: A setting is wrong; the message names the flag.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, kind)):
        value = registry[field.name].value
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def help_text(usage: str, kind: type = TrainConfig) -> str:
    """The usage, and each flag with its choices and default."""
    lines = [usage, "", "Flags (--flagfile=FILE reads them from a file):"]
    for field in dataclasses.fields(kind):
        choices = field.metadata["choices"]
        accepted = f" One of: {', '.join(choices)}." if choices else ""
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(default)
        shown = "" if default in (None, "") else f" [{default}]"
        text = f"{field.metadata['help']}{accepted}{shown}"
        lines.append(f"  --{field.name}")
        lines += textwrap.wrap(
            text, 78, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def _define(
    field: dataclasses.Field[Any], hint: Any, registry: flags.FlagValues
) -> None:
    text, choices = field.metadata["help"], field.metadata["choices"]
    name, default = field.name, cast(Any, field.default)
    kind = _plain_type(hint)
    if choices:
        flags.DEFINE_enum(
            name, default, list(choices), text, flag_values=registry
        )
        return
    if field.metadata.get("is_repeated"):
        define: Any = flags.DEFINE_multi_string
    else:
        define = _DEFINITIONS.get(kind, flags.DEFINE_string)
    if kind is tuple and default is not None:
        default = list(default)
    define(name, default, text, flag_values=registry)


_DEFINITIONS: dict[type, Any] = {
    tuple: flags.DEFINE_list,
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
}


def _plain_type(hint: Any) -> type:
    """`int` for `int | None`, `tuple` for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    return typing.get_origin(hint) or hint
