"""Reads a traced step: its operations, how often they run, their FLOPs."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

_PRIVATE_NAMES = {
    "tensorflow 2.21, Graph": {
        "_get_function": "the graph of a function by its name",
    },
}

Shape = Sequence[int]

_LOOPS = ("While", "StatelessWhile")


def operations(graph: tf.Graph) -> Iterator[tuple[tf.Operation, int | None]]:
    """All operations of a graph and of the functions that it calls.

    Args:
        graph: Of a `ConcreteFunction`.

    Yields:
        The operation, and how often it runs in one call of the graph; both
        branches of a condition count. None in a loop of unknown length.
    """
    yield from _operations(graph, 1)


def _operations(
    graph: tf.Graph, times: int | None
) -> Iterator[tuple[tf.Operation, int | None]]:
    for op in graph.get_operations():
        yield op, times
        inner_times = times
        if op.type in _LOOPS:
            # TensorFlow's loops carry the greatest number of rounds.
            rounds = tf.get_static_value(op.inputs[1])
            is_known = rounds is not None and rounds >= 0
            inner_times = None
            if times is not None and is_known:
                inner_times = times * int(rounds)
        for name in _called(op):
            inner: Any = graph._get_function(name)
            if getattr(inner, "graph", None) is not None:
                yield from _operations(inner.graph, inner_times)


def _called(op: tf.Operation) -> Iterator[str]:
    for value in op.node_def.attr.values():
        if value.HasField("func"):
            yield value.func.name
        yield from (function.name for function in value.list.func)


def flops_of(graph: tf.Graph) -> tuple[int, int]:
    """FLOPs of one call of a graph: its matrix products and convolutions.

    As papers count them: a multiplication and an addition are two, and what
    is no product or convolution is nothing.

    Returns:
        `(flops, uncounted)`: the products whose shapes, or how often they
        run, cannot be told before the graph is run are uncounted.
    """
    total = uncounted = 0
    for op, times in operations(graph):
        count = flops_of_operation(op)
        if count is None or (count and times is None):
            uncounted += 1
        else:
            total += count * (times or 0)
    return total, uncounted


def kept_bytes(graph: tf.Graph) -> int:
    """What the forward pass leaves in memory for the backward pass.

    Every result of it that an operation of a gradient tape reads, once;
    variables, constants and arguments are there anyway.
    """
    kept: dict[Any, int] = {}
    backward: set[str] = set()  # an operation comes after its inputs
    for op in graph.get_operations():
        is_of_tape = _TAPE in op.name
        if is_of_tape or any(t.op.name in backward for t in op.inputs):
            backward.add(op.name)
        if not is_of_tape or op.type in _READ_ONLY_SHAPES:
            continue
        for tensor in op.inputs:
            source = _behind_views(tensor)
            if source.op.name in backward or source.op.type in _THERE_ANYWAY:
                continue
            elements = source.shape.num_elements()
            kept[source.ref()] = (elements or 0) * source.dtype.size
    return sum(kept.values())


_TAPE = "gradient_tape/"
_READ_ONLY_SHAPES = ("Shape", "ShapeN", "Size", "ZerosLike", "OnesLike")
_VIEWS = ("Identity", "Reshape", "ExpandDims", "Squeeze")
_THERE_ANYWAY = ("ReadVariableOp", "Const", "Placeholder", "Shape", "Fill")


def _behind_views(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor whose memory this one shows in another shape."""
    while tensor.op.type in _VIEWS and _TAPE not in tensor.op.name:
        tensor = tensor.op.inputs[0]
    return tensor


def flops_of_operation(op: tf.Operation) -> int | None:
    """FLOPs of an operation; 0 for what does not count.

    Args:
        op: In a graph.

    Returns:
        None where a shape that matters is unknown.
    """
    count = _COUNTS.get(op.type)
    if count is None:
        return 0
    shapes = [tensor.shape for tensor in (*op.inputs, op.outputs[0])]
    if not all(shape.is_fully_defined() for shape in shapes):
        return None
    *inputs, output = (shape.as_list() for shape in shapes)
    return 2 * count(op, inputs, output)


def _matmul(op: tf.Operation, inputs: Sequence[Shape], output: Shape) -> int:
    is_transposed = op.get_attr(
        "transpose_a" if op.type == "MatMul" else "adj_x"
    )
    inner = inputs[0][-2 if is_transposed else -1]
    return math.prod(output) * inner


def _einsum(op: tf.Operation, inputs: Sequence[Shape], output: Shape) -> int:
    """As many as there are combinations of all indices."""
    if len(inputs) != 2:
        return 0
    terms = op.get_attr("equation").decode().partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    broadcast = 1
    for term, shape in zip(terms, inputs, strict=True):
        before, has_rest, after = term.partition("...")
        num_rest = len(shape) - len(before) - len(after) if has_rest else 0
        rest = shape[len(before) : len(before) + num_rest]
        broadcast = max(broadcast, math.prod(rest))
        ends = [*shape[: len(before)], *shape[len(before) + num_rest :]]
        sizes.update(zip(before + after, ends, strict=True))
    return math.prod(sizes.values()) * broadcast


def _sums(op: tf.Operation, outputs: Shape, kernel: Shape) -> int:
    """Each output is a sum over the filter's space and its input channels."""
    is_depthwise = op.type.startswith("Depthwise")
    return math.prod(outputs) * math.prod(kernel[: -2 if is_depthwise else -1])


def _convolution(
    op: tf.Operation, inputs: Sequence[Shape], output: Shape
) -> int:
    return _sums(op, output, inputs[1])


def _gradient_of_input(
    op: tf.Operation, inputs: Sequence[Shape], output: Shape
) -> int:
    return _sums(op, inputs[2], inputs[1])


def _gradient_of_filter(
    op: tf.Operation, inputs: Sequence[Shape], output: Shape
) -> int:
    return _sums(op, inputs[2], output)


_COUNTS: dict[str, Callable[[tf.Operation, Sequence[Shape], Shape], int]] = {
    "MatMul": _matmul,
    "BatchMatMulV2": _matmul,
    "BatchMatMulV3": _matmul,
    "Einsum": _einsum,
    "Conv2D": _convolution,
    "Conv2DBackpropInput": _gradient_of_input,
    "Conv2DBackpropFilter": _gradient_of_filter,
    "Conv3D": _convolution,
    "Conv3DBackpropInputV2": _gradient_of_input,
    "Conv3DBackpropFilterV2": _gradient_of_filter,
    "DepthwiseConv2dNative": _convolution,
    "DepthwiseConv2dNativeBackpropInput": _gradient_of_input,
    "DepthwiseConv2dNativeBackpropFilter": _gradient_of_filter,
}
