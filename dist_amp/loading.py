"""Batches that each worker loads its own rows of, and no others.

Every worker goes through the same global batches, so that all agree on who
has which example. Where that takes long, a batch first holds what is cheap:
encoded images, names of files, indices. It is cut, and then loaded.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dist_amp.stream import DatasetLike, no_examples, one_pass

_AUTOTUNE = tf.data.AUTOTUNE


class LoadedBatches:
    """Cheap global batches, and how their rows are loaded.

    A function of the pass over the data that returns loaded global batches,
    for all that takes one. `Trainer` knows better: it cuts a batch into the
    slices of the replicas first, and loads those of this worker; the bits are
    the same. A loss that divides by the sum of the weights
    (`reduction="mean_with_sample_weight"`) needs those of all examples, and so
    has every worker load whole batches.

    Args:
        batches: Global batches as in `Trainer.fit`, or a function of the pass
            that returns them; each leaf `[global_batch, ...]`, of any
            structure, the same on every worker.
        load: Called with such rows `[n, ...]`, of any `n` from 1, as
            `tf.data.Dataset.map` calls a function. Returns `x`, `(x, y)` or
            `(x, y, sample_weight)`, each leaf `[n, ...]`. What it makes of a
            row must depend on that row alone: a random change on a seed among
            the rows.

    >>> import tensorflow as tf
    >>> import dist_amp
    >>> files = tf.data.Dataset.from_tensor_slices(["1.5", "2.5", "3.5"])
    >>> dataset = dist_amp.LoadedBatches(
    ...     files.batch(2), lambda names: tf.strings.to_number(names)
    ... )
    >>> for x in dataset(tf.constant(0, tf.int64)):
    ...     print(x.numpy())
    [1.5 2.5]
    [3.5]
    """

    def __init__(self, batches: DatasetLike, load: Callable[..., Any]):
        self.batches = batches
        # Traced once for all that look at shapes, and read by AutoGraph as
        # `Dataset.map` would.
        self._load: Any = tf.function(load)

    def __call__(self, number: tf.Tensor) -> tf.data.Dataset:
        """The batches of a pass, loaded whole."""
        return _of_pass(self.batches, number).map(
            self.load, num_parallel_calls=_AUTOTUNE
        )

    def whole(self) -> DatasetLike:
        """The batches, loaded whole: a dataset, if they come from one."""
        if isinstance(self.batches, tf.data.Dataset):
            return one_pass(self)
        return self

    def first_pass(self) -> "LoadedBatches":
        """Nothing but the first pass: its batches are a dataset."""
        return LoadedBatches(one_pass(self.batches), self._load)

    def map(self, transform: Callable[..., Any]) -> "LoadedBatches":
        """The same batches, what is loaded transformed, row by row.

        Args:
            transform: As `load`, of what it returns.
        """

        @tf.autograph.experimental.do_not_convert
        def load(*rows: Any) -> Any:
            return transform(*as_tuple(self._load(*rows)))

        return LoadedBatches(self.batches, load)

    def apply(
        self, change: Callable[[tf.data.Dataset], tf.data.Dataset]
    ) -> "LoadedBatches":
        """The same, the cheap batches changed, as `tf.data.Dataset.apply`."""
        batches = self.batches
        if isinstance(batches, tf.data.Dataset):
            return LoadedBatches(change(batches), self._load)
        return LoadedBatches(lambda number: change(batches(number)), self._load)

    def take(self, number: int) -> "LoadedBatches":
        """The first so many batches of a pass."""
        return self.apply(lambda batches: batches.take(number))

    def cardinality(self) -> tf.Tensor:
        """Batches in a pass, as `tf.data.Dataset.cardinality`."""
        return one_pass(self.batches).cardinality()

    @tf.autograph.experimental.do_not_convert
    def load(self, *rows: Any) -> Any:
        """What `load` makes of rows, of none as well."""
        leaf = tf.nest.flatten(rows)[0]
        if leaf.shape.rank == 0:
            raise ValueError(
                "`batches` must be global batches: each leaf has the shape "
                "[global_batch, ...]. Received single examples; add "
                "`.batch(global_batch_size)`."
            )
        if leaf.shape[0]:
            return _checked(self._load(*rows), leaf)
        made = self._load.get_concrete_function(*rows).structured_outputs
        specs = [
            None if each is None else tf.type_spec_from_value(each)
            for each in tf.nest.flatten(made)
        ]
        tensors = tf.cond(
            tf.shape(leaf)[0] > 0,
            lambda: _tensors_of(_checked(self._load(*rows), leaf)),
            lambda: [_empty(spec) for spec in specs if spec is not None],
        )
        some = iter(tensors)
        return tf.nest.pack_sequence_as(
            made, [None if spec is None else next(some) for spec in specs]
        )


def first_pass(dataset: DatasetLike) -> tf.data.Dataset | LoadedBatches:
    """The first pass over the data; what is loaded late is so still."""
    if isinstance(dataset, LoadedBatches):
        return dataset.first_pass()
    return one_pass(dataset)


def for_each(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of rows, from one of a single example; on all CPU cores.

    Args:
        function: Called as `tf.data.Dataset.map` calls it.
    """

    @tf.autograph.experimental.do_not_convert
    def load(*rows: Any) -> Any:
        size = tf.shape(tf.nest.flatten(rows)[0], tf.int64)[0]
        examples = tf.data.Dataset.from_tensor_slices(
            rows if len(rows) > 1 else rows[0]
        )
        loaded = examples.map(function, num_parallel_calls=_AUTOTUNE)
        return loaded.batch(size).get_single_element()

    return load


def as_tuple(element: Any) -> tuple[Any, ...]:
    """An element as the arguments that `tf.data.Dataset.map` makes of it."""
    return element if isinstance(element, tuple) else (element,)


def _of_pass(dataset: DatasetLike, number: tf.Tensor) -> tf.data.Dataset:
    if isinstance(dataset, tf.data.Dataset):
        return dataset
    return dataset(number)


def _tensors_of(loaded: Any) -> list[Any]:
    """What a branch of a condition can return, which is no None."""
    return [each for each in tf.nest.flatten(loaded) if each is not None]


def _checked(loaded: Any, rows: tf.Tensor) -> Any:
    """As many rows as were given, in the static shapes too, as TPUs need."""
    size = rows.shape[0]

    def checked(leaf: Any) -> Any:
        if not isinstance(leaf, tf.Tensor) or not leaf.shape.rank:
            return leaf
        if size is not None:
            return tf.ensure_shape(leaf, [size, *leaf.shape[1:]])
        check = tf.debugging.assert_equal(
            tf.shape(leaf)[0],
            tf.shape(rows)[0],
            "`load` must return a row for each row that it is given",
        )
        with tf.control_dependencies([check]):
            return tf.identity(leaf)

    return tf.nest.map_structure(checked, loaded)


def _empty(spec: Any) -> Any:
    """No row of a leaf that `load` returns."""
    if isinstance(spec, tf.RaggedTensorSpec):
        inner = spec.shape[spec.ragged_rank + 1 :]
        empty = tf.zeros([0, *(n or 0 for n in inner)], spec.dtype)
        for _ in range(spec.ragged_rank):
            empty = tf.RaggedTensor.from_row_splits(
                empty, tf.constant([0], spec.row_splits_dtype)
            )
        return empty
    if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
        raise ValueError(
            "`load` must return tensors of known rank, or ragged ones: "
            f"`tf.ensure_shape` tells. Received {spec}."
        )
    return no_examples(spec)
