"""absl flags made from the fields of a config, and back."""

import dataclasses
import textwrap
import types
import typing
from typing import Any, cast

from absl import flags

from launch.config import TrainConfig

Config = typing.TypeVar("Config")


def define_flags(config_class: Any = TrainConfig) -> None:
    """Defines one flag for each field of the config, and --help."""
    flags.DEFINE_boolean("help", False, "Shows all flags.", short_name="h")
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        _define(field, hints[field.name])


@typing.overload
def config_from_flags() -> TrainConfig: ...
@typing.overload
def config_from_flags(config_class: type[Config]) -> Config: ...
def config_from_flags(config_class: Any = TrainConfig) -> Any:
    """The settings on the command line.

    Raises:
        ConfigError: A setting is wrong; the message names the flag.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        value = flags.FLAGS[field.name].value
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return config_class(**values)


def help_text(usage: str, config_class: Any = TrainConfig) -> str:
    """The usage, and each flag with its choices and default."""
    lines = [usage, "", "Flags (--flagfile=FILE reads them from a file):"]
    for field in dataclasses.fields(config_class):
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


def _define(field: dataclasses.Field[Any], hint: Any) -> None:
    text, choices = field.metadata["help"], field.metadata["choices"]
    name, default = field.name, cast(Any, field.default)
    kind = _plain_type(hint)
    if choices:
        flags.DEFINE_enum(name, default, list(choices), text)
    elif kind is tuple:
        flags.DEFINE_list(name, list(default), text)
    elif kind is bool:
        flags.DEFINE_boolean(name, default, text)
    elif kind is int:
        flags.DEFINE_integer(name, default, text)
    elif kind is float:
        flags.DEFINE_float(name, default, text)
    else:
        flags.DEFINE_string(name, default, text)


def _plain_type(hint: Any) -> type:
    """`int` for `int | None`, `tuple` for `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    return typing.get_origin(hint) or hint
