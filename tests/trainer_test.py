"""Trainer.fit and evaluate: the outer loop, callbacks, errors."""

import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from tests import support


def fit(trainer, dataset=None, **options):
    dataset = support.make_dataset() if dataset is None else dataset
    return trainer.fit(dataset, **{"epochs": 2, "verbose": 0, **options})


def test_history_has_a_number_an_epoch_for_each_name():
    trainer = support.make_trainer(metrics=["accuracy"])
    history = fit(trainer, validation_data=support.make_dataset(5))
    assert isinstance(history, keras.callbacks.History)
    assert history.epoch == [0, 1]
    names = ("loss", "accuracy", "val_loss", "val_accuracy", "loss_scale")
    assert {len(history.history[name]) for name in names} == {2}


@pytest.mark.parametrize("steps_per_loop", [1, 2, 100, "auto"])
def test_steps_per_loop_changes_nothing_but_the_calls(steps_per_loop):
    trained = support.fit_trainer(
        support.make_dataset(30), fit={"steps_per_loop": steps_per_loop}
    )
    expected = support.fit_reference(support.make_dataset(30))
    support.assert_close(trained.weights, expected.weights)


def _make_odd():
    layers = keras.layers
    logits = layers.Dense(support.NUM_CLASSES, dtype="float32", name="logits")
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            layers.Reshape((1, 2, 3)),
            layers.Conv2D(16, 1, name="even"),
            layers.DepthwiseConv2D(1, name="depthwise"),
            layers.Conv2DTranspose(12, 1, name="odd_filters"),
            layers.Flatten(),
            layers.Dense(13, name="odd_units"),
            layers.Dense(8, name="even_units"),
            logits,
        ]
    )


@pytest.mark.parametrize("kind", ["CPU", "GPU"])
def test_sizes_that_tensor_cores_dislike_are_named(kind, caplog, monkeypatch):
    trainer = support.make_trainer(_make_odd, precision="mixed_bfloat16")
    monkeypatch.setattr(trainer, "is_on", lambda other: other == kind)
    trainer.build(support.make_dataset())
    named = [r.message for r in caplog.records if "multiple of 8" in r.message]
    if kind == "CPU":
        assert named == []
    else:
        (message,) = named
        sizes = re.findall(r"(\w+) \((\d+)\)", message)
        assert sizes == [("odd_filters", "12"), ("odd_units", "13")]


def test_callbacks_hear_of_the_end_of_each_call():
    ends = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(batch)
    )
    fit(
        support.make_trainer(),
        support.make_dataset(40),
        steps_per_loop=2,
        callbacks=[callback],
        epochs=1,
    )
    assert ends == [1, 3, 4]


@pytest.mark.parametrize("steps_per_loop", [1, 3])
def test_a_dataset_of_unknown_length_is_trained_to_its_end(steps_per_loop):
    known = support.make_dataset(30)
    unknown = known.filter(lambda *_: True)
    options = {"epochs": 3, "steps_per_loop": steps_per_loop}
    expected = support.fit_trainer(known, fit=options)
    trained = support.fit_trainer(
        unknown, fit={**options, "validation_data": unknown}
    )
    support.assert_close(trained.weights, expected.weights)
    assert trained.trainer.global_step == 3 * 4
    np.testing.assert_allclose(
        trained.history["val_loss"][-1],
        expected.trainer.evaluate(known)["loss"],
        rtol=1e-5,
    )


def test_steps_per_epoch_goes_on_in_the_data():
    """Three epochs of two steps are one pass over six batches."""
    dataset = support.make_dataset(48)
    in_parts = support.fit_trainer(
        dataset, fit={"epochs": 3, "steps_per_epoch": 2}
    )
    at_once = support.fit_trainer(dataset, fit={"epochs": 1})
    support.assert_close(in_parts.weights, at_once.weights)


def test_a_subclassed_model_is_built_from_the_data():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(support.NUM_CLASSES)

        def call(self, x):  # no `training` argument
            return self.dense(x)

    trainer = support.make_trainer(Net, num_replicas=2)
    fit(trainer)
    assert len(trainer.model.trainable_variables) == 2


