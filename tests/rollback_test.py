"""Training blows up: the way back, and past the batches that did it."""

import logging
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import data, storage
from dist_amp.rollback import RollbackPolicy, call_loss
from tests import support

BAD_BATCH = 2
NUM_BATCHES = 5


def make_batches(spoil=None):
    x, y = support.make_arrays(NUM_BATCHES * support.GLOBAL_BATCH)
    if spoil is not None:
        rows = slice(
            BAD_BATCH * support.GLOBAL_BATCH,
            (BAD_BATCH + 1) * support.GLOBAL_BATCH,
        )
        spoil(x[rows])
    return support.batched((x, y))


def without_bad_batch():
    dataset = make_batches()
    return dataset.take(BAD_BATCH).concatenate(dataset.skip(BAD_BATCH + 1))


def put_nan(rows):
    rows[3] = np.nan


def put_zeros(rows):
    rows[:] = 0.0


def fit(directory, dataset, *, policy=None, fit=None, **options):
    return support.fit_trainer(
        lambda number: dataset,
        fit={
            "epochs": 2,
            "checkpoint_dir": directory,
            "rollback": policy or RollbackPolicy(),
            **(fit or {}),
        },
        **options,
    )


# -------------------------------------------------------------- the batch


@pytest.mark.parametrize("steps_per_loop", [1, 4, "auto"])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_batch_with_nan_is_found_and_passed_over(
    tmp_path, steps_per_loop, num_replicas, caplog
):
    """As if it had not been in the data, in both epochs."""
    options = {"num_replicas": num_replicas}
    with caplog.at_level(logging.WARNING):
        trained = fit(
            tmp_path / "run",
            make_batches(put_nan),
            fit={"steps_per_loop": steps_per_loop},
            **options,
        )
    expected = support.fit_trainer(without_bad_batch(), **options)
    support.assert_parity(trained, expected)
    assert trained.history["rollbacks"] == [1, 2]
    for epoch in (1, 2):
        assert f"batch 3 of epoch {epoch} is passed over" in caplog.text
    assert "The data is the cause" in caplog.text


class Norm(keras.layers.Layer):
    """Its gradient at zero is NaN though its value is not."""

    def call(self, x):
        return tf.norm(x, axis=-1, keepdims=True)


def make_norm_model():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(4, use_bias=False),
            Norm(),
            keras.layers.Dense(support.NUM_CLASSES),
        ]
    )


@pytest.mark.parametrize("steps_per_loop", [1, 4])
def test_a_finite_loss_with_a_gradient_that_is_not_is_found(
    tmp_path, steps_per_loop
):
    """The weights break first; a checkpoint of them is not gone back to."""
    trained = fit(
        tmp_path,
        make_batches(put_zeros),
        make_model=make_norm_model,
        fit={
            "steps_per_loop": steps_per_loop,
            "save_policy": dist_amp.SavePolicy(every_steps=1),
        },
    )
    expected = support.fit_trainer(without_bad_batch(), make_norm_model)
    support.assert_parity(trained, expected)
    last = storage.find(str(tmp_path))[-1]
    assert storage.read_state(last)["bad_batches"] == [[0, 2, 3], [1, 2, 3]]


def test_the_floor_of_the_loss_scale_is_a_blow_up(tmp_path):
    """Twenty batches in a row overflow at any scale; the rest is trained."""
    x, y = support.make_arrays(30 * support.GLOBAL_BATCH)
    x[5 * support.GLOBAL_BATCH : 25 * support.GLOBAL_BATCH] = np.inf
    trained = fit(
        tmp_path,
        support.batched((x, y)),
        precision="mixed_float16",
        loss_scale_options={"initial_scale": 1.0, "min_scale": 1.0},
        fit={"epochs": 1},
    )
    assert trained.trainer.global_step == 10
    assert np.isfinite(trained.history["loss"][0])
    (bad,) = storage.read_state(storage.find(str(tmp_path))[-1])["bad_batches"]
    assert bad == [0, 5, 25]


def test_interrupted_after_a_rollback_it_ends_the_same(tmp_path):
    def run(directory, stop_after=None):
        trainer = support.make_trainer()

        def stop(batch, logs):
            if trainer.global_step == stop_after:
                trainer.request_stop()

        trainer.fit(
            lambda number: make_batches(put_nan),
            epochs=2,
            steps_per_loop=1,
            verbose=0,
            checkpoint_dir=directory,
            rollback=RollbackPolicy(),
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)],
        )
        return trainer

    straight = run(tmp_path / "straight")
    run(tmp_path / "parts", stop_after=3)
    resumed = run(tmp_path / "parts")
    for one, other in zip(
        straight.model.get_weights(), resumed.model.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert straight.model.history.history["rollbacks"] == [1, 2]
    assert resumed.model.history.history["rollbacks"] == [1, 2]


# ------------------------------------------------------------------- the limit


def test_too_many_rollbacks_are_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="went back 1 time already"):
        fit(
            tmp_path,
            make_batches(put_nan),
            policy=RollbackPolicy(max_rollbacks=1),
        )


def test_a_dataset_that_may_shuffle_anew_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pass a function of the pass"):
        support.fit_trainer(
            make_batches(),
            fit={"checkpoint_dir": tmp_path, "rollback": RollbackPolicy()},
        )


