"""Runs a model eagerly and keeps what goes through each of its layers."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import optimizer as optimizer_lib
from dist_amp import random_state
from dist_amp import strategy as strategy_lib
from dist_amp.data import Batch
from dist_amp.layer_dtypes import switched
from dist_amp.steps import Steps

# Errors are those of a layer's first calls: a cell has one for each time step.
_MAX_TRIED = 8


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        layer: Which one.
        args: As its `call` was given them, and
        kwargs: likewise.
        outputs: What it returned.
        state: Variables with their values before the call; None if the call
            is not to be repeated.
    """

    layer: keras.layers.Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    state: Sequence[tuple[tf.Variable, tf.Tensor]] | None

    @property
    def input_tensors(self) -> list[tf.Tensor]:
        """Its inputs that are floats."""
        return floats_of((self.args, self.kwargs))

    @property
    def output_tensors(self) -> list[tf.Tensor]:
        """Its outputs that are floats."""
        return floats_of(self.outputs)


@dataclasses.dataclass(frozen=True)
class Run:
    """A forward and backward pass in float32.

    Attributes:
        loss: None if there is nothing to differentiate.
        calls: Of all layers, in the order in which they ended.
        gradients: By the number of a trainable variable; None for one that
            the loss does not depend on.
        backward: By the id of a tensor in the calls, the loss' gradient.
    """

    loss: float | None
    calls: Sequence[Call]
    gradients: Sequence[tf.Tensor | None]
    backward: dict[int, tf.Tensor]


def floats_of(structure: Any) -> list[tf.Tensor]:
    """The tensors in it that are floats."""
    return [
        leaf
        for leaf in tf.nest.flatten(structure)
        if tf.is_tensor(leaf) and leaf.dtype.is_floating
    ]


@contextlib.contextmanager
def eager(model: keras.Model) -> Iterator[None]:
    """Where a model is run op by op, and what that changed is put back.

    Its random generators and statistics on all replicas of this host are put
    back, that is.
    """
    variables = [
        *model.non_trainable_variables,
        *random_state.variables_of(model),
    ]
    before = [
        (copy, tf.identity(copy))
        for variable in variables
        for copy in strategy_lib.local_copies(variable)
    ]
    was_eager = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(was_eager)
        _assign(before)


def run(steps: Steps, batch: Batch, *, keeps_state: bool) -> Run:
    """Runs a batch forward and back, in float32; within `eager`.

    Args:
        steps: Model and loss; the model is built.
        batch: Of the model's first replica.
        keeps_state: Whether calls are to be repeated by `error_of`.
    """
    model, calls = steps.model, list[Call]()
    copies = [
        strategy_lib.local_copies(variable)[0]
        for variable in model.trainable_variables
    ]
    layers = list(optimizer_lib.layers_of(model))
    with contextlib.ExitStack() as stack:
        stack.enter_context(switched(layers, "float32"))
        stack.enter_context(_watched(layers, calls, keeps_state=keeps_state))
        if copies:  # the copy that is read is that of the device
            stack.enter_context(tf.device(copies[0].device))
        tape = stack.enter_context(tf.GradientTape())
        predictions = model(batch.x, training=True)
        loss = None
        if steps.loss is not None or model.losses:
            loss = steps.compute_loss(batch, predictions)
    tensors = [t for c in calls for t in (*c.input_tensors, *c.output_tensors)]
    if loss is None:
        return Run(None, calls, [None] * len(copies), {})
    found = tape.gradient(loss, [*copies, *tensors])
    dense = [None if g is None else tf.convert_to_tensor(g) for g in found]
    backward = zip(tensors, dense[len(copies) :], strict=True)
    return Run(
        float(loss),
        calls,
        dense[: len(copies)],
        {id(t): gradient for t, gradient in backward if gradient is not None},
    )


def error_of(
    call: Call, members: Sequence[keras.layers.Layer], compute_dtype: str
) -> float | None:
    """How far off a layer is in another dtype, its inputs being the same.

    Layers that draw random numbers are compared in inference: other dtypes
    draw others.

    Args:
        call: Of a run in float32.
        members: The layer and what it is made of.
        compute_dtype: "float16" or "bfloat16".

    Returns:
        The norm of the difference over that of the outputs in float32;
        infinite if the layer overflows. None if it cannot be told: the layer
        has no such kernel, or draws random numbers in inference too.
    """
    if call.state is None:
        return None
    outputs, kwargs = call.outputs, call.kwargs
    try:
        if _draws(call.layer):
            if "training" not in kwargs:
                return None
            kwargs = {**kwargs, "training": False}
            outputs = _repeated(call, members, kwargs, "float32")
        other = _repeated(call, members, kwargs, compute_dtype)
    except (tf.errors.OpError, TypeError, ValueError):
        return None
    return _relative_error(floats_of(other), floats_of(outputs))


def _repeated(
    call: Call,
    members: Sequence[keras.layers.Layer],
    kwargs: dict[str, Any],
    compute_dtype: str,
) -> Any:
    _assign(call.state or ())
    with switched(members, compute_dtype):
        return call.layer(*call.args, **kwargs)


def _relative_error(
    other: Sequence[tf.Tensor], exact: Sequence[tf.Tensor]
) -> float | None:
    if not exact or len(other) != len(exact):
        return None
    a, b = (
        np.concatenate(
            [tf.cast(t, tf.float64).numpy().ravel() for t in tensors]
        )
        for tensors in (other, exact)
    )
    if not np.isfinite(b).all():
        return None
    if not np.isfinite(a).all():
        return float("inf")
    difference, norm = np.linalg.norm(a - b), np.linalg.norm(b)
    if not difference:
        return 0.0
    return float(difference / norm) if norm else float("inf")


def _draws(layer: keras.layers.Layer) -> bool:
    return any("seed_generator" in v.path for v in layer.variables) or any(
        isinstance(value, tf.random.Generator) for value in vars(layer).values()
    )


def _assign(values: Iterable[tuple[tf.Variable, tf.Tensor]]) -> None:
    for variable, value in values:
        variable.assign(value)


@contextlib.contextmanager
def _watched(
    layers: Sequence[keras.layers.Layer],
    calls: list[Call],
    *,
    keeps_state: bool,
) -> Iterator[None]:
    """Appends each call of the layers to `calls`."""
    before = [(layer, vars(layer).get("call")) for layer in layers]
    try:
        for layer in layers:
            vars(layer)["call"] = _recorder(layer, calls, keeps_state)
        yield
    finally:
        for layer, own in before:
            del vars(layer)["call"]
            if own is not None:
                vars(layer)["call"] = own


def _recorder(
    layer: keras.layers.Layer, calls: list[Call], keeps_state: bool
) -> Callable[..., Any]:
    original, num_calls = layer.call, 0

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        state = None
        if keeps_state and num_calls <= _MAX_TRIED:
            state = [
                (copy, tf.identity(copy))
                for variable in layer.non_trainable_variables
                for copy in strategy_lib.local_copies(variable)
            ]
        outputs = original(*args, **kwargs)
        if not any(map(tf.is_symbolic_tensor, floats_of((args, outputs)))):
            calls.append(Call(layer, args, kwargs, outputs, state))
        return outputs

    return call
