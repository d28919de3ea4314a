"""A run that is interrupted anywhere ends like one that was not."""

import math
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import data, storage
from dist_amp.meter import MEASURED
from tests import support

NUM_EXAMPLES = 30  # four batches an epoch, the last one of six
EPOCHS = 3


def make_random_model():
    """Augmentation, dropout, batch norm, a generator of TensorFlow's own."""
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.GaussianNoise(0.1),
            AddsUniform(),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


class AddsUniform(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.generator = tf.random.Generator.from_seed(5)

    def call(self, x):
        return x + tf.cast(self.generator.uniform(tf.shape(x)), x.dtype)


def shuffled(number):
    """A function of the pass, with augmentation that depends on it."""
    make = data.from_arrays(
        support.make_arrays(NUM_EXAMPLES), support.GLOBAL_BATCH, shuffle_seed=1
    )

    def augment(x, y):
        noise = tf.random.stateless_normal(
            tf.shape(x), [7, tf.cast(number, tf.int32)]
        )
        return x + 0.1 * noise, y

    return make(number).map(augment)


def shuffled_dataset():
    """Plain tf.data: shuffled and augmented by stateful operations."""
    arrays = support.make_arrays(NUM_EXAMPLES)
    return (
        tf.data.Dataset.from_tensor_slices(arrays)
        .shuffle(NUM_EXAMPLES, seed=2)
        .map(lambda x, y: (x + tf.random.normal(tf.shape(x), seed=3), y))
        .batch(support.GLOBAL_BATCH)
    )


def train(
    directory,
    *,
    stop=None,
    make_dataset=lambda: shuffled,
    make_model=make_random_model,
    num_replicas=1,
    precision="float32",
    accumulation=None,
    callbacks=(),
    epochs=EPOCHS,
    **options,
):
    """Trains; `stop(trainer)` is asked after each call and test."""
    trainer = support.make_trainer(
        make_model,
        lambda: keras.optimizers.Adam(
            0.01,
            use_ema=True,
            ema_momentum=0.9,
            gradient_accumulation_steps=accumulation,
        ),
        num_replicas=num_replicas,
        precision=precision,
        metrics=["accuracy"],
    )
    asks = []
    if stop:

        def ask(batch, logs):
            if stop(trainer):
                trainer.request_stop("the test says so")

        asks = [keras.callbacks.LambdaCallback(on_train_batch_end=ask)]
    trainer.fit(
        make_dataset(),
        epochs=epochs,
        steps_per_loop=1,
        verbose=0,
        callbacks=[*callbacks, *asks],
        checkpoint_dir=directory,
        validation_data=support.make_dataset(),
        **options,
    )
    return trainer


def assert_same_bits(one, other):
    for mine, theirs in zip(
        [*one.model.variables, *one.optimizer.variables],
        [*other.model.variables, *other.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(
            support.local_copies(mine), support.local_copies(theirs), mine.path
        )
    generators = [
        [copy.numpy().tolist() for copy in support.local_copies_of_state(t)]
        for t in (one, other)
    ]
    assert generators[0] == generators[1]


def assert_same_history(one, other):
    plain = [
        {k: v for k, v in t.model.history.history.items() if k not in MEASURED}
        for t in (one, other)
    ]
    assert plain[0] == plain[1]


CASES = [(1, "float32"), (2, "mixed_float16"), (4, "mixed_bfloat16")]


@pytest.mark.parametrize(("num_replicas", "precision"), CASES)
@pytest.mark.parametrize("make_dataset", [lambda: shuffled, shuffled_dataset])
def test_stopped_at_any_step_it_ends_bit_for_bit_the_same(
    tmp_path, num_replicas, precision, make_dataset
):
    """At the first step, in an epoch's middle, at its end, in the next one."""
    options = {
        "num_replicas": num_replicas,
        "precision": precision,
        "make_dataset": make_dataset,
    }
    straight = train(tmp_path / "straight", **options)
    stops = [1, 3, 4, 9]
    for step in stops:
        train(
            tmp_path / "parts",
            stop=lambda t, step=step: t.global_step == step,
            **options,
        )
    resumed = train(tmp_path / "parts", **options)
    assert resumed.resumed_step == stops[-1]
    assert_same_bits(resumed, straight)
    assert_same_history(resumed, straight)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_stopped_between_accumulated_updates(tmp_path, num_replicas):
    options = {"accumulation": 3, "num_replicas": num_replicas}
    straight = train(tmp_path / "straight", **options)
    assert straight.global_step == 2 * EPOCHS
    train(tmp_path / "parts", stop=lambda t: t.global_step == 3, **options)
    resumed = train(tmp_path / "parts", **options)
    assert_same_bits(resumed, straight)
    assert_same_history(resumed, straight)


def test_an_epoch_of_which_nothing_was_left_has_no_speed(tmp_path):
    train(tmp_path, stop=lambda t: t.global_step == 4)
    history = train(tmp_path).model.history.history
    for name in ("examples_per_sec", "steps_per_sec"):
        assert math.isnan(history[name][0])
        assert history[name][1] > 0


class StopsInEvaluation(keras.callbacks.Callback):
    """Asks when the test data has been read in part."""

    def __init__(self, trainer_of, epoch):
        super().__init__()
        self.trainer_of, self.epoch = trainer_of, epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_test_begin(self, logs=None):
        if self.now == self.epoch:
            self.trainer_of().request_stop("in the evaluation")


def test_stopped_in_an_evaluation(tmp_path):
    straight = train(tmp_path / "straight", num_replicas=2)
    made = []
    callback = StopsInEvaluation(lambda: made[0], epoch=1)
    train(
        tmp_path / "parts",
        num_replicas=2,
        callbacks=[callback],
        stop=lambda trainer: made.append(trainer),
    )
    assert made[0].stop_reason == "in the evaluation"
    assert made[0].global_step == 8
    assert len(made[0].model.history.epoch) == 1
    resumed = train(tmp_path / "parts", num_replicas=2)
    assert_same_bits(resumed, straight)
    assert_same_history(resumed, straight)


def test_an_evaluation_is_heard_between_its_calls(tmp_path):
    """A long evaluation must not outlast the grace period of a machine."""
    trainer = support.make_trainer()
    evaluated = []

    def count(x):
        evaluated.append(1)
        if len(evaluated) == 3:
            trainer.request_stop("now")
        return x

    def counted(x, y):
        return tf.ensure_shape(
            tf.py_function(count, [x], x.dtype), [None, support.NUM_FEATURES]
        ), y

    trainer.fit(
        support.make_dataset(),
        validation_data=support.make_dataset(80_000, 8).map(counted),
        verbose=0,
    )
    assert trainer.stop_reason == "now"
    assert len(evaluated) < 10_000


class Unseeded(keras.layers.Layer):
    """Draws from Keras' global generator, which no model holds."""

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), dtype=x.dtype)


def test_keras_global_generator_goes_on_too(tmp_path):
    def make_model():
        return keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                Unseeded(),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        )

    options = {"make_model": make_model, "precision": "float32"}
    straight = train(tmp_path / "straight", **options)
    train(tmp_path / "parts", stop=lambda t: t.global_step == 5, **options)
    resumed = train(tmp_path / "parts", **options)
    assert_same_bits(resumed, straight)
    tensors = storage.read_tensors(storage.find(str(tmp_path / "parts"))[-1])
    assert any("seed_generator_state" in name for name in tensors)


