"""One trace of each step function; XLA changes nothing but the speed."""

import functools
import sys

import pytest
import tensorflow as tf

from dist_amp import data
from tests import support


def _num_traces(trainer):
    return [
        loop.experimental_get_tracing_count()
        for loop in (trainer._train_loop, trainer._test_loop)
    ]


@pytest.mark.parametrize("steps_per_loop", ["auto", 1, 3])
@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_one_trace_serves_a_whole_fit(num_replicas, steps_per_loop):
    """Last batches and last calls of every size, in fit and evaluate."""
    trainer = support.make_trainer(num_replicas=num_replicas)
    for last_batch in (0, 1, 5):
        num_examples = 4 * support.GLOBAL_BATCH + last_batch
        trainer.fit(
            support.make_dataset(num_examples),
            epochs=2,
            steps_per_loop=steps_per_loop,
            validation_data=support.make_dataset(num_examples),
            verbose=0,
        )
    trainer.evaluate(support.make_dataset(3))
    assert _num_traces(trainer) == [1, 1]


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_one_trace_with_accumulation(num_replicas):
    trainer = support.make_trainer(
        make_optimizer=lambda: support.make_sgd(gradient_accumulation_steps=4),
        num_replicas=num_replicas,
    )
    for num_examples in (64, 35, 3):
        trainer.fit(support.make_dataset(num_examples), verbose=0)
    assert _num_traces(trainer) == [1, 0]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_one_trace_with_fixed_shapes(num_replicas):
    arrays = support.make_arrays(21)
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(
        support.GLOBAL_BATCH, drop_remainder=True
    )
    trainer = support.make_trainer(num_replicas=num_replicas)
    trainer.fit(dataset, epochs=2, validation_data=dataset, verbose=0)
    assert _num_traces(trainer) == [1, 1]


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_one_trace_for_batches_that_come_in_stacks(num_replicas):
    trainer = support.make_trainer(num_replicas=num_replicas)
    for last_batch in (0, 5):
        arrays = support.make_arrays(4 * support.GLOBAL_BATCH + last_batch)
        make = data.from_arrays(arrays, support.GLOBAL_BATCH)
        trainer.fit(make, epochs=2, verbose=0)
    assert trainer._train_loop.experimental_get_tracing_count() == 0
    assert trainer._stacked_loop.experimental_get_tracing_count() == 1


@functools.cache
def _reference(precision):
    return support.fit_reference(support.make_dataset(21), precision=precision)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("num_replicas", "precision"),
    [*support.FEW_CASES, (4, "mixed_bfloat16")],
)
def test_jit_compile_gives_the_same_model(num_replicas, precision, jit_compile):
    """21 examples: a smaller last batch, which XLA compiles for itself."""
    trained = support.fit_trainer(
        support.make_dataset(21),
        num_replicas=num_replicas,
        precision=precision,
        jit_compile=jit_compile,
    )
    support.assert_parity(trained, _reference(precision), precision)


def test_jit_compile_with_an_empty_replica():
    trained = support.fit_trainer(
        support.make_dataset(9), num_replicas=4, jit_compile=True
    )
    reference = support.fit_reference(support.make_dataset(9))
    support.assert_parity(trained, reference)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_fixed_shapes_give_the_same_model(num_replicas):
    dataset = tf.data.Dataset.from_tensor_slices(support.make_arrays(21)).batch(
        support.GLOBAL_BATCH, drop_remainder=True
    )
    trained = support.fit_trainer(dataset, num_replicas=num_replicas)
    support.assert_parity(trained, support.fit_reference(dataset))


@pytest.mark.parametrize("steps_per_loop", [1, 2, 5])
@pytest.mark.parametrize("num_replicas", [1, 4])
def test_steps_per_loop_gives_the_same_model(num_replicas, steps_per_loop):
    trained = support.fit_trainer(
        support.make_dataset(21),
        num_replicas=num_replicas,
        fit={"steps_per_loop": steps_per_loop},
    )
    support.assert_parity(trained, _reference("float32"))


@pytest.mark.parametrize("steps_per_loop", [1, 3, "auto"])
@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_stacks_give_the_same_model(num_replicas, steps_per_loop):
    """With a smaller last batch, which comes in a stack of its own."""
    make = data.from_arrays(support.make_arrays(21), support.GLOBAL_BATCH)
    assert make.stack_size == 2
    trained = support.fit_trainer(
        make, num_replicas=num_replicas, fit={"steps_per_loop": steps_per_loop}
    )
    support.assert_parity(trained, _reference("float32"))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
