"""LARS against numbers by hand, what does not decay, and smoothed labels."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp.lars import LARS
from dist_amp.losses import SmoothedCrossentropy
from launch import inputs, models, updates
from launch.config import OPTIMIZERS, ConfigError, TrainConfig
from tests import support


def updated(optimizer, gradients, weights=(3.0, 4.0), name="kernel"):
    variable = keras.Variable(list(weights), name=name)
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    return variable.numpy()


# ---------------------------------------------------------------------- LARS


def test_two_updates_by_hand():
    # |w| = 5, |g| = 2: the ratio is 0.1 * 5 / (2 + 0.2 * 5) = 1/6, and the
    # first step 0.6 * 1/6 * (g + 0.2 w) = 0.1 * (0.6, 2.8).
    optimizer = LARS(0.6, momentum=0.5, weight_decay=0.2, trust_coefficient=0.1)
    first = updated(optimizer, [[0.0, 2.0]])
    np.testing.assert_allclose(first, [2.94, 3.72], rtol=1e-6)

    optimizer = LARS(0.6, momentum=0.5, weight_decay=0.2, trust_coefficient=0.1)
    norm = (2.94**2 + 3.72**2) ** 0.5
    rate = 0.6 * 0.1 * norm / (1.0 + 0.2 * norm)
    step = [0.5 * 0.06 + rate * (1 + 0.588), 0.5 * 0.28 + rate * 0.744]
    second = updated(optimizer, [[0.0, 2.0], [1.0, 0.0]])
    np.testing.assert_allclose(
        second, [2.94 - step[0], 3.72 - step[1]], rtol=1e-5
    )


@pytest.mark.parametrize("name", ["bias", "gamma", "beta", "embeddings"])
def test_norms_and_biases_are_not_adapted_and_do_not_decay(name):
    optimizer = LARS(0.5, momentum=0.0, weight_decay=0.2)
    np.testing.assert_allclose(
        updated(optimizer, [[0.0, 2.0]], name=name), [3.0, 3.0]
    )


@pytest.mark.parametrize(
    ("weights", "gradient", "expected"),
    [
        ([0.0, 0.0], [0.0, 2.0], [0.0, -1.0]),
        # Half of a tenth of the weights, which alone would be as large.
        ([3.0, 4.0], [0.0, 0.0], [2.85, 3.8]),
    ],
)
def test_the_ratio_is_one_where_a_norm_is_zero(weights, gradient, expected):
    optimizer = LARS(0.5, momentum=0.0, weight_decay=0.1)
    np.testing.assert_allclose(
        updated(optimizer, [gradient], weights), expected, rtol=1e-6
    )


def test_slices_of_a_gradient_are_added_up_before_the_norm():
    table = keras.Variable([[3.0], [4.0]], name="table")
    slices = tf.IndexedSlices(
        tf.constant([[1.5], [0.5]]), tf.constant([1, 1]), tf.constant([2, 1])
    )
    LARS(1.0, momentum=0.0, trust_coefficient=0.1).apply([slices], [table])
    np.testing.assert_allclose(table, [[3.0], [3.5]], rtol=1e-6)


def test_survives_keras_serialization():
    one = LARS(0.3, weight_decay=0.1, exclude=("x",), clipnorm=1.0)
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(one)
    )
    assert copy.get_config() == one.get_config()
    assert copy.weight_decay is None  # Keras' own, which would come first
    with pytest.raises(ValueError, match="`momentum` must be"):
        LARS(momentum=1.0)


def test_on_two_replicas_in_float16_it_is_the_same():
    certificate = dist_amp.verify(
        support.make_mlp,
        support.make_dataset(),
        optimizer_fn=lambda: LARS(
            1.0, weight_decay=1e-2, trust_coefficient=0.05
        ),
        loss=support.make_loss(),
        precision="mixed_float16",
        num_steps=2,
        num_replicas=[2],
        suites=["replicas"],
    )
    assert certificate.passed, str(certificate)


# ------------------------------------------------------------ what decays


class Decaying(keras.Model):
    """One variable of each kind that does not decay, and a kernel."""

    def __init__(self):
        super().__init__()
        self.table = keras.layers.Embedding(4, 2)
        self.norm = keras.layers.LayerNormalization()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(self.norm(self.table(x)))


def decayed(num_replicas, **settings):
    """Names of variables that an update without gradient makes smaller."""
    config = TrainConfig(learning_rate=0.5, weight_decay=0.5, **settings)
    data = inputs.Data(tf.data.Dataset.from_tensors(tf.zeros([4])), None, None)
    strategy = support.make_strategy(num_replicas)
    with dist_amp.scope(strategy, "float32"):
        model = Decaying()
        model(tf.zeros([1, 2], tf.int32))
        for variable in model.variables:
            variable.assign(tf.ones(variable.shape))
        optimizer = updates.make_optimizer(config, data)
        optimizer.build(model.trainable_variables)
    zeros = [tf.zeros(v.shape) for v in model.trainable_variables]
    strategy.run(lambda: optimizer.apply(zeros))
    support.assert_same_on_replicas(model.variables)
    return [
        v.name for v in model.variables if support.read([v])[0].max() < 0.999
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lars"])
def test_norms_biases_and_embeddings_do_not_decay(optimizer):
    settings = {}
    if optimizer == "lars":  # without gradient its ratio is 1
        settings["optimizer_option"] = ("trust_coefficient=1.0",)
    assert decayed(2, optimizer=optimizer, **settings) == ["kernel"]


def test_what_does_not_decay_can_be_chosen():
    assert decayed(1, optimizer="adamw", weight_decay_exclude=("bias",)) == [
        "embeddings",
        "gamma",
        "beta",
        "kernel",
    ]
    everything = ["embeddings", "gamma", "beta", "kernel", "bias"]
    assert decayed(1, optimizer="adamw", weight_decay_exclude=()) == everything
    assert decayed(1, optimizer="sgd") == everything


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_the_flag_is_made(name):
    config = TrainConfig(optimizer=name)
    data = inputs.Data(tf.data.Dataset.from_tensors(tf.zeros([4])), None, None)
    made = updates.make_optimizer(config, data).inner_optimizer
    assert type(made).__name__.lower() == name


def test_an_optimizers_options_are_typed():
    data = inputs.Data(tf.data.Dataset.from_tensors(tf.zeros([4])), None, None)

    def make(*options, **settings):
        config = TrainConfig(optimizer_option=options, **settings)
        return updates.make_optimizer(config, data).inner_optimizer

    assert make("beta_2=0.95").beta_2 == 0.95
    assert make("nesterov=true", optimizer="sgd").nesterov is True
    made = make("trust_coefficient=0.02", optimizer="lars", momentum=0.8)
    assert (made.trust_coefficient, made.momentum) == (0.02, 0.8)
    with pytest.raises(ConfigError, match="must be one of beta_1, beta_2"):
        make("weight_decay=0.1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_option": ("width",)}, "--model_option must be name=value"),
        ({"model_option": ("a=1", "a=2")}, "--model_option sets a twice"),
        ({"label_smoothing": 1.0}, r"--label_smoothing must be in \[0, 1\)"),
        (
            {"label_smoothing": 0.1, "loss": "mse"},
            "--label_smoothing contradicts --loss=mse",
        ),
        (
            {"weight_decay_exclude": ("bias",)},
            "--weight_decay_exclude contradicts no --weight_decay",
        ),
    ],
)
def test_settings_that_are_wrong_or_ignored(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


# ------------------------------------------------------------------ smoothing


@pytest.mark.parametrize("from_logits", [True, False])
def test_smoothed_labels_are_keras_own_on_vectors(from_logits):
    random = np.random.default_rng(0)
    scores = random.normal(size=(2, 5, 4)).astype("float32")
    if not from_logits:
        scores = tf.nn.softmax(scores)
    labels = random.integers(0, 4, size=(2, 5))
    ours = SmoothedCrossentropy(0.1, from_logits=from_logits)
    theirs = keras.losses.CategoricalCrossentropy(
        from_logits=from_logits, label_smoothing=0.1
    )
    expected = theirs.call(tf.one_hot(labels, 4), scores)
    np.testing.assert_allclose(ours.call(labels, scores), expected, rtol=1e-5)
    np.testing.assert_allclose(
        ours.call(labels[..., None], scores), expected, rtol=1e-5
    )


def test_smoothing_by_flag():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss = models.make_loss(TrainConfig(label_smoothing=0.1), model)
    assert isinstance(loss, SmoothedCrossentropy)
    assert (loss.smoothing, loss.from_logits) == (0.1, True)
    config = TrainConfig(loss="CategoricalCrossentropy", label_smoothing=0.1)
    config_of_loss = models.make_loss(config, model).get_config()
    assert config_of_loss["label_smoothing"] == 0.1
    copy = SmoothedCrossentropy.from_config(loss.get_config())
    assert copy.get_config() == loss.get_config()
    with pytest.raises(ValueError, match="`smoothing` must be"):
        SmoothedCrossentropy(1.0)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
