"""From a config to the model, its loss and its metrics."""

import inspect
import logging
import re
from typing import Any

import keras
import tensorflow as tf

from dist_amp import data as data_lib
from dist_amp import losses, metrics, optimizer
from dist_amp.models import batch_norm
from dist_amp.stream import one_pass
from launch.config import ConfigError, TrainConfig
from launch.imported import call_with, imported
from launch.inputs import Data
from launch.options import read_options

_log = logging.getLogger(__name__)

_OF_KERAS = "keras.applications"

_BINARY = (
    keras.losses.BinaryCrossentropy,
    keras.losses.BinaryFocalCrossentropy,
)
_OF_CLASSES = (
    keras.losses.SparseCategoricalCrossentropy,
    losses.SmoothedCrossentropy,
)
_CROSS_ENTROPIES = (
    keras.metrics.BinaryCrossentropy,
    keras.metrics.CategoricalCrossentropy,
    keras.metrics.SparseCategoricalCrossentropy,
)
# Metrics that look at the order of scores only, or are made for scores.
_OF_SCORES = (
    keras.metrics.CategoricalAccuracy,
    keras.metrics.SparseCategoricalAccuracy,
    keras.metrics.TopKCategoricalAccuracy,
    keras.metrics.SparseTopKCategoricalAccuracy,
    keras.metrics.Hinge,
    keras.metrics.SquaredHinge,
    keras.metrics.CategoricalHinge,
)
# What makes probabilities: names of functions, and of operations of Keras.
_ACTIVATIONS = ("softmax", "softmax_v2", "sigmoid", "hard_sigmoid", "sparsemax")
_OPERATIONS = ("Softmax", "Sigmoid", "HardSigmoid", "Sparsemax")
# Operations of Keras that leave numbers as they are.
_HANDING_ON = ("Cast", "ExpandDims", "Reshape", "Squeeze", "Transpose")


def make_model(
    config: TrainConfig, data: Data, *, synchronized: bool | None = None
) -> keras.Model:
    """The model of the flags; call it in a scope.

    Args:
        config: The settings.
        data: Tells the input's shape and the number of classes.
        synchronized: Batch norm over all replicas; None: if there are
            several.
    """
    path = config.model
    if ":" not in path:
        path = f"dist_amp.models.{path}:build"
    function = imported("model", path)
    is_keras = path.startswith(_OF_KERAS)
    offered = _offered_to_model(data, is_keras=is_keras)
    if synchronized is not None:
        offered["synchronized"] = synchronized
    offered |= read_options("model_option", config.model_option, function)
    model = call_with("model", function, **offered)
    if not isinstance(model, keras.Model):
        raise ConfigError(
            f"--model={config.model} must return a keras.Model. Received "
            f"{type(model).__name__}."
        )
    if is_keras:
        batch_norm.synchronize(model, synchronized)
        _check_scaling(config, model)
    return model


def _offered_to_model(data: Data, *, is_keras: bool) -> dict[str, Any]:
    """What a model's function may take of what the data tells."""
    offered: dict[str, Any] = {}
    spec = data_lib.input_spec(one_pass(data.train))
    if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
        offered["input_shape"] = tuple(spec.shape[1:])
    if data.num_classes is not None:
        offered["num_classes"] = data.num_classes
    if not is_keras:
        return offered
    if data.num_classes is not None:
        offered["classes"] = data.num_classes
    return offered | {
        "weights": None,  # would be downloaded
        "classifier_activation": None,
        "include_preprocessing": False,  # images are in [0, 1] already
    }


def _check_scaling(config: TrainConfig, model: keras.Model) -> None:
    """Whether a model of Keras' own would scale images a second time."""
    kinds = keras.layers.Rescaling | keras.layers.Normalization
    names = [one.name for one in model.layers if isinstance(one, kinds)]
    if not names:
        return
    told = (
        f"--model={config.model} scales its inputs by itself "
        f"({', '.join(names)}), which must be in 0..255"
    )
    if config.data_kind == "tfds":
        raise ConfigError(
            f"{told}; images of --dataset={config.dataset} come in [0, 1]. "
            "Name a model that takes include_preprocessing and leave that "
            "alone, as keras.applications:EfficientNetV2B0, or a function of "
            "yours as --dataset that returns images in 0..255."
        )
    _log.warning("%s: those of your data have to be", told)


def make_metrics(config: TrainConfig, loss: Any) -> list[Any]:
    """The metrics of the flags, of probabilities where the loss has logits.

    Args:
        config: The settings.
        loss: From `make_loss`.

    Raises:
        ConfigError: Keras has no metric of such a name.
    """
    # What a loss of the user's takes is the user's to know.
    is_of_logits = ":" not in config.loss and takes_logits(loss)
    activation = None
    if is_of_logits:
        is_binary = isinstance(loss, _BINARY)
        activation = "sigmoid" if is_binary else "softmax"
    return [_make_metric(name, activation) for name in config.metrics]


def takes_logits(loss: Any) -> bool | None:
    """Whether a loss takes logits; None if it is no cross-entropy."""
    return getattr(loss, "from_logits", None)


