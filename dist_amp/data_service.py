"""Batches that a tf.data service loads: the same ones, in the same order.

Every worker of the service goes through the same cheap batches, and cuts and
loads only its share of them: of W workers each one takes every W-th. Here one
batch of each is taken in turn, and a round of W is put in order by their
numbers. Beside its number each has a hash of all cheap batches up to it, so
that workers that do not see the same data are found out at once. Behind the
last batch come empty ones without end, numbered and hashed alike: the end has
come when each worker says so.
"""

import contextlib
import functools
import logging
import queue
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dist_amp.cluster import split_address

_log = logging.getLogger(__name__)

Cut = Callable[[tf.data.Dataset], tf.data.Dataset]

_SECONDS_TO_CONNECT = 5.0
_SECONDS_BETWEEN_TRIES = 0.5
_HASHES = 2**62
_PYTHON = re.compile(r"(Eager)?PyFunc(Stateless)?")
# Those of `tf.random.stateless_*` and `index_shuffle` draw by a seed.
_RANDOM = re.compile(
    r"(Random(Uniform|Standard|Shuffle|Gamma|Poisson|Crop)|Multinomial"
    r"|TruncatedNormal|ParameterizedTruncated|SampleDistorted"
    r"|Stateful(Uniform|StandardNormal|TruncatedNormal|RandomBinomial)"
    r"|RngReadAndSkip|NonDeterministicInts)"
)
_NO_ADDRESSES = "is not in the workers list"


class DataServiceError(ValueError):
    """The service is not there, or cannot load these data."""


class DataServiceLostError(RuntimeError):
    """The service has failed, or does not give all batches any more."""


class _Head(NamedTuple):
    """What travels with the slices of a batch, scalars int64.

    Attributes:
        number: Of the batch, from 0.
        stride: Workers of the service.
        is_end: 1 behind the last batch, else 0.
        before: Hash of all cheap batches before this one,
        after: and with it.
    """

    number: Any
    stride: Any
    is_end: Any
    before: Any
    after: Any


