"""Which layers float16 fails, and why: ranges, errors, loss scales, advice.

`report` runs a model in float32 on some batches and looks at what goes
through each of its layers, forward and back:

>>> model = keras.Sequential([
...     keras.Input((2,)), keras.layers.Rescaling(1e5, name="large"),
...     keras.layers.LayerNormalization(name="norm"),
...     keras.layers.Dense(1, name="last")])
>>> x, y = tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([[0.0], [1.0]])
>>> report = dist_amp.numerics.report(model, (x, y), loss="mean_squared_error")
>>> for pin in report.advice.pins:
...     print(f"{pin.layer}: {'; '.join(pin.reasons)}")
large: its output reaches 4e+05, beyond float16's 65504
norm: its input reaches 4e+05, beyond float16's 65504
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_amp import data, probe
from dist_amp import optimizer as optimizer_lib
from dist_amp.advice import (
    Advice,
    LayerNumerics,
    Limits,
    VariableNumerics,
    advise,
)
from dist_amp.data import Batch
from dist_amp.layer_tree import LayerTree, only_passes_on, with_parts
from dist_amp.ranges import Range, Window, range_of
from dist_amp.steps import Steps, reduction_of

LOSS_SCALES = Window(2.0**-14, 2.0**24)  # those of LossScaleOptimizer


@dataclasses.dataclass(frozen=True)
class Report:
    """The numbers of a model.

    Attributes:
        loss: Mean over the batches, of one replica's share; None if there is
            none to differentiate.
        layers: All, at any depth, in the model's order.
        variables: The trainable ones.
        advice: What to do for float16.
    """

    loss: float | None
    layers: Sequence[LayerNumerics]
    variables: Sequence[VariableNumerics]
    advice: Advice

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; infinity is "inf"."""
        return _plain(self)

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=indent)


def report(
    model: keras.Model | Steps,
    batch: Any,
    *,
    loss: Any = None,
    max_error: float = 0.05,
    max_lost: float = 0.05,
    loss_scales: Window = LOSS_SCALES,
    has_errors: bool = True,
) -> Report:
    """Looks at every layer's numbers and at every variable's gradient.

    The model is run op by op in float32, in training mode, on the device of
    its first replica; its weights, statistics and random generators are as
    before afterwards. A layer fails float16 if

    * its inputs or outputs exceed 65504, or it overflows within;
    * its output is off by more than `max_error`;
    * at the loss scale that is best for the whole model, its gradients
      overflow, or more than `max_lost` of them becomes 0: of a variable's
      gradient by number, of what flows through the layer by sum.

    The best loss scale is the one at which the fewest layers fail.

    Args:
        model: A `keras.Model` in any dtype policy, or a `Trainer`, whose loss
            is taken. A trainer's `compute_loss` may be overridden.
        batch: A global one, `x`, `(x, y)` or `(x, y, sample_weight)`; or
            several, in a `tf.data.Dataset` or an iterator. Of each, one
            replica's slice is looked at, with its share of the loss.
        loss: As in `Trainer`; without it only activations are looked at.
        max_error: Relative error from which on a layer fails.
        max_lost: Share from which on a gradient counts as lost.
        loss_scales: Those to choose from.
        has_errors: Whether to run each layer in float16 and bfloat16, too.

    Returns:
        The numbers and the advice.

    Raises:
        ValueError: A trainer has a loss of its own, or the data do not suit
            the loss.
    """
    steps = _steps_of(model, loss)
    batches = list(_batches(steps, batch))
    if not batches:
        raise ValueError("The dataset is empty: it yields no batch.")
    _build(steps.model, batches[0].x)
    tree = LayerTree(steps.model)
    found = _Found(tree)
    with probe.eager(steps.model):
        for one in batches:
            found.add(probe.run(steps, one, keeps_state=has_errors))
    layers, variables = found.layers(), found.variables()
    advice = advise(
        tree,
        layers,
        variables,
        Limits(max_error, max_lost, loss_scales),
    )
    losses = [value for value in found.losses if value is not None]
    mean = sum(losses) / len(losses) if losses else None
    return Report(mean, layers, variables, advice)


# ------------------------------------------------------------------- running


def _steps_of(model: keras.Model | Steps, loss: Any) -> Steps:
    if isinstance(model, Steps):
        if loss is not None:
            raise ValueError(
                "`loss` would be ignored: the trainer has one. Pass its "
                "`model` to look at another loss."
            )
        return model
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a keras.Model or a dist_amp.Trainer. Received "
            f"{type(model).__name__}."
        )
    strategy = model.distribute_strategy
    with strategy.scope():
        optimizer = optimizer_lib.DistributedOptimizer(keras.optimizers.SGD())
    return Steps(
        model,
        optimizer,
        loss=loss,
        metrics=(),
        strategy=strategy,
        jit_compile=False,
    )


