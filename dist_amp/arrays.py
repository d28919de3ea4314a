"""Examples in memory: shuffled batches, and stacks of many batches at once.

What is read of a small batch costs as much as the batch itself: a call of a
function, a hand-over between threads. A stack holds several batches, so that
a compiled loop takes one of them for many steps.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

Rows: TypeAlias = Callable[[Any], Any]

# Bytes of a stack: little beside any memory, much beside what a call costs.
_STACK_BYTES = 2**22
_MOST_BATCHES = 32


class ArrayBatches:
    """A function of the pass over the data, for `Trainer.fit`.

    Batch `b` of pass `p` is computed from `(seed, p, b)` alone.

    Args:
        arrays: Structure of arrays or tensors `[num_examples, ...]`.
        global_batch_size: Examples in a batch; the last one may be smaller.
        shuffle_seed: None keeps the order.
        transform: From a structure of `[n, ...]` rows, for any `n`, to what
            batches are made of.
    """

    def __init__(
        self,
        arrays: Any,
        global_batch_size: int,
        shuffle_seed: int | None = None,
        transform: Rows = lambda rows: rows,
    ):
        self._arrays = tf.nest.map_structure(tf.convert_to_tensor, arrays)
        sizes = [leaf.shape[0] for leaf in tf.nest.flatten(self._arrays)]
        if len(set(sizes)) > 1:
            raise ValueError(
                "`arrays` must all hold as many examples. Received "
                f"{', '.join(map(str, sizes))}."
            )
        self._size = sizes[0]
        self._batch_size = global_batch_size
        self._seed = shuffle_seed
        self._transform = transform
        self._num_whole = self._size // global_batch_size

    @tf.autograph.experimental.do_not_convert  # which is slow, for nothing
    def __call__(self, number: tf.Tensor) -> tf.data.Dataset:
        """The batches of a pass."""
        step = self._batch_size

        def batch(index: tf.Tensor) -> Any:
            end = tf.minimum((index + 1) * step, self._size)
            return self._rows(number, index * step, end)

        num_batches = math.ceil(self._size / step)
        dataset = tf.data.Dataset.range(num_batches)
        return dataset.map(batch, num_parallel_calls=tf.data.AUTOTUNE)

    @property
    def stack_size(self) -> int:
        """Batches in a stack; 1 where they are too large to gain by it."""
        leaves = tf.nest.flatten(self._arrays)
        size = sum(
            leaf.dtype.size * math.prod(leaf.shape[1:]) for leaf in leaves
        )
        fitting = _STACK_BYTES // max(1, size * self._batch_size)
        return max(1, min(fitting, _MOST_BATCHES, self._num_whole))

    @tf.autograph.experimental.do_not_convert
    def stacks(self, number: tf.Tensor) -> tf.data.Dataset:
        """The same, each leaf `[num_batches, global_batch, ...]`.

        A last, smaller batch comes in a stack of its own.
        """
        step, end = self._batch_size, self._num_whole * self._batch_size
        span = step * self.stack_size

        def stack(index: tf.Tensor) -> Any:
            last = tf.minimum((index + 1) * span, end)
            rows = self._rows(number, index * span, last)
            return tf.nest.map_structure(
                lambda leaf: tf.reshape(leaf, [-1, step, *leaf.shape[1:]]), rows
            )

        def rest(_: tf.Tensor) -> Any:
            rows = self._rows(number, end, self._size)
            return tf.nest.map_structure(lambda leaf: leaf[None], rows)

        stacks = tf.data.Dataset.range(math.ceil(end / span)).map(stack)
        if end < self._size:
            stacks = stacks.concatenate(tf.data.Dataset.range(1).map(rest))
        return stacks

    def find(self, batch: int) -> tuple[int, int]:
        """Which stack of a pass a batch is in, and where in it."""
        if batch < self._num_whole:
            return divmod(batch, self.stack_size)
        return math.ceil(self._num_whole / self.stack_size), 0

    def map(self, transform: Rows) -> "ArrayBatches":
        """The same batches, their rows transformed; see `transform`."""
        before = self._transform
        return ArrayBatches(
            self._arrays,
            self._batch_size,
            self._seed,
            lambda rows: transform(before(rows)),
        )

    def _rows(
        self, number: tf.Tensor, begin: tf.Tensor | int, end: tf.Tensor | int
    ) -> Any:
        indices = tf.range(tf.cast(begin, tf.int64), tf.cast(end, tf.int64))
        if self._seed is not None:
            seed = tf.stack([tf.constant(self._seed, tf.int64), number])
            indices = tf.random.experimental.index_shuffle(
                indices, seed, tf.constant(self._size - 1, tf.int64)
            )
        rows = tf.nest.map_structure(
            lambda array: tf.gather(array, indices), self._arrays
        )
        return self._transform(rows)
