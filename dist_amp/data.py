"""From any tf.data of global batches to what each replica is fed.

A global batch of R examples is cut into N near-equal slices, one a replica, on
the host. Every example carries a weight: its share of the mean over the global
batch. A replica's loss is then a plain weighted sum, and the global loss and
gradient are plain sums over replicas, whatever the size of the last batch;
a replica that gets no example at all adds zero.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dist_amp.arrays import ArrayBatches
from dist_amp.loading import LoadedBatches, as_tuple
from dist_amp.stream import DatasetLike

# Data of up to so many bytes is kept in memory and shuffled as a whole.
MAX_BYTES_IN_MEMORY = 2**30
# Else as many examples are shuffled at a time.
SHUFFLE_BUFFER = 50_000

_AUTOTUNE = tf.data.AUTOTUNE

_PRIVATE_NAMES = {
    "tensorflow 2.21, Dataset": {
        "_inputs": "the datasets that one was made of, to find `batch`",
    },
}

# Of TensorFlow's datasets, those that make batches, and those whose elements
# are the same as before. What `map` makes of a batch may be an example.
_BATCHING = ("Batch", "ParallelBatch", "PaddedBatch", "Rebatch")
_HANDING_ON = (
    "AssertCardinality",
    "Cache",
    "Concatenate",
    "Filter",
    "IgnoreErrors",
    "Options",
    "Prefetch",
    "Repeat",
    "Shard",
    "Shuffle",
    "Skip",
    "Take",
    "Zip",
)

REDUCTIONS = ("sum_over_batch_size", "mean_with_sample_weight", "sum")


class Batch(NamedTuple):
    """One replica's slice of a global batch.

    Attributes:
        x: Model inputs, any structure of `[per_replica_batch, ...]`.
        y: Targets, any structure of `[per_replica_batch, ...]`, or None.
        weight: Share of each example in the loss of the global batch, float32
            `[per_replica_batch]` (or the longer shape of the sample weights).
            Without sample weights all shares of all replicas add up to one.
        global_size: Examples in the global batch, scalar float32, the same on
            every replica.
        normalizer: What the shares were divided by, scalar float32, the same
            on every replica: the examples or the sum of their weights.
        num_examples: Where slices are padded to one size, on TPUs, how many
            rows of this one are examples, scalar float32; the rows behind
            them are copies of weight 0. None: all are.
    """

    x: Any
    y: Any
    weight: tf.Tensor
    global_size: tf.Tensor
    normalizer: tf.Tensor
    num_examples: tf.Tensor | None = None


def split(
    dataset: tf.data.Dataset,
    *,
    num_replicas: int = 1,
    first_replica: int = 0,
    num_local_replicas: int | None = None,
    reduction: str = "sum_over_batch_size",
    class_weight: Mapping[int, float] | None = None,
    is_stacked: bool = False,
    pad_to: int | None = None,
    load: Callable[..., Any] | None = None,
) -> tf.data.Dataset:
    """Cuts each global batch into the slices of this host's replicas.

    Args:
        dataset: Yields global batches: `x`, `(x, y)` or
            `(x, y, sample_weight)`, each leaf `[global_batch, ...]`. Every
            host is given the same dataset.
        num_replicas: Replicas of all hosts.
        first_replica: Index of this host's first replica.
        num_local_replicas: Replicas of this host; all by default.
        reduction: What the loss divides by: the number of examples
            ("sum_over_batch_size"), the sum of their weights
            ("mean_with_sample_weight"), or nothing ("sum").
        class_weight: Weight of each class; multiplies the sample weights.
            The targets are class indices, or one-hot rows.
        is_stacked: Whether an element holds several batches of one size, each
            leaf `[num_batches, global_batch, ...]`; slices do so, too.
        pad_to: Rows that every slice is made to have, for devices that
            compile for one shape; not with `is_stacked`.
        load: Makes of the rows of a slice what is described above, if the
            dataset yields others: see `LoadedBatches`. Not with `is_stacked`,
            nor `reduction="mean_with_sample_weight"`.

    Returns:
        A dataset of tuples of `Batch`, one for each local replica.

    Raises:
        ValueError: The batch size is known and is no multiple of the number
            of replicas, an element is not of the form above, or `load`
            cannot be had.
    """
    count = num_local_replicas or num_replicas
    if not is_stacked:
        _check_batch_size(batch_size_of(dataset), num_replicas)
    if load and reduction == "mean_with_sample_weight":
        raise ValueError(
            "`load` contradicts `reduction='mean_with_sample_weight'`, which "
            "needs the weights of all examples: load whole batches."
        )
    cut = _Cut(
        num_replicas,
        range(first_replica, first_replica + count),
        axis=1 if is_stacked else 0,
        pad_to=pad_to,
    )
    shares = _Shares(reduction, _class_table(class_weight), cut.axis)

    @tf.autograph.experimental.do_not_convert
    def to_slices(*element: Any) -> tuple[Batch, ...]:
        if load:
            return _loaded_slices(element, load, cut, shares)
        return _slices(element, cut, shares)

    return dataset.map(
        to_slices, num_parallel_calls=None if is_stacked else _AUTOTUNE
    )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Where batches are cut: see `split`."""

    num_replicas: int
    replicas: range
    axis: int  # of the examples
    pad_to: int | None

    def __call__(self, tensors: Any, size: tf.Tensor | int) -> list[Any]:
        """A slice of `(x, y, weight)`, or four parts, for each replica."""
        if self.pad_to is not None:
            return _padded_slices(
                tensors, size, self.replicas, self.num_replicas, self.pad_to
            )
        return [
            _rows_of_replica(tensors, size, i, self.num_replicas, self.axis)
            for i in self.replicas
        ]


