"""AutoLayers: what float16 fails trains to float32's accuracy."""

import logging
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import data as data_lib
from dist_amp import precision as precision_lib
from tests import support

NUM_EXAMPLES, EPOCHS = 96, 8


def make_arrays():
    x = np.random.default_rng(1).normal(size=(NUM_EXAMPLES, 6))
    return x.astype("float32"), np.argmax(x[:, :3], axis=1).astype("int32")


def make_large():
    """What the second layer returns is far beyond 65504."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, name="first"),
            keras.layers.Rescaling(1e6, name="large"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(3, dtype="float32", name="logits"),
        ]
    )


def make_tiny():
    """Two heads; the loss of the second one counts next to nothing."""
    inputs = keras.Input((6,))
    main = keras.layers.Dense(3, name="main")(inputs)
    tiny = keras.layers.Dense(3, name="tiny")(inputs)
    return keras.Model(inputs, {"main": main, "tiny": tiny})


def tiny_loss(y, prediction):
    return 1e-13 * keras.losses.sparse_categorical_crossentropy(
        y, prediction, from_logits=True
    )


def make_adam(**options):
    return keras.optimizers.Adam(0.03, epsilon=1e-30, **options)


def make_trainer(precision, make_model=make_large, **options):
    return support.make_trainer(
        make_model, make_adam, precision=precision, **options
    )


def fit(trainer, dataset, *, epochs=EPOCHS, callbacks=(), **options):
    """Trains with AutoLayers, if the model has any layer in float16."""
    auto_layers = dist_amp.AutoLayers(trainer, dataset)
    history = trainer.fit(
        dataset,
        epochs=epochs,
        verbose=0,
        callbacks=[auto_layers, *callbacks],
        **options,
    )
    return history.history, auto_layers


def messages_of(caplog):
    """What AutoLayers has logged."""
    return [
        record.message
        for record in caplog.records
        if record.name == "dist_amp.auto_layers"
    ]


@pytest.fixture
def dataset():
    return support.batched(make_arrays(), 16)


# -------------------------------------------------- what float16 alone fails


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_activations_too_large_train_as_in_float32(dataset, num_replicas):
    def metrics(precision):
        return make_trainer(
            precision, num_replicas=num_replicas, metrics=["accuracy"]
        )

    exact = metrics("float32")
    exact.fit(dataset, epochs=EPOCHS, verbose=0)
    wanted = exact.evaluate(dataset)
    assert wanted["accuracy"] > 0.9

    with pytest.raises(FloatingPointError, match="loss scale at its floor"):
        metrics("mixed_float16").fit(dataset, epochs=50, verbose=0)

    trainer = metrics("auto_layers")
    history, auto_layers = fit(trainer, dataset)
    assert auto_layers.pinned == ["large", "norm"]
    assert history["skipped_updates"][-1] == 0
    found = trainer.evaluate(dataset)
    assert found["accuracy"] == pytest.approx(wanted["accuracy"], abs=0.03)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert trainer.model.get_layer("first").compute_dtype == "float16"
    support.assert_same_on_replicas(trainer.model.variables)


def test_gradients_too_small_train_as_in_float32():
    x, y = make_arrays()
    dataset = support.batched((x, {"main": y, "tiny": y}), 16)

    def accuracy(precision, *, adapts=False):
        loss = {"main": support.make_loss(), "tiny": tiny_loss}
        trainer = make_trainer(precision, make_tiny, loss=loss)
        if adapts:
            assert fit(trainer, dataset)[1].pinned == ["tiny"]
        else:
            trainer.fit(dataset, epochs=EPOCHS, verbose=0)
        logits = trainer.model(x)["tiny"].numpy()
        return np.mean(np.argmax(logits, axis=1) == y)

    exact = accuracy("float32")
    assert exact > 0.9
    assert accuracy("mixed_float16") < 0.6  # it learned nothing
    found = accuracy("auto_layers", adapts=True)
    assert found == pytest.approx(exact, abs=0.03)


def test_the_loss_scale_starts_where_gradients_fit():
    """2**15 is too small here, where the loss is, and never grows in time."""

    def small(y, prediction):
        return 1e-10 * support.make_loss().call(y, prediction)

    x, y = make_arrays()
    dataset = support.batched((x, y), 16)
    trainer = make_trainer("auto_layers", support.make_mlp, loss=small)
    _, auto_layers = fit(trainer, dataset, epochs=1)
    assert float(trainer.optimizer.loss_scale) > 2.0**15
    assert not auto_layers.pinned


# ---------------------------------------------------------- while it trains


def make_growing():
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, name="grows"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(3, dtype="float32", name="logits"),
        ]
    )


class Growth(keras.callbacks.Callback):
    """Makes a layer's weights large at the begin of an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            kernel = self.model.get_layer("grows").kernel
            kernel.assign(1e6 * tf.convert_to_tensor(kernel))


