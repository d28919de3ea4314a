"""What a step takes before it is run: FLOPs, memory, traffic; for TPUs exactly.

One trace of one replica's train step tells what it multiplies and what it
keeps for the backward pass. For a TPU its own compiler tells the rest; see
`ahead_of_time`. No device is needed for either.
"""

import dataclasses
from typing import Any

import tensorflow as tf

from dist_amp import ahead_of_time, graphs, memory
from dist_amp import optimizer as optimizer_lib
from dist_amp.stream import DatasetLike
from dist_amp.trainer import Trainer

# Where a search for the largest batch ends: so close to the limit.
_PRECISION = 1 / 16
_MOST_COMPILATIONS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a train step takes.

    Attributes:
        precision: Compute dtype of the step.
        num_replicas: How many share the global batch.
        per_replica_batch_size: Examples of each; the largest, if they differ.
        parameters: Numbers in the model's variables.
        flops: Of a step, all replicas together: matrix products and
            convolutions, forward and backward.
        uncounted_products: Products that run an unknown number of times, in
            loops, and are not in `flops`.
        parameter_bytes: Of the model's variables, on each replica.
        optimizer_bytes: Of the optimizer's variables, likewise; with an
            "int8" wire also of what gradients have lost on their way.
        gradient_bytes: Of all gradients, likewise; those of embeddings count
            as if every row had one.
        activation_bytes: What the forward pass leaves for the backward pass,
            likewise, if nothing is computed twice or fused away.
        all_reduce_bytes: What each replica puts into all-reduces in a step.
        num_all_reduces: Operations; None where they are not traced.
    """

    precision: str
    num_replicas: int
    per_replica_batch_size: int
    parameters: int
    flops: int
    uncounted_products: int
    parameter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    activation_bytes: int
    all_reduce_bytes: int
    num_all_reduces: int | None

    @property
    def global_batch_size(self) -> int:
        """Examples of a step."""
        return self.num_replicas * self.per_replica_batch_size

    @property
    def memory_bytes(self) -> int:
        """What a replica needs at least: variables, gradients, activations."""
        return (
            self.parameter_bytes
            + self.optimizer_bytes
            + self.gradient_bytes
            + self.activation_bytes
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuPlan:
    """What the TPU's compiler says.

    Attributes:
        topology: Name and shape of the TPU.
        hbm_bytes: Of a core, for programs.
        fits: Whether the step does.
        hbm_used_bytes: Of `hbm_bytes`, on each core; None if the compiler
            does not tell of a step that does not fit.
        compile_secs: That the compilation took here.
        compiled: Of a step that fits.
        largest_per_replica_batch_size: That fits, within a sixteenth; 0 if
            not even one example does, None if it was not searched for.
    """

    topology: str
    hbm_bytes: int
    fits: bool
    hbm_used_bytes: int | None
    compile_secs: float | None = None
    compiled: ahead_of_time.Compiled | None = None
    largest_per_replica_batch_size: int | None = None


def make(
    trainer: Trainer,
    dataset: DatasetLike,
    *,
    num_replicas: int,
    per_replica_batch_size: int,
    wire_dtype: str = "float32",
) -> Plan:
    """Traces the train step of one replica and reads the trace.

    Args:
        trainer: Its strategy has one replica, or is one of
            `ahead_of_time.make_strategy`.
        dataset: As in `Trainer.fit`; only its shapes are looked at.
        num_replicas: That are to train; need not be here.
        per_replica_batch_size: Examples of each.
        wire_dtype: What gradients are to travel in; a TPU's are traced.
    """
    step = _traced(trainer, dataset, per_replica_batch_size)
    program = None
    if trainer.is_on("TPU"):
        program = ahead_of_time.program_of(step, num_replicas)
    parts = trainer.optimizer.gradient_accumulation_steps or 1
    flops, uncounted = graphs.flops_of(step.graph)
    model, optimizer = trainer.model, trainer.optimizer
    gradients = memory.bytes_of(model.trainable_variables)
    state = memory.bytes_of(optimizer.variables)
    if wire_dtype == "int8" and num_replicas > 1:
        state += gradients  # what each replica still owes, in float32
    reduced = 0
    if program is not None:
        reduced = program.all_reduce_bytes
    elif num_replicas > 1:
        statistics = optimizer_lib.moving_statistics(model)
        wire = tf.as_dtype(wire_dtype).size
        reduced = gradients * wire // 4 + memory.bytes_of(statistics)
    return Plan(
        precision=model.dtype_policy.compute_dtype,
        num_replicas=num_replicas,
        per_replica_batch_size=per_replica_batch_size,
        parameters=model.count_params(),
        flops=flops * num_replicas * parts,
        uncounted_products=uncounted,
        parameter_bytes=memory.bytes_of(model.variables),
        optimizer_bytes=state,
        gradient_bytes=gradients,
        activation_bytes=graphs.kept_bytes(step.graph),
        all_reduce_bytes=reduced,
        num_all_reduces=program.num_all_reduces if program else None,
    )


def flops_of_replica(trainer: Trainer, dataset: DatasetLike, rows: int) -> int:
    """FLOPs of an update in one replica, by a trace of it.

    Args:
        trainer: On any strategy.
        dataset: As in `Trainer.fit`; only its shapes are looked at.
        rows: Examples of the replica in a batch, of one part of the update
            if it accumulates.
    """
    flops, _ = graphs.flops_of(_traced(trainer, dataset, rows).graph)
    flops *= trainer.optimizer.gradient_accumulation_steps or 1
    # A TPU's replicas share a program; others have each their own.
    devices = trainer.strategy.extended.worker_devices
    return flops if trainer.is_on("TPU") else flops // len(devices)


def make_for_tpu(
    trainer: Trainer,
    dataset: DatasetLike,
    *,
    topology: str,
    per_replica_batch_size: int,
    searches: bool = False,
) -> TpuPlan:
    """Compiles the train step for a TPU that need not be here.

    Args:
        trainer: Made in a strategy of `ahead_of_time.make_strategy`.
        dataset: As in `Trainer.fit`; only its shapes are looked at.
        topology: See `ahead_of_time.compile_for_tpu`.
        per_replica_batch_size: Examples of each core.
        searches: Whether to look for the largest batch that fits.

    Raises:
        UnsupportedError: A TPU cannot run the step.
        ValueError: The topology is unknown, or the extra is not installed.
    """
    num_cores = ahead_of_time.num_cores(topology)
    limit = ahead_of_time.hbm_bytes(topology)

    def attempt(size: int) -> TpuPlan:
        step = _traced(trainer, dataset, size)
        program = ahead_of_time.program_of(step, num_cores)
        try:
            compiled = ahead_of_time.compile_for_tpu(program, topology)
        except ahead_of_time.OutOfMemoryError as error:
            return TpuPlan(
                topology=topology,
                hbm_bytes=error.limit_bytes or limit,
                fits=False,
                hbm_used_bytes=error.used_bytes,
            )
        return TpuPlan(
            topology=topology,
            hbm_bytes=limit,
            fits=compiled.used_bytes <= limit,
            hbm_used_bytes=compiled.used_bytes,
            compile_secs=compiled.seconds,
            compiled=compiled,
        )

    found = attempt(per_replica_batch_size)
    if not searches:
        return found
    largest = _largest(attempt, per_replica_batch_size, found)
    return dataclasses.replace(found, largest_per_replica_batch_size=largest)


def _largest(attempt: Any, size: int, first: TpuPlan) -> int:
    """The largest batch that fits; 0 if not even one example does.

    What a step takes grows in a line with the batch, so that two sizes tell
    where the limit is; the compiler has the last word.
    """
    sizes = {size: first}
    for _ in range(_MOST_COMPILATIONS):
        fitting = [n for n, plan in sizes.items() if plan.fits]
        failing = [n for n, plan in sizes.items() if not plan.fits]
        low, high = max(fitting, default=0), min(failing, default=None)
        if high is not None and high - low <= max(1, int(low * _PRECISION)):
            break
        size = _next_size(sizes, low, high)
        sizes[size] = attempt(size)
    return max((n for n, plan in sizes.items() if plan.fits), default=0)


def _next_size(sizes: dict[int, TpuPlan], low: int, high: int | None) -> int:
    """Where the line through the last two sizes meets the limit."""
    used = {
        n: plan.hbm_used_bytes
        for n, plan in sizes.items()
        if plan.hbm_used_bytes
    }
    guess = 2 * low
    if len(used) > 1:
        (a, used_a), (b, used_b) = list(used.items())[-2:]
        slope = (used_b - used_a) / (b - a)
        if slope > 0:
            room = sizes[b].hbm_bytes - used_b
            guess = int((b + room / slope) * (1 - _PRECISION / 3))
    if high is None:  # small batches tell little
        return min(max(guess, 2 * low), 64 * low)
    margin = max(1, (high - low) // 8)
    return min(max(guess, low + margin), high - margin)


def _traced(trainer: Trainer, dataset: DatasetLike, rows: int) -> Any:
    """The train step of every replica, for slices of so many rows."""
    trainer.build(dataset)
    slices = trainer.slice_spec(dataset)

    def fixed(leaf: Any) -> Any:
        if not isinstance(leaf, tf.TensorSpec) or leaf.shape.rank == 0:
            return leaf if isinstance(leaf, tf.TensorSpec) else None
        return tf.TensorSpec([rows, *leaf.shape[1:]], leaf.dtype)

    batch = tf.nest.map_structure(fixed, slices)

    @tf.function(autograph=False)
    def step(batch: Any) -> None:
        trainer.strategy.run(trainer.train_replica, args=(batch,))

    return step.get_concrete_function(batch)
