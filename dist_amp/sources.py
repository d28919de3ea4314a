"""Data as they lie on disk: what TFDS has prepared, and files of records.

All is read as batches of `(x, y)` in an order that depends on the seed, the
pass and the examples' places only, the same for all workers; what takes long
is done after a batch is cut, by each worker for its own rows.
"""

import contextlib
import fcntl
import functools
import importlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from dist_amp import data, records
from dist_amp.loading import LoadedBatches, first_pass, for_each
from dist_amp.stream import DatasetLike, one_pass

# Of what is not kept in memory so many bytes are shuffled at a time, at most.
_SHUFFLE_BYTES = 2**31
_UNKNOWN_BUFFER = 16_384
# Files that are read at a time, where the order is to be shuffled.
_NUM_FILES_AT_A_TIME = 16

_INFO = "dataset_info.json"


def prepare_tfds(name: str, data_dir: str | None = None) -> Any:
    """The TFDS builder of a dataset, prepared in `data_dir` if need be.

    Args:
        name: TFDS name, say "mnist" or "cifar10:3.*.*"; "digits" is this
            library's own and needs no network. What was prepared elsewhere
            is read without its code: by its name in `data_dir`, or by the
            path of the folder that holds dataset_info.json.
        data_dir: Where TFDS keeps its data; `~/tensorflow_datasets` by
            default.

    Raises:
        ValueError: The dataset has no supervised keys, or the folder is none
            of TFDS.
    """
    tfds = importlib.import_module("tensorflow_datasets")  # slow to import
    tfds.disable_progress_bar()
    if is_folder(name):
        builder = _builder_of_folder(tfds, name)
    else:
        builder = _builder_of_name(tfds, name, data_dir)
    if builder.info.supervised_keys is None:
        raise ValueError(
            f"TFDS dataset {name!r} has no supervised keys; write a function "
            "that returns a tf.data.Dataset of (x, y) "
            "(--dataset=module:function)."
        )
    return builder


def is_folder(name: str) -> bool:
    """Whether a dataset is named by its folder."""
    return name.startswith(("/", "./", "../", "~")) or "://" in name


def _builder_of_folder(tfds: Any, path: str) -> Any:
    folder = os.path.expanduser(path)
    if not tf.io.gfile.exists(os.path.join(folder, _INFO)):
        found = sorted(tf.io.gfile.glob(os.path.join(folder, f"*/{_INFO}")))
        within = ", ".join(os.path.dirname(one) for one in found)
        raise ValueError(
            f"{path} holds no {_INFO}: name the folder of one version that "
            f"TFDS has prepared, as {within or 'name/config/1.0.0'}."
        )
    return tfds.builder_from_directory(folder)


def _builder_of_name(tfds: Any, name: str, data_dir: str | None) -> Any:
    if name.partition(":")[0] == "digits":
        importlib.import_module("dist_amp.datasets.digits")  # registers it
    builder = tfds.builder(name, data_dir=data_dir)
    if not builder.data_path.exists():
        with _one_process_at_a_time(str(builder.data_path)):
            # Anew: another process may have prepared it meanwhile.
            builder = tfds.builder(name, data_dir=data_dir)
            builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def _one_process_at_a_time(data_path: str) -> Iterator[None]:
    """Workers of one host, or on one disk, would break each other's files."""
    if "://" in data_path:
        yield
        return
    pathlib.Path(data_path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{data_path}.lock", "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_tfds(
    builder: Any,
    split: str,
    *,
    global_batch_size: int,
    shuffle_seed: int | None = None,
) -> DatasetLike:
    """Global batches of `(x, y)`; images become float32 in [0, 1].

    The order depends on the seed, the pass and the examples' indices only.
    Up to 1 GiB is kept in memory and shuffled as a whole. Of more, ArrayRecord
    files are shuffled as a whole, too, and each worker reads its own rows
    only; all workers read TFRecord files and shuffle them in a buffer, and
    each decodes the images of its rows.

    Args:
        builder: From `prepare_tfds`.
        split: TFDS split, say "train" or "test[:10%]".
        global_batch_size: Examples in a batch; the last one may be smaller.
        shuffle_seed: Shuffles, in another order each pass, the same for the
            same seed; None keeps the order.

    Returns:
        Batches with a known length; if shuffled, a function of the pass.

    Raises:
        ValueError: There is no such split, or it is empty.
    """
    size = num_examples_of(builder, split)
    make = functools.partial(_batches_of_split, builder, split)
    whole = one_pass(make(size, None))
    if size * _bytes_of_row(whole.element_spec) > data.MAX_BYTES_IN_MEMORY:
        batches = make(global_batch_size, shuffle_seed).map(_scale_image)
        return batches if shuffle_seed is not None else first_pass(batches)
    arrays = next(iter(whole))
    in_memory = data.from_arrays(arrays, global_batch_size, shuffle_seed).map(
        lambda rows: _scale_image(*rows)
    )
    return in_memory if shuffle_seed is not None else one_pass(in_memory)


def num_examples_of(builder: Any, split: str) -> int:
    """Examples in a split.

    Args:
        builder: From `prepare_tfds`.
        split: As in `read_tfds`.

    Raises:
        ValueError: There is no such split, or it is empty.
    """
    try:
        size = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{builder.info.name} has no split {split!r}; it has "
            f"{', '.join(builder.info.splits)}, and parts of them as "
            "train[:90%]."
        ) from error
    if not size:
        raise ValueError(f"Split {split!r} of {builder.info.name} is empty.")
    return size