@pytest.mark.parametrize(
    ("is_function", "jit_compile"), [(False, False), (True, True)]
)
def test_what_begins_to_overflow_is_pinned_at_the_epochs_end(
    caplog, is_function, jit_compile
):
    dataset = support.batched(make_arrays(), 16)
    if is_function:
        dataset = data_lib.from_arrays(make_arrays(), 16, shuffle_seed=1)
    trainer = make_trainer("auto_layers", make_growing, jit_compile=jit_compile)
    with caplog.at_level(logging.INFO, "dist_amp.auto_layers"):
        history, auto_layers = fit(
            trainer, dataset, epochs=4, callbacks=[Growth()]
        )
    assert auto_layers.pinned == ["grows", "norm"]
    # All six updates of the second epoch; none before, none after.
    assert history["skipped_updates"] == [0, 6, 6, 6]
    (message,) = messages_of(caplog)
    assert message.startswith("float32 from here on: grows (its output reaches")
    assert history["loss"][-1] < history["loss"][-2]
    # Six skips had lowered it.
    assert history["loss_scale"] == [2.0**15, 2.0**9, 2.0**15, 2.0**15]


def test_skips_alone_pin_nothing(dataset):
    """A loss scale that is far too large is no layer's fault."""
    trainer = make_trainer(
        "auto_layers",
        support.make_mlp,
        loss_scale_options={"initial_scale": 2.0**24},
    )
    auto_layers = dist_amp.AutoLayers(trainer, dataset)
    auto_layers.set_state(
        {"is_calibrated": True, "skipped": 0, "indices": [], "pinned": []}
    )
    history = trainer.fit(
        dataset, epochs=3, verbose=0, callbacks=[auto_layers]
    ).history
    assert history["skipped_updates"][-1] > 0
    assert not auto_layers.pinned


# ---------------------------------------------------------------- checkpoints


def shuffled():
    arrays = tf.data.Dataset.from_tensor_slices(make_arrays())
    return arrays.shuffle(NUM_EXAMPLES, seed=1).batch(16)


@pytest.mark.parametrize(
    "make_dataset",
    [
        shuffled,
        lambda: data_lib.from_arrays(make_arrays(), 16, shuffle_seed=1),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, caplog, make_dataset):
    """It pins before its first update, and does not calibrate again."""

    def train(epochs, directory):
        trainer = make_trainer("auto_layers", make_growing)
        _, auto_layers = fit(
            trainer,
            make_dataset(),
            epochs=epochs,
            callbacks=[Growth()],
            checkpoint_dir=tmp_path / directory,
        )
        assert auto_layers.pinned == ["grows", "norm"]
        return support.read(
            [*trainer.model.variables, *trainer.optimizer.variables]
        )

    straight = train(4, "straight")
    train(2, "parts")
    with caplog.at_level(logging.INFO, "dist_amp.auto_layers"):
        resumed = train(4, "parts")
    assert messages_of(caplog) == ["float32 as before: grows, norm"]
    for one, other in zip(resumed, straight, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_saved_model_keeps_its_pins(dataset, tmp_path):
    trainer = make_trainer("auto_layers")
    fit(trainer, dataset, epochs=1)
    trainer.model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    dtypes = {layer.name: layer.compute_dtype for layer in loaded.layers}
    assert dtypes == {
        "first": "float16",
        "large": "float32",
        "norm": "float32",
        "logits": "float32",
    }


# --------------------------------------------------------------------- errors


def test_auto_layers_is_mixed_float16():
    precision = dist_amp.Precision("auto_layers")
    assert precision.policy == "mixed_float16"
    assert precision.compute_dtype == "float16"
    assert precision.needs_loss_scale
    assert precision.adapts_layers
    assert not dist_amp.Precision("mixed_float16").adapts_layers
    assert "auto_layers" in precision_lib.PRECISIONS


def test_a_model_without_float16_is_refused(dataset):
    with pytest.raises(ValueError, match="no layer of the model computes"):
        dist_amp.AutoLayers(make_trainer("float32"), dataset)


class Mixes(keras.Model):
    """Adds what two layers return with TensorFlow's operator."""

    def __init__(self):
        super().__init__()
        self.large = keras.layers.Dense(
            3, kernel_initializer=keras.initializers.Constant(1e6)
        )
        self.small = keras.layers.Dense(3)

    def call(self, x):
        return tf.nn.tanh(self.large(x)) + tf.nn.tanh(self.small(x))


def test_a_model_that_mixes_dtypes_is_named(dataset):
    trainer = make_trainer("auto_layers", Mixes)
    with pytest.raises(
        ValueError, match=r"dense\S* cannot compute.*layers\.Add"
    ):
        fit(trainer, dataset, epochs=1)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