def test_going_on_with_other_numbers_of_replicas_is_within_tolerance(tmp_path):
    def fit(num_replicas, epochs, directory):
        trained = support.fit_trainer(
            shuffled,
            num_replicas=num_replicas,
            fit={
                "epochs": epochs,
                "checkpoint_dir": directory,
                "save_policy": dist_amp.SavePolicy(every_steps=3),
            },
        )
        return trained.weights

    straight = fit(1, 4, tmp_path / "straight")
    for epochs, num_replicas in enumerate([1, 4, 2, 1], start=1):
        moved = fit(num_replicas, epochs, tmp_path / "moved")
    support.assert_close(moved, straight)


# ------------------------------------------------------------------ callbacks


class Counts(keras.callbacks.Callback):
    """A callback of the user's own, with plain attributes."""

    def __init__(self, patience=1):
        super().__init__()
        self.patience = patience
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(epoch)


def test_callbacks_go_on_with_what_they_had_learned(tmp_path):
    def make():
        return [
            keras.callbacks.EarlyStopping(
                "loss", mode="max", patience=3, restore_best_weights=True
            ),
            keras.callbacks.ReduceLROnPlateau(
                "loss", mode="max", factor=0.5, patience=2
            ),
            Counts(),
        ]

    straight_callbacks, first, second = make(), make(), make()
    options = {"epochs": 9}
    straight = train(
        tmp_path / "straight", callbacks=straight_callbacks, **options
    )
    train(
        tmp_path / "parts",
        callbacks=first,
        stop=lambda t: t.global_step == 6,
        **options,
    )
    second[2].patience = 5  # a setting: the new one holds
    resumed = train(tmp_path / "parts", callbacks=second, **options)
    stopping, expected = second[0], straight_callbacks[0]
    assert stopping.stopped_epoch == expected.stopped_epoch == 3
    assert (stopping.best, stopping.wait) == (expected.best, expected.wait)
    assert second[1].best == straight_callbacks[1].best
    assert second[2].seen == straight_callbacks[2].seen == [0, 1, 2, 3]
    assert second[2].patience == 5
    assert_same_bits(resumed, straight)