def test_shuffled_batches_are_passed_over_in_their_own_order(tmp_path):
    """One example of forty is bad, wherever a pass puts it."""
    x, y = support.make_arrays(40)
    x[13] = np.nan
    shuffled = data.from_arrays((x, y), support.GLOBAL_BATCH, shuffle_seed=3)
    trained = support.fit_trainer(
        shuffled,
        fit={
            "epochs": 3,
            "checkpoint_dir": tmp_path,
            "rollback": RollbackPolicy(),
        },
    )
    assert trained.history["rollbacks"] == [1, 2, 3]
    state = storage.read_state(storage.find(str(tmp_path))[-1])
    for epoch, first, end in state["bad_batches"]:
        batches = list(shuffled(tf.constant(epoch, tf.int64)))
        assert end == first + 1
        assert np.isnan(batches[first][0]).any()


def test_without_a_policy_it_is_an_error_at_once(tmp_path):
    with pytest.raises(FloatingPointError, match="The data is the cause"):
        support.fit_trainer(
            make_batches(put_nan), fit={"checkpoint_dir": tmp_path}
        )


def test_a_kind_that_is_not_asked_for_is_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        fit(
            tmp_path,
            make_batches(put_nan),
            policy=RollbackPolicy(on=("spike",)),
        )


# ------------------------------------------------------------ what is lowered


def test_the_learning_rate_is_lowered_each_time(tmp_path):
    trained = fit(
        tmp_path,
        make_batches(put_nan),
        policy=RollbackPolicy(lower="learning_rate", factor=0.5),
    )
    assert trained.history["learning_rate"] == pytest.approx([0.025, 0.0125])


def test_the_loss_scale_is_lowered(tmp_path):
    x, y = support.make_arrays(30 * support.GLOBAL_BATCH)
    x[5 * support.GLOBAL_BATCH : 25 * support.GLOBAL_BATCH] = np.inf
    trained = fit(
        tmp_path,
        support.batched((x, y)),
        policy=RollbackPolicy(lower="loss_scale", factor=0.25),
        precision="mixed_float16",
        loss_scale_options={"initial_scale": 4.0, "min_scale": 1.0},
        fit={"epochs": 1},
    )
    assert trained.history["loss_scale"] == [1.0]


def test_all_that_a_schedule_gives_is_lowered(tmp_path):
    """Twice; the rate of the last step is told."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [4], [0.2, 0.1]
    )
    trained = fit(
        tmp_path,
        make_batches(put_nan),
        policy=RollbackPolicy(lower="learning_rate", factor=0.5),
        make_optimizer=lambda: keras.optimizers.SGD(schedule),
    )
    assert trained.history["learning_rate"] == pytest.approx([0.1, 0.025])
    config = trained.optimizer.get_config()
    again = dist_amp.DistributedOptimizer.from_config(config)
    assert float(again.learning_rate) == pytest.approx(0.2)


def test_a_loss_scale_that_there_is_not_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="no loss scale to lower"):
        fit(
            tmp_path,
            make_batches(),
            policy=RollbackPolicy(lower="loss_scale"),
        )


# ---------------------------------------------------------------------- spikes


def test_a_spike_is_gone_back_on(tmp_path, caplog):
    """One batch of forty has labels that make the loss jump."""
    x, y = support.make_arrays(40 * support.GLOBAL_BATCH)
    rows = slice(30 * support.GLOBAL_BATCH, 31 * support.GLOBAL_BATCH)
    spoiled = x.copy()
    spoiled[rows] *= 1000.0
    options = {
        "make_model": make_linear,
        "fit": {"epochs": 1, "steps_per_loop": 1},
    }
    with caplog.at_level(logging.WARNING):
        trained = fit(
            tmp_path,
            support.batched((spoiled, y)),
            policy=RollbackPolicy(on=("spike",)),
            **options,
        )
    keep = np.r_[0 : rows.start, rows.stop : len(x)]
    expected = support.fit_trainer(
        support.batched((x[keep], y[keep])), **options
    )
    support.assert_parity(trained, expected)
    assert "batch 31 of epoch 1 is passed over" in caplog.text


def make_linear():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(support.NUM_CLASSES),
        ]
    )


CALM = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.1]


@pytest.mark.parametrize(
    ("loss", "recent", "is_spike"),
    [
        (1.3, CALM, False),
        (9.0, CALM, True),
        (-9.0, CALM, False),
        (9.0, CALM[:7], False),
        (float("nan"), CALM, False),
        (1.05, [1.0] * 8, False),
        (1.2, [1.0] * 8, True),
        (-0.5, [-1.0] * 8, True),
    ],
)
def test_a_spike_is_far_above_recent_losses(loss, recent, is_spike):
    assert RollbackPolicy(on=("spike",)).is_spike(loss, recent) is is_spike


def test_the_loss_of_a_call_comes_from_the_epochs_mean():
    assert call_loss(2.0, 30, 1.0, 20) == pytest.approx(4.0)
    assert np.isnan(call_loss(2.0, 20, 2.0, 20))


@pytest.mark.parametrize(
    "options",
    [
        {"on": ("inf",)},
        {"on": ()},
        {"lower": "weights"},
        {"factor": 1.0},
        {"max_rollbacks": 0},
        {"spike_threshold": 0.0},
    ],
)
def test_a_policy_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RollbackPolicy(**options)


def test_a_call_after_those_without_a_finite_loss_has_one():
    assert call_loss(2.0, 8, float("nan"), 0) == 2.0


def test_a_batch_that_is_bad_in_each_epoch_is_told(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        fit(
            tmp_path,
            make_batches(put_nan),
            policy=RollbackPolicy(max_rollbacks=1),
        )
    told = str(caught.value)
    assert "in step 7 (epoch 2)" in told
    assert "The data is the cause: 1 slice of a batch since" in told
    assert "It was batch 3 each epoch" in told


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
