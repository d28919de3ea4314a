"""From a config to data: what TFDS, files or a function of the user's has."""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow_datasets.core.registered import DatasetNotFoundError

from dist_amp import data as data_lib
from dist_amp import records, sources, storage
from dist_amp.loading import LoadedBatches, first_pass
from dist_amp.stream import DatasetLike, one_pass
from launch.config import ConfigError, TrainConfig
from launch.imported import call_with, imported
from launch.options import read_options

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """Global batches to train on and, unless there are none, to test on."""

    train: DatasetLike
    test: DatasetLike | None
    num_classes: int | None


def load_data(config: TrainConfig) -> Data:
    """Loads a TFDS dataset, or calls the user's function for each split."""
    data = _load(config)
    if config.input_dtype == "float32":
        return data
    cast = functools.partial(data_lib.cast_inputs, dtype=config.input_dtype)
    return dataclasses.replace(
        data, train=cast(data.train), test=data.test and cast(data.test)
    )


def load_split(config: TrainConfig, split: str) -> Data:
    """One split, once, in its own order, for whatever it is wanted.

    Args:
        config: The settings.
        split: "train", "test" (what the flags say, or is there for it), any
            split of TFDS, what stands for {split} in the names of files, or
            what the user's function takes.

    Raises:
        ConfigError: There is no such split.
    """
    num_classes = None
    dataset: DatasetLike
    if config.data_kind == "function":
        function = imported("dataset", config.dataset)
        takes_split = "split" in inspect.signature(function).parameters
        if split != "train" and not takes_split:
            raise ConfigError(
                f"--split={split}: {config.dataset} takes no `split`; pass "
                "--split=train."
            )
        dataset = _user_dataset(function, split, config)
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
    takes_split = "split" in inspect.signature(function).parameters
    train = _user_dataset(function, "train", config)
    test = None
    if takes_split:
        test = first_pass(_user_dataset(function, "test", config))
    return Data(train, test, num_classes=None)


def _user_dataset(
    function: Callable[..., Any], split: str, config: TrainConfig
) -> DatasetLike:
    offered = {
        "split": split,
        "global_batch_size": config.batch_size,
        "seed": config.seed,
        "data_dir": config.data_dir,
    }
    options = read_options(
        "dataset_option",
        config.dataset_option,
        function,
        reserved=tuple(offered),
    )
    dataset = call_with(function, **offered, **options)
    first_pass = one_pass(dataset)
    if not isinstance(first_pass, tf.data.Dataset):
        raise ConfigError(
            f"--dataset={config.dataset} must return a tf.data.Dataset, or a "
            "function of the pass over the data that returns one. Received "
            f"{type(first_pass).__name__}."
        )
    if isinstance(dataset, LoadedBatches):
        return dataset
    takes_size = "global_batch_size" in inspect.signature(function).parameters
    if takes_size or data_lib.is_batched(first_pass):
        return dataset
    if isinstance(dataset, tf.data.Dataset):
        return dataset.batch(config.batch_size)
    return lambda number: dataset(number).batch(config.batch_size)
