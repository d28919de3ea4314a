"""Options of a function as NAME=VALUE, typed as the function has them.

Standard library only.
"""

import ast
import contextlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.config import ConfigError

# Of types of defaults, those that tell what is accepted.
_PLAIN = (bool, int, float, str, tuple, list, dict)
_LISTS: dict[Any, Any] = {tuple: tuple, list: list, Sequence: tuple}


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
        if not known:
            raise ConfigError(
                f"--{flag}: there is nothing to set. Received {name}."
            )
        if name not in known:
            raise ConfigError(
                f"--{flag} must be one of {', '.join(known)}. Received {name}."
            )
        try:
            options[name] = _converted(value, known[name])
        except ValueError as error:
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
    """By the default, where it is plain; others tell nothing."""
    kind = type(parameter.default)
    return kind if kind in _PLAIN else Any


def _converted(text: str, kind: Any) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: It stands for none of that type.
    """
    origin, kinds = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _of_union(text, kinds)
    if origin is typing.Literal:
        return _of_literal(text, kinds)
    if kind is bool:
        return _as_bool(text)
    if kind is str:
        return text
    if kind in (int, float):
        value = kind(text)
    elif origin in _LISTS:
        value = _LISTS[origin](_parts(text, kind))
    else:
        value = _as_python(text)
    if not _is_of(value, kind):
        raise ValueError(f"of another type: {value!r}")
    return value


def _of_union(text: str, kinds: tuple[Any, ...]) -> Any:
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if kind is not type(None):
            with contextlib.suppress(ValueError):
                return _converted(text, kind)
    raise ValueError("of none of these types")


def _of_literal(text: str, values: tuple[Any, ...]) -> Any:
    for value in values:
        if text == str(value):
            return value
    raise ValueError("none of these values")


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("neither true nor false")
    return text.lower() == "true"


def _parts(text: str, kind: Any) -> Any:
    """What a list is made of: with commas, or as Python writes it."""
    if text.startswith(("(", "[")):
        value = _as_python(text)
        return value if isinstance(value, tuple | list) else [value]
    texts = text.split(",") if text else []
    kinds = typing.get_args(kind)
    if not _has_length(kind):
        kinds = (kinds or (Any,))[:1] * len(texts)
    pairs = zip(texts, kinds, strict=True)
    return [_converted(*pair) for pair in pairs]


def _has_length(kind: Any) -> bool:
    """Whether each element has a type of its own, as in `tuple[int, str]`."""
    is_tuple = typing.get_origin(kind) is tuple
    return is_tuple and Ellipsis not in typing.get_args(kind)


def _as_python(text: str) -> Any:
    """A number, true, false, none, or the text as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() == "none":
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, and finite; types not known here are."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    origin, kinds = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(value, one) for one in kinds)
    if origin is typing.Literal:
        return value in kinds
    if kind is None:
        return value is None
    if kind is Any or not isinstance(origin, type):
        return True
    if isinstance(value, bool):
        return issubclass(bool, origin) and origin is not int
    if origin is float:
        return isinstance(value, int | float)
    return isinstance(value, origin) and (not kinds or _holds(value, kind))


def _holds(value: Any, kind: Any) -> bool:
    """Whether what a value is made of is of the types in brackets."""
    kinds = typing.get_args(kind)
    if _has_length(kind):
        return len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if isinstance(value, Mapping):
        one, other = kinds
        return all(
            _is_of(k, one) and _is_of(v, other) for k, v in value.items()
        )
    return all(_is_of(one, kinds[0]) for one in value)
