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
from dist_amp.data import Batch
from dist_amp.layer_dtypes import is_switchable
from dist_amp.layer_tree import (
    LayerTree,
    is_model,
    only_passes_on,
    with_parts,
)
from dist_amp.ranges import LARGEST, Range, Window, range_of
from dist_amp.steps import Steps, reduction_of

LOSS_SCALES = Window(2.0**-14, 2.0**24)  # those of LossScaleOptimizer

_MAX_REASONS = 2


@dataclasses.dataclass(frozen=True)
class LayerNumerics:
    """What goes through a layer, in float32, over all its calls.

    Attributes:
        path: Its name, behind those of the layers that it is part of.
        kind: The name of its class.
        unit: The path of the layer to put in float32 if this one fails: of
            the outermost one around it that is no model.
        compute_dtype: What it computes in outside of the report.
        only_passes_on: Whether it is a model of the functional API, which does
            not compute by itself.
        num_calls: Calls over all batches; 0 if it was not called.
        inputs: Range of its inputs; None if none is a float.
        output: Range of its outputs.
        input_gradient: Of the loss, by its inputs; None: the loss or a
            variable before it does not depend on them.
        output_gradient: Of the loss, by its outputs.
        float16_error: Relative error of its output if it computes in float16,
            given the same inputs: the norm of the difference over the norm.
            Infinite if it overflows; None if it cannot be told.
        bfloat16_error: The same in bfloat16.
    """

    path: str
    kind: str
    unit: str
    compute_dtype: str
    only_passes_on: bool = False
    num_calls: int = 0
    inputs: Range | None = None
    output: Range | None = None
    input_gradient: Range | None = None
    output_gradient: Range | None = None
    float16_error: float | None = None
    bfloat16_error: float | None = None


@dataclasses.dataclass(frozen=True)
class VariableNumerics:
    """The gradient of a trainable variable, in float32, unscaled.

    Attributes:
        path: The variable's.
        layer: The path of its layer.
        gradient: Its range; None if the loss does not depend on it.
    """

    path: str
    layer: str
    gradient: Range | None


@dataclasses.dataclass(frozen=True)
class Pin:
    """A layer to put in float32, and why.

    Attributes:
        layer: Its path.
        reasons: In words.
        index: Its place in `LayerTree.layers` of the model.
    """

    layer: str
    reasons: Sequence[str]
    index: int


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to do for float16.

    Attributes:
        pins: Layers to put in float32, in the model's order.
        window: Loss scales at which the other layers' gradients fit; None if
            there is no gradient, empty if there is no such scale.
        loss_scale: The largest of them, at which the least becomes 0.
        notes: What else is odd: not finite in float32 either, or no gradient.
    """

    pins: Sequence[Pin]
    window: Window | None
    loss_scale: float | None
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """The numbers of a model.

    Attributes:
        loss: Mean over the batches; None if there is none to differentiate.
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
        batch: `x`, `(x, y)` or `(x, y, sample_weight)`; or several, in a
            `tf.data.Dataset` or an iterator.
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
    advice = _Judge(tree, layers, variables, max_error, max_lost).advise(
        loss_scales
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
    is_many = isinstance(batch, tf.data.Dataset | Iterator)
    for one in batch if is_many else [batch]:
        dataset = tf.data.Dataset.from_tensors(one)
        (whole,) = next(
            iter(data.split(dataset, reduction=reduction_of(steps.loss)))
        )
        yield whole


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
    ) -> dict[str, float | None]:
        members = with_parts(call.layer)
        errors = {}
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


# ------------------------------------------------------------------- judging