@dataclasses.dataclass(frozen=True)
class _Shares:
    """What each example weighs in the loss of a batch: see `split`."""

    reduction: str
    class_table: tf.Tensor | None
    axis: int

    def weights(self, x: Any, y: Any, weight: Any) -> tf.Tensor:
        """Weights before the loss divides by anything."""
        axis = self.axis
        if weight is None:
            numbers = tf.unstack(_num_batches(x, axis), axis)
            weight = tf.ones([*numbers, _rows(x, axis)], tf.float32)
        weight = tf.cast(weight, tf.float32)
        if weight.shape.rank == axis + 2 and weight.shape[-1] == 1:
            weight = tf.squeeze(weight, axis=-1)
        if self.class_table is not None:
            weight = _times(weight, self.class_table, y, axis)
        return weight

    def divided(self, weight: tf.Tensor, normalizer: tf.Tensor) -> tf.Tensor:
        """Weights by `[]` or `[num_batches]` numbers, unless the loss adds."""
        if self.reduction == "sum":
            return weight
        numbers = tf.unstack(tf.shape(normalizer), self.axis)
        ones = [1] * (weight.shape.rank - self.axis)
        divisor = tf.reshape(normalizer, [*numbers, *ones])
        return tf.math.divide_no_nan(weight, divisor)


def _slices(
    element: Sequence[Any], cut: _Cut, shares: _Shares
) -> tuple[Batch, ...]:
    x, y, weight = _unpack(element)
    size = _rows(x, cut.axis)
    global_size = tf.fill(_num_batches(x, cut.axis), _at_least_one(size))
    weight = shares.weights(x, y, weight)
    normalizer = global_size
    if shares.reduction == "mean_with_sample_weight":
        normalizer = _total_weight(weight, cut.axis)
    weight = shares.divided(weight, normalizer)
    return tuple(
        Batch(x, y, weight, global_size, normalizer, *num_examples)
        for x, y, weight, *num_examples in cut((x, y, weight), size)
    )