def _batches(steps: Steps, batch: Any) -> Iterator[Batch]:
    """Of each global batch a replica's slice, the largest."""
    is_many = isinstance(batch, tf.data.Dataset | Iterator)
    for one in batch if is_many else [batch]:
        # Slices that are put together again may be fewer than the replicas.
        examples = tf.data.Dataset.from_tensor_slices(one)
        slices = data.split(
            examples.batch(len(examples)),
            num_replicas=steps.strategy.num_replicas_in_sync,
            reduction=reduction_of(steps.loss),
        )
        yield max(next(iter(slices)), key=lambda part: len(part.weight))


def _build(model: keras.Model, x: Any) -> None:
    if not model.built:
        with model.distribute_strategy.scope():
            model(x, training=False)


class _Found:
    """The ranges of some runs, put together."""

    def __init__(self, tree: LayerTree):
        self._tree = tree
        self._layers = {
            id(layer): LayerNumerics(
                path=tree.path_of(layer),
                kind=type(layer).__name__,
                unit=tree.path_of(tree.unit_of(layer)),
                compute_dtype=layer.compute_dtype,
                only_passes_on=only_passes_on(layer),
            )
            for layer in tree.layers
        }
        self._gradients: list[Range | None] = [None] * len(
            tree.model.trainable_variables
        )
        self.losses: list[float | None] = []

    def add(self, run: probe.Run) -> None:
        self.losses.append(run.loss)
        ranges: dict[int, Range] = {}  # a tensor is one layer's out, one's in

        def measure(tensors: Iterable[tf.Tensor]) -> Range | None:
            found = None
            for tensor in tensors:
                if id(tensor) not in ranges:
                    ranges[id(tensor)] = _range_of(tensor)
                found = _merged(found, ranges[id(tensor)])
            return found

        def back(tensors: Iterable[tf.Tensor]) -> list[tf.Tensor]:
            found = (run.backward.get(id(tensor)) for tensor in tensors)
            return [gradient for gradient in found if gradient is not None]

        for call in run.calls:
            inputs, outputs = call.input_tensors, call.output_tensors
            before = self._layers[id(call.layer)]
            self._layers[id(call.layer)] = dataclasses.replace(
                before,
                num_calls=before.num_calls + 1,
                inputs=_merged(before.inputs, measure(inputs)),
                output=_merged(before.output, measure(outputs)),
                input_gradient=_merged(
                    before.input_gradient, measure(back(inputs))
                ),
                output_gradient=_merged(
                    before.output_gradient, measure(back(outputs))
                ),
                **self._errors(call, before),
            )
        for number, gradient in enumerate(run.gradients):
            if gradient is not None:
                self._gradients[number] = _merged(
                    self._gradients[number], _range_of(gradient)
                )

    def _errors(
        self, call: probe.Call, before: LayerNumerics
    ) -> dict[str, Any]:
        members = with_parts(call.layer)
        errors: dict[str, float | None] = {}
        for dtype in ("float16", "bfloat16"):
            name = f"{dtype}_error"
            both = (
                getattr(before, name),
                probe.error_of(call, members, dtype),
            )
            known = [error for error in both if error is not None]
            errors[name] = max(known, default=None)
        return errors

    def layers(self) -> list[LayerNumerics]:
        return [self._layers[id(layer)] for layer in self._tree.layers]

    def variables(self) -> list[VariableNumerics]:
        return [
            VariableNumerics(variable.path, self._tree.path_of(owner), gradient)
            for variable, owner, gradient in zip(
                self._tree.model.trainable_variables,
                self._tree.owners(),
                self._gradients,
                strict=True,
            )
        ]


def _range_of(tensor: tf.Tensor) -> Range:
    return range_of(tf.cast(tensor, tf.float32).numpy())


def _merged(one: Range | None, other: Range | None) -> Range | None:
    if one is None or other is None:
        return one or other
    return one.merged(other)


# -------------------------------------------------------------------- as JSON


@functools.singledispatch
def _plain(value: Any) -> Any:
    """Values for JSON."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    return value


@_plain.register(float)
def _(value: float) -> Any:
    return value if math.isfinite(value) else str(value)


@_plain.register(Range)
def _(value: Range) -> Any:
    return value.to_dict()


@_plain.register(list)
@_plain.register(tuple)
def _(value: Sequence[Any]) -> Any:
    return [_plain(one) for one in value]
