"""Tries out what a run will need: devices, all-reduces, shared storage.

Small enough to be done before each run. Each function returns what it found
and decides nothing.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from dist_amp import strategy as strategy_lib

# What gradients, metrics and counters travel in.
WIRE_DTYPES = ("float32", "float16", "bfloat16", "int64")

_NUM_ELEMENTS = 4096
_NUM_TINY = 50
_FIRST_BYTES, _GROWTH = 2**16, 8
_NUM_CHAINED = 4  # all-reduces in a call, so that the call itself counts less
_NUM_CALLS = 3
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclasses.dataclass(frozen=True)
class SumCheck:
    """All-reduces of numbers with a known sum.

    Attributes:
        dtype: What they were sent in.
        wrong_workers: Workers on which a replica got another sum.
    """

    dtype: str
    wrong_workers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The time of an all-reduce, in the words of NVIDIA's nccl-tests.

    Attributes:
        num_bytes: Size of the tensor on each replica.
        num_replicas: How many take part.
        seconds: Median time, on the slowest worker.
    """

    num_bytes: int
    num_replicas: int
    seconds: float

    @property
    def algorithm_bandwidth(self) -> float:
        """Size over time, in bytes a second."""
        return self.num_bytes / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """What each link carries: the above times 2 (n - 1) / n."""
        n = self.num_replicas
        return self.algorithm_bandwidth * 2 * (n - 1) / n


# -------------------------------------------------------------------- devices


def check_device(device: str, *, jit_compile: bool = False) -> str:
    """Multiplies small matrices on a device, with a known answer.

    Args:
        device: As "GPU:0".
        jit_compile: Whether XLA compiles the product.

    Returns:
        What went wrong; empty if nothing did.
    """
    multiply = tf.matmul
    if jit_compile:
        multiply = tf.function(multiply, jit_compile=True)
    # A permutation: exact in every dtype, however the device multiplies.
    numbers = np.arange(64 * 64).reshape(64, 64) % 100
    turned = np.eye(64)[::-1]
    try:
        with tf.device(device):
            for dtype in (tf.float32, tf.float16, tf.bfloat16):
                product = multiply(
                    tf.constant(numbers, dtype), tf.constant(turned, dtype)
                )
                if not product.device.endswith(device):
                    return f"TensorFlow computed on {product.device} instead"
                product = tf.cast(product, tf.float32).numpy()
                if not np.array_equal(product, numbers[:, ::-1]):
                    return f"wrong results in {dtype.name}"
    except (tf.errors.OpError, RuntimeError) as error:
        return str(getattr(error, "message", error)).partition("\n")[0]
    return ""


# ----------------------------------------------------------------- all-reduce


def check_sums(strategy: tf.distribute.Strategy) -> list[SumCheck]:
    """All-reduces numbers whose sums are exact; all workers call it.

    Element k is a sum of what replicas k and k + 1, modulo their number, give
    it: so it is exact in every dtype and in any order, and a replica that was
    left out or counted twice shows.

    Args:
        strategy: Whose replicas take part.

    Returns:
        A check for each of `WIRE_DTYPES`, the same on every worker.
    """
    counts = []
    for dtype in WIRE_DTYPES:
        results = _summed(strategy, tf.as_dtype(dtype))
        expected = sum(_summands(dtype))
        counts.append(
            sum(not np.array_equal(result, expected) for result in results)
        )
    table = strategy_lib.gather_workers(strategy, counts)
    return [
        SumCheck(dtype, tuple(map(int, np.flatnonzero(column))))
        for dtype, column in zip(WIRE_DTYPES, table.T, strict=True)
    ]