def _loaded_slices(
    rows: tuple[Any, ...],
    load: Callable[..., Any],
    cut: _Cut,
    shares: _Shares,
) -> tuple[Batch, ...]:
    """The same, of rows that are loaded when they are cut."""
    size = _rows(rows, 0)
    global_size = _at_least_one(size)

    def slice_of(rows: Any, is_example: Any, *num_examples: Any) -> Batch:
        x, y, weight = _unpack(as_tuple(load(*rows)))
        weight = shares.divided(shares.weights(x, y, weight), global_size)
        if num_examples:  # else all are
            weight *= tf.reshape(
                is_example, [-1] + [1] * (len(weight.shape) - 1)
            )
        return Batch(x, y, weight, global_size, global_size, *num_examples)

    slices = cut((rows, None, tf.ones([size], tf.float32)), size)
    return tuple(slice_of(rows, *rest) for rows, _, *rest in slices)


def _at_least_one(size: tf.Tensor | int) -> tf.Tensor:
    """A batch without examples divides nothing, by one."""
    return tf.maximum(tf.cast(size, tf.float32), 1)


def from_arrays(
    arrays: Any, global_batch_size: int, shuffle_seed: int | None = None
) -> ArrayBatches:
    """A function of the pass over examples in memory, each pass shuffled.

    Batch `b` of pass `p` is computed from `(seed, p, b)` alone, by
    `tf.random.experimental.index_shuffle`. The fastest input for small
    batches: `Trainer.fit` takes several of them at a time.

    Args:
        arrays: Structure of arrays or tensors `[num_examples, ...]`.
        global_batch_size: Examples in a batch; the last one may be smaller.
        shuffle_seed: None keeps the order.

    Returns:
        A function that `Trainer.fit` takes for a dataset.
    """
    return ArrayBatches(arrays, global_batch_size, shuffle_seed)


def seed_of_pass(seed: int, number: tf.Tensor) -> tf.Tensor:
    """A seed for each pass over the data, scalar int64."""
    return tf.random.experimental.index_shuffle(
        tf.cast(number, tf.int64),
        tf.constant([seed, 0], tf.int64),
        tf.constant(2**31 - 1, tf.int64),
    )


def shuffled(
    examples: tf.data.Dataset,
    seed: tf.Tensor,
    buffer_size: int = SHUFFLE_BUFFER,
) -> tf.data.Dataset:
    """Shuffles examples that do not fit in memory, the same for the same seed.

    Args:
        examples: In an order that is always the same.
        seed: From `seed_of_pass`.
        buffer_size: Examples among which the next one is drawn.
    """
    if not tf.executing_eagerly():
        # Of this function's graph; TensorFlow 2.21 fails on a global
        # seed of 0 beside one that is a tensor.
        tf.random.set_seed(1)
    return examples.shuffle(
        buffer_size, seed=seed, reshuffle_each_iteration=False
    )


def cast_inputs(dataset: DatasetLike, dtype: str) -> Any:
    """The same batches, with the inputs' floats in another dtype.

    Args:
        dataset: As in `Trainer.fit`.
        dtype: Say "bfloat16", which models in mixed_bfloat16 compute in.
    """

    def cast(leaf: tf.Tensor) -> tf.Tensor:
        return tf.cast(leaf, dtype) if leaf.dtype.is_floating else leaf

    @tf.autograph.experimental.do_not_convert
    def convert(*element: Any) -> Any:
        x, *rest = element
        x = tf.nest.map_structure(cast, x)
        return (x, *rest) if rest else x

    if isinstance(dataset, tf.data.Dataset):
        return dataset.map(convert, num_parallel_calls=_AUTOTUNE)
    if isinstance(dataset, LoadedBatches):
        return dataset.map(convert)
    if isinstance(dataset, ArrayBatches):
        return dataset.map(
            lambda rows: (
                convert(*rows) if isinstance(rows, tuple) else convert(rows)
            )
        )
    return lambda number: dataset(number).map(
        convert, num_parallel_calls=_AUTOTUNE
    )