def test_train_step_can_be_overridden():
    class Doubled(dist_amp.Trainer):
        def compute_loss(self, batch, predictions):
            return 2.0 * super().compute_loss(batch, predictions)

    class TwoCalls(dist_amp.Trainer):
        def train_step(self, batch):
            with tf.GradientTape() as tape:
                predictions = self.model(batch.x, training=True)
                loss = 2.0 * self.compute_loss(batch, predictions)
            variables = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            self.metrics.update(batch, loss, predictions)

    losses = []
    for trainer_class in (Doubled, TwoCalls):
        keras.utils.set_random_seed(0)
        with dist_amp.scope(support.make_strategy(2), "float32"):
            model, optimizer = support.make_mlp(), support.make_sgd()
        trainer = trainer_class(model, optimizer, loss=support.make_loss())
        losses.append(fit(trainer).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_plain_optimizer_is_wrapped_for_the_models_precision():
    with dist_amp.scope(support.make_strategy(2), "mixed_float16"):
        model, optimizer = support.make_mlp(), support.make_sgd()
    trainer = dist_amp.Trainer(model, optimizer, loss=support.make_loss())
    assert isinstance(trainer.optimizer, dist_amp.LossScaleOptimizer)
    fit(trainer)


def test_an_optimizer_of_another_scope_is_refused():
    with dist_amp.scope(support.make_strategy(2), "float32"):
        model = support.make_mlp()
    with pytest.raises(ValueError, match=r"made in one scope.*: keep one"):
        dist_amp.Trainer(model, support.make_sgd(), loss=support.make_loss())


def test_a_model_of_no_scope_is_refused():
    with pytest.raises(ValueError, match=r"in `with dist_amp.scope\(.*one_dev"):
        dist_amp.Trainer(
            support.make_mlp(), support.make_sgd(), loss=support.make_loss()
        )


# ------------------------------------------------------------ Keras callbacks


def test_early_stopping_stops_and_restores_the_best():
    trainer = support.make_trainer(num_replicas=2)
    stopping = keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=0, restore_best_weights=True
    )
    fit(trainer, epochs=9, callbacks=[stopping])
    expected = support.fit_trainer(support.make_dataset(), fit={"epochs": 1})
    assert stopping.stopped_epoch == 1
    support.assert_close(
        support.read(trainer.model.variables), expected.weights
    )


def test_learning_rate_callbacks_reach_the_optimizer():
    trainer = support.make_trainer(num_replicas=2)
    history = fit(
        trainer,
        epochs=3,
        callbacks=[
            keras.callbacks.LearningRateScheduler(lambda epoch: 0.5**epoch)
        ],
    )
    assert history.history["learning_rate"] == [1.0, 0.5, 0.25]


def test_reduce_lr_on_plateau_halves():
    trainer = support.make_trainer(
        make_optimizer=lambda: keras.optimizers.SGD(0.1), num_replicas=2
    )
    plateau = keras.callbacks.ReduceLROnPlateau(
        "loss", mode="max", factor=0.5, patience=1
    )
    fit(trainer, epochs=3, callbacks=[plateau])
    assert float(trainer.optimizer.learning_rate.numpy()) == pytest.approx(
        0.025
    )


def test_files_of_callbacks(tmp_path):
    trainer = support.make_trainer(num_replicas=2, metrics=["accuracy"])
    fit(
        trainer,
        validation_data=support.make_dataset(),
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TensorBoard(tmp_path / "tb", write_graph=False),
        ],
    )
    loaded = keras.models.load_model(tmp_path / "2.keras")
    support.assert_close(
        support.read(loaded.variables),
        support.read(trainer.model.variables),
    )
    header, *lines = (tmp_path / "log.csv").read_text().splitlines()
    assert "val_accuracy" in header
    assert len(lines) == 2
    assert list((tmp_path / "tb").rglob("events*"))


@pytest.mark.parametrize("monitor", ["val_accuracy", "accuracy", "loss"])
def test_callbacks_know_which_way_a_metric_is_better(monitor, tmp_path):
    trainer = support.make_trainer(metrics=["accuracy"])
    stopping = keras.callbacks.EarlyStopping(monitor, patience=99)
    saving = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", monitor=monitor, save_best_only=True
    )
    history = fit(
        trainer,
        epochs=3,
        validation_data=support.make_dataset(),
        callbacks=[stopping, saving],
    )
    best = min if monitor == "loss" else max
    assert stopping.best == best(history.history[monitor])


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a positive integer"),
        ({"steps_per_loop": "fast"}, "`steps_per_loop` must be"),
        ({"steps_per_epoch": -1}, "`steps_per_epoch` must be"),
        ({"validation_steps": 0}, "`validation_steps` must be"),
    ],
)
def test_a_count_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(support.make_trainer(), **options)


def test_validation_for_ever_is_refused_before_training():
    trainer = support.make_trainer()
    with pytest.raises(ValueError, match="validation_steps"):
        fit(trainer, validation_data=support.make_dataset().repeat())
    assert trainer.global_step == 0


