"""Predictions of all replicas and workers, in the order of the examples."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from dist_amp import strategy as strategy_lib
from dist_amp.stream import Gather


def gathered(
    strategy: tf.distribute.Strategy,
    slices: Iterable[Any],
    call: Callable[[Any], Any],
    gather: Gather | None = None,
) -> Iterator[Any]:
    """Predicts batch by batch.

    Args:
        strategy: Whose replicas predict.
        slices: What a call takes, for each global batch.
        call: From `Steps.make_predict_call`.
        gather: Tells each worker the numbers of all; None for a single one.

    Yields:
        For each global batch arrays of all its rows, in order, in the
        structure of the predictions.

    Raises:
        ValueError: The data of the workers end at different batches.
    """
    iterator = iter(slices)
    while True:
        one = next(iterator, None)
        if not _all_go_on(one is not None, gather):
            return
        results = [
            (tf.nest.map_structure(_to_host, predictions), int(rows))
            for predictions, rows in call(one)
        ]
        if gather is not None:
            results = _of_all_workers(strategy, results, gather)
        yield joined(
            tf.nest.map_structure(lambda leaf, n=rows: leaf[:n], predictions)
            for predictions, rows in results
        )


def joined(parts: Iterable[Any]) -> Any:
    """Structures of arrays, one after the other.

    Raises:
        ValueError: There is none.
    """
    found = list(parts)
    if not found:
        raise ValueError("The dataset is empty: it yields no batch.")
    return tf.nest.map_structure(lambda *leaves: np.concatenate(leaves), *found)


def _to_host(leaf: tf.Tensor) -> np.ndarray:
    array = tf.convert_to_tensor(leaf).numpy()
    if np.ndim(array) == 0:
        raise ValueError(
            "`predict_step` must return a row for each example. Received a "
            "scalar."
        )
    return array


def _all_go_on(has_batch: bool, gather: Gather | None) -> bool:
    """Whether there is another batch, on which the workers must agree."""
    if gather is None:
        return has_batch
    flags = gather([has_batch])[:, 0]
    if len(set(flags.tolist())) > 1:
        ended = [index for index, flag in enumerate(flags) if not flag]
        raise ValueError(
            f"The data of workers {ended} ended before that of others: each "
            "worker must be given the same dataset."
        )
    return has_batch


def _of_all_workers(
    strategy: tf.distribute.Strategy,
    results: list[tuple[Any, int]],
    gather: Gather,
) -> list[tuple[Any, int]]:
    """This worker's pairs with those of the others, in replicas' order.

    Collectives add up arrays of one shape, so shorter slices are filled up
    on their way; half precision travels in float32, which holds it exactly.
    """
    counts = gather([rows for _, rows in results]).ravel().tolist()
    flat = [tf.nest.flatten(predictions) for predictions, _ in results]
    of_leaves = [
        strategy_lib.gather_replicas(
            strategy, [_filled(leaf, max(counts)) for leaf in leaves]
        ).astype(leaves[0].dtype)
        for leaves in zip(*flat, strict=True)
    ]
    return [
        (tf.nest.pack_sequence_as(results[0][0], one), rows)
        for one, rows in zip(zip(*of_leaves, strict=True), counts, strict=True)
    ]


def _filled(leaf: np.ndarray, rows: int) -> tf.Tensor:
    missing = [(0, rows - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)]
    tensor = tf.convert_to_tensor(np.pad(leaf, missing))
    is_half = tensor.dtype.is_floating and tensor.dtype.size < 4
    return tf.cast(tensor, tf.float32) if is_half else tensor