class DataService:
    """A tf.data service, as a training worker sees it.

    What comes is what reading without it would give, bit for bit, in a
    process that has not read the data before: a dataset that shuffles, and is
    no function of the pass, begins its order anew at each reading. All of a
    job's workers may use one service; it cuts for each.

    Args:
        address: "grpc://host:port" of its dispatcher, which must have been
            started with the addresses of all its workers.
        startup_timeout: Seconds to wait for all of the service, once.
        timeout: Seconds without a batch, from its first one on, until the
            service counts as lost.

    Raises:
        DataServiceError: The address is not of this form.
    """

    def __init__(
        self,
        address: str,
        *,
        startup_timeout: float = 300.0,
        timeout: float = 300.0,
    ):
        if not re.fullmatch(r"grpc://\S+:\d+", address):
            raise DataServiceError(
                "`data_service` must be grpc://host:port. Received "
                f"{address!r} (--data_service)."
            )
        self.address = address
        self._startup_timeout = startup_timeout
        self._timeout = timeout
        self._has_begun = False
        self._error: Exception | None = None

    def open(self, batches: tf.data.Dataset, cut: Cut) -> tf.data.Dataset:
        """What `cut` makes of batches, one element of each, made elsewhere.

        Args:
            batches: Every worker of the service goes through all of them.
            cut: Cuts and loads; called with a dataset of one batch.

        Raises:
            DataServiceError: The service does not answer, or the data cannot
                travel to it.
        """
        _check_leaves(batches.element_spec)
        spec = cut(batches).element_spec
        _check_leaves(spec)
        numbered = _numbered(batches, cut, _leaf_specs(spec))
        _check_can_travel(numbered)
        self._wait_for_dispatcher()
        flat = tf.data.Dataset.from_generator(
            functools.partial(self._in_order, numbered),
            output_signature=tuple(_leaf_specs(spec)),
        )

        @tf.autograph.experimental.do_not_convert
        def pack(*leaves: tf.Tensor) -> Any:
            rest = iter(leaves)
            return tf.nest.map_structure(
                lambda one: next(rest) if _is_dense(one) else None, spec
            )

        return flat.map(pack)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Within it errors of what `open` returned are the service's own.

        Raises:
            DataServiceError: It cannot load these data.
            DataServiceLostError: It has failed.
        """
        try:
            yield
        except tf.errors.OpError as error:
            found, self._error = self._error, None
            if found is None:
                raise
            raise found from error

    def _wait_for_dispatcher(self) -> None:
        host, port = split_address(self.address.removeprefix("grpc://"))
        deadline = time.monotonic() + self._limit
        while True:
            try:
                socket.create_connection(
                    (host, port), _SECONDS_TO_CONNECT
                ).close()
                return
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise self._not_there(error) from error
            time.sleep(_SECONDS_BETWEEN_TRIES)

    @property
    def _limit(self) -> float:
        """Seconds to wait for the first batch of a reading."""
        return self._timeout if self._has_begun else self._startup_timeout

    def _not_there(self, error: OSError) -> Exception:
        if self._has_begun:
            return DataServiceLostError(
                f"the data service at {self.address} does not answer any more "
                f"({error}): look whether its dispatcher still runs."
            )
        return DataServiceError(
            f"no data service answers at {self.address} within "
            f"{self._startup_timeout:g} s ({error}): start it, or name its "
            "dispatcher (--data_service, --startup_timeout)."
        )

    # ----------------------------------------------- where batches come back

    def _in_order(
        self, numbered: tf.data.Dataset
    ) -> Iterator[tuple[tf.Tensor, ...]]:
        """The leaves of each batch; each call has a job of its own."""
        try:
            yield from self._rounds(numbered)
        except (DataServiceError, DataServiceLostError) as error:
            self._error = error
            raise
        except tf.errors.OpError as error:
            self._error = self._explained(error)
            raise self._error from error

    def _rounds(
        self, numbered: tf.data.Dataset
    ) -> Iterator[tuple[tf.Tensor, ...]]:
        number = hashed = num_ends = 0
        with contextlib.ExitStack() as stack:
            reader, batches = self._first_round(numbered, stack)
            while num_ends < reader.stride:
                for head, leaves in batches or reader.take(self._timeout):
                    if (head.number, head.before) != (number, hashed):
                        raise self._out_of_order(number, head)
                    number, hashed = number + 1, head.after
                    num_ends += head.is_end
                    if not head.is_end:
                        yield leaves
                batches = []

    def _first_round(
        self, numbered: tf.data.Dataset, stack: contextlib.ExitStack
    ) -> tuple["_Reader", list[tuple[_Head, Any]]]:
        """Waits until all workers of the service take part."""
        deadline = time.monotonic() + self._limit
        while True:
            with contextlib.ExitStack() as attempt:
                reader = attempt.enter_context(_Reader(self.address, numbered))
                batches = self._take_first(reader, deadline)
                if batches is not None:
                    stack.enter_context(attempt.pop_all())
                    self._has_begun = True
                    return reader, batches
            time.sleep(_SECONDS_BETWEEN_TRIES)

    def _take_first(
        self, reader: "_Reader", deadline: float
    ) -> list[tuple[_Head, Any]] | None:
        """The first round; None if a worker was not in it."""
        left = max(_SECONDS_BETWEEN_TRIES, deadline - time.monotonic())
        try:
            found = reader.take(left)
        except DataServiceLostError as error:
            if self._has_begun:
                raise
            raise DataServiceError(
                f"the data service at {self.address} gave no batch within "
                f"{self._startup_timeout:g} s: its workers may not have come, "
                "or its data may take longer to begin (--startup_timeout)."
            ) from error
        if [head.number for head, _ in found] == list(range(reader.stride)):
            return found
        if time.monotonic() >= deadline:
            kind = DataServiceLostError if self._has_begun else DataServiceError
            raise kind(
                f"not all {reader.stride} workers of the data service at "
                f"{self.address} have come within {self._limit:g} s: start "
                "them (--startup_timeout)."
            )
        return None

    def _out_of_order(self, number: int, head: _Head) -> DataServiceLostError:
        if head.number != number:
            return DataServiceLostError(
                f"a worker of the data service at {self.address} was lost: "
                f"batch {number} since its start did not come in its turn. "
                "Start the whole service again, then the training."
            )
        return DataServiceLostError(
            f"the workers of the data service at {self.address} do not see "
            f"the same batches, from batch {number} on: the files differ "
            "between them, or the data are shuffled without a fixed seed. Use "
            "a function of the pass, `lambda number: examples.shuffle(n, "
            "seed=number).batch(k)`."
        )

    def _explained(self, error: tf.errors.OpError) -> Exception:
        if _NO_ADDRESSES in error.message:
            return DataServiceError(
                f"the dispatcher at {self.address} was not told the addresses "
                "of all its workers, by which batches are divided: start it "
                "with them (launch.data_service --workers; "
                "DispatcherConfig.worker_addresses)."
            )
        text = re.sub(r"\{\{.*?\}\} ", "", error.message)
        said = text.splitlines()[0][:500]
        if isinstance(error, tf.errors.UnavailableError):
            return DataServiceLostError(
                f"the data service at {self.address} was lost: {said}"
            )
        return DataServiceError(
            f"the data service at {self.address} cannot load the data: {said}"
        )


class _Reader:
    """Takes batches in a thread, so that waiting for one can end.

    Args:
        address: Of the service.
        numbered: From `_numbered`.

    Attributes:
        stride: Workers of the service; 0 before the first batch.
    """

    def __init__(self, address: str, numbered: tf.data.Dataset):
        self._address = address
        self._numbered = numbered
        self._found: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._is_over = threading.Event()
        self.stride = 0

    def __enter__(self) -> "_Reader":
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def take(self, timeout: float) -> list[tuple[_Head, Any]]:
        """One batch of each worker, in order.

        Raises:
            DataServiceLostError: One did not come in so many seconds.
        """
        taken = [self._next(timeout)]
        self.stride = taken[0][0].stride
        taken += [self._next(timeout) for _ in range(self.stride - 1)]
        return sorted(taken, key=lambda one: one[0].number)

    def _next(self, timeout: float) -> tuple[_Head, Any]:
        try:
            found = self._found.get(timeout=timeout)
        except queue.Empty:
            raise DataServiceLostError(
                f"the data service at {self._address} has given no batch for "
                f"{round(timeout, 1):g} s (half of --collective_timeout): look "
                "whether its dispatcher and its workers still run."
            ) from None
        if isinstance(found, Exception):
            raise found
        return found

    def _run(self) -> None:
        try:
            for head, leaves in self._numbered.apply(self._distributed()):
                numbers = _Head(*(int(number) for number in head))
                if not self._give((numbers, leaves)):
                    return
        except Exception as error:
            self._give(error)

    def _give(self, found: Any) -> bool:
        """Whether it was wanted."""
        while not self._is_over.is_set():
            with contextlib.suppress(queue.Full):
                self._found.put(found, timeout=_SECONDS_BETWEEN_TRIES)
                return True
        return False

    def _distributed(self) -> Any:
        """As one consumer, which is given a batch of each worker in turn."""
        service = tf.data.experimental.service
        return service.distribute(
            service.ShardingPolicy.HINT,
            self._address,
            job_name=uuid.uuid4().hex,
            consumer_index=0,
            num_consumers=1,
        )


# ------------------------------------------------------ what the service runs


def _numbered(
    batches: tf.data.Dataset, cut: Cut, specs: Sequence[tf.TensorSpec]
) -> tf.data.Dataset:
    """A worker's share of `(head, leaves)`; without end, as rounds need it."""
    hint = tf.data.experimental.SHARD_HINT
    places = tf.data.Dataset.range(tf.int64.max).shard(hint, hint).skip(1)
    hashed = _endless(batches).enumerate()
    hashed = hashed.scan(tf.constant(0, tf.int64), _with_hashes)

    @tf.autograph.experimental.do_not_convert
    def load(element: Any, next_number: tf.Tensor) -> Any:
        number, before, after, (is_end, batch) = element

        def leaves() -> list[tf.Tensor]:
            slices = cut(tf.data.Dataset.from_tensors(batch))
            flat = tf.nest.flatten(slices.get_single_element())
            return [leaf for leaf in flat if leaf is not None]

        stride = next_number - number
        return (
            _Head(number, stride, tf.cast(is_end, tf.int64), before, after),
            tuple(tf.cond(is_end, lambda: [*map(_empty, specs)], leaves)),
        )

    own = tf.data.Dataset.zip(hashed.shard(hint, hint), places)
    return own.map(load, num_parallel_calls=tf.data.AUTOTUNE)


