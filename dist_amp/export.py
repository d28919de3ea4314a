"""A trained model for others: `.keras`, or a SavedModel, in one dtype.

What is exported is Keras' own model, made anew from its configuration: it
needs neither this library nor the strategy that it was trained on.
"""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import strategy as strategy_lib
from dist_amp.layer_dtypes import switched
from dist_amp.optimizer import layers_of

FORMATS = ("keras", "saved_model")
DTYPES = ("float32", "bfloat16", "float16")

# Largest difference of an output by its largest value. Float32 is summed in
# another order, perhaps; each layer of the others rounds to 8 or 11 bits.
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}

_HALF = ("float16", "bfloat16")
_SECONDS = 600

# What a user does who has TensorFlow and Keras, but not this library; of a
# SavedModel, not even Keras.
_PROGRAM = """
import pickle, sys
format, path, source, target = sys.argv[1:]
with open(source, "rb") as file:
    batches = pickle.load(file)
sys.modules["dist_amp"] = None
if format == "keras":
    import keras
    call = keras.models.load_model(path, compile=False)
else:
    sys.modules["keras"] = None
    import tensorflow as tf
    loaded = tf.saved_model.load(path)
    assert "serving_default" in loaded.signatures
    call = loaded.serve
import tensorflow as tf
results = [
    [leaf.numpy() for leaf in tf.nest.flatten(call(batch))]
    for batch in batches
]
with open(target, "wb") as file:
    pickle.dump(results, file)
"""


class UnusableError(ValueError):
    """What was exported does not work where this library is not."""


def export(
    model: keras.Model,
    path: str | pathlib.Path,
    *,
    inputs: Any,
    format: str = "keras",
    dtype: str = "float32",
) -> None:
    """Writes a built model for use elsewhere.

    Args:
        model: Of any strategy and precision.
        path: A file that ends in `.keras`, or the folder of a SavedModel.
        inputs: A batch of them, or their `tf.TensorSpec`s; a SavedModel takes
            such inputs, in batches of any size. Floats are float32.
        format: "keras", or "saved_model" with the signature
            "serving_default".
        dtype: What layers compute in and keep their weights in. With a half
            dtype, layers that compute in float32 among others in half
            precision stay so, and normalization keeps its weights in float32.

    Raises:
        ValueError: An argument is none of these, Keras cannot make the model
            from its configuration, or a `.keras` file would need this library.

    Example:
    >>> import tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> path = tempfile.mkdtemp() + "/model.keras"
    >>> export(model, path, inputs=tf.zeros([1, 4]), dtype="bfloat16")
    >>> keras.models.load_model(path).layers[0].kernel.dtype
    'bfloat16'
    """
    _check(str(path), format, dtype)
    if format == "keras":
        _check_layers(model)
    try:
        made = remade(model, dtype)
    except (TypeError, ValueError, NotImplementedError) as error:
        if format == "keras" or dtype != "float32":
            raise ValueError(
                "Keras cannot make this model from its configuration (a "
                "subclass without get_config?): export it as a SavedModel in "
                "float32 (--format=saved_model --dtype=float32). Keras says: "
                f"{str(error).splitlines()[0]}"
            ) from error
        with switched(layers_of(model), "float32"):
            _save(model, str(path), inputs)
        return
    if format == "keras":
        made.save(path)
    else:
        _save(made, str(path), inputs)


def remade(model: keras.Model, dtype: str) -> keras.Model:
    """A copy of a model in another dtype, outside of any strategy.

    Args:
        model: Built.
        dtype: See `export`.

    Raises:
        TypeError, ValueError, NotImplementedError: Keras cannot make it from
            its configuration.
    """
    layers = layers_of(model)
    is_mixed = any(layer.compute_dtype in _HALF for layer in layers)
    config = _converted(json.loads(model.to_json()), dtype, is_mixed=is_mixed)
    made = keras.models.model_from_json(json.dumps(config))
    if len(made.variables) != len(model.variables):
        raise ValueError(
            f"made anew it has {len(made.variables)} variables instead of "
            f"{len(model.variables)}"
        )
    for new, old in zip(made.variables, model.variables, strict=True):
        new.assign(tf.cast(strategy_lib.local_copies(old)[0], new.dtype))
    return made


