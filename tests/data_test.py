"""Slices, shares, and where epochs end in the stream."""

import sys

import numpy as np
import pytest
import tensorflow as tf

from dist_amp import data, sources, steps, stream


def batches(num_examples, batch_size, *more):
    x = tf.range(num_examples)
    return tf.data.Dataset.from_tensor_slices((x, x % 3, *more)).batch(
        batch_size
    )


def slices(dataset, **options):
    return list(data.split(dataset, **options))


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("num_examples", range(1, 13))
def test_every_example_goes_to_one_replica(num_examples, num_replicas):
    (replicas,) = slices(batches(num_examples, 12), num_replicas=num_replicas)
    sizes = [len(batch.x) for batch in replicas]
    assert max(sizes) - min(sizes) <= 1
    together = np.concatenate([batch.x for batch in replicas])
    np.testing.assert_array_equal(together, np.arange(num_examples))
    assert {float(batch.global_size) for batch in replicas} == {num_examples}


@pytest.mark.parametrize("num_examples", [1, 5, 8])
def test_shares_of_all_replicas_add_up_to_one(num_examples):
    (replicas,) = slices(batches(num_examples, 8), num_replicas=4)
    total = sum(float(tf.reduce_sum(batch.weight)) for batch in replicas)
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("reduction", data.REDUCTIONS)
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_stacks_are_split_like_their_batches(num_parts, reduction):
    x, y, weight = np.ones((50, 3)), np.arange(50) % 4, np.arange(50.0)
    make = data.from_arrays((x, y, weight)[:num_parts], 7, shuffle_seed=3)
    options = {"num_replicas": 2, "reduction": reduction}
    if num_parts > 1:
        options["class_weight"] = {1: 2.0}
    batches = slices(make(tf.constant(2, tf.int64)), **options)
    stacks = make.stacks(tf.constant(2, tf.int64))
    split = []
    for stack in data.split(stacks, is_stacked=True, **options):
        for place in range(len(stack[0].x)):
            split.append([steps.batch_of(one, place) for one in stack])
    assert len(split) == len(batches) == 8
    for one, other in zip(split, batches, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, list(other))


def test_batches_too_large_to_gain_by_it_are_not_stacked():
    image = np.zeros((4, 1024, 1024), "float32")
    with pytest.raises(ValueError, match="as many examples"):
        data.from_arrays((tf.zeros([9, 2]), tf.zeros([11])), 4)
    assert data.from_arrays(image, 1).stack_size == 1
    assert data.from_arrays(image[:, :512], 1).stack_size == 2


def test_hosts_take_their_own_replicas():
    everything = slices(batches(8, 8), num_replicas=4)[0]
    second_host = slices(
        batches(8, 8), num_replicas=4, first_replica=2, num_local_replicas=2
    )[0]
    for mine, one in zip(second_host, everything[2:], strict=True):
        np.testing.assert_array_equal(mine.x, one.x)
        np.testing.assert_array_equal(mine.weight, one.weight)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum_over_batch_size", [0.25, 0.5, 0.75, 1.0]),
        ("mean_with_sample_weight", [0.1, 0.2, 0.3, 0.4]),
        ("sum", [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_sample_weights_by_reduction(reduction, expected):
    weight = tf.constant([1.0, 2.0, 3.0, 4.0])
    ((first, second),) = slices(
        batches(4, 4, weight), num_replicas=2, reduction=reduction
    )
    np.testing.assert_allclose([*first.weight, *second.weight], expected)


@pytest.mark.parametrize("one_hot", [False, True])
def test_class_weights_multiply_sample_weights(one_hot):
    y = tf.constant([0, 1, 2, 5])
    y = tf.one_hot(y, 6) if one_hot else y
    dataset = tf.data.Dataset.from_tensors(
        (tf.zeros([4, 2]), y, tf.constant([1.0, 1.0, 2.0, 1.0]))
    )
    ((batch,),) = slices(
        dataset, reduction="sum", class_weight={0: 3.0, 2: 0.5}
    )
    np.testing.assert_allclose(batch.weight, [3.0, 1.0, 1.0, 1.0])


def test_inputs_without_targets_and_nested_inputs():
    dataset = tf.data.Dataset.from_tensors(
        {"a": tf.zeros([4, 2]), "b": tf.ones([4])}
    )
    ((first, second),) = slices(dataset, num_replicas=2)
    assert first.y is None
    assert second.x["a"].shape == (2, 2)


def test_a_batch_size_that_does_not_fit_is_refused_with_two_that_do():
    dataset = batches(20, 10).map(
        lambda x, y: (tf.ensure_shape(x, [10]), tf.ensure_shape(y, [10]))
    )
    with pytest.raises(ValueError, match=r"Received 10 with 4 .*8 or 12"):
        data.split(dataset, num_replicas=4)


def test_an_element_of_four_parts_is_refused():
    dataset = tf.data.Dataset.from_tensors((1, 2, 3, 4)).batch(2)
    with pytest.raises(ValueError, match="Received 4 parts"):
        data.split(dataset)


def test_digits_need_no_network_and_are_prepared_once(tmp_path):
    builder = sources.prepare_tfds("digits", str(tmp_path))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    builder = sources.prepare_tfds("digits", str(tmp_path))
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert sources.num_classes_of(builder) == 10
    assert sources.test_split_of(builder) == "test"
    train = sources.read_tfds(
        builder, "train", global_batch_size=100, shuffle_seed=1
    )
    test = sources.read_tfds(builder, "test", global_batch_size=100)
    train = stream.one_pass(train)
    assert (stream.length_of(train), stream.length_of(test)) == (15, 4)
    x, y = next(iter(train))
    assert x.shape == (100, 8, 8, 1)
    assert x.dtype == tf.float32
    assert 0.9 < float(tf.reduce_max(x)) <= 1.0
    assert set(y.numpy()) == set(range(10))


@pytest.mark.parametrize("max_bytes", [2**30, 0])
def test_digits_are_shuffled_anew_each_pass_and_alike_for_a_seed(
    tmp_path, monkeypatch, max_bytes
):
    """In memory and from files alike."""
    monkeypatch.setattr(data, "MAX_BYTES_IN_MEMORY", max_bytes)
    builder = sources.prepare_tfds("digits", str(tmp_path))

    def labels(number, seed=3):
        dataset = sources.read_tfds(
            builder, "train", global_batch_size=1437, shuffle_seed=seed
        )
        ((_, y),) = dataset(tf.constant(number, tf.int64))
        return y.numpy().tolist()

    assert labels(0) == labels(0)
    assert len({tuple(labels(n)) for n in range(3)}) == 3
    assert labels(0) != labels(0, seed=4)
    assert sorted(labels(0)) == sorted(labels(1))


def test_what_batches_are_told_by_is_still_there():
    dataset = tf.data.Dataset.range(4).batch(2)
    (names,) = data._PRIVATE_NAMES.values()
    assert all(hasattr(dataset, name) for name in names)
    again = dataset.shuffle(2).repeat(2).take(1).skip(0).cache().prefetch(1)
    assert data.is_batched(again.filter(lambda x: True).shard(2, 0))
    assert data.is_batched(dataset.map(lambda x: x)) is None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
