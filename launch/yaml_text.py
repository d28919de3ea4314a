"""Writes YAML that people read: the little of it that manifests need."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What no reader takes for anything but this text, if it is no word below.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_RESERVED = re.compile(
    "y|n|yes|no|on|off|true|false|null|none|nan|inf", re.IGNORECASE
)
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def dump(documents: Sequence[Mapping[str, Any]]) -> str:
    """The text of some documents.

    Args:
        documents: Of mappings with plain names, sequences, strings, numbers
            and booleans.
    """
    texts = ["\n".join(_mapping(document)) for document in documents]
    return "\n---\n".join(texts) + "\n"


def _mapping(value: Mapping[str, Any]) -> Iterator[str]:
    for key, item in value.items():
        name = _string(key)
        if isinstance(item, Mapping) and item:
            yield f"{name}:"
            yield from (f"  {line}" for line in _mapping(item))
        elif isinstance(item, list | tuple) and item:
            yield f"{name}:"
            yield from _sequence(item)
        else:
            yield f"{name}: {_scalar(item)}"


def _sequence(value: Sequence[Any]) -> Iterator[str]:
    for item in value:
        if isinstance(item, Mapping) and item:
            first, *rest = _mapping(item)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
        else:
            yield f"- {_scalar(item)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if value in ({}, [], ()):
        return "{}" if isinstance(value, Mapping) else "[]"
    raise TypeError(f"YAML of {type(value).__name__} is not written here.")


def _string(text: str) -> str:
    if _PLAIN.fullmatch(text) and not _RESERVED.fullmatch(text):
        return text
    return '"' + "".join(map(_character, text)) + '"'


def _character(one: str) -> str:
    if one in _ESCAPES:
        return _ESCAPES[one]
    if one.isprintable():
        return one
    return f"\\U{ord(one):08x}"
