"""Gradients in eight bits: what they lose is bounded, known and given back."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import ahead_of_time, quantized, reduction
from tests import support

INT8 = {"wire_dtype": "int8", "wire_check_interval": 0}
SCALED = INT8 | {"loss_scale": "dynamic", "initial_scale": 2.0**10}
CHECKED = INT8 | {"wire_check_interval": 1}

# After six steps of the small models; float16 itself is 4e-4 away there.
TOLERANCE = {"rtol": 0.0, "atol": 2e-3}


def random_blocks(num_replicas, seed=0):
    """Blocks of all sizes; in the first one all numbers are extreme."""
    generator = np.random.default_rng(seed)
    shape = (num_replicas, 6, quantized.BLOCK)
    values = generator.normal(size=shape)
    values *= 10.0 ** generator.uniform(-20, 20, (num_replicas, 6, 1))
    values[:, 0] = np.sign(generator.normal(size=quantized.BLOCK))
    return tf.constant(values, tf.float32)


def in_replicas(num_replicas, function):
    """What a function of the replica's number returns on each of them."""
    strategy = support.make_strategy(num_replicas)

    @tf.function
    def run():
        def in_replica():
            context = tf.distribute.get_replica_context()
            return function(context.replica_id_in_sync_group)

        return strategy.run(in_replica)

    per_output = [
        [one.numpy() for one in strategy.experimental_local_results(output)]
        for output in run()
    ]
    return list(zip(*per_output, strict=True))


# ------------------------------------------------------------- arithmetic


def test_numbers_by_hand():
    """Two replicas whose largest is 63: 126 levels, so that a unit is 1."""
    values = [63.0, 10.4, -0.6, 0.4, -63.0, 0.0, 7.0, -7.5]
    blocks = quantized.to_blocks(tf.constant(values))
    assert blocks.shape == (1, quantized.BLOCK)
    total = 2 * quantized.magnitudes(blocks)
    quantum = quantized.quantum_of(total, num_replicas=2)
    assert quantum.numpy().tolist() == [1.0]
    units = quantized.quantize(blocks, quantum)
    expected = [63, 10, -1, 0, -63, 0, 7, -8]
    assert units[0, :8].numpy().tolist() == expected
    words = quantized.to_words(units, tf.int64)
    doubled = quantized.from_words(words + words)
    assert doubled[0, :8].numpy().tolist() == [2 * n for n in expected]
    back = quantized.from_blocks(doubled, like=tf.constant(values))
    assert back.numpy().tolist() == [2 * n for n in expected]


@pytest.mark.parametrize("num_replicas", [2, 3, 4, quantized.MAX_REPLICAS])
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_sums_of_words_are_those_of_each_number(dtype, num_replicas):
    values = random_blocks(num_replicas)
    total = tf.add_n([quantized.magnitudes(v) for v in values])
    quantum = quantized.quantum_of(total, num_replicas)
    units = [quantized.quantize(v, quantum) for v in values]
    partial = np.cumsum(units, axis=0)
    assert 100 < np.abs(partial).max() <= 127
    words = sum(quantized.to_words(each, dtype) for each in units)
    np.testing.assert_array_equal(quantized.from_words(words), partial[-1])


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("number", [127.0, -127.0])
def test_the_largest_words_do_not_overflow(dtype, number):
    units = tf.fill([1, quantized.BLOCK], number)
    words = quantized.to_words(units, dtype)
    np.testing.assert_array_equal(quantized.from_words(words), units)
    expected = int(number) * sum(256**place for place in range(dtype.size))
    assert words.numpy()[0] == expected


@pytest.mark.parametrize("shape", [(), (0,), (3,), (256,), (16, 16), (5, 77)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_shape_comes_back(shape, dtype):
    values = tf.cast(tf.random.normal(shape, seed=1), dtype)
    blocks = quantized.to_blocks(values)
    assert blocks.shape[1] == quantized.BLOCK
    back = quantized.from_blocks(blocks, like=values)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 1e-36])
def test_what_is_too_small_to_send_is_nothing(tiny):
    blocks = tf.fill([1, quantized.BLOCK], tiny)
    quantum = quantized.quantum_of(2 * quantized.magnitudes(blocks), 2)
    units = quantized.quantize(blocks, quantum)
    np.testing.assert_array_equal(units, tf.zeros_like(units))