def read_records(
    pattern: str,
    parse: Callable[[tf.Tensor], Any],
    *,
    global_batch_size: int,
    shuffle_seed: int | None = None,
) -> LoadedBatches:
    """Global batches from TFRecord or ArrayRecord files; for `Trainer.fit`.

    Every worker reads the same files, however few they are, and parses the
    records that it trains on; of ArrayRecord files (".array_record" in their
    names) it reads no others. Those are shuffled as a whole, TFRecord files in
    a buffer. The records of TFRecord files on local disks are counted first,
    by their lengths; of others (gs://) the length is unknown until the end of
    the first pass.

    Args:
        pattern: Of the files, as "/data/train-*.tfrecord"; they are taken
            in the order of their names.
        parse: From a record, a scalar string, to `x`, `(x, y)` or `(x, y,
            sample_weight)` of one example.
        global_batch_size: Examples in a batch; the last one may be smaller.
        shuffle_seed: As in `read_tfds`.

    Raises:
        ValueError: There is no such file, no record in it, or it cannot be
            read.
    """
    paths = records.find(pattern)
    if records.are_array_records(paths):
        found = records.ArrayRecords.of_files(paths)
        _check_has_records(len(found), pattern)
        return _batches_by_place(found, parse, global_batch_size, shuffle_seed)
    number = records.count(paths)
    _check_has_records(number, pattern)
    is_mixed = shuffle_seed is not None and len(paths) > 1
    examples = tf.data.TFRecordDataset(
        paths, num_parallel_reads=_NUM_FILES_AT_A_TIME if is_mixed else None
    )
    if number is not None:
        examples = examples.apply(
            tf.data.experimental.assert_cardinality(number)
        )
    return LoadedBatches(
        _batches_in_order(
            examples,
            global_batch_size,
            shuffle_seed,
            _UNKNOWN_BUFFER
            if number is None
            else _buffer_size(records.num_bytes(paths), number),
        ),
        for_each(parse),
    )


def _check_has_records(number: int | None, pattern: str) -> None:
    if number == 0:
        raise ValueError(f"The files {pattern} hold no record.")


def _batches_of_split(
    builder: Any, split: str, global_batch_size: int, seed: int | None
) -> LoadedBatches:
    """Batches of what TFDS decodes, of any file format."""
    info = builder.info
    if info.file_format.value == "array_record":
        pieces = [
            records.Piece(os.fspath(one.filename), one.skip, one.take)
            for one in info.splits[split].file_instructions
        ]
        return _batches_by_place(
            records.ArrayRecords(pieces),
            _parse_of(info),
            global_batch_size,
            seed,
        )
    tfds = importlib.import_module("tensorflow_datasets")
    images = _images_of(tfds, info)
    examples = builder.as_dataset(
        split=split,
        as_supervised=True,
        decoders={name: tfds.decode.SkipDecoding() for name in images},
    )
    splits = info.splits.values()
    buffer_size = _buffer_size(
        sum(one.num_bytes for one in splits),
        sum(one.num_examples for one in splits),
    )
    batches = _batches_in_order(examples, global_batch_size, seed, buffer_size)
    return LoadedBatches(batches, _decode_of(info, images))


def _images_of(tfds: Any, info: Any) -> dict[str, Any]:
    """Features that take long to decode, by their names."""
    return {
        name: feature
        for name, feature in info.features.items()
        if isinstance(feature, tfds.features.Image)
    }


