"""A model's weights in files that other programs read."""

import pathlib
import re
from collections.abc import Mapping

import keras
import numpy as np
from safetensors import numpy as safetensors

from dist_amp import strategy as strategy_lib

SUFFIXES = (".keras", ".h5", ".safetensors")


def load(model: keras.Model, path: str) -> None:
    """Gives a built model the weights in a file; all of them or none.

    Args:
        model: Of any strategy; every replica gets the weights.
        path: `.keras`, `.weights.h5` or `.h5` that Keras saved from a model
            of the same layers, or `.safetensors` with a tensor for each
            variable, by its path or in Keras' order where paths differ only
            in the numbers that Keras adds.

    Raises:
        ValueError: The file is of another kind, or of another model; the
            message lists what differs.
        OSError: The file cannot be read.
    """
    suffix = _suffix_of(path)
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if suffix != ".safetensors":
        optimizer = getattr(model, "optimizer", None)
        model.optimizer = None  # Keras would load its variables too
        try:
            model.load_weights(path)
        finally:
            model.optimizer = optimizer
        return
    arrays = safetensors.load_file(path)
    variables = {_plain(v.path): v for v in model.variables}
    found = {_plain(name): array for name, array in arrays.items()}
    if len(variables) != len(model.variables) or len(found) != len(arrays):
        variables = {v.path: v for v in model.variables}
        found = dict(arrays)
    differences = _differences(found, variables)
    if differences:
        raise ValueError(
            f"{path} is of another model:\n  " + "\n  ".join(differences)
        )
    for name, variable in variables.items():
        if name in found:
            for copy in strategy_lib.local_copies(variable):
                copy.assign(found[name])


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


def _plain(path: str) -> str:
    """A variable's path without the numbers that Keras adds to names."""
    return re.sub(r"_\d+", "", path)


def _differences(
    found: Mapping[str, np.ndarray], variables: Mapping[str, keras.Variable]
) -> list[str]:
    """Random states may be missing: they are no weights."""
    lines = [
        f"{name} {list(found[name].shape)} there, {list(v.shape)} here"
        for name, v in variables.items()
        if name in found and found[name].shape != tuple(v.shape)
    ]
    lines += [f"only there: {name}" for name in found if name not in variables]
    lines += [
        f"only here: {name}"
        for name, variable in variables.items()
        if name not in found and variable.name != "seed_generator_state"
    ]
    return lines