# -------------------------------------------------------------- all-reduce


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_a_sum_is_off_by_half_a_quantum_a_replica(num_replicas):
    values = random_blocks(num_replicas)
    large = tf.reshape(values, [num_replicas, 2, -1])
    small = large[:, 0, :300]

    def reduce(replica):
        own = [tf.gather(large, replica), tf.gather(small, replica)]
        sums, lost = reduction.all_reduce_quantized(own)
        return *sums, *lost

    found = in_replicas(num_replicas, reduce)
    maxima = np.abs(values).max(axis=2)  # [num_replicas, 6]
    bound = maxima.sum(axis=0) / quantized.num_levels(num_replicas) / 2
    for sums in found:
        np.testing.assert_array_equal(sums[0], found[0][0])
        np.testing.assert_array_equal(sums[1], found[0][1])
        lost = sums[2].reshape(6, -1)
        assert (np.abs(lost).max(axis=1) <= bound * (1 + 1e-5)).all()
    made_whole = found[0][0] + np.sum([each[2] for each in found], axis=0)
    scale = maxima.sum(axis=0).reshape(2, 3, 1)
    difference = made_whole - np.sum(large, axis=0)
    assert (np.abs(difference.reshape(2, 3, -1)) <= 1e-5 * scale).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_block_that_is_not_finite_says_so_on_every_replica(bad, replica):
    values = np.ones([2, 2 * quantized.BLOCK], "float32")
    values[replica, 3] = bad

    def reduce(number):
        return reduction.all_reduce_quantized([tf.gather(values, number)])[0]

    for (total,) in in_replicas(2, reduce):
        assert not np.isfinite(total[: quantized.BLOCK]).any()
        np.testing.assert_allclose(total[quantized.BLOCK :], 2.0, rtol=1e-6)


def test_what_cannot_be_quantized_is_summed_as_it_is():
    def reduce(replica):
        number = tf.cast(replica, tf.float32) + 1 / 3
        slices = tf.IndexedSlices(
            number[None, None], tf.constant([1]), tf.constant([3, 1])
        )
        double = tf.cast(number, tf.float64)
        (sparse, wide), lost = reduction.all_reduce_quantized([slices, double])
        dense = tf.convert_to_tensor(sparse)
        return dense, wide, *map(reduction.values_of, lost)

    for dense, wide, *lost in in_replicas(2, reduce):
        np.testing.assert_allclose(dense[:, 0], [0, 5 / 3, 0], rtol=1e-7)
        np.testing.assert_allclose(wide, 5 / 3, rtol=1e-7)
        assert not np.any([np.any(each) for each in lost])


# ---------------------------------------------------------- error feedback


class Setup:
    """SGD of rate 1 on two vectors; gradients are given by hand."""

    def __init__(self, num_replicas, **options):
        self.strategy = support.make_strategy(num_replicas)
        with self.strategy.scope():
            self.weights = [keras.Variable(np.zeros(n)) for n in (40, 400)]
            self.optimizer = dist_amp.wrap_optimizer(
                keras.optimizers.SGD(1.0), **options
            )
            self.optimizer.build(self.weights)
        self.num_replicas = num_replicas
        self._apply = tf.function(self._apply_gradients)

    def _apply_gradients(self, first, second):
        def in_replica():
            context = tf.distribute.get_replica_context()
            own = [
                tf.gather(g, context.replica_id_in_sync_group)
                for g in (first, second)
            ]
            scaled = [self.optimizer.scale_loss(g) for g in own]
            self.optimizer.apply(scaled, self.weights)

        self.optimizer.guarded(lambda: self.strategy.run(in_replica))

    def apply(self, gradients):
        """Each of `[num_replicas, size]`."""
        self._apply(*(tf.constant(g, tf.float32) for g in gradients))

    def feedback(self):
        """For each weight, each replica's."""
        feedback = self.optimizer.feedback
        return [np.stack(support.local_copies(v)) for v in feedback]

    def random_gradients(self, seed):
        generator = np.random.default_rng(seed)
        return [
            generator.normal(size=(self.num_replicas, *w.shape))
            for w in self.weights
        ]


