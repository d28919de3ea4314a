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
        branches of a condition count. None in a loop of unknown length; 0 of
        what nothing needs, say the gradient of a model's input.
    """
    yield from _operations(graph, 1)


def _operations(
    graph: tf.Graph, times: int | None
) -> Iterator[tuple[tf.Operation, int | None]]:
    needed = {op.name for op in _needed(graph)}
    for op in graph.get_operations():
        own_times = times if op.name in needed else 0
        yield op, own_times
        inner_times = own_times
        if op.type in _LOOPS and own_times != 0:
            rounds = _rounds(op)
            inner_times = None
            if own_times is not None and rounds is not None:
                inner_times = own_times * rounds
        for inner in _called(op):
            yield from _operations(inner, inner_times)


def _needed(graph: tf.Graph) -> list[tf.Operation]:
    """The operations that a call runs, each after its inputs.

    Those that its results or its effects depend on.
    """
    if not hasattr(graph, "control_outputs"):  # no function's
        return list(graph.get_operations())
    found: set[str] = set()
    ahead = [*(t.op for t in graph.outputs), *graph.control_outputs]
    while ahead:
        op = ahead.pop()
        if op.name not in found:
            found.add(op.name)
            ahead += [tensor.op for tensor in op.inputs]
            ahead += op.control_inputs
    return [op for op in graph.get_operations() if op.name in found]


def _rounds(op: tf.Operation) -> int | None:
    """The greatest number of rounds of a loop, which TensorFlow's carry."""
    rounds = tf.get_static_value(op.inputs[1])
    return int(rounds) if rounds is not None and rounds >= 0 else None


def _called(op: tf.Operation) -> Iterator[tf.Graph]:
    """The graphs of the functions that an operation calls."""
    for value in op.node_def.attr.values():
        names = [function.name for function in value.list.func]
        if value.HasField("func"):
            names.append(value.func.name)
        for name in names:
            inner: Any = op.graph._get_function(name)
            if getattr(inner, "graph", None) is not None:
                yield inner.graph


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
        count = flops_of_operation(op) if times != 0 else 0
        if count is None or (count and times is None):
            uncounted += 1
        else:
            total += count * (times or 0)
    return total, uncounted


def kept_bytes(graph: tf.Graph) -> int:
    """What the forward pass leaves in memory for the backward pass.

    Every result of it that an operation of a gradient tape reads, once;
    variables, constants and arguments are there anyway. A loop keeps its
    results of every round; one of unknown length counts as one round.
    """
    kept: dict[Any, int] = {}
    backward: set[str] = set()
    in_loops = 0
    for op in _needed(graph):
        is_of_tape = _TAPE in op.name
        if is_of_tape or any(t.op.name in backward for t in op.inputs):
            backward.add(op.name)
        if op.type in _LOOPS and op.name not in backward:
            in_loops += _kept_in_loop(op)
        if not is_of_tape or op.type in _READ_ONLY_SHAPES:
            continue
        for tensor in op.inputs:
            source = _behind_views(tensor)
            if source.op.name in backward or source.op.type in _THERE_ANYWAY:
                continue
            kept[source.ref()] = _size_of(source)
    return sum(kept.values()) + in_loops


def _kept_in_loop(loop: tf.Operation) -> int:
    """What TensorFlow puts on stacks for the way back, in all rounds."""
    pushed = [
        op.inputs[1]
        for body in _called(loop)
        for op in _needed(body)
        if op.type == "TensorListPushBack"
    ]
    return sum(map(_size_of, pushed)) * (_rounds(loop) or 1)


def _size_of(tensor: tf.Tensor) -> int:
    """Bytes; 0 where the shape is unknown, or the tensor is a handle."""
    return (tensor.shape.num_elements() or 0) * tensor.dtype.size


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