def _make_metric(name: str, activation: str | None) -> Any:
    """A metric by name; of logits, if they have an activation to come."""
    if name.lower() in ("accuracy", "acc"):  # `MetricSet` looks at the shapes
        if activation == "sigmoid":
            return metrics.OfProbabilities(name, activation)
        return name
    try:
        found = keras.metrics.get(name)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "--metrics must be names of Keras metrics that need no arguments. "
            f"Received {name}."
        ) from error
    if not isinstance(found, keras.metrics.Metric):
        found = keras.metrics.MeanMetricWrapper(found, name=found.__name__)
    kind, options = type(found), found.get_config()
    # Keras numbers those that it names by itself.
    options["name"] = re.sub(r"_\d+$", "", found.name)
    if activation and kind in _CROSS_ENTROPIES:
        return kind.from_config(options | {"from_logits": True})
    made = kind.from_config(options)
    if activation is None or kind in _OF_SCORES:
        return made
    return metrics.OfProbabilities(made, activation)


def make_loss(config: TrainConfig, model: keras.Model) -> Any:
    """The loss of the flags, from logits or not as the model ends."""
    if ":" in config.loss:
        return imported("loss", config.loss)
    loss_class = _loss_class(config)
    if "from_logits" not in inspect.signature(loss_class).parameters:
        return loss_class()
    from_logits = not ends_in_probabilities(model)
    if not config.label_smoothing:
        return loss_class(from_logits=from_logits)
    if loss_class is keras.losses.SparseCategoricalCrossentropy:
        return losses.SmoothedCrossentropy(
            config.label_smoothing, from_logits=from_logits
        )
    return loss_class(
        from_logits=from_logits, label_smoothing=config.label_smoothing
    )


def check_labels(
    config: TrainConfig, data: Data, model: keras.Model, loss: Any
) -> None:
    """Whether a sparse cross-entropy gets labels and outputs that are classes.

    Without it numbers to predict are cut to integers, of a class each: with
    one output the loss is 0 whatever the model says.

    Args:
        config: The settings.
        data: Tells the labels' dtype and the number of classes.
        model: Its width is looked at if it is known before it is built.
        loss: From `make_loss`.

    Raises:
        ConfigError: The labels are floats, or the outputs too few.
    """
    if not isinstance(loss, _OF_CLASSES):
        return
    labels = data_lib.target_spec(one_pass(data.train))
    outputs = tf.nest.flatten(getattr(model, "outputs", None) or [])
    if not isinstance(labels, tf.TensorSpec) or len(outputs) > 1:
        return
    width = outputs[0].shape[-1] if outputs else None
    returns = f"the model returns [.., {width}] and " if outputs else ""
    told = (
        f"--loss={config.loss} wants integer labels and one output per class; "
        f"{returns}labels are {labels.dtype.name}"
    )
    if labels.dtype.is_floating or width == 1:
        raise ConfigError(
            f"{told}: pass --loss=mean_squared_error (numbers) or "
            "binary_crossentropy (two classes), or make them so."
        )
    if width is not None and data.num_classes and width < data.num_classes:
        raise ConfigError(
            f"{told} of {data.num_classes} classes: give the last layer "
            f"{data.num_classes} units."
        )


def _loss_class(config: TrainConfig) -> Any:
    """BinaryCrossentropy for its own name, binary_crossentropy, or bce."""
    found = getattr(keras.losses, config.loss_class, None)
    if isinstance(found, type):
        return found
    try:
        function = keras.losses.get(config.loss)
    except ValueError as error:
        raise ConfigError(
            "--loss must be a Keras loss or module:function. Received "
            f"{config.loss}."
        ) from error
    plain = function.__name__.replace("_", "")  # kl_divergence: KLDivergence
    names = {name.lower(): name for name in dir(keras.losses)}
    return getattr(keras.losses, names[plain])


def ends_in_probabilities(model: keras.Model) -> bool:
    """Whether the first output comes from a softmax or a sigmoid.

    What only hands on, as a change of shape or of dtype, is passed over. In a
    functional model the output is followed back, in others the layers.
    """
    outputs = tf.nest.flatten(getattr(model, "outputs", None) or [])
    if isinstance(model, keras.Sequential) or not outputs:
        found = map(_makes_probabilities, reversed(model.layers))
        return bool(next((one for one in found if one is not None), False))
    inputs = outputs[:1]
    while len(inputs) == 1:
        operation, inputs = optimizer.made_by(inputs[0])
        verdict = _makes_probabilities(operation)
        if verdict is not None:
            return verdict
    return False


def _makes_probabilities(operation: Any) -> bool | None:
    """Of a layer, or an operation of Keras; None if it hands on."""
    if isinstance(operation, keras.Model):
        return ends_in_probabilities(operation)
    if isinstance(operation, keras.layers.Wrapper):
        return _makes_probabilities(operation.layer)
    kind = type(operation).__name__
    if not isinstance(operation, keras.layers.Layer):  # of keras.ops
        return None if kind in _HANDING_ON else kind in _OPERATIONS
    is_lambda = isinstance(operation, keras.layers.Lambda)
    function = getattr(
        operation, "function" if is_lambda else "activation", None
    )
    name = getattr(function, "__name__", type(function).__name__)
    if "Softmax" in (kind, name) or name in _ACTIVATIONS:
        return True
    is_linear = isinstance(operation, keras.layers.Activation) and (
        name == "linear"
    )
    if is_lambda or is_linear:
        return None
    return False if function is not None or operation.weights else None
