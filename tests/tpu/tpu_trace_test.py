"""The trainer's own steps, traced under the real `TPUStrategy`."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.client import session
from tensorflow.python.tpu import tpu_strategy_util, tpu_system_metadata

import dist_amp
from dist_amp import ahead_of_time, graphs
from dist_amp.ahead_of_time import UnsupportedError
from tests import support

PARTIAL = support.GLOBAL_BATCH + 3


def make_trainer(*args, num_cores=4, **options):
    strategy = ahead_of_time.make_strategy(num_cores)
    return support.make_trainer(*args, strategy=strategy, **options)


def trace(trainer, dataset, step="train_replica"):
    """The step, traced for the slices of the dataset's batches."""
    trainer.build(dataset)
    (batch,) = trainer.feed(dataset).open(lambda: dataset.take(1))
    one = tf.nest.map_structure(lambda leaf: leaf.values[0], batch)

    @tf.function(autograph=False)
    def run(batch):
        trainer.strategy.run(getattr(trainer, step), args=(batch,))

    return run.get_concrete_function(
        tf.nest.map_structure(tf.TensorSpec.from_tensor, one)
    )


def in_replica(function):
    return [
        op
        for op in function.graph.get_operations()
        if "_tpu_replicate" in op.node_def.attr
    ]


def test_gradients_are_reduced_together_and_once():
    dataset = support.make_dataset(PARTIAL)
    trainer = make_trainer(precision="mixed_bfloat16", metrics=["accuracy"])
    function = trace(trainer, dataset)
    reduces = [
        op for op in in_replica(function) if op.type == "CrossReplicaSum"
    ]
    (one,) = reduces
    weights = sum(
        int(np.prod(v.shape)) for v in trainer.model.trainable_variables
    )
    assert one.outputs[0].shape == [weights]
    program = ahead_of_time.program_of(function)
    assert program.all_reduce_bytes == 4 * weights
    assert program.num_replicas == 4


def test_products_are_in_bfloat16():
    def make_model():
        return support.make_mlp(name="hidden")

    trainer = make_trainer(make_model, precision="auto")
    function = trace(trainer, support.make_dataset())
    products = [op for op in in_replica(function) if op.type == "MatMul"]
    dtypes = {"hidden" in op.name: op.get_attr("T") for op in products}
    assert len(products) == 5  # the first layer's input needs no gradient
    assert dtypes == {True: tf.bfloat16, False: tf.float32}


def test_there_is_no_loss_scale():
    trainer = make_trainer(precision="auto")
    assert trainer.optimizer.loss_scale == 1.0


@pytest.mark.parametrize("step", ["train_replica", "test_replica"])
def test_nothing_is_left_for_the_host(step):
    dataset = support.make_dataset(PARTIAL)
    trainer = make_trainer(metrics=["accuracy"])
    function = trace(trainer, dataset, step)
    assert not any(
        "_xla_outside_compilation" in op.node_def.attr
        for op in in_replica(function)
    )
    ahead_of_time.lower(ahead_of_time.program_of(function))  # or it raises


def test_evaluation_talks_to_nobody():
    dataset = support.make_dataset(PARTIAL)
    trainer = make_trainer(metrics=["accuracy"])
    function = trace(trainer, dataset, "test_replica")
    assert ahead_of_time.program_of(function).num_all_reduces == 0


def test_the_whole_loop_is_traced_and_takes_its_input_on_the_host():
    trainer = make_trainer()
    assert trainer.trace(support.make_dataset(PARTIAL)) > 100
    function = trainer._traced_loop(support.make_dataset(PARTIAL))
    bodies = [op for op, _ in graphs.operations(function.graph)]
    inputs = [op for op in bodies if op.type == "IteratorGetNext"]
    assert inputs
    assert not any("_tpu_replicate" in op.node_def.attr for op in inputs)


def test_what_is_loaded_after_the_cut_is_fed_alike():
    dataset = support.make_dataset(PARTIAL)
    loaded = dist_amp.LoadedBatches(dataset, lambda x, y: (x, y))
    trainer = make_trainer()
    trainer.build(loaded)
    fed = list(trainer.feed(loaded).open(lambda: dataset))
    assert len(fed) == 2
    for one, other in zip(
        fed, trainer.feed(dataset).open(lambda: dataset), strict=True
    ):
        for a, b in zip(
            tf.nest.flatten(one), tf.nest.flatten(other), strict=True
        ):
            for mine, whole in zip(a.values, b.values, strict=True):
                assert mine.shape == whole.shape
                np.testing.assert_array_equal(mine, whole)
    assert trainer.trace(loaded) > 100


def test_slices_have_one_size_and_copies_weigh_nothing():
    dataset = support.make_dataset(PARTIAL)
    trainer = make_trainer()
    trainer.build(dataset)
    batches = list(trainer.feed(dataset).open(lambda: dataset))
    assert len(batches) == 2
    for batch, sizes in zip(batches, [(2, 2, 2, 2), (0, 1, 1, 1)], strict=True):
        slices = [
            tf.nest.map_structure(lambda leaf, i=i: leaf.values[i], batch)
            for i in range(4)
        ]
        assert [int(one.num_examples) for one in slices] == list(sizes)
        for one in slices:
            assert one.x.shape == (2, support.NUM_FEATURES)
            weights = one.weight.numpy()
            number = int(one.num_examples)
            np.testing.assert_allclose(weights[:number], 1 / sum(sizes))
            assert not weights[number:].any()
    x, _ = support.make_arrays(PARTIAL)
    last = [leaf.numpy() for leaf in batches[1].x.values]
    np.testing.assert_array_equal(last[1], np.stack([x[8], x[8]]))


