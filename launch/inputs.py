"""From a config to data: what TFDS, files or a function of the user's has."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_datasets.core.registered import DatasetNotFoundError

from dist_amp import data as data_lib
from dist_amp import records, sources, storage
from dist_amp.loading import LoadedBatches, first_pass
from dist_amp.stream import DatasetLike, length_of, one_pass
from launch.config import ConfigError, TrainConfig
from launch.imported import call_with, imported, takes, takes_none
from launch.options import read_options

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """Global batches to train on and, unless there are none, to test on."""

    train: DatasetLike
    test: DatasetLike | None
    num_classes: int | None


def load_data(config: TrainConfig) -> Data:
    """Loads a TFDS dataset, or calls the user's function for each split.

    Raises:
        ConfigError: There are no such data, or a setting does not fit them.
    """
    data = _load(config)
    if config.eval_steps is not None and data.test is None:
        raise ConfigError(
            f"--eval_steps contradicts --dataset={config.dataset}: there is no "
            "test split; drop the flag."
        )
    if config.input_dtype == "float32":
        return data
    cast = functools.partial(data_lib.cast_inputs, dtype=config.input_dtype)
    return dataclasses.replace(
        data, train=cast(data.train), test=data.test and cast(data.test)
    )


def load_split(
    config: TrainConfig, split: str, *, needs_order: bool = False
) -> Data:
    """One split, once, in its own order, for whatever it is wanted.

    A function of the user's is asked for that order by `seed=None`, if its
    `seed` is annotated as `int | None`; else this is its first pass.

    Args:
        config: The settings.
        split: "train", "test" (what the flags say, or is there for it), any
            split of TFDS, what stands for {split} in the names of files, or
            what the user's function takes.
        needs_order: Whether an order that nobody knows is an error.

    Raises:
        ConfigError: There is no such split, or its order is not known.
    """
    num_classes = None
    dataset: DatasetLike
    if config.data_kind == "function":
        function = imported("dataset", config.dataset)
        dataset = _user_split(function, split, config, needs_order=needs_order)
    elif config.data_kind == "records":
        if split != "train" and "{split}" not in config.dataset:
            raise ConfigError(
                f"--split={split}: --dataset={config.dataset} has no {{split}} "
                "in its name; pass --split=train."
            )
        dataset = _records(config, split)
    else:
        builder = _prepared(config)
        if split == "test":
            split = config.test_split or sources.test_split_of(builder) or split
        elif split == "train":
            split = config.train_split or split
        num_classes = sources.num_classes_of(builder)
        dataset = _split("split", builder, split, config)
    if config.input_dtype != "float32":
        dataset = data_lib.cast_inputs(dataset, dtype=config.input_dtype)
    dataset = first_pass(dataset)
    return Data(dataset, dataset, num_classes)


def _load(config: TrainConfig) -> Data:
    if config.data_kind == "function":
        return _data_of(imported("dataset", config.dataset), config)
    if config.data_kind == "records":
        train = _records(config, "train", config.seed)
        return Data(train, _test_records(config), num_classes=None)
    builder = _prepared(config)
    train_split = config.train_split or "train"
    test_split = config.test_split or sources.test_split_of(builder)
    train = _split("train_split", builder, train_split, config, config.seed)
    test = None
    if test_split is not None:
        test = _split("test_split", builder, test_split, config)
    return Data(train, test, sources.num_classes_of(builder))


def _prepared(config: TrainConfig) -> Any:
    """The builder of a TFDS dataset."""
    try:
        return sources.prepare_tfds(config.dataset, config.data_dir)
    except DatasetNotFoundError as error:
        where = config.data_dir or "~/tensorflow_datasets"
        raise ConfigError(
            f"--dataset={config.dataset} is no dataset of TFDS, nor prepared "
            f"in {where} (--data_dir), nor module:function."
        ) from error
    except (ValueError, *storage.IO_ERRORS) as error:
        raise ConfigError(f"--dataset={config.dataset}: {error}") from error


def _split(
    flag: str, builder: Any, split: str, config: TrainConfig, *seed: int
) -> DatasetLike:
    """A split of TFDS, shuffled if there is a seed."""
    try:
        sources.num_examples_of(builder, split)
    except ValueError as error:
        raise ConfigError(f"--{flag}={split}: {error}") from error
    return sources.read_tfds(
        builder,
        split,
        global_batch_size=config.batch_size,
        shuffle_seed=seed[0] if seed else None,
    )


def _records(
    config: TrainConfig, split: str, seed: int | None = None
) -> DatasetLike:
    """The files of a split; {split} in the pattern stands for it."""
    assert config.parse is not None
    parse = imported("parse", config.parse)
    try:
        return sources.read_records(
            config.pattern_of(split),
            parse,
            global_batch_size=config.batch_size,
            shuffle_seed=seed,
        )
    except (ValueError, *storage.IO_ERRORS) as error:
        raise ConfigError(f"--dataset={config.dataset}: {error}") from error


def _test_records(config: TrainConfig) -> DatasetLike | None:
    """Those of the test split, if it has files."""
    if "{split}" not in config.dataset:
        return None
    if not tf.io.gfile.glob(config.pattern_of("test")):
        _log.warning("no test split: no file %s", config.pattern_of("test"))
        return None
    train, test = (
        records.find(config.pattern_of(split)) for split in ("train", "test")
    )
    if shared := sorted({*train} & {*test}):
        raise ConfigError(
            f"--dataset={config.dataset} names {shared[0]} for train and for "
            "test: let {split} tell them apart."
        )
    return _records(config, "test")


def _data_of(function: Callable[..., Any], config: TrainConfig) -> Data:
    train = _user_dataset(function, "train", config, config.seed)
    test = None
    if takes(function, "split"):
        test = first_pass(_user_dataset(function, "test", config, config.seed))
    return Data(train, test, num_classes=None)


def _user_split(
    function: Callable[..., Any],
    split: str,
    config: TrainConfig,
    *,
    needs_order: bool,
) -> DatasetLike:
    """A split in its own order, where the function can be asked for that."""
    if split != "train" and not takes(function, "split"):
        raise ConfigError(
            f"--split={split}: {config.dataset} takes no `split`; pass "
            "--split=train."
        )
    is_asked = takes_none(function, "seed")
    seed = None if is_asked else config.seed
    dataset = _user_dataset(function, split, config, seed)
    if needs_order and not is_asked and _is_of_pass(dataset):
        raise ConfigError(
            f"--split={split}: {config.dataset} returns a function of the "
            "pass, which may shuffle, so that nobody knows whose rows "
            "predictions are. Annotate its `seed` as `int | None` and keep "
            "the order of the data where it is None, or return a "
            "tf.data.Dataset for this split."
        )
    return dataset


def _user_dataset(
    function: Callable[..., Any],
    split: str,
    config: TrainConfig,
    seed: int | None,
) -> DatasetLike:
    """Batches of what the user's function returns."""
    if config.data_dir and not takes(function, "data_dir"):
        raise ConfigError(
            f"--data_dir contradicts --dataset={config.dataset}: the function "
            "takes no `data_dir`; drop the flag."
        )
    offered = {
        "split": split,
        "global_batch_size": config.batch_size,
        "seed": seed,
        "data_dir": config.data_dir,
    }
    options = read_options(
        "dataset_option",
        config.dataset_option,
        function,
        reserved=tuple(offered),
    )
    dataset = call_with("dataset", function, **offered, **options)
    whole = one_pass(dataset)
    if not isinstance(whole, tf.data.Dataset):
        raise ConfigError(
            f"--dataset={config.dataset} must return a tf.data.Dataset, or a "
            "function of the pass over the data that returns one. Received "
            f"{type(whole).__name__}."
        )
    takes_size = takes(function, "global_batch_size")
    if isinstance(dataset, LoadedBatches):
        whole = one_pass(dataset.batches)
    elif not takes_size and not _has_batches(whole, config):
        return _batched(dataset, config.batch_size)
    if split == "train":
        _check_size(whole, config, is_told=takes_size)
    return dataset


