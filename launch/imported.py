"""What flags name as module:function."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from launch.config import ConfigError


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


def call_with(function: Callable[..., Any], **offered: Any) -> Any:
    """Calls a user's function with those arguments that it takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    taken = {n: v for n, v in offered.items() if takes_all or n in parameters}
    try:
        return function(**taken)
    except ValueError as error:  # not ours: the user needs the traceback
        raise RuntimeError(f"{function.__name__} raised {error!r}") from error
