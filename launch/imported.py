"""What flags name as module:function."""

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

from launch.config import ConfigError
from launch.errors import is_ours


def imported(flag: str, path: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--{flag} must be module:function of an importable module. "
            f"Received {path}: {error}."
        ) from error


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of that name."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return takes_all or name in parameters


def takes_none(function: Callable[..., Any], name: str) -> bool:
    """Whether an argument is annotated as one that may be None."""
    try:
        hint = typing.get_type_hints(function).get(name)
    except (NameError, TypeError):  # annotations that name what is not there
        return False
    return type(None) in typing.get_args(hint)


def call_with(flag: str, function: Callable[..., Any], **offered: Any) -> Any:
    """Calls a function that a flag names with the arguments that it takes.

    Raises:
        ConfigError: A file that one of our functions looks for is not there.
        ValueError: One of our functions raised it.
        RuntimeError: The user's raised a ValueError; its traceback tells.
    """
    taken = {n: v for n, v in offered.items() if takes(function, n)}
    try:
        return function(**taken)
    except OSError as error:
        if not is_ours(error):
            raise
        raise ConfigError(f"--{flag}: {error}") from error
    except ValueError as error:
        if is_ours(error):
            raise
        raise RuntimeError(f"{function.__name__} raised {error!r}") from error
