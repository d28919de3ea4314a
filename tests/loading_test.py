"""What is loaded after the cut is, bit for bit, what was to be cut."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import data, stream
from dist_amp.feed import Feed
from dist_amp.loading import LoadedBatches, first_pass, for_each
from tests import support

NUM_EXAMPLES = 19  # the last batch has 3 of 8: a replica of 4 goes without


def zero():
    return tf.constant(0, tf.int64)


def features(index, seed):
    """An example by its index alone, as images are by their names."""
    noise = tf.random.stateless_normal([support.NUM_FEATURES], seed)
    return noise, index % support.NUM_CLASSES, tf.cast(index, tf.float32)


def passes(number):
    """Indices and seeds: what is cheap."""
    index = tf.data.Dataset.range(NUM_EXAMPLES)
    seeded = index.map(lambda i: (i, tf.stack([number, i])))
    return data.shuffled(seeded, number).batch(support.GLOBAL_BATCH)


def make_loaded(num_parts=3, batches=passes):
    def example(*row):
        parts = features(*row)[:num_parts]
        return parts if num_parts > 1 else parts[0]

    return LoadedBatches(batches, for_each(example))


def flat(element):
    return [
        leaf.numpy() for leaf in tf.nest.flatten(element) if leaf is not None
    ]


def assert_same(actual, expected):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        for a, b in zip(flat(one), flat(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("pad_to", [None, 2])
def test_slices_are_those_of_batches_that_were_loaded_whole(num_parts, pad_to):
    loaded = make_loaded(num_parts)
    options = {"num_replicas": 4, "pad_to": pad_to}
    if num_parts > 1:
        options["class_weight"] = {1: 2.0}
    for reduction in ("sum_over_batch_size", "sum"):
        options["reduction"] = reduction
        cut_first = data.split(passes(zero()), load=loaded.load, **options)
        cut_last = data.split(loaded(zero()), **options)
        assert_same(cut_first, cut_last)
        assert [
            leaf.shape.as_list() for leaf in flat_spec(cut_first, pad_to)
        ] == [leaf.shape.as_list() for leaf in flat_spec(cut_last, pad_to)]


@pytest.mark.parametrize("kind", ["ragged", "none", "none and weights"])
def test_leaves_of_other_kinds_are_cut_alike(kind):
    def load(index):
        number = tf.cast(index, tf.float32)
        if kind == "ragged":
            return tf.ragged.range(number + 1.0), number
        return (number, None, number) if "weights" in kind else (number, None)

    batches = tf.data.Dataset.range(9).batch(8)  # the last one of 1
    loaded = LoadedBatches(batches, load)
    cut_first = data.split(batches, num_replicas=4, load=loaded.load)
    cut_last = data.split(loaded(zero()), num_replicas=4)
    assert_same(
        map(_with_lists, cut_first),
        map(_with_lists, cut_last),
    )


def _with_lists(slices):
    """Ragged tensors as their values and where rows end."""
    return [
        (leaf.values, leaf.row_splits)
        if isinstance(leaf, tf.RaggedTensor)
        else leaf
        for batch in slices
        for leaf in batch
    ]


def test_a_row_that_load_drops_or_adds_is_an_error():
    batches = tf.data.Dataset.range(8).batch(8)
    loaded = LoadedBatches(batches, lambda index: index[:1])
    slices = data.split(batches, num_replicas=2, load=loaded.load)
    with pytest.raises(tf.errors.InvalidArgumentError, match="a row for each"):
        list(slices)


def test_examples_that_are_no_batches_are_told():
    loaded = LoadedBatches(tf.data.Dataset.range(8), lambda index: index)
    with pytest.raises(ValueError, match="must be global batches"):
        stream.one_pass(loaded)


def flat_spec(dataset, pad_to):
    """Of what shapes have to be known: all, on a TPU."""
    leaves = tf.nest.flatten(dataset.element_spec)
    return [leaf for leaf in leaves if isinstance(leaf, tf.TensorSpec)][:1]


def test_a_worker_loads_its_own_rows_only():
    """The second of two, with replicas 2 and 3 of 4."""
    seen = []

    def look(index):
        seen.extend(index)
        return index.astype(np.float32)

    def load(index, seed):
        x = tf.numpy_function(look, [index], tf.float32, stateful=True)
        return tf.ensure_shape(x, [None])

    second = data.split(
        passes(zero()),
        num_replicas=4,
        first_replica=2,
        num_local_replicas=2,
        load=LoadedBatches(passes, load).load,
    )
    fed = [int(i) for batch in second for part in batch for i in part.x]
    assert sorted(seen) == sorted(fed)
    # Of 8, 8 and 3 examples; replica 2 of 4 has one of three, so has 3.
    assert len(fed) == 4 + 4 + 2
    batches = [index.numpy() for index, _ in passes(zero())]
    assert set(fed) == {i for b in batches for i in b[len(b) // 2 :]}


class Replicas:
    """So many, of which a worker here has some."""

    def __init__(self, number):
        self.num_replicas_in_sync = number


def test_a_loss_that_divides_by_all_weights_loads_whole_batches():
    loaded = make_loaded()
    plain = LoadedBatches(stream.one_pass(passes), loaded.load)
    for dataset in (loaded, plain):
        feed = Feed(
            Replicas(4), range(4), dataset, reduction="mean_with_sample_weight"
        )
        expected = data.split(
            stream.one_pass(loaded),
            num_replicas=4,
            reduction="mean_with_sample_weight",
        )
        assert_same(
            feed.open(lambda feed=feed: stream.one_pass(feed.batches)), expected
        )
    # As before: a function of the pass, or a dataset.
    assert isinstance(feed.batches, tf.data.Dataset)
    with pytest.raises(ValueError, match="load whole batches"):
        data.split(
            passes(zero()),
            reduction="mean_with_sample_weight",
            load=loaded.load,
        )


def fitted(dataset, num_replicas, stop_at=None, **options):
    keras.utils.set_random_seed(1)
    with dist_amp.scope(support.make_strategy(num_replicas), "float32"):
        model = keras.Sequential(
            [
                keras.Input([support.NUM_FEATURES]),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        )
        optimizer = dist_amp.wrap_optimizer(keras.optimizers.SGD(0.1))
    trainer = dist_amp.Trainer(
        model,
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def stop(batch, logs):
        if trainer.global_step == stop_at:
            trainer.request_stop()

    trainer.fit(
        dataset,
        steps_per_loop=1,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)],
        verbose=0,
        **options,
    )
    return trainer


def test_training_evaluating_and_predicting_are_the_same(tmp_path):
    """Also where training goes on in the middle of a pass."""
    loaded = make_loaded()
    straight = fitted(loaded, 4, epochs=2)
    whole = fitted(lambda number: loaded(number), 4, epochs=2)
    support.assert_close(
        straight.model.get_weights(), whole.model.get_weights()
    )
    folder = {"checkpoint_dir": tmp_path}
    fitted(loaded, 4, epochs=2, stop_at=4, **folder)
    again = fitted(loaded, 4, epochs=2, **folder)
    assert again.global_step == straight.global_step == 6
    for one, other in zip(
        again.model.get_weights(), straight.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    for steps in (None, 2):  # what is shuffled is so again if read again
        results = straight.evaluate(loaded, steps=steps)
        assert results == straight.evaluate(loaded(zero()), steps=steps)
    predicted = straight.predict(loaded)
    assert len(predicted) == NUM_EXAMPLES
    np.testing.assert_array_equal(predicted, straight.predict(loaded(zero())))


def test_inputs_are_cast_after_the_cut():
    cast = data.cast_inputs(make_loaded(2), "bfloat16")
    assert isinstance(cast, LoadedBatches)
    spec = cast(zero()).element_spec
    assert [leaf.dtype for leaf in spec] == [tf.bfloat16, tf.int64]
    (one, *_), *_ = data.split(passes(zero()), load=cast.load)
    assert one.x.dtype == tf.bfloat16


def test_batches_that_only_fill_up_hold_no_example():
    """Of a worker whose data end before those of the others."""
    longer = first_pass(make_loaded()).apply(
        lambda some: stream.padded(some, 5)
    )
    assert int(longer.cardinality()) == 5
    *_, last = data.split(longer.batches, num_replicas=2, load=longer.load)
    assert [one.x.shape for one in last] == [(0, support.NUM_FEATURES)] * 2


def test_batches_of_a_known_size_have_slices_of_a_known_size():
    known = LoadedBatches(
        lambda number: passes(number).unbatch().batch(8, drop_remainder=True),
        make_loaded(2).load,
    )
    slices = data.split(known.batches(zero()), num_replicas=4, load=known.load)
    assert slices.element_spec[3].x.shape == (2, support.NUM_FEATURES)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