@pytest.mark.parametrize("num_replicas", [2, 4])
@pytest.mark.parametrize("options", [INT8, SCALED | {"growth_interval": 5}])
def test_what_was_applied_is_all_but_what_is_owed(num_replicas, options):
    """Also when the loss scale falls and grows on the way."""
    setup = Setup(num_replicas, **options)
    exact = [np.zeros(w.shape) for w in setup.weights]
    for step in range(20):
        gradients = setup.random_gradients(step)
        setup.apply(gradients)
        for whole, gradient in zip(exact, gradients, strict=True):
            whole += gradient.sum(axis=0)
        if step == 7 and options is not INT8:
            setup.optimizer.lower_loss_scale(0.125)
    support.assert_same_on_replicas(setup.weights)
    # No number is beyond four, nor what is owed beyond a half.
    quantum = num_replicas * 4.5 / quantized.num_levels(num_replicas)
    for weight, whole, owed in zip(
        setup.weights, exact, setup.feedback(), strict=True
    ):
        applied = -support.local_copies(weight)[0]
        np.testing.assert_allclose(applied + owed.sum(axis=0), whole, atol=2e-5)
        assert 0 < np.abs(owed).max() <= quantum / 2
        assert (owed[0] != owed[1]).any()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize(("num_replicas", "replica"), [(2, 0), (2, 1), (4, 3)])
def test_a_skipped_update_leaves_what_is_owed(num_replicas, replica, bad):
    setup = Setup(num_replicas, **SCALED)
    setup.apply(setup.random_gradients(0))
    state = [*setup.weights, *setup.optimizer.inner_optimizer.variables]
    before = [support.local_copies(v) for v in state], setup.feedback()
    gradients = setup.random_gradients(1)
    gradients[1][replica, 300] = bad
    setup.apply(gradients)
    after = [support.local_copies(v) for v in state], setup.feedback()
    for old, new in zip(before, after, strict=True):
        for one, other in zip(old, new, strict=True):
            np.testing.assert_array_equal(one, other)
    for name, expected in [("loss_scale", 2.0**9), ("skipped_updates", 1)]:
        copies = support.local_copies(getattr(setup.optimizer, name))
        assert copies == [expected] * num_replicas


def test_nothing_is_owed_of_a_sum_that_was_exact():
    setup = Setup(2, **SCALED)
    ones = [np.ones((2, *w.shape)) for w in setup.weights]
    setup.apply(ones)
    for weight, owed in zip(setup.weights, setup.feedback(), strict=True):
        np.testing.assert_allclose(support.local_copies(weight)[0], -2.0)
        np.testing.assert_allclose(owed, 0.0, atol=1e-7)


# ---------------------------------------------------------------- training


def fit(num_replicas, make_dataset=support.make_dataset, **options):
    return support.fit_trainer(
        make_dataset(),
        num_replicas=num_replicas,
        **({"loss_scale_options": INT8} | options),
    )


@pytest.mark.parametrize("num_replicas", [2, 4])
@pytest.mark.parametrize("precision", support.PRECISIONS)
def test_training_is_close_to_one_device(num_replicas, precision):
    trained = fit(num_replicas, precision=precision)
    reference = support.fit_reference(support.make_dataset())
    support.assert_same_on_replicas(trained.model.variables)
    support.assert_same_on_replicas(trained.optimizer.variables)
    tolerance = {"rtol": 1e-2, "atol": 7e-3}  # as bfloat16 itself is
    if precision != "mixed_bfloat16":
        tolerance = TOLERANCE
    for own, other in zip(trained.weights, reference.weights, strict=True):
        np.testing.assert_allclose(own, other, **tolerance)


def test_parts_clipping_and_replicas_without_examples():
    """A last batch of three, and updates of two batches, on four replicas."""

    def make_sgd():
        return support.make_sgd(
            gradient_accumulation_steps=2, global_clipnorm=0.5
        )

    dataset = support.make_dataset(27)
    trained = fit(4, lambda: dataset, make_optimizer=make_sgd)
    exact = support.fit_trainer(
        dataset, make_optimizer=make_sgd, num_replicas=4
    )
    support.assert_same_on_replicas(trained.model.variables)
    for own, other in zip(trained.weights, exact.weights, strict=True):
        np.testing.assert_allclose(own, other, **TOLERANCE)


