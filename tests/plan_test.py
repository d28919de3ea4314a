"""What a step takes, against what a hand computes."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_amp import ahead_of_time, graphs, memory, plan
from tests import support

F, C = support.NUM_FEATURES, support.NUM_CLASSES
HIDDEN = 8
PARAMETERS = F * HIDDEN + HIDDEN + HIDDEN * C + C


def make_plan(
    *args, num_replicas=1, rows=8, strategy=None, wire="float32", **options
):
    trainer = support.make_trainer(*args, strategy=strategy, **options)
    return plan.make(
        trainer,
        support.make_dataset(),
        num_replicas=num_replicas,
        per_replica_batch_size=rows,
        wire_dtype=wire,
    )


def flops(function, *shapes):
    specs = [tf.TensorSpec(shape) for shape in shapes]
    traced = tf.function(function).get_concrete_function(*specs)
    return graphs.flops_of(traced.graph)


def products_of_mlp(rows):
    """Forward, both kernels' gradients, the hidden layer's gradient."""
    first, second = F * HIDDEN, HIDDEN * C
    return 2 * rows * (2 * first + 3 * second)


def test_a_step_of_a_small_network():
    made = make_plan(rows=8)
    assert made.parameters == PARAMETERS
    assert made.flops == products_of_mlp(8)
    assert made.uncounted_products == 0
    assert made.parameter_bytes == 4 * PARAMETERS
    assert made.gradient_bytes == 4 * PARAMETERS
    # Momenta; the number of updates and the learning rate, of the wrapper too.
    assert made.optimizer_bytes == 4 * PARAMETERS + 2 * (8 + 4)
    assert made.all_reduce_bytes == 0
    assert made.precision == "float32"
    assert made.memory_bytes == sum(
        (
            made.parameter_bytes,
            made.gradient_bytes,
            made.optimizer_bytes,
            made.activation_bytes,
        )
    )


def test_replicas_share_the_batch():
    made = make_plan(num_replicas=4, rows=2)
    assert made.global_batch_size == 8
    assert made.flops == products_of_mlp(8)
    assert made.all_reduce_bytes == 4 * PARAMETERS


def test_a_wire_in_eight_bits_keeps_what_gradients_lost():
    plain, quantized = (
        make_plan(num_replicas=2, wire=wire) for wire in ("float32", "int8")
    )
    assert quantized.optimizer_bytes - plain.optimizer_bytes == 4 * PARAMETERS
    assert make_plan(wire="int8").optimizer_bytes == plain.optimizer_bytes


def test_a_wire_in_float16_is_half_the_bytes():
    made = make_plan(num_replicas=2, wire="float16")
    assert made.all_reduce_bytes == 2 * PARAMETERS


def test_batch_statistics_travel_too():
    def make_model():
        return keras.Sequential(
            [
                keras.Input((F,)),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(C),
            ]
        )

    made = make_plan(make_model, num_replicas=2)
    trainable = F * C + C + 2 * F
    assert made.all_reduce_bytes == 4 * (trainable + 2 * F)


def test_a_tpu_counts_the_same_products():
    strategy = ahead_of_time.make_strategy(2)
    made = make_plan(strategy=strategy, num_replicas=16, rows=4)
    assert made.flops == products_of_mlp(64)
    assert made.all_reduce_bytes == 4 * PARAMETERS
    assert made.num_all_reduces == 1


def test_activations_grow_with_the_batch():
    small, large = (make_plan(rows=n).activation_bytes for n in (8, 16))
    assert large == 2 * small
    assert small >= 4 * 8 * HIDDEN


def test_what_is_kept_for_the_backward_pass():
    weights = tf.Variable(tf.ones([4, 5]))

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            y = tf.tanh(tf.reshape(x @ weights, [10]))
            z = tf.reduce_sum(y * y)
        return tape.gradient(z, weights)

    graph = gradient.get_concrete_function(tf.TensorSpec([2, 4])).graph
    assert graphs.kept_bytes(graph) == 4 * 10  # y, for tanh and for the square


def test_what_a_loop_keeps_for_the_backward_pass():
    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.while_loop(
                lambda i, x: i < 5,
                lambda i, x: (i + 1, tf.tanh(x)),
                [0, x],
                maximum_iterations=5,
            )[1]
        return tape.gradient(y, x)

    graph = gradient.get_concrete_function(tf.TensorSpec([10])).graph
    # Of each round tanh, and how many rounds there were.
    assert graphs.kept_bytes(graph) == 5 * 4 * 10 + 4


def test_a_gradient_that_nothing_needs_does_not_count():
    """Of a first convolution's input: the operation is there, and not run."""
    kernel = tf.Variable(tf.ones([3, 3, 4, 6]))

    def gradient(x):
        with tf.GradientTape() as tape:
            y = tf.nn.conv2d(x, kernel, strides=1, padding="SAME")
            loss = tf.reduce_sum(y * y)
        return tape.gradient(loss, kernel)

    forward = 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert flops(gradient, [2, 8, 8, 4]) == (2 * forward, 0)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (tf.matmul, ([2, 3], [3, 5]), 2 * 2 * 3 * 5),
        (tf.matmul, ([7, 2, 3], [7, 3, 5]), 2 * 7 * 2 * 3 * 5),
        (
            lambda a, b: tf.matmul(a, b, transpose_a=True),
            ([3, 2], [3, 5]),
            2 * 2 * 3 * 5,
        ),
        (
            lambda a, b: tf.einsum("bqhd,bkhd->bhqk", a, b),
            ([2, 3, 4, 5], [2, 6, 4, 5]),
            2 * 2 * 3 * 4 * 5 * 6,
        ),
        (
            lambda a, b: tf.einsum("...i,io->...o", a, b),
            ([2, 3, 4], [4, 5]),
            2 * 2 * 3 * 4 * 5,
        ),
        (
            lambda a, b: tf.nn.conv2d(a, b, strides=2, padding="SAME"),
            ([2, 8, 8, 3], [3, 3, 3, 5]),
            2 * 2 * 4 * 4 * 5 * 3 * 3 * 3,
        ),
        (
            lambda a, b: tf.nn.depthwise_conv2d(
                a, b, strides=[1, 1, 1, 1], padding="VALID"
            ),
            ([2, 8, 8, 3], [3, 3, 3, 2]),
            2 * 2 * 6 * 6 * 6 * 3 * 3,
        ),
        (lambda a, b: a + b, ([2, 3], [2, 3]), 0),
    ],
)
def test_flops_of_an_operation(function, shapes, expected):
    assert flops(function, *shapes) == (expected, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_of_the_gradients_of_a_convolution(groups):
    def gradients(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = tf.nn.conv2d(x, kernel, strides=1, padding="SAME")
            loss = tf.reduce_sum(y * y)
        return tape.gradient(loss, [x, kernel])

    forward = 2 * (2 * 8 * 8 * 6) * (3 * 3 * (4 // groups))
    shapes = ([2, 8, 8, 4], [3, 3, 4 // groups, 6])
    assert flops(gradients, *shapes) == (3 * forward, 0)


def test_loops_count_their_rounds():
    def loop(x):
        return tf.while_loop(
            lambda i, x: i < 5,
            lambda i, x: (i + 1, x @ x),
            [0, x],
            maximum_iterations=5,
        )[1]

    assert flops(loop, [3, 3]) == (5 * 2 * 27, 0)


def test_products_in_loops_of_unknown_length_are_told():
    def loop(x):
        while tf.reduce_sum(x) < 100.0:
            x = x @ x
        return x

    assert flops(loop, [3, 3]) == (0, 1)


def test_the_build_needs_no_whole_batch():
    """A model is built on one example, however large batches are."""
    seen = []

    class Watching(keras.layers.Layer):
        def call(self, inputs):
            seen.append(inputs.shape[0])
            return inputs

    def make_model():
        return keras.Sequential([Watching(), keras.layers.Dense(C)])

    dataset = support.make_dataset().unbatch().batch(8, drop_remainder=True)
    support.make_trainer(make_model).build(dataset)
    assert set(seen) == {1}


def test_memory_of_variables_and_of_this_process():
    variables = [tf.Variable(np.zeros([3, 4], "float16")), tf.Variable(0)]
    assert memory.bytes_of(variables) == 3 * 4 * 2 + 4
    before = memory.peak_bytes(support.make_strategy(1))
    block = np.ones(2**24)  # 128 MiB
    in_use = memory.bytes_in_use(support.make_strategy(1))
    after = memory.peak_bytes(support.make_strategy(1))
    assert after >= in_use > 2**27
    assert after >= before > 2**26
    assert block.sum() == 2**24


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
