"""Which layers fail float16, and why, from the numbers of a model."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import keras

from dist_amp.layer_dtypes import is_switchable
from dist_amp.layer_tree import LayerTree, is_model, only_passes_on
from dist_amp.ranges import LARGEST, Range, Window

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
class Limits:
    """From where on a layer fails.

    Attributes:
        max_error: Relative error of its output in float16.
        max_lost: Share of a gradient that becomes 0.
        loss_scales: Those to choose from.
    """

    max_error: float
    max_lost: float
    loss_scales: Window


def advise(
    tree: LayerTree,
    layers: Sequence[LayerNumerics],
    variables: Sequence[VariableNumerics],
    limits: Limits,
) -> Advice:
    """The layers to put in float32; see `numerics.report` for the rules.

    Args:
        tree: The model's layers.
        layers: Their numbers, in the same order.
        variables: The gradients.
        limits: From where on a layer fails.
    """
    return _Judge(tree, layers, variables, limits).advise()


# -------------------------------------------------------------------- private


class _Gradient(NamedTuple):
    """One that a unit computes; whether its sum counts, or each number."""

    name: str
    range: Range
    by_sum: bool


class _Judge:
    """Tells which units fail float16, and why."""

    def __init__(
        self,
        tree: LayerTree,
        layers: Sequence[LayerNumerics],
        variables: Sequence[VariableNumerics],
        limits: Limits,
    ):
        self._tree = tree
        self._of = {
            id(layer): numbers
            for layer, numbers in zip(tree.layers, layers, strict=True)
        }
        self._variables = variables
        self._limits = limits

    def advise(self) -> Advice:
        units = self._units()
        reasons = [self._forward_reasons(unit) for unit in units]
        # What is in float32 for its activations has no gradient to lose.
        gradients = [
            [] if found else list(self._gradients(unit))
            for unit, found in zip(units, reasons, strict=True)
        ]
        window = self._window(gradients)
        if window is not None:
            for found, own in zip(reasons, gradients, strict=True):
                found += self._failures(own, window.largest, window)
        pins = [
            Pin(
                self._tree.path_of(unit),
                tuple(dict.fromkeys(found))[:_MAX_REASONS],
                self._tree.index_of(unit),
            )
            for unit, found in zip(units, reasons, strict=True)
            if found
        ]
        scale = window.largest if window else None
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

    def _forward_reasons(self, unit: keras.layers.Layer) -> list[str]:
        members = self._tree.members_of(unit)
        return [
            reason for layer in members for reason in self._forward(layer, unit)
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
        elif error > self._limits.max_error:
            yield f"{where}its output is off by {error:.1%} in float16"

    def _gradients(self, unit: keras.layers.Layer) -> Iterator[_Gradient]:
        """All that a unit computes on the way back."""
        members = self._tree.members_of(unit)
        paths = {self._tree.path_of(layer) for layer in members}
        for variable in self._variables:
            found = variable.gradient
            if variable.layer not in paths or found is None:
                continue
            if found.largest > self._noise(variable.layer):
                yield _Gradient(variable.path, found, by_sum=False)
        if is_model(unit):
            return
        for layer in members:
            numbers = self._of[id(layer)]
            for what, found in (
                ("output", numbers.output_gradient),
                ("input", numbers.input_gradient),
            ):
                if found:
                    name = f"the {what} of {numbers.path}"
                    yield _Gradient(name, found, by_sum=True)

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
        self, gradients: Iterable[_Gradient], scale: float, window: Window
    ) -> Iterator[str]:
        """Words for each gradient that does not fit at a loss scale."""
        for name, found, by_sum in gradients:
            if not found.is_finite:
                continue
            if scale > found.ceiling:
                yield (
                    f"the gradient of {name} reaches {found.largest:.3g}: it "
                    "overflows at the loss scales that the other layers need "
                    f"({window})"
                )
                continue
            lost = found.sum_lost(scale) if by_sum else found.share_lost(scale)
            if lost > self._limits.max_lost:
                yield (
                    f"{lost:.1%} of the gradient of {name} is lost even at "
                    f"the best loss scale, 2^{math.log2(scale):.0f}"
                )

    def _window(
        self, gradients: Sequence[Sequence[_Gradient]]
    ) -> Window | None:
        """The loss scales at which the fewest units fail."""
        if not any(gradients):
            return None
        limits = self._limits.loss_scales
        low = round(math.log2(limits.smallest))
        high = round(math.log2(limits.largest))
        scales = [2.0**exponent for exponent in range(low, high + 1)]
        counts = [
            sum(any(self._failures(own, scale, limits)) for own in gradients)
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