class _Judge:
    """Tells which units fail float16, and why."""

    def __init__(
        self,
        tree: LayerTree,
        layers: Sequence[LayerNumerics],
        variables: Sequence[VariableNumerics],
        max_error: float,
        max_lost: float,
    ):
        self._tree = tree
        self._of = {
            id(layer): numbers
            for layer, numbers in zip(tree.layers, layers, strict=True)
        }
        self._variables = variables
        self._max_error = max_error
        self._max_lost = max_lost

    def advise(self, loss_scales: Window) -> Advice:
        units = self._units()
        reasons = {
            id(unit): [
                reason
                for layer in self._tree.members_of(unit)
                for reason in self._forward(layer, unit)
            ]
            for unit in units
        }
        left = [unit for unit in units if not reasons[id(unit)]]
        gradients = {id(unit): list(self._gradients(unit)) for unit in left}
        window = self._window([*gradients.values()], loss_scales)
        scale = None
        if window is not None:
            scale = window.largest
            for unit in left:
                for _, words in self._failures(
                    gradients[id(unit)], scale, window
                ):
                    reasons[id(unit)].append(words)
        pins = [
            Pin(
                self._tree.path_of(unit),
                tuple(dict.fromkeys(reasons[id(unit)]))[:_MAX_REASONS],
                self._tree.index_of(unit),
            )
            for unit in units
            if reasons[id(unit)]
        ]
        return Advice(pins, window, scale, self._notes())

    def _units(self) -> list[keras.layers.Layer]:
        """What may be put in float32 and is not there already."""
        units = dict.fromkeys(
            self._tree.unit_of(layer) for layer in self._tree.layers
        )
        is_mixed = any(
            layer.compute_dtype in ("float16", "bfloat16")
            for layer in self._tree.layers
        )
        return [
            unit
            for unit in units
            if not only_passes_on(unit)
            and is_switchable(unit)
            and not (is_mixed and unit.compute_dtype == "float32")
        ]

    def _forward(
        self, layer: keras.layers.Layer, unit: keras.layers.Layer
    ) -> Iterator[str]:
        """Why a layer fails on the way forward."""
        numbers = self._of[id(layer)]
        where = "" if layer is unit else f"{numbers.path}: "
        fits = True
        for what, found in (
            ("input", numbers.inputs),
            ("output", numbers.output),
        ):
            if found is None or (what == "output" and is_model(layer)):
                continue
            if found.is_finite and found.num_over:
                fits = False
                yield (
                    f"{where}its {what} reaches {found.largest:.3g}, beyond "
                    f"float16's {LARGEST:.0f}"
                )
        error = numbers.float16_error
        if not fits or error is None or is_model(layer):
            return
        if math.isinf(error):
            yield f"{where}it overflows within, in float16"
        elif error > self._max_error:
            yield f"{where}its output is off by {error:.1%} in float16"

    def _gradients(
        self, unit: keras.layers.Layer
    ) -> Iterator[tuple[str, Range, bool]]:
        """Its name, its range, and whether its sum counts."""
        members = self._tree.members_of(unit)
        paths = {self._tree.path_of(layer) for layer in members}
        for variable in self._variables:
            found = variable.gradient
            if variable.layer not in paths or found is None:
                continue
            if found.largest > self._noise(variable.layer):
                yield variable.path, found, False
        if is_model(unit):
            return
        for layer in members:
            numbers = self._of[id(layer)]
            for what, found in (
                ("output", numbers.output_gradient),
                ("input", numbers.input_gradient),
            ):
                if found:
                    yield f"the {what} of {numbers.path}", found, True

    def _noise(self, path: str) -> float:
        """What rounding may leave of a variable's gradient that is 0.

        That of a bias before a normalization is, or of the keys' bias in
        attention: a sum over the batch of which each term meets its opposite.
        """
        numbers = next(n for n in self._of.values() if n.path == path)
        if numbers.output_gradient is None:
            return 0.0
        factor = max(1.0, numbers.inputs.largest if numbers.inputs else 1.0)
        return 2.0**-22 * factor * numbers.output_gradient.sum

    def _failures(
        self,
        gradients: Iterable[tuple[str, Range, bool]],
        scale: float,
        window: Window,
    ) -> Iterator[tuple[str, str]]:
        """Which gradients do not fit at a loss scale, with words."""
        for name, found, by_sum in gradients:
            if not found.is_finite:
                continue
            if scale > found.ceiling:
                yield (
                    name,
                    f"the gradient of {name} reaches {found.largest:.3g}: it "
                    "overflows at each loss scale that the other layers need "
                    f"({window})",
                )
                continue
            lost = found.sum_lost(scale) if by_sum else found.share_lost(scale)
            if lost > self._max_lost:
                yield (
                    name,
                    f"{lost:.1%} of the gradient of {name} is lost even at "
                    f"the best loss scale, 2^{math.log2(scale):.0f}",
                )

    def _window(
        self,
        gradients: Sequence[Sequence[tuple[str, Range, bool]]],
        loss_scales: Window,
    ) -> Window | None:
        """The loss scales at which the fewest units fail."""
        if not any(gradients):
            return None
        low, high = (
            round(math.log2(s))
            for s in (loss_scales.smallest, loss_scales.largest)
        )
        scales = [2.0**exponent for exponent in range(low, high + 1)]
        counts = [
            sum(
                any(self._failures(one, scale, loss_scales))
                for one in gradients
            )
            for scale in scales
        ]
        last = max(i for i, n in enumerate(counts) if n == min(counts))
        first = last
        while first and counts[first - 1] == counts[last]:
            first -= 1
        return Window(scales[first], scales[last])

    def _notes(self) -> list[str]:
        notes = []
        for numbers in self._of.values():
            if numbers.output and not numbers.output.is_finite:
                inputs = numbers.inputs
                if inputs is None or inputs.is_finite:
                    notes.append(
                        f"{numbers.path}: its output is not finite in float32 "
                        "either"
                    )
        for variable in self._variables:
            found = variable.gradient
            if found and not found.is_finite:
                notes.append(
                    f"{variable.path}: its gradient is not finite in float32 "
                    "either"
                )
            elif found is None and any(v.gradient for v in self._variables):
                notes.append(f"{variable.path}: the loss does not depend on it")
        return notes


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
