"""From global batches to what the compiled loops take, on any strategy.

On CPUs and GPUs a loop takes a tuple with a slice for each replica of this
host, as long as the batch has examples for it. A TPU compiles for one shape
and reads its input on its own hosts: there a distributed iterator gives each
replica a slice of always the same size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from dist_amp import data
from dist_amp.arrays import ArrayBatches
from dist_amp.data_service import DataService, DataServiceError
from dist_amp.loading import LoadedBatches
from dist_amp.stream import DatasetLike, one_pass, stacks_of


class Feed:
    """Slices global batches and takes them to the replicas.

    Args:
        strategy: Whose replicas are fed.
        replica_ids: Indices of this host's replicas.
        dataset: As in `Trainer.fit`. For a TPU its first batch is read if
            its shapes do not tell how large a batch is.
        reduction: See `data.split`.
        class_weight: See `data.split`.
        service: What cuts and loads in this worker's place; None: nobody.

    Attributes:
        batches: What to read, and give to `split` or `open`: the dataset, or
            the cheap batches of one that is loaded when it is cut.

    Raises:
        ValueError: The batches do not suit the strategy.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        replica_ids: Sequence[int],
        dataset: DatasetLike,
        *,
        reduction: str,
        class_weight: Mapping[int, float] | None = None,
        service: DataService | None = None,
    ):
        self._strategy = strategy
        self._replica_ids = replica_ids
        self.batches, self._load = _batches_and_load(dataset, reduction)
        self._reduction = reduction
        self._class_weight = class_weight
        self._is_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
        self._rows: int | None = None
        self._service = service
        if service:
            self._check_service_is_used()
        if self._is_tpu:
            _check_shapes(one_pass(dataset))
            self._rows = self._rows_of_slice()

    def stacks(self, batches_per_step: int = 1) -> ArrayBatches | None:
        """The data, if the loop is to take several batches at a time."""
        if self._is_tpu or self._load:
            return None
        return stacks_of(self.batches, batches_per_step)

    def split(
        self, batches: tf.data.Dataset, *, is_stacked: bool = False
    ) -> tf.data.Dataset:
        """Tuples with the slice of each replica of this host."""
        return self._slices(batches, self._replica_ids, is_stacked=is_stacked)

    def open(
        self, make: Callable[[], tf.data.Dataset]
    ) -> Iterable[data.Batch | tuple[data.Batch, ...]]:
        """A dataset, maybe a distributed one, of what a loop takes.

        Args:
            make: Makes the global batches; called once for each host of a
                TPU, where they are to be read.
        """
        if self._service:
            slices = self._service.open(make(), self.split)
            return slices.prefetch(tf.data.AUTOTUNE)
        if not self._is_tpu:
            return self.split(make()).prefetch(tf.data.AUTOTUNE)

        def on_host(context: tf.distribute.InputContext) -> tf.data.Dataset:
            number = (
                self._strategy.num_replicas_in_sync
                // context.num_input_pipelines
            )
            first = context.input_pipeline_id * number
            slices = self._slices(make(), range(first, first + number))
            return data.one_by_one(slices).prefetch(tf.data.AUTOTUNE)

        return self._strategy.distribute_datasets_from_function(on_host)

    def _slices(
        self,
        batches: tf.data.Dataset,
        replicas: Sequence[int],
        *,
        is_stacked: bool = False,
    ) -> tf.data.Dataset:
        return data.split(
            batches,
            num_replicas=self._strategy.num_replicas_in_sync,
            first_replica=replicas[0],
            num_local_replicas=len(replicas),
            reduction=self._reduction,
            class_weight=self._class_weight,
            is_stacked=is_stacked,
            pad_to=self._rows,
            load=self._load,
        )

    def _check_service_is_used(self) -> None:
        if self._is_tpu:
            raise DataServiceError(
                "`data_service` is not for TPUs, whose hosts read their own "
                "input: leave it out (--data_service)."
            )
        if isinstance(self.batches, ArrayBatches) and not self._load:
            raise DataServiceError(
                "`data_service` has nothing to load: all examples are in this "
                "worker's memory already. Leave it out (--data_service)."
            )

    def _rows_of_slice(self) -> int | None:
        """What a TPU's slices are padded to; None if all batches are full."""
        first = one_pass(self.batches)
        has_many_hosts = self._strategy.extended.num_hosts > 1
        if has_many_hosts and isinstance(self.batches, tf.data.Dataset):
            raise ValueError(
                "Each host of a TPU reads its own input, so `dataset` must be "
                "a function of the pass that makes it there: `lambda number: "
                "tf.data.TFRecordDataset(files)...batch(size)`."
            )
        if data.batch_size_of(first) is not None:
            return None
        batch = next(iter(first.take(1)), None)
        if batch is None:
            raise ValueError("The dataset is empty: it yields no batch.")
        size = tf.nest.flatten(batch)[0].shape[0]
        return -(-size // self._strategy.num_replicas_in_sync)


def _batches_and_load(
    dataset: DatasetLike, reduction: str
) -> tuple[DatasetLike, Callable[..., Any] | None]:
    """What to read, and how its slices are loaded, if they are to be."""
    if not isinstance(dataset, LoadedBatches):
        return dataset, None
    if reduction == "mean_with_sample_weight":
        return dataset.whole(), None
    return dataset.batches, dataset.load


def _check_shapes(dataset: tf.data.Dataset) -> None:
    varying = [
        str(leaf.shape)
        for leaf in tf.nest.flatten(dataset.element_spec)
        if leaf.shape.rank is None or None in leaf.shape[1:]
    ]
    if varying:
        raise ValueError(
            "A TPU compiles for one shape, so only the first dimension of the "
            f"batches may vary. Received {', '.join(varying)}; pad to a fixed "
            "length (`padded_batch(size, padded_shapes=...)`)."
        )
