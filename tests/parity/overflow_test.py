"""An overflow anywhere makes every replica skip the same update."""

import functools
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from tests import support

NUM_BATCHES = 3
POISONED_BATCH = 1
INITIAL_SCALE = 2.0**10
# Finite in float32, infinite in float16.
TOO_LARGE = 1e30
BOOKKEEPING = ("loss_scale", "good_steps", "skipped_updates", "skips_at_floor")
EACH_REPLICA_IN_TURN = [
    (num_replicas, replica)
    for num_replicas in support.NUM_REPLICAS
    for replica in range(num_replicas)
]


def _poisoned_arrays(replica, num_replicas, value=TOO_LARGE):
    """One input row of the poisoned batch, in a replica's slice, is large."""
    x, y = support.make_arrays(NUM_BATCHES * support.GLOBAL_BATCH)
    first_row = replica * support.GLOBAL_BATCH // num_replicas
    x[POISONED_BATCH * support.GLOBAL_BATCH + first_row] = value
    return x, y


def _batch(arrays, index):
    """One batch of some arrays."""
    begin = index * support.GLOBAL_BATCH
    return tuple(a[begin : begin + support.GLOBAL_BATCH] for a in arrays)


def _make_adam():
    return keras.optimizers.Adam(0.01, epsilon=1e-4, weight_decay=0.1)


class _ByTrainer:
    """Fits with `Trainer`; the same trainer for every test."""

    def __init__(self, num_replicas):
        self._trainer = support.make_trainer(
            make_optimizer=_make_adam,
            num_replicas=num_replicas,
            precision="mixed_float16",
            loss_scale_options={"initial_scale": INITIAL_SCALE},
        )
        self._trainer.build(support.make_dataset())
        self.model = self._trainer.model

    def fit(self, dataset):
        self._trainer.fit(dataset, verbose=0)


class _ByKeras:
    """Fits with `model.fit`."""

    def __init__(self, num_replicas):
        self.model = support.make_compiled(
            make_optimizer=_make_adam,
            num_replicas=num_replicas,
            precision="mixed_float16",
            loss_scale_options={"initial_scale": INITIAL_SCALE},
        )

    def fit(self, dataset):
        self.model.fit(dataset, verbose=0, shuffle=False)


@functools.cache
def _fitter(kind, num_replicas):
    fitter = kind(num_replicas)
    variables = fitter.model.variables + fitter.model.optimizer.variables
    return fitter, variables, support.read(variables)


def _fresh_fitter(kind, num_replicas):
    """A fitter whose variables are what they were at the start."""
    fitter, variables, initial_values = _fitter(kind, num_replicas)
    support.assign(variables, initial_values)
    return fitter


def _numbers(optimizer):
    """The loss scale, the skipped updates and the applied ones."""
    return [
        float(tf.convert_to_tensor(number))
        for number in (
            optimizer.loss_scale,
            optimizer.skipped_updates,
            optimizer.iterations,
        )
    ]


@pytest.mark.parametrize("kind", [_ByTrainer, _ByKeras])
@pytest.mark.parametrize(("num_replicas", "replica"), EACH_REPLICA_IN_TURN)
def test_training_goes_on_as_if_the_batch_were_not_there(
    num_replicas, replica, kind
):
    arrays = _poisoned_arrays(replica, num_replicas)
    others = [
        _batch(arrays, i) for i in range(NUM_BATCHES) if i != POISONED_BATCH
    ]
    without = tuple(
        np.concatenate(parts) for parts in zip(*others, strict=True)
    )

    reference = _fresh_fitter(_ByTrainer, 1)
    reference.fit(support.batched(without))
    expected = support.read(reference.model.variables)

    fitter = _fresh_fitter(kind, num_replicas)
    fitter.fit(support.batched(arrays))
    model = fitter.model
    support.assert_close(
        support.read(model.variables), expected, "mixed_float16"
    )
    support.assert_same_on_replicas(model.variables)
    support.assert_same_on_replicas(model.optimizer.variables)
    assert _numbers(model.optimizer) == [INITIAL_SCALE / 2, 1, 2]


