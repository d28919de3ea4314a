"""A step for a TPU that is not here: traced, lowered, compiled by its compiler.

The step is traced under the real `TPUStrategy` over a list of cores that is
made up; what one core would run is cut out of the trace and lowered to XLA by
TensorFlow; JAX's bindings hand it to the TPU's compiler, which needs no TPU.

This is the one file that touches private names for it (`_PRIVATE_NAMES` lists
them with the reason; a test fails when one changes).
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import json
import linecache
import math
import os
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.tpu import topology_pb2
from tensorflow.python.client import session
from tensorflow.python.tpu import tpu_strategy_util, tpu_system_metadata

from dist_amp import graphs

_PRIVATE_NAMES = {
    "tensorflow 2.21, tpu_system_metadata": {
        "_query_tpu_system_metadata": "asks the runtime for the TPU's cores",
    },
    "tensorflow 2.21, tpu_strategy_util": {
        "_INITIALIZED_TPU_SYSTEMS": "the strategy wants an initialized TPU",
    },
    "tensorflow 2.21, session": {
        "_DeviceAttributes": "what the list of cores is made of",
    },
    "tensorflow 2.21, TPUStrategy": {
        "_enable_packed_variable_in_eager_mode": "needs kernels of a TPU",
    },
    "tensorflow 2.21, Tensor": {
        "_handle_data": "dtype of the variable behind a handle",
    },
    "jaxlib 0.10.2": {
        "_jax.mlir.hlo_to_stablehlo": "from TensorFlow's form to JAX's",
        "xla_client.make_tfrt_tpu_c_api_device_topology": "no TPU needed",
    },
    "jax 0.10.2": {
        "_src.interpreters.mlir.make_ir_context": "with XLA's dialects",
    },
}

EXTRA = 'pip install "dist-amp[tpu-plan]"'

# Of the process, before libtpu is loaded, where nobody set them: no question
# to a metadata server that is not there, no lock on a TPU, no folder of logs.
_LIBTPU_ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}
_ALL_TO_ALL = "dist_amp.all_to_all"


def make_strategy(num_replicas: int = 2) -> tf.distribute.TPUStrategy:
    """A `TPUStrategy` over cores that are not there.

    Models, optimizers and distributed datasets can be made in it, and steps
    traced; nothing runs. Variables live on the CPU.

    Args:
        num_replicas: Cores, at least 1.
    """
    topology = topology_pb2.TopologyProto(
        mesh_shape=[num_replicas, 1, 1, 1],
        num_tasks=1,
        num_tpu_devices_per_task=num_replicas,
        device_coordinates=[
            n for i in range(num_replicas) for n in (i, 0, 0, 0)
        ],
    ).SerializeToString()
    cores = [_device("TPU", i) for i in range(num_replicas)]
    metadata = tpu_system_metadata.TPUSystemMetadata(
        num_cores=num_replicas,
        num_hosts=1,
        num_of_cores_per_host=num_replicas,
        topology=tf.tpu.experimental.Topology(serialized=topology),
        devices=(*cores, _device("CPU", 0)),
    )
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver("local")
    resolver.set_tpu_topology(topology)
    tf.config.set_soft_device_placement(True)
    initialized = tpu_strategy_util._INITIALIZED_TPU_SYSTEMS
    with (
        _replaced(initialized, "local", metadata.topology),
        _patched(
            tpu_system_metadata,
            "_query_tpu_system_metadata",
            lambda *_, **__: metadata,
        ),
    ):
        strategy = tf.distribute.TPUStrategy(resolver)
    strategy._enable_packed_variable_in_eager_mode = False
    return strategy


def _device(kind: str, index: int) -> Any:
    name = f"/job:localhost/replica:0/task:0/device:{kind}:{index}"
    return session._DeviceAttributes(name, kind, 0, 0)


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _replaced(table: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    before = table.get(key)
    table[key] = value
    try:
        yield
    finally:
        del table[key]
        if before is not None:
            table[key] = before


# ------------------------------------------------------- one replica's program


@dataclasses.dataclass(frozen=True)
class ReplicatedVariable:
    """A variable of a step.

    Attributes:
        handles: The resource of each replica's copy.
        dtype: Of its value.
    """

    handles: tuple[tf.Tensor, ...]
    dtype: tf.DType

    def read(self, replica: int = 0) -> tf.Tensor:
        """The value of a replica's copy."""
        return tf.raw_ops.ReadVariableOp(
            resource=self.handles[replica], dtype=self.dtype
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """What one core runs of a step.

    Attributes:
        function: Compiled by XLA; takes what the step's placeholders take and
            reads and writes the variables of replica 0.
        specs: Of its arguments.
        variables: Those that it uses, in the order of the lowered program's
            last arguments.
        num_replicas: Of the strategy that the step was traced under.
        all_reduce_bytes: What each core puts into all-reduces in a step.
        num_all_reduces: Operations in the trace; the compiler joins them.
        graph: The trace, for the places of operations in the user's code.
    """

    function: Any
    specs: tuple[tf.TensorSpec, ...]
    variables: tuple["ReplicatedVariable", ...]
    num_replicas: int
    all_reduce_bytes: int
    num_all_reduces: int
    graph: tf.Graph


def program_of(
    step: Any, num_replicas: int | None = None, *, reads_back: bool = False
) -> Program:
    """Cuts out of a traced step what one core runs.

    Args:
        step: A `ConcreteFunction` that calls `strategy.run` once, under the
            strategy of `make_strategy`, with placeholders of a replica's
            shapes for all replicas alike.
        num_replicas: Cores that take part in all-reduces; those of the
            strategy by default.
        reads_back: Whether the program ends by returning the values of its
            variables, after what the step returns.

    Raises:
        ValueError: There is no such call, or there are several.
    """
    cut = _Cut(step, num_replicas)
    return Program(
        function=cut.function(reads_back=reads_back),
        specs=tuple(cut.specs),
        variables=tuple(cut.variables),
        num_replicas=cut.traced_replicas,
        all_reduce_bytes=cut.all_reduce_bytes,
        num_all_reduces=cut.collectives["CrossReplicaSum"],
        graph=step.graph,
    )


class _Cut:
    """One replica's part of a graph, as a graph of its own."""

    def __init__(self, step: Any, num_replicas: int | None):
        graph = step.graph
        self._captured = {inner.name: outer for outer, inner in graph.captures}
        self._ops = {op.name: op for op in graph.get_operations()}
        self._cluster = {
            name
            for name, op in self._ops.items()
            if "_tpu_replicate" in op.node_def.attr
        }
        metadata = [
            op for op in self._ops.values() if op.type == "TPUReplicateMetadata"
        ]
        if len(metadata) != 1:
            raise ValueError(
                "The step must call `strategy.run` once. Received one that "
                f"calls it {len(metadata)} times."
            )
        self.traced_replicas = metadata[0].get_attr("num_replicas")
        self._num_replicas = num_replicas or self.traced_replicas
        self.specs: list[tf.TensorSpec] = []
        self.variables: list[ReplicatedVariable] = []
        self.all_reduce_bytes = 0
        self.collectives: collections.Counter[str] = collections.Counter()
        # What the cluster takes from outside: "arg", "variable" or "constant".
        self._inputs: dict[str, tuple[str, Any]] = {}
        self._definition = tf.compat.v1.GraphDef()
        whole = graph.as_graph_def()
        self._definition.library.CopyFrom(whole.library)
        self._definition.versions.CopyFrom(whole.versions)
        self._add_groups()
        for node in whole.node:
            op = self._ops[node.name]
            if node.name in self._cluster and op.type not in _OF_REPLICATION:
                self._add(node, op)
        self._outputs = [
            f"{op.inputs[0].op.name}:{op.inputs[0].value_index}"
            for op in self._ops.values()
            if op.type == "TPUReplicatedOutput"
        ]

    def function(self, *, reads_back: bool) -> Any:
        """The replica's part, to be compiled by XLA."""

        @tf.function(jit_compile=True, autograph=False)
        def replica(*arguments: tf.Tensor) -> Any:
            graph = tf.compat.v1.get_default_graph()
            # Captured first, in their order.
            handles = [graph.capture(v.handles[0]) for v in self.variables]
            given = {
                "arg": lambda place: arguments[place],
                "variable": lambda place: handles[place],
                "constant": tf.constant,
            }
            outputs = tf.import_graph_def(
                self._definition,
                input_map={
                    f"{_cut_name(key)}:0": given[kind](value)
                    for key, (kind, value) in self._inputs.items()
                },
                return_elements=self._outputs,
                name="",
            )
            if reads_back:
                outputs += [
                    tf.raw_ops.ReadVariableOp(resource=handle, dtype=v.dtype)
                    for handle, v in zip(handles, self.variables, strict=True)
                ]
            return [*outputs, tf.constant(0)]  # XLA wants one at least

        return replica

    def _add_groups(self) -> None:
        """All replicas in one group, for the all-reduces."""
        node = self._definition.node.add()
        node.name, node.op = _GROUPS, "Const"
        group = np.arange(self._num_replicas, dtype=np.int32)[np.newaxis]
        node.attr["dtype"].type = tf.int32.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(group))

    def _add(self, original: Any, op: tf.Operation) -> None:
        node = self._definition.node.add()
        node.CopyFrom(original)
        node.device = ""
        for name in ("_tpu_replicate", "_xla_outside_compilation"):
            node.attr.pop(name, None)
        inputs = [self._input_of(tensor) for tensor in op.inputs]
        inputs += [
            f"^{control.name}"
            for control in op.control_inputs
            if control.name in self._cluster
            and control.type not in _OF_REPLICATION
        ]
        del node.input[:]
        node.input.extend(inputs)
        if node.op == "CrossReplicaSum":
            self._to_all_reduce(node, op)
        elif node.op == "AllToAll":
            self._to_custom_call(node, op)

    def _input_of(self, tensor: tf.Tensor) -> str:
        key = f"{tensor.op.name}:{tensor.value_index}"
        if tensor.op.name in self._cluster:
            return key
        if key not in self._inputs:
            self._inputs[key] = self._source_of(tensor)
        return _cut_name(key)

    def _source_of(self, tensor: tf.Tensor) -> tuple[str, Any]:
        """Where the cluster gets a tensor from, on replica 0."""
        copies = [tensor]
        if tensor.op.type == "TPUReplicatedInput":
            copies = list(tensor.op.inputs)
        source, *others = map(self._behind_identities, copies)
        if source.name in self._captured:
            outer = self._captured[source.name]
            if outer.dtype != tf.resource:
                return "constant", outer.numpy()
            value = outer._handle_data.shape_and_type[0]
            handles = (outer, *(self._captured[o.name] for o in others))
            self.variables.append(
                ReplicatedVariable(handles, tf.as_dtype(value.dtype))
            )
            return "variable", len(self.variables) - 1
        if source.op.type == "Placeholder":
            self.specs.append(tf.TensorSpec(source.shape, source.dtype))
            return "arg", len(self.specs) - 1
        constant = tf.get_static_value(source)
        if constant is None:
            raise ValueError(
                f"The step takes {source.name} ({source.op.type}) from outside "
                "of the replicas, which only variables and arguments may be."
            )
        return "constant", constant

    def _behind_identities(self, tensor: tf.Tensor) -> tf.Tensor:
        while (
            tensor.op.type == "Identity" and tensor.name not in self._captured
        ):
            tensor = tensor.op.inputs[0]
        return tensor

    def _to_all_reduce(self, node: Any, op: tf.Operation) -> None:
        self.collectives["CrossReplicaSum"] += 1
        elements = op.outputs[0].shape.num_elements() or 0
        self.all_reduce_bytes += elements * op.outputs[0].dtype.size
        node.op, node.input[1] = "XlaAllReduce", f"{_GROUPS}:0"
        node.attr["reduce_op"].s, node.attr["mode"].s = b"Add", b"CrossReplica"

    def _to_custom_call(self, node: Any, op: tf.Operation) -> None:
        """TensorFlow cannot lower it on a CPU; `_to_module` puts it back."""
        self.collectives["AllToAll"] += 1
        names = ("concat_dimension", "split_dimension", "split_count")
        options = {name: node.attr[name].i for name in names}
        dtype = node.attr["T"].type
        node.ClearField("attr")
        node.op = "XlaCustomCallV2"
        del node.input[1]
        node.attr["call_target_name"].s = _ALL_TO_ALL.encode()
        node.attr["has_side_effect"].b = False
        node.attr["backend_config"].s = json.dumps(options).encode()
        node.attr["operand_dtypes"].list.type.append(dtype)
        node.attr["result_dtypes"].list.type.append(dtype)
        node.attr["result_shapes"].list.shape.append(
            op.outputs[0].shape.as_proto()
        )


