"""What Keras callbacks have learned, to save and restore."""

import collections
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import strategy as strategy_lib

_log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

# What Keras' `set_model` and `set_params` set, and TensorBoard's open files.
_NO_STATE = ("params", "validation_data", "_model", "_writers")
_SEQUENCES: dict[str, type] = {"tuple": tuple, "set": set, "list": list}
_CONTAINERS = (list, tuple, set, dict, collections.deque, np.ndarray)


class CallbackStates:
    """The attributes of callbacks that changed since training began.

    Kept are numbers, strings, arrays, variables, and lists, tuples, sets,
    deques and dicts of them: `EarlyStopping.best`, its `best_weights`, a
    counter of your own. What did not change is a setting, and stays as the
    new run has it. A callback that has `get_state()` and `set_state(state)`,
    a dict that JSON can hold, speaks for itself.

    Args:
        callbacks: Right after `on_train_begin`.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]):
        self._callbacks = list(callbacks)
        self._at_begin = [_encoded_attributes(c) for c in self._callbacks]
        self._told: set[str] = set()

    def read(self) -> tuple[list[Any], Arrays]:
        """Plain values, and arrays by name; what `write` takes."""
        states: list[Any] = []
        arrays: Arrays = {}
        pairs = zip(self._callbacks, self._at_begin, strict=True)
        for index, (callback, at_begin) in enumerate(pairs):
            kind = type(callback).__name__
            if hasattr(callback, "get_state"):
                states.append([kind, callback.get_state()])
                continue
            self._tell_what_is_left_out(callback)
            changed = {
                name: value
                for name, value in _encoded_attributes(callback).items()
                if not _is_same(value, at_begin.get(name))
            }
            states.append([kind, {n: code for n, (code, _) in changed.items()}])
            for _, held in changed.values():
                for name, array in held.items():
                    arrays[f"callbacks/{index:05d}/{name}"] = array
        return states, arrays

    def write(self, states: Sequence[Any], arrays: Arrays) -> list[str]:
        """Gives callbacks what `read` returned, by kind and order.

        Returns:
            The kinds that were saved and are not here.
        """
        left_out, free = [], list(range(len(self._callbacks)))
        for place, (kind, state) in enumerate(states):
            found = [
                i for i in free if type(self._callbacks[i]).__name__ == kind
            ]
            if not found:
                left_out.append(kind)
                continue
            free.remove(found[0])
            callback = self._callbacks[found[0]]
            if hasattr(callback, "set_state"):
                callback.set_state(state)
                continue
            prefix = f"callbacks/{place:05d}/"
            held = {
                name.removeprefix(prefix): array
                for name, array in arrays.items()
                if name.startswith(prefix)
            }
            for name, (code, before) in self._at_begin[found[0]].items():
                if name not in state:
                    _set(callback, name, code, before)
            for name, code in state.items():
                _set(callback, name, code, held)
        return left_out

    def _tell_what_is_left_out(
        self, callback: keras.callbacks.Callback
    ) -> None:
        """Once for each; Keras' own keep nothing there that matters."""
        if type(callback).__module__.startswith("keras."):
            return
        for name, value in vars(callback).items():
            full_name = f"{type(callback).__name__}.{name}"
            is_state = isinstance(value, _CONTAINERS) and name not in _NO_STATE
            if not is_state or full_name in self._told:
                continue
            try:
                _encode(value, {}, name)
            except TypeError as error:
                self._told.add(full_name)
                _log.warning(
                    "%s is not saved: %s. Give the class `get_state()` and "
                    "`set_state(state)` if it matters.",
                    full_name,
                    error,
                )


def _encoded_attributes(
    callback: keras.callbacks.Callback,
) -> dict[str, tuple[Any, Arrays]]:
    """Each attribute that can be saved: its code and the arrays in it."""
    found = {}
    for name, value in vars(callback).items():
        if name in _NO_STATE:
            continue
        held: Arrays = {}
        try:
            found[name] = (_encode(value, held, name), held)
        except TypeError:
            continue  # a model, a file, a function: no state
    return found


def _encode(value: Any, arrays: Arrays, name: str) -> Any:
    """JSON that `_decode` makes the value of again; arrays go to `arrays`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        arrays[name] = value.copy()
        return {"array": name}
    if isinstance(value, keras.Variable | tf.Variable):
        arrays[name] = strategy_lib.local_copies(value)[0].numpy()
        return {"variable": name}
    if isinstance(value, dict):
        pairs = [
            [_encode(k, {}, name), _encode(v, arrays, f"{name}/{index:05d}")]
            for index, (k, v) in enumerate(value.items())
        ]
        return {"dict": pairs}
    kind = type(value).__name__
    if type(value) in (list, tuple, set, collections.deque):
        codes = [
            _encode(one, arrays, f"{name}/{index:05d}")
            for index, one in enumerate(value)
        ]
        length = getattr(value, "maxlen", None)
        return {kind: codes} | ({"maxlen": length} if length else {})
    raise TypeError(f"it holds a {kind}")


def _decode(code: Any, arrays: Arrays) -> Any:
    if not isinstance(code, Mapping):
        return code
    (kind, content), *rest = code.items()
    if kind == "array":
        return arrays[content].copy()
    if kind == "dict":
        return {_decode(k, arrays): _decode(v, arrays) for k, v in content}
    values = [_decode(one, arrays) for one in content]
    if kind == "deque":
        return collections.deque(values, rest[0][1] if rest else None)
    return _SEQUENCES[kind](values)


def _set(
    callback: keras.callbacks.Callback, name: str, code: Any, arrays: Arrays
) -> None:
    if isinstance(code, Mapping) and "variable" in code:
        for copy in strategy_lib.local_copies(getattr(callback, name)):
            copy.assign(arrays[code["variable"]])
        return
    setattr(callback, name, _decode(code, arrays))


def _is_same(one: tuple[Any, Arrays], other: tuple[Any, Arrays] | None) -> bool:
    if other is None or json.dumps(one[0]) != json.dumps(other[0]):
        return False
    return all(np.array_equal(a, other[1][n]) for n, a in one[1].items())