def outputs_in_float32(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    """What a model returns with all its layers in float32, in inference.

    Args:
        model: Built.
        inputs: A batch.
    """
    with switched(layers_of(model), "float32"):
        outputs = model(inputs, training=False)
    return [tf.cast(x, tf.float32).numpy() for x in tf.nest.flatten(outputs)]


def outputs_elsewhere(
    path: str | pathlib.Path, format: str, inputs: Any
) -> list[np.ndarray]:
    """What an exported model returns in a process without our modules.

    Only installed packages are there, and of those not this one. The first
    example goes through it alone as well: batches have any size.

    Args:
        path: As in `export`.
        format: As in `export`.
        inputs: A batch of arrays.

    Raises:
        UnusableError: It cannot be loaded or called there, or an example
            alone gives another shape than among others.
    """
    whole = tf.nest.map_structure(np.asarray, inputs)
    alone = tf.nest.map_structure(lambda leaf: leaf[:1], whole)
    where = str(pathlib.Path(path).resolve())
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/inputs", f"{folder}/outputs"
        pathlib.Path(source).write_bytes(pickle.dumps([whole, alone]))
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, format, where, source, target],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_installed())},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            hint = ""
            if format == "keras":
                hint = (
                    " If a layer is a class of your own: a SavedModel needs no "
                    "code (--format=saved_model)."
                )
            raise UnusableError(f"it cannot be used elsewhere: {last}{hint}")
        outputs, first = pickle.loads(pathlib.Path(target).read_bytes())
    for one, other in zip(first, outputs, strict=True):
        if one.shape != other[:1].shape:
            raise UnusableError(
                f"it returns {list(one.shape)} for one example, and "
                f"{list(other.shape)} for a batch."
            )
    return outputs


def largest_difference(
    outputs: list[np.ndarray], expected: list[np.ndarray]
) -> float:
    """Of any output, by its largest value; infinite if one is not finite.

    Args:
        outputs: Of the exported model.
        expected: Of the model, in the same order and shapes.
    """
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        return float("inf")
    differences = [0.0]
    for one, other in zip(outputs, expected, strict=True):
        error = np.abs(one.astype("float64") - other.astype("float64"))
        scale = max(float(np.abs(other.astype("float64")).max()), 1e-30)
        relative = float(error.max()) / scale
        differences.append(relative if np.isfinite(relative) else float("inf"))
    return max(differences)


# -------------------------------------------------------------------- private


def _installed() -> list[str]:
    """Where packages are installed; not where we, or the user, work."""
    return [x for x in sys.path if x.endswith(("-packages", "-packages/"))]


def _check(path: str, format: str, dtype: str) -> None:
    for name, value, accepted in (
        ("format", format, FORMATS),
        ("dtype", dtype, DTYPES),
    ):
        if value not in accepted:
            raise ValueError(
                f"`{name}` must be one of {', '.join(accepted)}. Received "
                f"{value!r} (--{name})."
            )
    if (format == "keras") != path.endswith(".keras"):
        raise ValueError(
            "`path` must end in .keras with format='keras', and only then. "
            f"Received {path!r} with {format!r} (--output, --format)."
        )


def _check_layers(model: keras.Model) -> None:
    """Whether Keras alone can load the model."""
    package = __name__.partition(".")[0]
    ours = {
        type(layer).__name__
        for layer in layers_of(model)
        if type(layer).__module__.partition(".")[0] == package
    }
    if ours:
        raise ValueError(
            f"A .keras file of this model needs {package}, for its layers "
            f"{', '.join(sorted(ours))}: export it as a SavedModel, which "
            "needs no code (--format=saved_model)."
        )


def _save(model: keras.Model, path: str, inputs: Any) -> None:
    """As a SavedModel that takes batches of any size."""
    spec = tf.nest.map_structure(_spec_of, inputs)
    model.export(
        path, format="tf_saved_model", verbose=False, input_signature=[spec]
    )


def _spec_of(leaf: Any) -> tf.TensorSpec:
    dtype = tf.as_dtype(leaf.dtype)
    return tf.TensorSpec(
        [None, *leaf.shape[1:]], tf.float32 if dtype.is_floating else dtype
    )


def _converted(
    node: Any, dtype: str, *, is_mixed: bool, layer: str = ""
) -> Any:
    """A model's configuration with other dtype policies."""
    if isinstance(node, list):
        return [
            _converted(x, dtype, is_mixed=is_mixed, layer=layer) for x in node
        ]
    if not isinstance(node, dict):
        return node
    if node.get("class_name") == "DTypePolicy":
        name = _policy_for(node["config"]["name"], dtype, layer, is_mixed)
        return {**node, "config": {**node["config"], "name": name}}
    layer = node.get("class_name", layer)
    return {
        key: _converted(value, dtype, is_mixed=is_mixed, layer=layer)
        for key, value in node.items()
    }


def _policy_for(before: str, dtype: str, layer: str, is_mixed: bool) -> str:
    """The name of a policy that takes the place of another one."""
    is_half = before.removeprefix("mixed_") in _HALF
    if not is_half and before != "float32":
        return before  # float64, int8 and others are there for a reason
    if dtype == "float32" or (is_mixed and not is_half):
        return "float32"
    return f"mixed_{dtype}" if "Normalization" in layer else dtype