_OF_REPLICATION = ("TPUReplicateMetadata", "TPUCompilationResult")
_GROUPS = "dist_amp_groups"


def _cut_name(key: str) -> str:
    return "cut_" + re.sub(r"[/:]", "_", key)


# -------------------------------------------------------------------- lowering


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """An operation that a TPU cannot run.

    Attributes:
        op: Its type, say "AsString".
        name: Its name, which tells the layer.
        why: What is wrong with it.
        place: `file:line` of the user's code that makes it, if it is known.
        line: That line.
    """

    op: str
    name: str
    why: str
    place: str | None
    line: str | None

    def __str__(self) -> str:
        where = (
            f"made in {self.place}: {self.line}" if self.place else self.name
        )
        return f"{self.op} ({self.why}), {where}"


class UnsupportedError(ValueError):
    """A TPU cannot run the step.

    Attributes:
        found: The operations it cannot run.
        reason: What XLA said.
    """

    def __init__(self, found: Sequence[Unsupported], reason: str):
        self.found = tuple(found)
        self.reason = reason
        told = "; ".join(map(str, found)) or reason
        super().__init__(f"A TPU cannot run this step: {told}")


def lower(program: Program) -> bytes:
    """The program as an HLO module of XLA, serialized.

    Raises:
        UnsupportedError: XLA has no kernel for something in it.
    """
    try:
        make = program.function.experimental_get_compiler_ir(*program.specs)
        return make(stage="hlo_serialized")
    except (tf.errors.OpError, ValueError) as error:
        found = _unsupported(str(error), program.graph)
        raise UnsupportedError(found, str(error)[:2000]) from error


