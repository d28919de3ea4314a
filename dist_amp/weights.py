"""A model's weights in files that other programs read."""

import io
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any, TypeVar

import h5py
import keras
import numpy as np
from safetensors import numpy as safetensors

from dist_amp import storage
from dist_amp import strategy as strategy_lib

_Value = TypeVar("_Value")

SUFFIXES = (".keras", ".h5", ".safetensors")


def load(model: keras.Model, path: str) -> None:
    """Gives a built model the weights in a file; all of them or none.

    Args:
        model: Of any strategy; every replica gets the weights.
        path: `.keras`, `.weights.h5` or `.h5` that Keras saved from a model
            of the same layers, or `.safetensors` with a tensor for each
            variable by its path. The model's own name, and the numbers that
            Keras adds to layers' names, need not agree. Or the folder of a
            checkpoint of such a model.

    Raises:
        ValueError: The file is of another kind, or of another model; the
            message lists what differs.
        OSError: The file cannot be read.
    """
    if storage.is_checkpoint(path):
        _load_checkpoint(model, path)
        return
    suffix = _suffix_of(path)
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if suffix != ".safetensors":
        _load_with_keras(model, path)
        return
    assign(model, safetensors.load_file(path), source=path)


def assign(
    model: keras.Model, arrays: Mapping[str, np.ndarray], *, source: str
) -> None:
    """Gives a built model weights by the paths of its variables.

    Args:
        model: Of any strategy; every replica gets the weights.
        arrays: One for each variable; names need agree only as in `load`.
        source: What an error calls them.

    Raises:
        ValueError: They are of another model; the message lists what differs.
    """
    found = _canonical({n: a for n, a in arrays.items() if is_weight(n)})
    variables = _canonical(
        {v.path: v for v in model.variables if is_weight(v.path)}
    )
    differences = _differences(found, variables)
    if differences:
        raise ValueError(
            f"{source} is of another model:\n  " + "\n  ".join(differences)
        )
    for name, variable in variables.items():
        for copy in strategy_lib.local_copies(variable):
            copy.assign(found[name])


def _load_checkpoint(model: keras.Model, path: str) -> None:
    """By place: paths of variables need not differ within a model."""
    tensors = storage.read_verified(path, "model/")
    there = {
        int(place): (name, tensors[f"model/{place}/{name}"])
        for _, place, name in (key.split("/", maxsplit=2) for key in tensors)
    }
    here = dict(enumerate(model.variables))
    differences = [
        f"variable {place}: {_shown(there.get(place))} there, "
        f"{_shown(_named(here.get(place)))} here"
        for place in sorted({*there, *here})
        if _shown(there.get(place)) != _shown(_named(here.get(place)))
    ]
    if differences:
        raise ValueError(
            f"{path} is of another model:\n  " + "\n  ".join(differences[:10])
        )
    for place, variable in here.items():
        if not is_weight(variable.path):
            continue
        for copy in strategy_lib.local_copies(variable):
            copy.assign(there[place][1])


def _named(variable: keras.Variable | None) -> tuple[str, Any] | None:
    return None if variable is None else (variable.path, variable)


def _shown(named: tuple[str, Any] | None) -> str:
    """Name, without the numbers that Keras adds, and shape."""
    if named is None:
        return "none"
    return f"{re.sub(r'_[0-9]+', '', named[0])} {list(named[1].shape)}"


def _load_with_keras(model: keras.Model, path: str) -> None:
    num_saved = _num_saved(path)
    num_weights = sum(is_weight(v.path) for v in model.variables)
    if num_saved not in (None, num_weights):
        raise ValueError(
            f"{path} is of another model: it holds {num_saved} variables, and "
            f"the model has {num_weights}."
        )
    optimizer = getattr(model, "optimizer", None)
    before = [v.numpy() for v in model.variables]
    model.optimizer = None  # Keras would load its variables too
    try:
        model.load_weights(path)
    except Exception as error:
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)
        raise ValueError(f"{path} is of another model: {error}") from error
    finally:
        model.optimizer = optimizer


def _num_saved(path: str) -> int | None:
    """Variables of the model in a file of Keras 3; None for a legacy one."""
    if path.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("model.weights.h5"))
        return _num_in_h5(content)
    return _num_in_h5(path) if path.endswith(".weights.h5") else None


def _num_in_h5(file: str | io.BytesIO) -> int:
    """Keras keeps each layer's variables in a group `vars`."""
    names: list[str] = []

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        is_variable = isinstance(item, h5py.Dataset) and "vars/" in name
        is_other = name.startswith("optimizer/") or "seed_generator" in name
        if is_variable and not is_other:
            names.append(name)

    with h5py.File(file, "r") as content:
        content.visititems(visit)
    return len(names)


def save(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as `.safetensors`.

    Args:
        path: Ends in `.safetensors`.
        arrays: Of any dtype that safetensors knows; bfloat16 included.
    """
    plain = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    safetensors.save_file(plain, path, metadata={"format": "np"})


def _suffix_of(path: str) -> str:
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"Weights are in a file that ends in {', '.join(SUFFIXES)}. "
            f"Received {path}."
        )
    return suffix


def is_weight(name: str) -> bool:
    """Whether a variable of that path is no random state."""
    return not name.endswith("seed_generator_state")


def _canonical(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Renames: `sequential_3/dense_7/kernel` is `dense/kernel` anywhere.

    Common first parts are dropped, and of the layers `dense_7`, `dense_9` of
    one parent the first one becomes `dense`, the second one `dense_1`.
    """
    paths = {name: tuple(name.split("/")) for name in values}
    while paths and all(len(path) > 1 for path in paths.values()):
        if len({path[0] for path in paths.values()}) > 1:
            break
        paths = {name: path[1:] for name, path in paths.items()}
    numbers: dict[tuple[str, ...], set[int]] = {}
    for path in paths.values():
        for depth, part in enumerate(path):
            base, number = _split_number(part)
            numbers.setdefault((*path[:depth], base), set()).add(number)

    def rename(path: tuple[str, ...]) -> str:
        parts = []
        for depth, part in enumerate(path):
            base, number = _split_number(part)
            place = sorted(numbers[(*path[:depth], base)]).index(number)
            parts.append(f"{base}_{place}" if place else base)
        return "/".join(parts)

    return {rename(path): values[name] for name, path in paths.items()}


def _split_number(part: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*)_(\d+)", part)
    return (match[1], int(match[2])) if match else (part, -1)


def _differences(
    found: Mapping[str, np.ndarray], variables: Mapping[str, keras.Variable]
) -> list[str]:
    lines = [
        f"{name} {list(found[name].shape)} there, {list(v.shape)} here"
        for name, v in variables.items()
        if name in found and found[name].shape != tuple(v.shape)
    ]
    lines += [f"only there: {name}" for name in found if name not in variables]
    return lines + [f"only here: {n}" for n in variables if n not in found]