def batch_size_of(dataset: tf.data.Dataset) -> int | None:
    """Global batch size, where the dataset's shapes tell it."""
    leaves = tf.nest.flatten(dataset.element_spec)
    shape = leaves[0].shape if leaves else None
    return shape[0] if shape is not None and shape.rank else None


def is_batched(dataset: tf.data.Dataset) -> bool | None:
    """Whether elements are batches; None where nothing tells.

    An example `(x, y)` of two images looks like a batch of their rows, so that
    one size of all leaves tells nothing. Sizes that vary do, unless they may
    be lengths of sequences; so does a dataset that was made by `batch`.
    """
    shapes = [leaf.shape for leaf in tf.nest.flatten(dataset.element_spec)]
    if any(shape.rank == 0 for shape in shapes):
        return False
    if _is_made_by_batch(dataset):
        return True
    if any(shape.rank is None for shape in shapes):
        return None
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        return False
    has_more = any(shape.rank > 1 for shape in shapes)
    return True if sizes == {None} and has_more else None


def _is_made_by_batch(dataset: tf.data.Dataset) -> bool:
    """Whether batches are handed on as they were made."""
    kind = type(dataset).__name__.strip("_").removesuffix("Dataset")
    if kind in _BATCHING:
        return True
    before = dataset._inputs()
    return kind in _HANDING_ON and all(map(_is_made_by_batch, before))


def input_spec(dataset: tf.data.Dataset) -> Any:
    """Structure of `tf.TensorSpec` of the model's inputs."""
    spec = dataset.element_spec
    return _unpack(spec if isinstance(spec, tuple) else (spec,))[0]


def target_spec(dataset: tf.data.Dataset) -> Any:
    """The same of the targets; None if there are none."""
    spec = dataset.element_spec
    return _unpack(spec if isinstance(spec, tuple) else (spec,))[1]


def _unpack(element: Sequence[Any]) -> tuple[Any, Any, Any]:
    if len(element) > 3:
        raise ValueError(
            "Each element of the dataset must be `x`, `(x, y)` or "
            f"`(x, y, sample_weight)`. Received {len(element)} parts."
        )
    x, y, weight = (*element, None, None)[:3]
    return x, y, weight


def _check_batch_size(batch_size: int | None, num_replicas: int) -> None:
    if not batch_size or batch_size % num_replicas == 0:
        return
    lower = batch_size - batch_size % num_replicas
    fitting = [size for size in (lower, lower + num_replicas) if size]
    raise ValueError(
        "`global_batch_size` must be a multiple of the number of replicas. "
        f"Received {batch_size} with {num_replicas} replicas; pass "
        f"{' or '.join(map(str, fitting))} (--global_batch_size)."
    )


def _rows(x: Any, axis: int) -> tf.Tensor | int:
    """Number of examples; a Python int where the shape is static."""
    leaf = tf.nest.flatten(x)[0]
    static = leaf.shape[axis]
    if static is not None:
        return static
    if isinstance(leaf, tf.RaggedTensor):
        return tf.cast(leaf.nrows(), tf.int32)
    return tf.shape(leaf)[axis]


def _num_batches(x: Any, axis: int) -> tf.Tensor:
    """Of a stack, `[1]`; of a batch an empty shape."""
    if axis == 0:
        return tf.constant([], tf.int32)
    return tf.shape(tf.nest.flatten(x)[0])[:axis]


def _rows_of_replica(
    tensors: Any,
    size: tf.Tensor | int,
    replica: int,
    num_replicas: int,
    axis: int,
) -> Any:
    """Slice number `replica` of `num_replicas`; sizes differ by one at most."""
    if num_replicas == 1:
        return tensors  # what is not sliced is not copied
    begin = replica * size // num_replicas
    end = (replica + 1) * size // num_replicas
    rows = (slice(None),) * axis + (slice(begin, end),)
    return tf.nest.map_structure(
        lambda leaf: None if leaf is None else leaf[rows], tensors
    )