def test_too_many_validation_steps_are_an_error():
    with pytest.raises(ValueError, match="fewer than 9 batches"):
        support.make_trainer().evaluate(support.make_dataset(), steps=9)


def test_xla_and_synchronized_layers_are_refused_together():
    def make_model():
        return keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                keras.layers.BatchNormalization(synchronized=True),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        )

    with pytest.raises(ValueError, match="synchronized=True"):
        fit(support.make_trainer(make_model, num_replicas=2, jit_compile=True))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_xla_and_a_masked_mean_are_refused_on_replicas(num_replicas):
    def make_model():
        return keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                keras.layers.Embedding(5, 2, mask_zero=True),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        )

    def train(**options):
        trainer = support.make_trainer(
            make_model, num_replicas=num_replicas, jit_compile=True, **options
        )
        return trainer.train_on(support.batched((tokens, tokens % 3)))["loss"]

    tokens = np.array([[1, 2, 0, 0], [3, 4, 1, 0]])
    if num_replicas == 1:
        assert train() > 0
        return
    with pytest.raises(ValueError, match=r"Keras mask.*--nojit_compile"):
        train()
    assert train(loss=support.make_loss(reduction="sum")) > 0


def test_nothing_to_minimize_is_an_error():
    with pytest.raises(ValueError, match="nothing to minimize"):
        fit(support.make_trainer(loss=None))


def test_a_loss_that_is_reduced_already_is_refused():
    def scalar(y, prediction):
        return tf.reduce_mean(tf.square(prediction))

    with pytest.raises(ValueError, match="one value for each example"):
        fit(support.make_trainer(loss=scalar))


def test_a_broken_model_has_no_good_validation_loss():
    trainer = support.make_trainer()
    x, y = support.make_arrays(24)
    x[3] = np.nan
    assert np.isnan(trainer.evaluate(support.batched((x, y)))["loss"])


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_evaluate_within_an_epoch_leaves_its_metrics_alone(num_replicas):
    histories, results = [], []
    for is_evaluated in (False, True):
        trainer = support.make_trainer(
            num_replicas=num_replicas, metrics=["accuracy"]
        )

        def evaluate(batch, logs, trainer=trainer, is_evaluated=is_evaluated):
            if is_evaluated:
                results.append(trainer.evaluate(support.make_dataset(5)))

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=evaluate)
        history = fit(trainer, callbacks=[callback], steps_per_loop=1).history
        histories.append([history["loss"], history["accuracy"]])
    assert histories[0] == histories[1]
    assert len({one["loss"] for one in results}) == 6


@pytest.mark.parametrize(
    ("make_dataset", "error", "message"),
    [
        (lambda: support.make_arrays(8), TypeError, "from_tensor_slices"),
        (lambda: support.make_dataset().unbatch(), ValueError, r"t\.batch"),
        (
            lambda: support.make_dataset().map(lambda x, y: x),
            ValueError,
            "inputs without targets",
        ),
    ],
)
def test_a_dataset_of_another_form_is_explained(make_dataset, error, message):
    with pytest.raises(error, match=message):
        fit(support.make_trainer(), make_dataset())


def test_inputs_alone_train_a_model_that_adds_its_loss():
    class AddsLoss(keras.layers.Layer):
        def call(self, x):
            self.add_loss(tf.reduce_mean(tf.square(x)))
            return x

    def make_model():
        return keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                keras.layers.Dense(4),
                AddsLoss(),
            ]
        )

    dataset = support.make_dataset(9).map(lambda x, y: x)
    runs = [
        support.fit_trainer(dataset, make_model, num_replicas=n, loss=None)
        for n in (1, 4)
    ]
    support.assert_close(runs[1].weights, runs[0].weights)


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_nan_in_float32_is_an_error_that_blames_the_data(num_replicas):
    x, y = support.make_arrays(24)
    x[-1] = np.nan
    trainer = support.make_trainer(num_replicas=num_replicas)
    with pytest.raises(FloatingPointError, match="The data is the cause"):
        fit(trainer, support.batched((x, y)))


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_nan_that_an_activation_hides_from_the_loss_is_found(num_replicas):
    """On a CPU relu(NaN) is 0, so the loss stays finite while weights go."""

    def make_model():
        return keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                keras.layers.Dense(8, activation="relu"),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        )

    x, y = support.make_arrays(24)
    x[12] = np.nan
    trainer = support.make_trainer(make_model, num_replicas=num_replicas)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite.*dense"):
        fit(trainer, support.batched((x, y)))