def _decode_of(info: Any, images: dict[str, Any]) -> Callable[..., Any]:
    """Decodes the images of rows in which all else is decoded."""

    def decode(name: str, value: Any) -> Any:
        return images[name].decode_example(value) if name in images else value

    @tf.autograph.experimental.do_not_convert
    def example(*values: Any) -> Any:
        return _by_names(info.supervised_keys, values, decode)

    @tf.autograph.experimental.do_not_convert
    def as_they_are(*rows: Any) -> Any:
        return rows

    return for_each(example) if images else as_they_are


def _parse_of(info: Any) -> Callable[[tf.Tensor], Any]:
    """From a record to what `as_dataset(as_supervised=True)` yields."""

    @tf.autograph.experimental.do_not_convert
    def parse(record: tf.Tensor) -> Any:
        example = info.features.deserialize_example(record)
        keys = info.supervised_keys
        return _by_names(keys, keys, lambda name, _: example[name])

    return parse


def _by_names(
    names: Any, values: Any, function: Callable[[str, Any], Any]
) -> Any:
    """Maps values, given what TFDS calls each of them."""
    if isinstance(names, str):
        return function(names, values)
    if isinstance(names, dict):
        return {
            key: _by_names(name, values[key], function)
            for key, name in names.items()
        }
    return tuple(
        _by_names(name, value, function)
        for name, value in zip(names, values, strict=True)
    )


def _batches_in_order(
    examples: tf.data.Dataset,
    global_batch_size: int,
    seed: int | None,
    buffer_size: int,
) -> DatasetLike:
    """Batches of what can only be read from its start."""
    if seed is None:
        return examples.batch(global_batch_size)

    def make(number: tf.Tensor) -> tf.data.Dataset:
        of_pass = data.seed_of_pass(seed, number)
        order = data.shuffled(examples, of_pass, buffer_size)
        return order.batch(global_batch_size)

    return make


def _batches_by_place(
    found: records.ArrayRecords,
    parse: Callable[[tf.Tensor], Any],
    global_batch_size: int,
    seed: int | None,
) -> LoadedBatches:
    """Batches of records any of which is read at once.

    The cheap batches are places in the pass; which records they are is
    computed as in `arrays.ArrayBatches`, for the rows of a slice only.
    """
    size, step = len(found), global_batch_size

    @tf.autograph.experimental.do_not_convert
    def make(number: tf.Tensor) -> tf.data.Dataset:
        def places(batch: tf.Tensor) -> Any:
            end = tf.minimum((batch + 1) * step, size)
            place = tf.range(batch * step, end)
            return place, tf.fill(tf.shape(place), number)

        return tf.data.Dataset.range(math.ceil(size / step)).map(places)

    each = for_each(parse)

    @tf.autograph.experimental.do_not_convert
    def load(place: tf.Tensor, number: tf.Tensor) -> Any:
        if seed is not None:
            place = tf.random.experimental.index_shuffle(
                place,
                tf.stack([tf.constant(seed, tf.int64), number[0]]),
                tf.constant(size - 1, tf.int64),
            )
        some = tf.numpy_function(found.read, [place], tf.string)
        return each(tf.ensure_shape(some, place.shape))

    return LoadedBatches(make, load)


def _buffer_size(num_bytes: int, num_examples: int | None) -> int:
    """Examples to shuffle at a time, by what they weigh as they lie there."""
    if not num_bytes or not num_examples:
        return _UNKNOWN_BUFFER
    fitting = _SHUFFLE_BYTES * num_examples // num_bytes
    return max(1, min(fitting, data.SHUFFLE_BUFFER))


def _bytes_of_row(spec: Any) -> float:
    """Size of one example of a batch; infinite where its shape varies."""
    return sum(
        math.prod(leaf.shape[1:]) * leaf.dtype.size
        if leaf.shape[1:].is_fully_defined() and leaf.dtype.size
        else math.inf
        for leaf in tf.nest.flatten(spec)
    )


def test_split_of(builder: Any) -> str | None:
    """The split to evaluate on: "test", else "validation", else none."""
    return next(
        (
            name
            for name in ("test", "validation")
            if name in builder.info.splits
        ),
        None,
    )


def num_classes_of(builder: Any) -> int | None:
    """Number of classes of the label; None if it is no class."""
    name = builder.info.supervised_keys[1]
    label = builder.info.features[name] if isinstance(name, str) else None
    return getattr(label, "num_classes", None)


def _scale_image(x: Any, *rest: Any) -> Any:
    def scale(leaf: tf.Tensor) -> tf.Tensor:
        if leaf.dtype != tf.uint8:
            return leaf
        return tf.cast(leaf, tf.float32) / 255.0

    return tf.nest.map_structure(scale, x), *rest