@pytest.mark.parametrize("kind", [_ByTrainer, _ByKeras])
@pytest.mark.parametrize(("num_replicas", "replica"), EACH_REPLICA_IN_TURN)
def test_a_skipped_step_moves_nothing_but_the_loss_scale(
    num_replicas, replica, kind
):
    arrays = _poisoned_arrays(replica, num_replicas)
    fitter = _fresh_fitter(kind, num_replicas)
    model, optimizer = fitter.model, fitter.model.optimizer
    fitter.fit(support.batched(_batch(arrays, 0)))
    kept = [
        variable
        for variable in model.variables + optimizer.variables
        if variable.name not in BOOKKEEPING
    ]
    before = [support.local_copies(variable) for variable in kept]

    fitter.fit(support.batched(_batch(arrays, POISONED_BATCH)))

    after = [support.local_copies(variable) for variable in kept]
    for variable, old, new in zip(kept, before, after, strict=True):
        np.testing.assert_array_equal(new, old, variable.path)
    assert _numbers(optimizer) == [INITIAL_SCALE / 2, 1, 1]


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_a_large_target_overflows_the_gradient_only(num_replicas):
    """The loss and the forward pass are finite; float16 gradients are not."""
    x, y = support.make_arrays(support.GLOBAL_BATCH)
    y = np.eye(support.NUM_CLASSES, dtype="float32")[y]
    y[-1] = 1e6
    trained = support.fit_trainer(
        support.batched((x, y)),
        num_replicas=num_replicas,
        precision="mixed_float16",
        loss="mean_squared_error",
        fit={"epochs": 1},
    )
    assert np.isfinite(trained.history["loss"]).all()
    assert _numbers(trained.optimizer) == [2.0**14, 1, 0]
    assert np.isfinite(
        np.concatenate([w.ravel() for w in trained.weights])
    ).all()


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_an_overflow_leaves_batch_norm_statistics_finite(num_replicas):
    arrays = _poisoned_arrays(num_replicas - 1, num_replicas)
    trained = support.fit_trainer(
        support.batched(arrays),
        lambda: keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                keras.layers.Dense(8),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
            ]
        ),
        num_replicas=num_replicas,
        precision="mixed_float16",
        fit={"epochs": 1},
    )
    # Statistics of two examples make steep gradients: more may overflow.
    _, skipped, applied = _numbers(trained.optimizer)
    assert skipped >= 1
    assert skipped + applied == 3
    for variable in trained.model.variables:
        assert np.isfinite(support.local_copies(variable)).all(), variable.path


@pytest.mark.parametrize("replica", range(4))
def test_an_overflow_in_a_micro_step_skips_the_whole_update(replica):
    """Batches 0 and 1 make the first update, batch 2 the second."""
    arrays = _poisoned_arrays(replica, 4)
    options = {"precision": "mixed_float16", "fit": {"epochs": 1}}
    trained = support.fit_trainer(
        support.batched(arrays),
        make_optimizer=lambda: support.make_sgd(gradient_accumulation_steps=2),
        num_replicas=4,
        **options,
    )
    reference = support.fit_reference(
        support.batched(_batch(arrays, 2)), **options
    )
    support.assert_close(trained.weights, reference.weights, "mixed_float16")
    assert _numbers(trained.optimizer) == [2.0**14, 1, 1]


# --------------------------------------------------------------- growth


class _RecordScale(keras.callbacks.Callback):
    """Remembers the loss scale after each batch."""

    def on_train_begin(self, logs=None):
        self.scales = []

    def on_train_batch_end(self, batch, logs=None):
        self.scales.append(_numbers(self.model.optimizer)[0])


GROWTH = {
    "initial_scale": 8.0,
    "growth_interval": 2,
    "growth_factor": 4.0,
    "max_scale": 64.0,
}
# Batches 0 to 2, where batch 1 overflows, and again; then six good ones.
SCALES = [8.0, 4.0, 4.0, 16.0, 8.0, 8.0, 32.0, 32.0, 64.0, 64.0, 64.0, 64.0]


def _growing_dataset(num_replicas):
    poisoned = support.batched(_poisoned_arrays(num_replicas - 1, num_replicas))
    good = support.make_dataset(6 * support.GLOBAL_BATCH)
    dataset = poisoned.repeat(2).concatenate(good)
    return dataset.apply(tf.data.experimental.assert_cardinality(12))


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_scale_follows_the_rule_in_the_trainer(num_replicas):
    record = _RecordScale()
    support.fit_trainer(
        _growing_dataset(num_replicas),
        num_replicas=num_replicas,
        precision="mixed_float16",
        loss_scale_options=GROWTH,
        fit={"epochs": 1, "steps_per_loop": 1, "callbacks": [record]},
    )
    assert record.scales == SCALES


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_scale_follows_the_rule_in_fit(num_replicas):
    record = _RecordScale()
    model = support.make_compiled(
        num_replicas=num_replicas,
        precision="mixed_float16",
        loss_scale_options=GROWTH,
    )
    model.fit(
        _growing_dataset(num_replicas),
        callbacks=[record],
        verbose=0,
        shuffle=False,
    )
    assert record.scales == SCALES


# ---------------------------------------------------------------- floor


def _two_branches():
    """Two heads that share nothing, so that one may overflow alone."""
    x = keras.Input((support.NUM_FEATURES,))
    heads = {
        name: keras.layers.Dense(1, name=name)(x) for name in ("calm", "wild")
    }
    return keras.Model(x, heads)