def _unsupported(message: str, graph: tf.Graph) -> list[Unsupported]:
    """The operations that an error of XLA's names, with the user's lines."""
    types = set(re.findall(r"No registered '(\w+)' OpKernel", message))
    varying = set(re.findall(r"Input \d+ to node `([^`]+)` with op", message))
    found: dict[tuple[str, str | None], Unsupported] = {}
    for op, _ in graphs.operations(graph):
        if op.type in types:
            why = "there is no such operation on TPUs"
        elif op.name in varying:
            why = "its shape depends on data"
        else:
            continue
        place, line = _users_line(op)
        one = Unsupported(op.type, op.name, why, place, line)
        found.setdefault((op.type, place), one)
    return list(found.values())


def _users_line(op: tf.Operation) -> tuple[str | None, str | None]:
    """The innermost frame that is neither a library's nor ours."""
    ours = pathlib.Path(__file__).resolve().parents[1]
    for frame in reversed(op.traceback or ()):
        path = pathlib.Path(frame.filename)
        is_ours = any(
            path.is_relative_to(ours / name) for name in ("dist_amp", "launch")
        )
        if "site-packages" in path.parts or is_ours or not path.is_file():
            continue
        line = linecache.getline(frame.filename, frame.lineno).strip()
        return f"{frame.filename}:{frame.lineno}", line
    return None, None