def test_divergence_in_float32_blames_the_model():
    trainer = support.make_trainer(
        make_optimizer=lambda: keras.optimizers.SGD(1e38)
    )
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        fit(trainer, epochs=9)


def test_a_stop_that_was_asked_for_ends_with_a_checkpoint(tmp_path):
    trainer = support.make_trainer()
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: trainer.request_stop("enough")
    )
    fit(
        trainer,
        steps_per_loop=1,
        callbacks=[callback],
        checkpoint_dir=tmp_path,
    )
    assert trainer.stop_reason == "enough"
    assert trainer.global_step == 1
    assert (tmp_path / "ckpt-1" / "manifest.json").exists()


def test_a_stop_before_the_first_step_is_heard():
    trainer = support.make_trainer()
    trainer.request_stop("early")
    assert fit(trainer).epoch == []
    assert (trainer.stop_reason, trainer.global_step) == ("early", 0)
    assert fit(trainer).epoch == [0, 1]
    assert trainer.stop_reason is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(support.make_trainer(), checkpoint_dir=tmp_path)
    other = support.make_trainer(
        make_optimizer=lambda: keras.optimizers.Adam(0.1)
    )
    with pytest.raises(ValueError, match="of another model or optimizer"):
        fit(other, epochs=3, checkpoint_dir=tmp_path)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = support.make_trainer()
    fit(first, checkpoint_dir=tmp_path)
    second = support.make_trainer(seed=1)
    history = fit(second, checkpoint_dir=tmp_path)
    assert history.history == first.model.history.history
    assert second.global_step == first.global_step
    support.assert_close(
        support.read(second.model.variables),
        support.read(first.model.variables),
    )


class HasOwnStep(keras.Sequential):
    """Trains itself, as Keras' documentation shows."""

    def train_step(self, data):
        return {}


def make_own():
    return HasOwnStep(
        [keras.Input((support.NUM_FEATURES,)), keras.layers.Dense(3)]
    )


def test_a_step_of_the_models_own_is_not_ignored():
    with pytest.raises(ValueError, match=r"HasOwnStep\.train_step would be"):
        support.make_trainer(make_own)

    class Moved(dist_amp.Trainer):
        def train_step(self, batch):
            self.metrics.update(batch, tf.constant(0.0), batch.y)

    with dist_amp.scope(support.make_strategy(1), "float32"):
        model, optimizer = make_own(), support.make_sgd()
    Moved(model, optimizer)


def test_what_compile_was_given_is_told_to_be_ignored(caplog):
    def make_compiled():
        model = support.make_mlp()
        model.compile(loss="mse")
        return model

    support.make_trainer(make_compiled)
    assert "what `compile` was given does not count" in caplog.text


def test_a_label_beyond_the_outputs_is_told_in_words():
    x, y = support.make_arrays(16)
    trainer = support.make_trainer()
    with pytest.raises(ValueError, match="A label is 7, and the model has 3"):
        fit(trainer, support.batched((x, y + 7 - y)))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_the_mean_of_no_finite_loss_is_nan(num_replicas):
    x, y = support.make_arrays(16)
    trainer = support.make_trainer(
        num_replicas=num_replicas, precision="mixed_float16"
    )
    dataset = support.batched((x + np.nan, y))
    assert np.isnan(trainer.train_on(dataset, num_steps=2)["loss"])
    history = trainer.fit(dataset, verbose=0).history
    assert np.isnan(history["loss"]).all()


def make_doubtful(**options):
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.BatchNormalization(**options),
            keras.layers.Dense(support.NUM_CLASSES),
        ],
        name="doubtful",
    )


@pytest.mark.parametrize(
    ("num_replicas", "precision", "options", "told"),
    [
        (1, "float32", {}, []),
        (2, "float32", {"synchronized": True}, []),
        (2, "float32", {"trainable": False}, []),
        (
            2,
            "float32",
            {"name": "norm"},
            ["batch norm doubtful/norm: statistics are"],
        ),
        (1, "mixed_float16", {}, ["the model's output is float16: give"]),
        (1, "mixed_bfloat16", {}, ["the model's output is bfloat16: give"]),
    ],
)
def test_a_model_to_doubt_is_told_once(
    caplog, num_replicas, precision, options, told
):
    trainer = support.make_trainer(
        lambda: make_doubtful(**options),
        num_replicas=num_replicas,
        precision=precision,
    )
    for _ in range(2):
        fit(trainer)
    records = [r for r in caplog.records if r.levelname == "WARNING"]
    found = [r.getMessage() for r in records if "tensor cores" not in r.msg]
    assert len(found) == len(told)
    for line, start in zip(found, told, strict=True):
        assert line.startswith(start)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