def _endless(batches: tf.data.Dataset) -> tf.data.Dataset:
    """`(is_end, batch)`: all batches, then empty ones for ever."""
    spec = batches.element_spec

    @tf.autograph.experimental.do_not_convert
    def before_end(*batch: Any) -> Any:
        return False, batch if isinstance(spec, tuple) else batch[0]

    empty = tf.nest.map_structure(_empty, spec)
    ends = tf.data.Dataset.from_tensors((True, empty)).repeat()
    return batches.map(before_end).concatenate(ends)


@tf.autograph.experimental.do_not_convert
def _with_hashes(before: tf.Tensor, element: Any) -> Any:
    number, batch = element
    parts = [before] + [
        tf.strings.to_hash_bucket_fast(tf.io.serialize_tensor(leaf), _HASHES)
        for leaf in tf.nest.flatten(batch, expand_composites=True)
        if leaf is not None
    ]
    text = tf.strings.reduce_join(tf.as_string(tf.stack(parts)), separator=",")
    after = tf.strings.to_hash_bucket_fast(text, _HASHES)
    return after, (number, before, after, batch)


def _empty(spec: Any) -> tf.Tensor | None:
    """Of a static shape like this, with nothing where it varies."""
    if not _is_dense(spec):
        return None
    if spec.shape.rank is None:
        raise DataServiceError(
            f"a data service takes tensors of a known rank. Received {spec}: "
            "tell it (`tf.ensure_shape`), or leave out --data_service."
        )
    return tf.zeros([size or 0 for size in spec.shape], spec.dtype)