# ----------------------------------------------------------- the TPU's compiler


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the TPU's compiler tells of a program on one core.

    Attributes:
        device: Kind of the chip, say "TPU v5 lite".
        seconds: That the compilation took.
        argument_bytes: Of variables and the batch.
        output_bytes: Of results that do not take an argument's place.
        temporary_bytes: Of activations and all else in between.
        code_bytes: Of the program itself.
        flops: Floating-point operations of a step.
        bytes_accessed: Bytes of HBM that a step reads and writes.
        collectives: How many of each kind are left, and among whom.
    """

    device: str
    seconds: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    flops: float
    bytes_accessed: float
    collectives: dict[str, int]

    @property
    def used_bytes(self) -> int:
        """HBM that a step needs on a core."""
        return (
            self.argument_bytes
            + self.output_bytes
            + self.temporary_bytes
            + self.code_bytes
        )


class OutOfMemoryError(ValueError):
    """The program does not fit in the HBM of a core.

    Attributes:
        used_bytes: What it would need, if the compiler told.
        limit_bytes: What there is, if the compiler told.
    """

    def __init__(self, message: str):
        super().__init__(message)
        size = r"\(?([\d.]+)([KMGT]?)\)?"
        used, limit = (
            r"(?:[Uu]sed|temporaries)",
            r"(?:of|exceeds available HBM)",
        )
        found = re.search(f"{used} {size} {limit} {size}", message)
        self.used_bytes = self.limit_bytes = None
        if found:
            self.used_bytes = _bytes_of(found[1], found[2])
            self.limit_bytes = _bytes_of(found[3], found[4])


def _bytes_of(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def has_compiler() -> bool:
    """Whether the extra `tpu-plan` is installed."""
    try:
        importlib.metadata.version("libtpu")
        importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def compile_for_tpu(program: Program, topology: str) -> Compiled:
    """Compiles the program for all cores of a TPU, with its own compiler.

    Args:
        program: Of `program_of`, for as many cores as the topology has.
        topology: Name and shape, say "v5e:2x2", "v4:2x2x1" or "v6e:2x4".

    Raises:
        OutOfMemoryError: It does not fit.
        UnsupportedError: A TPU cannot run it.
        ValueError: The topology is unknown, or the extra is not installed.
    """
    module = lower(program)
    devices = _devices(topology)
    begin = time.monotonic()
    executable = compile_module(module, devices, loads=False)
    seconds = time.monotonic() - begin
    memory = executable.get_compiled_memory_stats()
    costs = executable.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    text = executable.hlo_modules()[0].to_string()
    return Compiled(
        device=devices[0].device_kind,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=costs.get("flops", 0.0),
        bytes_accessed=costs.get("bytes accessed", 0.0),
        collectives=_collectives_in(text),
    )


def num_cores(topology: str) -> int:
    """Cores of a topology, as many replicas as a strategy has there.

    Raises:
        ValueError: The topology is unknown, or the extra is not installed.
    """
    return len(_devices(topology))


def hbm_bytes(topology: str) -> int:
    """HBM of a core that programs may use, as its compiler tells.

    It is asked for a program that cannot fit.

    Raises:
        ValueError: The topology is unknown, or the extra is not installed.
    """
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    devices = _devices(topology)[:1]
    array = f"tensor<{2**40}xf32>"
    text = (
        f"func.func public @main(%a: {array}) -> {array} {{\n"
        f"  %b = stablehlo.negate %a : {array}\n  return %b : {array}\n}}"
    )
    with mlir.make_ir_context():
        try:
            _compile(ir.Module.parse(text), devices, loads=False)
        except OutOfMemoryError as error:
            if error.limit_bytes is not None:
                return error.limit_bytes
    raise ValueError(f"The compiler does not tell the HBM of {topology}.")


def _devices(topology: str) -> list[Any]:
    """Descriptions of the cores, to compile for."""
    if not has_compiler():
        raise ValueError(
            f"The TPU's compiler is not installed: {EXTRA} (libtpu is under "
            "Google Cloud's terms)."
        )
    os.environ |= {**_LIBTPU_ENVIRONMENT, **os.environ}
    import libtpu
    from jaxlib import xla_client

    if not xla_client.pjrt_plugin_loaded("tpu"):
        library = os.path.join(os.path.dirname(libtpu.__file__), "libtpu.so")
        xla_client.load_pjrt_plugin_dynamically("tpu", library)
        xla_client.initialize_pjrt_plugin("tpu")
    options = {}
    shape = topology.partition(":")[2]
    if shape and math.prod(map(int, re.findall(r"\d+", shape))) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found: Any = xla_client.make_tfrt_tpu_c_api_device_topology(
            topology, **options
        )
    except Exception as error:  # of a class of jaxlib's own
        raise ValueError(
            f"`topology` must be one that the TPU's compiler knows, such as "
            f"v5e:2x2, v5e:16x16, v4:2x2x1, v5p:2x2x1 or v6e:2x4. Received "
            f"{topology!r}: {str(error).splitlines()[0][:200]} (--topology)."
        ) from error
    return list(found._make_compile_only_devices())


def compile_module(
    module: bytes, devices: Sequence[Any], *, loads: bool = True
) -> Any:
    """Compiles an HLO module, serialized, for JAX's devices.

    Args:
        module: Of `lower`.
        devices: A replica runs on each.
        loads: Whether it is to run here.

    Returns:
        The executable, as jaxlib has it.

    Raises:
        OutOfMemoryError: It does not fit.
    """
    from jax._src.interpreters import mlir

    with mlir.make_ir_context():
        stable = _to_module(module, len(devices))
        return _compile(stable, devices, loads=loads)


def _compile(module: Any, devices: Sequence[Any], *, loads: bool) -> Any:
    from jaxlib import xla_client

    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = len(devices), 1
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[device.id] for device in devices])
    )
    client = devices[0].client
    compile_ = client.compile_and_load if loads else client.compile
    try:
        return compile_(
            module,
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options,
        )
    except Exception as error:  # of a class of jaxlib's own
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemoryError(str(error)) from error
        raise


def _to_module(serialized: bytes, num_replicas: int) -> Any:
    """HLO as StableHLO, without what only TensorFlow's form can say."""
    from jaxlib import _jax
    from jaxlib.mlir import ir

    module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(serialized))
    copies, calls = [], []

    def visit(op: Any) -> Any:
        if op.name == "mhlo.copy":
            copies.append(op)
        elif op.name == "stablehlo.custom_call" and _ALL_TO_ALL in str(
            op.attributes["call_target_name"]
        ):
            calls.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    for op in calls:
        _put_all_to_all(op, num_replicas)
    for op in copies:  # of an output, which need be no copy
        op.results[0].replace_all_uses_with(op.operands[0])
        op.erase()
    return module


def _put_all_to_all(call: Any, num_replicas: int) -> None:
    """In place of the call that stands for it; in groups of its own size."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    options = json.loads(ir.StringAttr(call.attributes["backend_config"]).value)
    size = options["split_count"]
    groups: Any = np.arange(num_replicas, dtype=np.int64).reshape(-1, size)

    def number(name: str) -> Any:
        kind = ir.IntegerType.get_signless(64)
        return ir.IntegerAttr.get(kind, options[name])

    with ir.InsertionPoint(call), call.location:
        new = stablehlo.AllToAllOp(
            [call.operands[0]],
            number("split_dimension"),
            number("concat_dimension"),
            number("split_count"),
            ir.DenseIntElementsAttr.get(groups),
        )
    call.results[0].replace_all_uses_with(new.results[0])
    call.erase()


def _collectives_in(text: str) -> dict[str, int]:
    """Collectives of a compiled program, by kind and replica group."""
    pattern = r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
    found: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        kind = re.search(pattern, line)
        if kind and "-done(" not in line:
            groups = re.search(r"replica_groups=(\S+?), ", line)
            among = f" among {groups[1]}" if groups else ""
            found[kind[1].removesuffix("-start") + among] += 1
    return dict(found)