def _padded_slices(
    tensors: Any,
    size: tf.Tensor | int,
    replicas: Sequence[int],
    num_replicas: int,
    rows: int,
) -> list[tuple[Any, Any, tf.Tensor, tf.Tensor]]:
    """Slices of one size, with the number of examples in each.

    A full batch is cut as it is. Of a smaller one each replica repeats its
    own examples, with weight 0: rows of any other kind might make NaN.
    """
    check = tf.debugging.assert_less_equal(
        size,
        rows * num_replicas,
        "the batches of a dataset for a TPU must not be larger than the first.",
    )
    with tf.control_dependencies([check] if check is not None else []):
        size = tf.identity(size)
    starts = [i * size // num_replicas for i in (*replicas, replicas[-1] + 1)]
    numbers = [b - a for a, b in itertools.pairwise(starts)]

    def whole() -> list[Any]:
        return [_first_rows(tensors, start, rows) for start in starts[:-1]]

    def repeated() -> list[Any]:
        return [
            _repeated_rows(tensors, start, number, rows)
            for start, number in zip(starts, numbers, strict=False)
        ]

    slices = tf.cond(tf.equal(size, rows * num_replicas), whole, repeated)
    return [
        (*slice_, tf.cast(number, tf.float32))
        for slice_, number in zip(slices, numbers, strict=True)
    ]


def _first_rows(tensors: Any, start: Any, rows: int) -> Any:
    def cut(leaf: tf.Tensor | None) -> tf.Tensor | None:
        if leaf is None:
            return None
        return tf.ensure_shape(
            leaf[start : start + rows], [rows, *leaf.shape[1:]]
        )

    return tf.nest.map_structure(cut, tensors)


def _repeated_rows(tensors: Any, start: Any, number: Any, rows: int) -> Any:
    """`number` rows from `start` again and again; the copies weigh nothing."""
    x, y, weight = tensors
    place = tf.range(rows)
    last = tf.shape(weight)[0] - 1  # of a replica that has no example
    index = tf.minimum(start + place % tf.maximum(number, 1), last)
    x, y, weight = tf.nest.map_structure(
        lambda leaf: None if leaf is None else tf.gather(leaf, index),
        (x, y, weight),
    )
    is_example = tf.cast(place < number, tf.float32)
    ones = [1] * (weight.shape.rank - 1)
    return x, y, weight * tf.reshape(is_example, [rows, *ones])


def one_by_one(slices: tf.data.Dataset) -> tf.data.Dataset:
    """The slices of `split`, all of one size, each an element of its own."""

    @tf.autograph.experimental.do_not_convert
    def elements(*batches: Batch) -> tf.data.Dataset:
        datasets = [tf.data.Dataset.from_tensors(batch) for batch in batches]
        return functools.reduce(tf.data.Dataset.concatenate, datasets)

    return slices.flat_map(elements)


def _class_table(class_weight: Mapping[int, float] | None) -> tf.Tensor | None:
    if not class_weight:
        return None
    table = [1.0] * (max(class_weight) + 1)
    for index, weight in class_weight.items():
        table[index] = weight
    return tf.constant(table, tf.float32)


def _times(
    weight: tf.Tensor, class_table: tf.Tensor, y: Any, axis: int
) -> tf.Tensor:
    """Multiplies sample weights by those of the classes in `y`."""
    has_columns = y.shape.rank > axis + 1
    if has_columns and y.shape[-1] != 1:
        y = tf.argmax(y, axis=-1)
    elif has_columns:
        y = tf.squeeze(y, axis=-1)
    index = tf.cast(y, tf.int64)
    last = tf.size(class_table, tf.int64) - 1
    known = tf.gather(class_table, tf.minimum(index, last))
    return weight * tf.where(index <= last, known, 1.0)


def _total_weight(weight: tf.Tensor, axis: int) -> tf.Tensor:
    """Sum over the examples of their weight (its mean over the rest)."""
    inner = list(range(axis + 1, weight.shape.rank))
    per_example = tf.reduce_mean(weight, inner) if inner else weight
    return tf.reduce_sum(per_example, axis)