def test_a_run_that_a_callback_ended_stays_ended(tmp_path):
    def make():
        return keras.callbacks.EarlyStopping("loss", mode="max", patience=0)

    first = train(tmp_path, callbacks=[make()], epochs=9)
    assert first.global_step == 8
    second = train(tmp_path, callbacks=[make()], epochs=9)
    assert second.global_step == second.resumed_step == 8


def test_a_callback_that_is_gone_is_named(tmp_path, caplog):
    train(tmp_path, callbacks=[Counts()], epochs=1)
    train(tmp_path, epochs=2)
    assert "callbacks that are not here (Counts)" in caplog.text


# ---------------------------------------------------------------- what, when


def steps_in(directory):
    return [storage.step_of(path) for path in storage.find(str(directory))]


def test_it_saves_every_so_many_steps_and_at_epochs_ends(tmp_path):
    policy = dist_amp.SavePolicy(every_steps=3, max_to_keep=99)
    train(tmp_path, save_policy=policy)
    assert steps_in(tmp_path) == [3, 4, 6, 8, 9, 12]


def test_it_saves_every_so_many_minutes(tmp_path):
    policy = dist_amp.SavePolicy(
        every_epochs=None, every_minutes=1e-9, max_to_keep=99
    )
    train(tmp_path, save_policy=policy, epochs=1)
    assert steps_in(tmp_path)[:3] == [1, 2, 3]


def test_the_end_is_saved_whatever_the_policy(tmp_path):
    policy = dist_amp.SavePolicy(every_epochs=None)
    train(tmp_path, save_policy=policy)
    assert steps_in(tmp_path) == [12]


def test_the_best_epoch_is_kept_by_the_metrics_own_direction(tmp_path):
    policy = dist_amp.SavePolicy(max_to_keep=1, keep_best="accuracy")
    trainer = train(tmp_path, save_policy=policy)
    accuracies = trainer.model.history.history["accuracy"]
    best = 4 * (1 + int(np.argmax(accuracies)))
    assert steps_in(tmp_path) == sorted({best, 12})


def test_a_best_metric_that_there_is_not_is_an_error_at_the_start(tmp_path):
    policy = dist_amp.SavePolicy(keep_best="val_f1")
    told = "must be one of loss, accuracy, val_loss, val_accuracy. Received"
    with pytest.raises(ValueError, match=told):
        train(tmp_path, save_policy=policy)
    assert steps_in(tmp_path) == []


class Several(keras.metrics.Metric):
    """A metric of two results, whose names only they tell."""

    def update_state(self, y, predictions, sample_weight=None):
        pass

    def result(self):
        return {"one": 1.0, "two": 2.0}


def test_where_a_metric_names_its_results_an_epoch_tells(tmp_path):
    def fit(name):
        trainer = support.make_trainer(metrics=[Several()])
        trainer.fit(
            support.make_dataset(),
            verbose=0,
            checkpoint_dir=tmp_path / name,
            save_policy=dist_amp.SavePolicy(keep_best=name, mode="max"),
        )

    fit("two")
    with pytest.raises(ValueError, match="must be one of loss, one, two, "):
        fit("three")
    assert steps_in(tmp_path / "three") == [3]  # and the epoch is not lost


def test_a_checkpoint_tells_what_it_is(tmp_path):
    trainer = support.make_trainer()
    trainer.run_info = {"learning_rate": 0.05}
    trainer.fit(
        support.make_dataset(30), verbose=0, checkpoint_dir=tmp_path, epochs=2
    )
    state = storage.read_state(storage.find(str(tmp_path))[-1])
    assert state["info"] == {"learning_rate": 0.05}
    assert state["examples_consumed"] == 60
    assert state["versions"]["keras"] == keras.__version__
    assert (state["epoch"], state["batch"]) == (2, 0)
    model = keras.models.model_from_json(state["model"])
    assert model.count_params() == trainer.model.count_params()


def test_a_trainer_can_add_variables_of_its_own(tmp_path):
    class WithCritic(dist_amp.Trainer):
        critic = keras.Variable([1.0, 2.0], name="critic")

        def state(self):
            return {**super().state(), "critic": [self.critic]}

    def make():
        trainer = support.make_trainer()
        return WithCritic(
            trainer.model, trainer.optimizer, loss=support.make_loss()
        )

    first = make()
    first.fit(support.make_dataset(), verbose=0, checkpoint_dir=tmp_path)
    first.critic.assign([0.0, 0.0])
    make().fit(
        support.make_dataset(), epochs=1, verbose=0, checkpoint_dir=tmp_path
    )
    assert WithCritic.critic.numpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("name", ["save_policy", "rollback"])
def test_what_would_be_ignored_without_a_folder_is_refused(name):
    option = {
        "save_policy": dist_amp.SavePolicy(),
        "rollback": dist_amp.RollbackPolicy(),
    }[name]
    with pytest.raises(ValueError, match=f"`{name}` needs a `checkpoint_dir`"):
        support.make_trainer().fit(support.make_dataset(), **{name: option})


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
