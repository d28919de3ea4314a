"""Options of a function as NAME=VALUE, typed as the function has them.

Standard library only.
"""

import ast
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from launch.config import ConfigError


def read_options(
    flag: str,
    texts: Sequence[str],
    function: Callable[..., Any],
    *,
    reserved: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments for a function, or for a class.

    Args:
        flag: Where the texts come from, for errors.
        texts: "name=value" each. A tuple is a list with commas.
        function: Its annotations, else its defaults, tell the types.
        reserved: Arguments that are set in another way.

    Raises:
        ConfigError: A name is not among the arguments, or a value is of
            another type.
    """
    hints = _hints(function)
    known = {
        name: hints.get(name, _type_of(parameter))
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in reserved
        and parameter.kind
        in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    options: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(
                f"--{flag} must be one of {', '.join(known) or 'none'}. "
                f"Received {name}."
            )
        try:
            options[name] = _converted(value, known[name])
        except (ValueError, SyntaxError) as error:
            kind = getattr(known[name], "__name__", "")
            wanted = str(known[name]) if typing.get_args(known[name]) else kind
            raise ConfigError(
                f"--{flag}={name}=... must be {wanted}. Received {value}."
            ) from error
    return options


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        # A class has its arguments' types at its __init__.
        owner: Any = (
            function.__init__ if inspect.isclass(function) else function
        )
        return typing.get_type_hints(owner)
    except (NameError, TypeError):  # annotations that name what is not there
        return {}


def _type_of(parameter: inspect.Parameter) -> Any:
    """By the default; None tells nothing."""
    default = parameter.default
    if default is inspect.Parameter.empty or default is None:
        return Any
    return type(default)


def _converted(text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is (
        typing.Union
    ):
        return _of_union(text, typing.get_args(kind))
    if kind is bool:
        return _as_bool(text)
    if kind in (int, float, str):
        return kind(text)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(_converted(part, inner) for part in text.split(","))
    return _as_python(text)


def _of_union(text: str, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds and text.lower() == "none":
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    for kind in rest[:-1]:
        try:
            return _converted(text, kind)
        except (ValueError, SyntaxError):
            continue
    return _converted(text, rest[-1])


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("neither true nor false")
    return text.lower() == "true"


def _as_python(text: str) -> Any:
    """A number, true, false, none, or the text as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