def test_full_batches_need_no_padding():
    dataset = support.make_dataset().unbatch().batch(8, drop_remainder=True)
    trainer = make_trainer()
    trainer.build(dataset)
    (batch, *_) = trainer.feed(dataset).open(lambda: dataset)
    assert batch.num_examples.values == (None,) * 4
    assert batch.x.values[0].shape == (2, support.NUM_FEATURES)
    assert trainer.trace(dataset) > 100


def test_a_batch_larger_than_the_first_is_told():
    sizes = tf.data.Dataset.from_tensor_slices([4, 8])
    dataset = sizes.map(
        lambda n: (tf.zeros([n, support.NUM_FEATURES]), tf.zeros([n], tf.int32))
    )
    trainer = make_trainer()
    trainer.build(dataset)
    with pytest.raises(tf.errors.InvalidArgumentError, match="first"):
        list(trainer.feed(dataset).open(lambda: dataset))


def test_shapes_that_vary_are_told():
    dataset = tf.data.Dataset.range(3).map(
        lambda n: (tf.zeros([2, n + 1]), tf.zeros([2], tf.int32))
    )
    dataset = dataset.map(lambda x, y: (tf.ensure_shape(x, [None, None]), y))

    def make_pool():
        return keras.Sequential([keras.layers.GlobalMaxPooling1D()])

    trainer = make_trainer(make_pool, loss=None)
    with pytest.raises(ValueError, match="padded_batch"):
        trainer.feed(dataset)


def test_compiling_twice_is_refused():
    trainer = make_trainer(jit_compile=True)
    with pytest.raises(ValueError, match="nojit_compile"):
        trainer.build(support.make_dataset())


class _Tells(keras.layers.Layer):
    def call(self, inputs):
        tf.print(tf.reduce_sum(inputs))  # THE LINE
        return inputs


class _TellsSometimes(keras.layers.Layer):
    def call(self, inputs):
        return tf.cond(
            inputs[0, 0] > 0,
            lambda: inputs + len_of(inputs),
            lambda: inputs,
        )


def len_of(inputs):
    text = tf.strings.as_string(inputs)  # THE LINE
    return tf.cast(tf.strings.length(text), tf.float32)


@pytest.mark.parametrize(
    ("layer", "op"),
    [(_Tells, "StringFormat"), (_TellsSometimes, "AsString")],
)
def test_what_a_tpu_cannot_run_is_named_with_its_line(layer, op):
    def make_model():
        return keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                layer(),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        )

    trainer = make_trainer(make_model)
    function = trace(trainer, support.make_dataset())
    with pytest.raises(UnsupportedError) as caught:
        ahead_of_time.lower(ahead_of_time.program_of(function))
    assert [one.op for one in caught.value.found] == [op]
    (one,) = caught.value.found
    assert one.line.endswith("# THE LINE")
    assert __file__ in str(caught.value)


def test_shapes_that_depend_on_data_are_named_with_their_line():
    @tf.function(autograph=False)
    def step(x):
        strategy.run(inner, args=(x,))

    def inner(x):
        size = tf.cast(x[0, 0], tf.int32)
        return tf.reshape(x, [size, -1])  # THE LINE

    strategy = ahead_of_time.make_strategy(2)
    function = step.get_concrete_function(tf.TensorSpec([4, 4]))
    with pytest.raises(UnsupportedError) as caught:
        ahead_of_time.lower(ahead_of_time.program_of(function))
    (one,) = caught.value.found
    assert (one.op, one.why) == ("Reshape", "its shape depends on data")
    assert one.line.endswith("# THE LINE")


def test_a_step_must_run_once():
    strategy = ahead_of_time.make_strategy(2)

    def twice(x):
        strategy.run(tf.abs, args=(x,))
        strategy.run(tf.abs, args=(x,))

    function = tf.function(twice).get_concrete_function(tf.TensorSpec([2]))
    with pytest.raises(ValueError, match="calls it 2 times"):
        ahead_of_time.program_of(function)


def test_nothing_stays_changed():
    before = dict(tpu_strategy_util._INITIALIZED_TPU_SYSTEMS)
    query = tpu_system_metadata._query_tpu_system_metadata
    ahead_of_time.make_strategy(2)
    assert before == tpu_strategy_util._INITIALIZED_TPU_SYSTEMS
    assert tpu_system_metadata._query_tpu_system_metadata is query


def test_the_private_names_are_still_there():
    owners = {
        "tensorflow 2.21, tpu_system_metadata": tpu_system_metadata,
        "tensorflow 2.21, tpu_strategy_util": tpu_strategy_util,
        "tensorflow 2.21, session": session,
        "tensorflow 2.21, TPUStrategy": ahead_of_time.make_strategy(1),
        "tensorflow 2.21, Tensor": tf.Variable(1.0).handle,
        "tensorflow 2.21, Graph": tf.Graph(),
    }
    names = {**ahead_of_time._PRIVATE_NAMES, **graphs._PRIVATE_NAMES}
    for key, owner in owners.items():
        for name in names[key]:
            assert hasattr(owner, name), (key, name)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
