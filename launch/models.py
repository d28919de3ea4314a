"""From a config to the model, its loss and its metrics."""

import inspect
from typing import Any

import keras
import tensorflow as tf

from dist_amp import data as data_lib
from dist_amp import losses
from dist_amp.models import batch_norm
from dist_amp.stream import one_pass
from launch.config import ConfigError, TrainConfig
from launch.imported import call_with, imported
from launch.inputs import Data
from launch.options import read_options

_OF_KERAS = "keras.applications"


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
    if is_keras:
        batch_norm.synchronize(model, synchronized)
    if not isinstance(model, keras.Model):
        raise ConfigError(
            f"--model={config.model} must return a keras.Model. Received "
            f"{type(model).__name__}."
        )
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


def check_metrics(config: TrainConfig) -> None:
    """Whether Keras has metrics of those names."""
    for name in config.metrics:
        try:
            keras.metrics.get(name)
        except ValueError as error:
            raise ConfigError(
                f"--metrics must be names of Keras metrics. Received {name}."
            ) from error


def make_loss(config: TrainConfig, model: keras.Model) -> Any:
    """The loss of the flags, from logits or not as the model ends."""
    if ":" in config.loss:
        return imported("loss", config.loss)
    loss_class = getattr(keras.losses, config.loss_class, None)
    if isinstance(loss_class, type):
        if "from_logits" not in inspect.signature(loss_class).parameters:
            return loss_class()
        from_logits = not _ends_in_probabilities(model)
        if not config.label_smoothing:
            return loss_class(from_logits=from_logits)
        if loss_class is keras.losses.SparseCategoricalCrossentropy:
            return losses.SmoothedCrossentropy(
                config.label_smoothing, from_logits=from_logits
            )
        return loss_class(
            from_logits=from_logits, label_smoothing=config.label_smoothing
        )
    try:
        return keras.losses.get(config.loss)
    except ValueError as error:
        raise ConfigError(
            "--loss must be a Keras loss or module:function. Received "
            f"{config.loss}."
        ) from error


def _ends_in_probabilities(model: keras.Model) -> bool:
    """Whether the last activation is a softmax or a sigmoid."""
    for layer in reversed(model.layers):
        if isinstance(layer, keras.Model):
            return _ends_in_probabilities(layer)
        if isinstance(layer, keras.layers.Softmax):
            return True
        activation = getattr(layer, "activation", None)
        if activation is not None:
            name = getattr(activation, "__name__", "")
            return name in ("softmax", "sigmoid")
    return False