def test_keras_fit_trains_with_it():
    dataset = support.make_dataset()
    trained = support.fit_keras(
        dataset, num_replicas=2, loss_scale_options=INT8
    )
    support.assert_same_on_replicas(trained.model.variables)
    by_trainer = fit(2)
    for own, other in zip(trained.weights, by_trainer.weights, strict=True):
        np.testing.assert_allclose(own, other, **TOLERANCE)


def make_trainer(num_replicas, **options):
    return support.make_trainer(
        num_replicas=num_replicas,
        precision="mixed_float16",
        loss_scale_options=SCALED | options,
    )


def state_of(trainer):
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    return [
        support.local_copies(v)
        for v in [*variables, *trainer.optimizer.feedback]
    ]


def test_a_run_that_was_cut_ends_with_the_same_bits(tmp_path):
    options = {"epochs": 3, "steps_per_loop": 1, "verbose": 0}
    dataset = support.make_dataset()
    whole = make_trainer(2, wire_check_interval=2)
    whole.fit(dataset, **options)
    cut = make_trainer(2, wire_check_interval=2)
    stop = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: (
            cut.global_step == 5 and cut.request_stop("the test says so")
        )
    )
    cut.fit(dataset, checkpoint_dir=tmp_path, callbacks=[stop], **options)
    assert cut.global_step == 5
    resumed = make_trainer(2, wire_check_interval=2)
    resumed.fit(dataset, checkpoint_dir=tmp_path, **options)
    assert (resumed.resumed_step, resumed.global_step) == (5, 9)
    for one, other in zip(state_of(whole), state_of(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    owed = resumed.optimizer.feedback[0]
    assert (np.diff(support.local_copies(owed), axis=0) != 0).any()


def test_other_replicas_owe_as_much_in_all(tmp_path):
    dataset = support.make_dataset()
    two, four = make_trainer(2), make_trainer(4)
    for trainer in (two, four):
        trainer.fit(dataset, checkpoint_dir=tmp_path, verbose=0)
    assert four.resumed_step == two.global_step
    for old, new in zip(
        two.optimizer.feedback, four.optimizer.feedback, strict=True
    ):
        first, *others = support.local_copies(new)
        np.testing.assert_array_equal(first, sum(support.local_copies(old)))
        assert not np.any(others)


# ------------------------------------------------------------------- guard


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_check_changes_nothing_but_the_log(dtype):
    options = SCALED | {"wire_dtype": dtype}
    plain = fit(2, loss_scale_options=options)
    checked = fit(2, loss_scale_options=options | {"wire_check_interval": 1})
    for one, other in zip(plain.weights, checked.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert "wire_error" not in plain.history
    low, high = {
        "float16": (1e-5, 1e-3),
        "bfloat16": (1e-3, 1e-2),
        "int8": (5e-3, 5e-2),
    }[dtype]
    assert all(low < e < high for e in checked.history["wire_error"])


def test_the_error_is_the_norm_of_what_was_lost_by_that_of_the_sum():
    setup = Setup(2, **CHECKED)
    gradients = setup.random_gradients(0)
    setup.apply(gradients)
    lost = np.concatenate([f.sum(axis=0) for f in setup.feedback()])
    exact = np.concatenate([g.sum(axis=0) for g in gradients])
    expected = np.linalg.norm(lost) / np.linalg.norm(exact)
    for error in support.local_copies(setup.optimizer.wire_error):
        np.testing.assert_allclose(error, expected, rtol=1e-3)


def test_an_update_is_checked_when_it_is_time():
    setup = Setup(2, **(SCALED | {"wire_check_interval": 3}))
    errors = []
    for step in range(8):
        gradients = setup.random_gradients(step)
        if step == 1:  # a skipped one counts, too
            gradients[0][0, 0] = np.nan
        setup.apply(gradients)
        errors += support.local_copies(setup.optimizer.wire_error)[:1]
    is_new = [a != b for a, b in zip([0.0, *errors], errors, strict=False)]
    assert is_new == [True, False, False] * 2 + [True, False]


def test_a_sum_that_overflows_is_no_error():
    setup = Setup(2, **(CHECKED | {"loss_scale": "dynamic"}))
    setup.apply(setup.random_gradients(0))
    (before, _) = support.local_copies(setup.optimizer.wire_error)
    bad = setup.random_gradients(1)
    bad[0][1, 0] = np.inf
    setup.apply(bad)
    assert support.local_copies(setup.optimizer.wire_error) == [before] * 2


def test_beyond_the_bound_sums_are_exact_from_then_on(caplog, tmp_path):
    """The first update owes; the second one gives it back, and all is exact."""
    options = {"wire_check_interval": 2, "wire_error_bound": 1e-4}
    trainer = make_trainer(2, **options)
    dataset = support.make_dataset()
    trainer.fit(dataset, epochs=2, checkpoint_dir=tmp_path, verbose=0)
    assert caplog.text.count("gradients travel exactly for the rest") == 1
    assert "--wire_error_bound" in caplog.text
    error = support.local_copies(trainer.optimizer.wire_error)
    assert error[0] == error[1] > 1e-4
    for owed in trainer.optimizer.feedback:
        assert not np.any(support.local_copies(owed))
    resumed = make_trainer(2, **options)
    resumed.fit(dataset, epochs=3, checkpoint_dir=tmp_path, verbose=0)
    assert support.local_copies(resumed.optimizer.wire_error) == error
    for owed in resumed.optimizer.feedback:
        assert not np.any(support.local_copies(owed))


def test_exact_sums_give_back_what_is_owed():
    setup = Setup(2, **(CHECKED | {"wire_error_bound": 1e-4}))
    exact = [np.zeros(w.shape) for w in setup.weights]
    for step in range(3):
        gradients = setup.random_gradients(step)
        setup.apply(gradients)
        for whole, gradient in zip(exact, gradients, strict=True):
            whole += gradient.sum(axis=0)
        assert np.any(setup.feedback()[0]) == (step == 0)
    for weight, whole in zip(setup.weights, exact, strict=True):
        np.testing.assert_allclose(
            support.local_copies(weight)[0], -whole, atol=1e-5
        )


# --------------------------------------------------------- settings, TPUs


@pytest.mark.parametrize(
    ("num_replicas", "options", "message"),
    [
        (2, {"wire_dtype": "int4"}, "one of float16, bfloat16, int8"),
        (2, {"wire_dtype": "float16"}, "needs a loss scale"),
        (1, {"wire_dtype": "int8"}, "would be ignored on one device"),
        (2, {"wire_error_bound": 0.1}, "would be ignored: gradients travel"),
        (2, INT8 | {"wire_error_bound": 0.0}, "must be positive"),
        (2, INT8 | {"wire_check_interval": -1}, "must not be negative"),
    ],
)
def test_a_setting_that_is_wrong_or_ignored(num_replicas, options, message):
    with (
        support.make_strategy(num_replicas).scope(),
        pytest.raises(ValueError, match=message),
    ):
        dist_amp.wrap_optimizer(
            keras.optimizers.SGD(0.1), loss_scale=None, **options
        )


def test_too_many_replicas_for_eight_bits():
    strategy = ahead_of_time.make_strategy(quantized.MAX_REPLICAS + 1)
    with (
        strategy.scope(),
        pytest.raises(ValueError, match="too few levels for more than 32"),
    ):
        dist_amp.wrap_optimizer(keras.optimizers.SGD(0.1), wire_dtype="int8")


def test_the_settings_are_saved_with_the_optimizer():
    with support.make_strategy(2).scope():
        optimizer = dist_amp.wrap_optimizer(
            keras.optimizers.SGD(0.1), **(INT8 | {"wire_error_bound": 0.25})
        )
    again = type(optimizer).from_config(optimizer.get_config())  # one device
    wire = again.wire
    assert (wire.dtype, wire.check_interval, wire.error_bound) == (
        "int8",
        0,
        0.25,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_step_for_a_tpu_sums_what_tpus_can(dtype):
    """Traced only: no TPU is here."""
    trainer = support.make_trainer(
        strategy=ahead_of_time.make_strategy(2),
        loss_scale_options={"wire_dtype": dtype, "wire_check_interval": 5},
    )
    dataset = support.make_dataset().repeat()
    trainer.build(dataset)
    graph = trainer._traced_loop(dataset).graph.as_graph_def()
    sums = {
        tf.as_dtype(node.attr["T"].type).name
        for function in graph.library.function
        for node in function.node_def
        if node.op == "CrossReplicaSum"
    }
    sent = {"bfloat16": "bfloat16", "int8": "int32"}[dtype]
    assert sums == {"float32", sent}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