def _check_leaves(spec: Any) -> None:
    """Whether none is one whose parts would travel apart."""
    for leaf in tf.nest.flatten(spec):
        if isinstance(leaf, tf.RaggedTensorSpec | tf.SparseTensorSpec):
            raise DataServiceError(
                "ragged and sparse tensors cannot travel by way of a data "
                f"service. Received {leaf}: make it dense (`to_tensor`, "
                "`tf.sparse.to_dense`), or leave out --data_service."
            )


def _is_dense(spec: Any) -> bool:
    return isinstance(spec, tf.TensorSpec)


def _leaf_specs(spec: Any) -> list[tf.TensorSpec]:
    """Of what travels: all that is not None."""
    return [leaf for leaf in tf.nest.flatten(spec) if _is_dense(leaf)]


def _check_can_travel(dataset: tf.data.Dataset) -> None:
    """Whether other processes make the same of it."""
    graph = tf.compat.v1.GraphDef.FromString(
        tf.raw_ops.DatasetToGraphV2(
            input_dataset=tf.data.experimental.to_variant(dataset),
            external_state_policy=tf.data.experimental.ExternalStatePolicy.IGNORE.value,
        ).numpy()
    )
    nodes = [
        *graph.node,
        *(n for f in graph.library.function for n in f.node_def),
    ]
    names = sorted({node.op for node in nodes})
    if python := [name for name in names if _PYTHON.fullmatch(name)]:
        raise DataServiceError(
            f"Python code ({', '.join(python)}) cannot travel to a data "
            "service: the data must do without `tf.py_function`, "
            "`tf.numpy_function` and `from_generator`, or without "
            "--data_service. ArrayRecord files are read by such code, each "
            "worker its own rows, and need no service."
        )
    if drawn := [name for name in names if _RANDOM.match(name)]:
        raise DataServiceError(
            f"random numbers without a seed of their own ({', '.join(drawn)}) "
            "are others on each worker of a data service: use "
            "`tf.random.stateless_uniform` and the like, or leave out "
            "--data_service."
        )