LOSSES = {"calm": "mean_squared_error", "wild": "mean_squared_error"}
AT_FLOOR = {"initial_scale": 2.0, "min_scale": 2.0}


def _branch_dataset(bad_batches, replica=0, num_replicas=1):
    """Batches whose target for "wild" is too large in one replica's slice."""
    x, _ = support.make_arrays(len(bad_batches) * support.GLOBAL_BATCH)
    calm, wild = np.zeros([2, len(x), 1], "float32")
    first_row = replica * support.GLOBAL_BATCH // num_replicas
    for index, is_bad in enumerate(bad_batches):
        if is_bad:
            wild[index * support.GLOBAL_BATCH + first_row] = 1e12
    return support.batched((x, {"calm": calm, "wild": wild}))


def _fit_branches(dataset, num_replicas):
    return support.fit_trainer(
        dataset,
        _two_branches,
        num_replicas=num_replicas,
        precision="mixed_float16",
        loss_scale_options=AT_FLOOR,
        loss=LOSSES,
        fit={"epochs": 1},
    )


@pytest.mark.parametrize(("num_replicas", "replica"), [(1, 0), (2, 1), (4, 2)])
def test_trainer_names_what_overflows_at_the_floor(num_replicas, replica):
    dataset = _branch_dataset([True] * 20, replica, num_replicas)
    with pytest.raises(FloatingPointError) as raised:
        _fit_branches(dataset, num_replicas)
    message = str(raised.value)
    assert re.search(r"20 updates in a row.*wild/kernel, wild/bias", message)
    assert "calm" not in message
    assert "The input is finite" in message


@pytest.mark.parametrize(("num_replicas", "replica"), [(1, 0), (2, 1)])
def test_fit_names_what_overflows_at_the_floor(num_replicas, replica):
    model = support.make_compiled(
        _two_branches,
        num_replicas=num_replicas,
        precision="mixed_float16",
        loss_scale_options=AT_FLOOR,
        loss=LOSSES,
    )
    dataset = _branch_dataset([True] * 20, replica, num_replicas)
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        model.fit(dataset, verbose=0, shuffle=False)
    found = re.search(
        r"20 updates in a row.*\[([\d ]+)\] \[(.*?)\]", str(raised.value)
    )
    paths = found[2].split(", ")
    bad = {paths[int(number)] for number in found[1].split()}
    assert bad == {"wild/kernel", "wild/bias"}
    assert "calm/kernel" in paths


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_skips_at_the_floor_count_only_in_a_row(num_replicas):
    bad_batches = [True] * 19 + [False] + [True] * 19
    trained = _fit_branches(_branch_dataset(bad_batches), num_replicas)
    assert _numbers(trained.optimizer) == [2.0, 38, 1]


@pytest.mark.parametrize("precision", support.PRECISIONS)
@pytest.mark.parametrize(("num_replicas", "replica"), [(1, 0), (2, 0), (4, 3)])
def test_bad_input_is_told_apart(num_replicas, replica, precision):
    x, y = _poisoned_arrays(replica, num_replicas, value=np.nan)
    scales = precision == "mixed_float16"
    with pytest.raises(FloatingPointError, match="The data is the cause"):
        support.fit_trainer(
            support.batched(_batch((x, y), POISONED_BATCH)).repeat(20),
            num_replicas=num_replicas,
            precision=precision,
            loss_scale_options=AT_FLOOR if scales else None,
        )


@pytest.mark.parametrize("num_replicas", [1, 4])
def test_a_model_that_diverges_is_told_apart(num_replicas):
    with pytest.raises(FloatingPointError, match="The input is finite"):
        support.fit_trainer(
            support.make_dataset(),
            make_optimizer=lambda: keras.optimizers.SGD(1e38),
            num_replicas=num_replicas,
        )


# ---------------------------------------------------- no scale, no check


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_wide_exponents_need_no_loss_scale(precision):
    with dist_amp.scope(support.make_strategy(2), precision):
        optimizer = dist_amp.wrap_optimizer(support.make_sgd())
    assert not isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(optimizer, dist_amp.DistributedOptimizer)


def _operations_of_apply(precision, num_replicas):
    """Types of all operations of one traced `apply`."""
    strategy = support.make_strategy(num_replicas)
    with dist_amp.scope(strategy, precision):
        weight = keras.Variable([1.0])
        optimizer = dist_amp.wrap_optimizer(_make_adam())
        optimizer.build([weight])

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply([tf.constant([2.0])], [weight]))

    graph = step.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node]
    for function in graph.library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize(
    ("precision", "is_checked"),
    [("float32", False), ("mixed_bfloat16", False), ("mixed_float16", True)],
)
def test_only_float16_checks_that_gradients_are_finite(
    precision, is_checked, num_replicas
):
    operations = _operations_of_apply(precision, num_replicas)
    assert ("IsFinite" in operations) is is_checked


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
