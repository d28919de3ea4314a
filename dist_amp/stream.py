"""Training batches without end, and where in them training is."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import tensorflow as tf

from dist_amp.arrays import ArrayBatches
from dist_amp.beacon import Counts

# Global batches, or a function of the pass over the data (0, 1, ...; a scalar
# int64 tensor) that returns them: it shuffles by a seed made from the pass, so
# a run that goes on in pass 90 need not read the 89 before it.
DatasetLike: TypeAlias = (
    tf.data.Dataset | Callable[[tf.Tensor], tf.data.Dataset]
)

# From this worker's integers to those of all, `[num_workers, len(numbers)]`.
Gather: TypeAlias = Callable[[Sequence[int]], Any]

_log = logging.getLogger(__name__)

UNKNOWN_DIMENSION = 32


class HasLength(Protocol):
    """A dataset, or what has as many batches."""

    def cardinality(self) -> Any:
        """Batches; negative where TensorFlow cannot tell."""


def length_of(dataset: HasLength) -> int | None:
    """Batches in the dataset; None where TensorFlow cannot tell."""
    cardinality = int(dataset.cardinality())
    return cardinality if cardinality >= 0 else None


def is_infinite(dataset: HasLength) -> bool:
    """Whether the dataset repeats for ever."""
    return int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY


def one_pass(dataset: DatasetLike) -> tf.data.Dataset:
    """The first pass over the data: its shapes and length stand for all.

    Made in a graph, as all passes to train on are: there alone is a shuffle
    on a seed free of TensorFlow's global seed, which workers need not share.
    """
    if isinstance(dataset, tf.data.Dataset) or not callable(dataset):
        return dataset
    number = tf.constant(0, tf.int64)
    if isinstance(dataset, ArrayBatches) or not tf.executing_eagerly():
        return dataset(number)
    return tf.function(dataset).get_concrete_function(number)(number)


def stacks_of(
    dataset: DatasetLike, batches_per_step: int = 1
) -> ArrayBatches | None:
    """The data, if several batches at a time are to be taken of it."""
    if batches_per_step > 1 or not isinstance(dataset, ArrayBatches):
        return None
    return dataset if dataset.stack_size > 1 else None


class Feed(Protocol):
    """From global batches to what is fed."""

    def stacks(self, batches_per_step: int = 1) -> ArrayBatches | None:
        """The data, if several batches at a time are to be taken of it."""

    def split(
        self, batches: tf.data.Dataset, *, is_stacked: bool = False
    ) -> tf.data.Dataset:
        """What a loop takes of batches, or of stacks of batches."""

    def open(self, make: Callable[[], tf.data.Dataset]) -> Iterable[Any]:
        """What a loop takes of the batches that `make` returns."""


@dataclasses.dataclass(frozen=True)
class InputTimes:
    """What tf.data notes of the consumer of an iterator.

    Attributes:
        taken: Elements taken.
        gaps: Seconds from when an element was there until the next one was
            asked for; of the newest 100.
    """

    taken: int
    gaps: Sequence[float]


def counts_of(iterator: Any) -> Counts | None:
    """Elements taken of a prefetching iterator, and whether one is ready.

    Reads what tf.data notes for its own tuning; safe in another thread while
    a compiled loop takes batches. None where tf.data does not tell.
    """
    model = _model_of(iterator)
    if model is None:
        return None
    root = _root_of(model)
    prefetch = model.nodes[root.inputs[0]]
    return Counts(root.num_elements, prefetch.buffered_elements == 0)


def times_of(iterator: Any) -> InputTimes | None:
    """How long the consumer of an iterator works between two elements.

    Takes some tenths of a millisecond. None where tf.data does not tell.
    """
    model = _model_of(iterator)
    if model is None:
        return None
    gaps = [microseconds / 1e6 for microseconds in model.gap_times]
    return InputTimes(_root_of(model).num_elements, gaps)


def _model_of(iterator: Any) -> Any:
    """What tf.data notes; None where it does not, or has not begun."""
    try:
        model = tf.data.experimental.get_model_proto(iterator)
    except (tf.errors.OpError, ValueError):
        return None
    root = _root_of(model)
    return model if root is not None and root.inputs else None


def _root_of(model: Any) -> Any:
    nodes = model.nodes.values()
    return next((node for node in nodes if node.name == "Root"), None)


def agree_on_length(
    dataset: HasLength, length: int | None, gather: Gather | None
) -> tuple[int | None, bool]:
    """The batches that all workers take, and whether any has fewer.

    Args:
        dataset: Of this worker.
        length: Batches in it, if known.
        gather: None for a single worker.

    Returns:
        `(length, needs_padding)`; no length if a worker does not know its own.
    """
    if gather is None:
        return length, False
    lengths = [
        int(row[0]) for row in gather([-1 if length is None else length])
    ]
    if min(lengths) < 0:
        return None, True
    longest, shortest = max(lengths), min(lengths)
    if longest > shortest:
        _log.warning(
            "the workers' data differ: %s batches; who has fewer takes part "
            "in the last ones without examples",
            ", ".join(map(str, lengths)),
        )
    return longest, longest > shortest


def padded(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
    """As many batches; those that are missing hold no example."""
    endless = dataset.concatenate(
        tf.data.Dataset.from_tensors(no_examples(dataset.element_spec)).repeat()
    )
    return endless.take(length)


def no_examples(spec: Any) -> Any:
    """A batch of no example: no row in each leaf; 1 where it has no rows."""

    def empty(leaf: Any) -> Any:
        if not isinstance(leaf, tf.TensorSpec):
            return None
        if leaf.shape.rank == 0:
            return tf.ones([], leaf.dtype)
        shape = [UNKNOWN_DIMENSION if n is None else n for n in leaf.shape]
        return tf.zeros([0, *shape[1:]], leaf.dtype)

    return tf.nest.map_structure(empty, spec)


class Stream:
    """Training batches without end, and where in them training is.

    A batch is an element of the dataset; an update takes `batches_per_step`
    of them.

    Args:
        dataset: Global batches, or a function of the pass that returns them.
        feed: Makes of them what the loops take; see `Feed`.
        batches_per_step: Batches that one update takes.
        steps_per_epoch: Updates in an epoch; by default one pass over the
            dataset, whose last update may take fewer batches.
        gather: Tells each worker the numbers of all; None for a single one.
            Workers whose data are shorter take part without examples.

    Attributes:
        epoch: Epoch under way, from 0.
        batch: Batches of it that are used up, bad ones included.
        batches_per_epoch: None until the end of the first epoch if TensorFlow
            cannot tell the length of the dataset.
        bad: Batches never to train on: `(epoch, first, end)` each.
        stack: Where batches come in stacks, the one under way,
        place: and the place in it of the next batch.

    Raises:
        ValueError: `steps_per_epoch` is needed and missing.
    """

    def __init__(
        self,
        dataset: DatasetLike,
        feed: Feed,
        *,
        batches_per_step: int = 1,
        steps_per_epoch: int | None = None,
        gather: Gather | None = None,
    ):
        first = one_pass(dataset)
        self._length, self._is_padded = length_of(first), False
        if steps_per_epoch is None:
            self._length, self._is_padded = agree_on_length(
                first, self._length, gather
            )
        if steps_per_epoch is None and is_infinite(first):
            raise ValueError(
                "`steps_per_epoch` is needed: the dataset repeats for ever "
                "(--steps_per_epoch)."
            )
        needs_length = steps_per_epoch is None and self._length is None
        if needs_length and batches_per_step > 1:
            raise ValueError(
                "`steps_per_epoch` is needed to accumulate gradients over a "
                "dataset whose length TensorFlow cannot tell; or use "
                "`dataset.apply(tf.data.experimental.assert_cardinality(n))`."
            )
        if self._length == 0:
            raise ValueError("The dataset is empty: it yields no batch.")
        self._dataset = dataset
        self._feed = feed
        self._batches_per_step = batches_per_step
        self.batches_per_epoch = self._length
        if steps_per_epoch is not None:
            self.batches_per_epoch = steps_per_epoch * batches_per_step
        self.epoch = self.batch = 0
        self.bad: list[tuple[int, int, int]] = []
        self.iterator: Any = None
        self.stack: Any = None
        self.place = 0
        self._taken = 0
        self._stacks: ArrayBatches | None = None
        if not self._is_padded:
            self._stacks = feed.stacks(batches_per_step)

    @property
    def is_stacked(self) -> bool:
        """Whether the iterator yields several batches at a time."""
        return self._stacks is not None

    @property
    def steps_per_epoch(self) -> int | None:
        """Updates in an epoch of which no batch is bad, if known."""
        if self.batches_per_epoch is None:
            return None
        return -(-self.batches_per_epoch // self._batches_per_step)

    def open(self, epoch: int = 0, batch: int = 0) -> None:
        """Starts at a place: the beginning, or where an earlier run was."""
        self.epoch, self.batch = epoch, batch
        begin = epoch * (self.batches_per_epoch or 0) + batch
        if self._stacks:
            self._start_stacks(self._stacks, begin)
        else:
            self._start(lambda: self._from(begin))

    def close(self) -> None:
        """Lets go of the iterator, its threads and what it has read ahead.

        One that stands idle for long takes TensorFlow seconds to delete.
        """
        self.iterator = self.stack = None

    def _start(self, make: Callable[[], tf.data.Dataset]) -> None:
        self.iterator = iter(self._feed.open(make))
        self._taken = 0

    def _start_stacks(self, make: ArrayBatches, begin: int) -> None:
        assert self._length is not None
        number, rest = divmod(begin, self._length)
        first, self.place = make.find(rest)
        passes = tf.data.Dataset.range(number, tf.int64.max)
        stacks = passes.flat_map(make.stacks).skip(first)
        options = tf.data.Options()
        options.threading.private_threadpool_size = 1  # it only copies
        stream = self._feed.split(stacks, is_stacked=True).prefetch(2)
        self.iterator = iter(stream.with_options(options))
        self.stack = next(self.iterator)
        self._taken = 1

    def _next_passes(self) -> tf.data.Dataset:
        """After a first pass of unknown length.

        A dataset that shuffles does it anew at each pass and for each
        iterator, so the passes after the first come from its start.
        """
        if isinstance(self._dataset, tf.data.Dataset):
            return self._whole(self._dataset).repeat()
        return self._from(self.epoch * (self.batches_per_epoch or 0))

    def _from(self, begin: int) -> tf.data.Dataset:
        """All that comes after so many batches."""
        dataset, has_epochs = self._dataset, self.batches_per_epoch is not None
        if isinstance(dataset, tf.data.Dataset):
            dataset = self._whole(dataset).repeat() if has_epochs else dataset
            return dataset.skip(begin) if begin else dataset
        number, rest = 0, begin
        if self._length is not None:
            number, rest = divmod(begin, self._length)
        passes = tf.data.Dataset.range(number, tf.int64.max)
        if not has_epochs:  # the end of the first one has to be seen
            passes = passes.take(1)
        make = dataset
        return passes.flat_map(lambda n: self._whole(make(n))).skip(rest)

    def _whole(self, one_pass: tf.data.Dataset) -> tf.data.Dataset:
        """A pass that is as long as the longest of all workers."""
        if not self._is_padded or self._length is None:
            return one_pass
        return padded(one_pass, self._length)

    def next_call(self, wanted: int) -> tuple[int, int]:
        """How many updates to run in one call, and of how many batches each.

        Args:
            wanted: Updates to run if the epoch is long enough.

        Returns:
            `(num_steps, batches_per_step)`; `(0, 0)` at the end of an epoch.
        """
        self._pass_over_bad()
        if self.batches_per_epoch is None:
            return 1, self._batches_per_step
        left = self._next_border() - self.batch
        if left <= 0:
            return 0, 0
        whole_steps = left // self._batches_per_step
        if whole_steps == 0:
            return 1, left
        return min(wanted, whole_steps), self._batches_per_step

    def peek(self, number: int) -> list[Any]:
        """The next batches, as they are fed; they are used up by it.

        Fewer, if the data end before.
        """
        found: list[Any] = []
        while len(found) < number:
            try:
                found.append(self._take_one())
            except (StopIteration, tf.errors.OutOfRangeError):
                break
        return found

    def _take_one(self) -> Any:
        if not self.is_stacked:
            return next(self.iterator)
        if self.place == len(tf.nest.flatten(self.stack)[0]):
            self.go_to(next(self.iterator), 0, num_stacks=1)
        place, self.place = self.place, self.place + 1
        return tf.nest.map_structure(
            lambda leaf: None if leaf is None else leaf[place], self.stack
        )

    def counter(self) -> Callable[[], Counts | None]:
        """Reads how many batches were taken since now; see `counts_of`.

        Of stacks, to within a stack.
        """
        iterator, before = self.iterator, self._taken
        times = self._stacks.stack_size if self._stacks else 1

        def count() -> Counts | None:
            counts = counts_of(iterator)
            if counts is None:
                return None
            taken = max(0, counts.taken - before) * times
            return Counts(taken, counts.is_starved)

        return count

    def advance(self, num_batches: int) -> None:
        """Tells that so many batches were used up."""
        self.batch += num_batches
        if not self.is_stacked:
            self._taken += num_batches

    def go_to(self, stack: Any, place: int, num_stacks: int) -> None:
        """Tells which stack is under way, after taking so many more."""
        self.stack, self.place = stack, place
        self._taken += num_stacks

    def end_epoch(self) -> None:
        """Goes to the beginning of the next epoch.

        Where the length was unknown it is learned here.
        """
        if self.batch == 0:
            raise ValueError("The dataset is empty: it yields no batch.")
        if self.batches_per_epoch is None:
            self.learn_length(self.batch)
            self.epoch, self.batch = self.epoch + 1, 0
            self._start(self._next_passes)
        else:
            self.epoch, self.batch = self.epoch + 1, 0

    def learn_length(self, num_batches: int) -> None:
        """Sets the batches of an epoch, which TensorFlow could not tell."""
        if self.batches_per_epoch is None:
            self.batches_per_epoch = num_batches
            self._length = num_batches

    def _pass_over_bad(self) -> None:
        for epoch, first, end in sorted(self.bad):
            while epoch == self.epoch and first <= self.batch < end:
                self._pass_over_one()

    def _pass_over_one(self) -> None:
        if not self.is_stacked:
            next(self.iterator)
        elif self.place < len(tf.nest.flatten(self.stack)[0]):
            self.place += 1
        else:
            self.go_to(next(self.iterator), 1, num_stacks=1)
        self.advance(1)

    def _next_border(self) -> int:
        """Where the epoch ends, or the next bad batch stands."""
        bad = [
            first
            for epoch, first, _ in self.bad
            if epoch == self.epoch and first >= self.batch
        ]
        return min([self.batches_per_epoch or 0, *bad])