def _is_of_pass(dataset: DatasetLike) -> bool:
    if isinstance(dataset, LoadedBatches):
        dataset = dataset.batches
    return not isinstance(dataset, tf.data.Dataset)


def _batched(dataset: DatasetLike, size: int) -> DatasetLike:
    if isinstance(dataset, tf.data.Dataset):
        return dataset.batch(size)
    return lambda number: dataset(number).batch(size)


def _has_batches(whole: tf.data.Dataset, config: TrainConfig) -> bool:
    is_batched = data_lib.is_batched(whole)
    if is_batched is None:
        raise ConfigError(
            f"--dataset={config.dataset} returns elements "
            f"{whole.element_spec}, which may be batches or single examples: "
            "have the function take `global_batch_size` and batch by it."
        )
    return is_batched


def _check_size(
    batches: tf.data.Dataset, config: TrainConfig, *, is_told: bool
) -> None:
    """Whether a user's own batches are as large as the flags say.

    Of a function that was told so, none is read to see.
    """
    wanted = config.batch_size
    size = data_lib.batch_size_of(batches)
    if size is None and not is_told:
        size = _first_size(batches, wanted)
    if size is None or size == wanted:
        return
    if size < wanted and length_of(batches) == 1:
        return
    parts = config.gradient_accumulation_steps
    in_parts = "" if parts == 1 else f" in {parts} parts"
    raise ConfigError(
        f"--global_batch_size={config.global_batch_size}{in_parts} makes "
        f"batches of {wanted}, and --dataset={config.dataset} returns batches "
        f"of {size}: pass --global_batch_size={size * parts}, or have the "
        "function take `global_batch_size` and batch by it, or return single "
        "examples."
    )


def _first_size(batches: tf.data.Dataset, wanted: int) -> int | None:
    """Rows of the first batch; None if it is all there is, and small."""
    size = None
    for batch in batches:
        if size is not None:
            return size
        size = int(tf.shape(tf.nest.flatten(batch)[0])[0])
        if size >= wanted:
            return size
    return None