def _summands(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """What the two replicas of an element give; sums are at most 150."""
    places = np.arange(_NUM_ELEMENTS)
    unit = 2**40 if dtype == "int64" else 1
    return (places % 100 + 1) * unit, (places % 50 + 1) * unit


def _summed(
    strategy: tf.distribute.Strategy, dtype: tf.DType
) -> list[np.ndarray]:
    """What the replicas of this worker got."""
    first, second = (
        tf.cast(tf.constant(part), dtype) for part in _summands(dtype.name)
    )
    number = strategy.num_replicas_in_sync
    places = tf.range(_NUM_ELEMENTS)

    def in_replica() -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        me = context.replica_id_in_sync_group
        nothing = tf.zeros_like(first)
        mine = tf.where(places % number == me, first, nothing)
        mine += tf.where((places + 1) % number == me, second, nothing)
        return context.all_reduce(tf.distribute.ReduceOp.SUM, mine)

    @tf.function
    def everywhere() -> tuple[tf.Tensor, ...]:
        return strategy.experimental_local_results(strategy.run(in_replica))

    wide = tf.int64 if dtype.is_integer else tf.float32
    return [tf.cast(result, wide).numpy() for result in everywhere()]


def measure_latency(strategy: tf.distribute.Strategy) -> Transfer:
    """Times the all-reduce of one number; all workers call it."""
    reduce = _reduction(strategy, num_bytes=4, number=1)
    return _measure(strategy, reduce, num_bytes=4, number=1, calls=_NUM_TINY)


def measure_bandwidth(
    strategy: tf.distribute.Strategy,
    *,
    max_bytes: int = 2**24,
    seconds: float = 4.0,
) -> list[Transfer]:
    """Times all-reduces of float32 that grow; all workers call it.

    Args:
        strategy: Whose replicas take part.
        max_bytes: The largest tensor.
        seconds: Time in all; a size that would take longer is left out.

    Returns:
        One measurement or more, the same on every worker.
    """
    transfers: list[Transfer] = []
    num_bytes, left = _FIRST_BYTES, seconds
    while num_bytes <= max_bytes:
        reduce = _reduction(strategy, num_bytes, _NUM_CHAINED)
        transfer = _measure(
            strategy, reduce, num_bytes, _NUM_CHAINED, _NUM_CALLS
        )
        transfers.append(transfer)
        calls = _NUM_CHAINED * (_NUM_CALLS + 1)
        left -= calls * transfer.seconds
        num_bytes *= _GROWTH
        if calls * transfer.seconds * _GROWTH > left:
            break  # all workers have the same numbers: all stop here
    return transfers


def _reduction(
    strategy: tf.distribute.Strategy, num_bytes: int, number: int
) -> Callable[[], None]:
    """A call that makes so many all-reduces, one after the other."""

    def in_replica(number_to_send: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        value = tf.fill([num_bytes // 4], number_to_send)
        for _ in range(number):
            value = context.all_reduce(tf.distribute.ReduceOp.SUM, value)
        return value[0]

    @tf.function
    def everywhere(number_to_send: tf.Tensor) -> tuple[tf.Tensor, ...]:
        results = strategy.run(in_replica, args=(number_to_send,))
        return strategy.experimental_local_results(results)

    # An argument: what is known while tracing would be summed then.
    one = tf.constant(1.0)

    def call() -> None:
        for result in everywhere(one):
            result.numpy()  # waits for the device

    return call


def _measure(
    strategy: tf.distribute.Strategy,
    reduce: Callable[[], None],
    num_bytes: int,
    number: int,
    calls: int,
) -> Transfer:
    reduce()  # traces
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        reduce()
        times.append((time.perf_counter() - begin) / number)
    nanoseconds = round(1e9 * statistics.median(times))
    slowest = strategy_lib.gather_workers(strategy, [nanoseconds]).max()
    num_replicas = strategy.num_replicas_in_sync
    return Transfer(num_bytes, num_replicas, max(1, int(slowest)) / 1e9)


# -------------------------------------------------------------------- storage


def write_token(folder: str, name: str) -> str:
    """Writes a file that others can recognize; returns what went wrong.

    Args:
        folder: There, or to be made; `gs://` and the like too.
        name: Of the file, and its content.
    """
    try:
        tf.io.gfile.makedirs(folder)
        with tf.io.gfile.GFile(f"{folder}/{name}", "w") as file:
            file.write(name)
    except (OSError, tf.errors.OpError) as error:
        return _reason(error)
    return ""


def read_token(folder: str, name: str, *, patience: float = 5.0) -> str:
    """Reads what another wrote with `write_token`; what went wrong.

    Args:
        folder: Where it should be.
        name: Of the file.
        patience: Seconds that the file may take to show up. It is asked for
            by its name: network file systems remember listings for longer.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            with tf.io.gfile.GFile(f"{folder}/{name}") as file:
                found = file.read()
            problem = "" if found == name else f"{name} holds something else"
        except tf.errors.NotFoundError:
            problem = f"{name} is not there"
        except (OSError, tf.errors.OpError) as error:
            problem = _reason(error)
        if not problem or time.monotonic() >= deadline:
            return problem
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def remove_tokens(folder: str) -> None:
    """Removes the folder with the tokens, if it can be."""
    with contextlib.suppress(OSError, tf.errors.OpError):
        tf.io.gfile.rmtree(folder)


def _reason(error: BaseException) -> str:
    text = str(getattr(error, "message", None) or error)
    return text.partition("\n")[0]
