"""The models: sizes of their papers, the same on replicas, built by flags."""

import functools
import sys
from collections.abc import Sequence
from typing import Literal

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp.models import (
    convnet,
    encoder,
    mlp,
    resnet50,
    transformer,
    transformer_lm,
)
from launch import inputs, models
from launch.config import ConfigError, TrainConfig
from launch.options import read_options
from tests import support

SMALL = {"num_layers": 1, "width": 8, "num_heads": 2, "vocabulary": 11}


def num_trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def digits(**settings):
    config = TrainConfig(global_batch_size=8, **settings)
    x, y = tf.zeros([8, 8, 8, 1]), tf.zeros([8], tf.int32)
    batches = tf.data.Dataset.from_tensors((x, y))
    return config, inputs.Data(batches, None, num_classes=10)


# ------------------------------------------------------------ published sizes


def test_resnet50_has_the_parameters_of_its_paper():
    model = resnet50.build()
    assert num_trainable(model) == 25_557_032
    assert model.count_params() - num_trainable(model) == 53_120  # moving
    strided = [
        layer.kernel_size
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
        and layer.strides == (2, 2)
        and "shortcut" not in layer.name
    ]
    assert strided == [(7, 7), (3, 3), (3, 3), (3, 3)]  # v1.5
    assert not any(isinstance(x, keras.layers.Dropout) for x in model.layers)


def test_gpt2_has_the_parameters_of_its_paper():
    model = transformer_lm.build(vocabulary_multiple=1)
    assert model.count_params() == 124_439_808
    assert model.output_shape == (None, 1024, 50_257)


def test_sizes_that_follow_from_the_arguments():
    padded = transformer_lm.build(input_shape=(4,), **SMALL)
    assert padded.output_shape == (None, 4, 64)
    untied = transformer_lm.build(input_shape=(4,), tied=False, **SMALL)
    assert untied.count_params() - padded.count_params() == 8 * 64
    assert mlp.build(num_classes=3, hidden=5).name == "MyModel"


def test_a_fresh_residual_block_is_the_identity():
    model = resnet50.build(input_shape=(8, 8, 3), blocks=(1,), width=2)
    (gamma,) = (v for v in model.variables if v.path == "block_0_2_norm/gamma")
    np.testing.assert_array_equal(gamma, np.zeros(8))


def test_stochastic_depth_grows_with_the_depth():
    rates = [b.drop_rate for b in resnet50.blocks_of((1, 3), 8, 0.4)]
    np.testing.assert_allclose(rates, [0.1, 0.2, 0.3, 0.4])
    model = resnet50.build(
        input_shape=(8, 8, 3), blocks=(1, 1), width=2, stochastic_depth=0.5
    )
    drops = [x for x in model.layers if isinstance(x, keras.layers.Dropout)]
    assert [layer.rate for layer in drops] == [0.25, 0.5]
    kept = drops[1](tf.ones([64, 2, 2, 8]), training=True).numpy()
    of_example = kept.reshape(64, -1)
    assert (of_example == of_example[:, :1]).all()  # whole branches
    assert set(of_example[:, 0]) == {0.0, 2.0}


# ------------------------------------------------------------- what is seen


def test_a_language_model_sees_no_later_token():
    model = transformer_lm.build(input_shape=(6,), **SMALL)
    tokens = np.array([[1, 2, 3, 4, 5, 6]])
    changed = np.array([[1, 2, 3, 9, 5, 6]])
    one, other = model(tokens).numpy(), model(changed).numpy()
    np.testing.assert_allclose(one[:, :3], other[:, :3], atol=1e-6)
    assert np.abs(one[:, 3:] - other[:, 3:]).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_of_large_numbers_stays_within_float16(dropout):
    """Products of 64 x 40 x 40 are beyond float16 until they are scaled."""
    layer = transformer.SelfAttention(1, dropout=dropout, dtype="float16")
    layer.build((1, 2, 64))
    layer.inward.kernel.assign(np.tile(np.eye(64), 3))
    layer.outward.kernel.assign(np.eye(64))
    found = layer(np.full((1, 2, 64), 40.0, "float16"))
    np.testing.assert_allclose(found, np.full((1, 2, 64), 40.0))


def test_a_mean_of_thousands_in_float16_and_of_no_token():
    x = tf.fill([2, 8192, 2], tf.constant(9.0, tf.float16))
    is_token = tf.constant([[True], [False]]) & tf.ones([1, 8192], tf.bool)
    found = encoder._pooled(x, is_token, "mean")
    np.testing.assert_array_equal(found, [[9.0, 9.0], [0.0, 0.0]])


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_an_encoder_sees_no_padding(pooling):
    model = encoder.build(
        input_shape=(None,), length=6, pooling=pooling, **SMALL
    )
    random = np.random.default_rng(1)
    model.set_weights(
        [random.normal(size=w.shape) for w in model.get_weights()]
    )
    short = model(np.array([[1, 2, 3]])).numpy()
    filled = model(np.array([[1, 2, 3, 0, 0, 0]])).numpy()
    np.testing.assert_allclose(filled, short, atol=1e-5)
    assert np.abs(model(np.array([[1, 2, 4]])).numpy() - short).max() > 1e-2


def test_attention_is_that_of_keras():
    x = keras.random.normal((2, 5, 8), seed=1)
    ours = transformer.SelfAttention(2, is_causal=True)
    theirs = keras.layers.MultiHeadAttention(2, 4)
    ours(x), theirs(x, x)
    inward = ours.inward.kernel.numpy().reshape(8, 3, 2, 4)
    outward = ours.outward.kernel.numpy().reshape(2, 4, 8)
    pairs = [(inward[:, i], np.zeros((2, 4))) for i in range(3)]
    theirs.set_weights(
        [w for pair in pairs for w in pair] + [outward, np.zeros(8)]
    )
    np.testing.assert_allclose(
        ours(x), theirs(x, x, use_causal_mask=True), atol=1e-5
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_with_dropout_is_the_same_formula(is_causal):
    x = keras.random.normal((4, 5, 8), seed=1)
    visible = np.arange(5) < np.array([5, 3, 1, 4])[:, None]
    plain = transformer.SelfAttention(2, is_causal=is_causal)
    drops = transformer.SelfAttention(2, is_causal=is_causal, dropout=0.5)
    expected = plain(x, visible=visible)
    drops(x)
    drops.set_weights([*plain.get_weights(), *drops.get_weights()[4:]])
    found = drops(x, visible=visible, training=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    many = [drops(x, visible=visible, training=True) for _ in range(400)]
    assert np.abs(many[0] - many[1]).max() > 1e-4
    # The projections' biases are 0, so what is dropped out is linear.
    error = np.abs(np.mean(many, axis=0) - expected).max()
    assert error < 0.25 * np.std(many, axis=0).max()
    again = type(drops).from_config(drops.get_config())
    assert again.get_config() == drops.get_config()


def test_replicas_drop_out_other_attention_weights():
    trainer = support.make_trainer(
        functools.partial(
            transformer_lm.build,
            input_shape=(6,),
            attention_dropout=0.5,
            **SMALL,
        ),
        num_replicas=2,
    )
    trainer.build(sequences(is_lm=True))
    x = tf.ones([4, 6], tf.int32)
    drawn = trainer.strategy.run(lambda: trainer.model(x, training=True))
    one, other = trainer.strategy.experimental_local_results(drawn)
    assert np.abs(one - other).max() > 1e-5


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`num_heads` must divide"):
        transformer_lm.build(**{**SMALL, "num_heads": 3})
    with pytest.raises(ValueError, match="--model_option=length"):
        transformer_lm.build(input_shape=(None,), **SMALL)
    with pytest.raises(ValueError, match=r"Received inputs of shape \[8, 8, 1"):
        encoder.build(input_shape=(8, 8, 1), **SMALL)
    with pytest.raises(ValueError, match="longer than the model's 4"):
        transformer_lm.build(input_shape=(6,), length=4, **SMALL)
    with pytest.raises(ValueError, match="`pooling` must be one of"):
        encoder.build(pooling="max", **SMALL)


# ------------------------------------------------ the same on two replicas


def images():
    x = np.random.default_rng(2).normal(size=(16, 8, 8, 1)).astype("float32")
    return support.batched((x, support.make_arrays(16)[1]))


def sequences(*, is_lm):
    x = np.random.default_rng(3).integers(0, 11, size=(16, 6))
    return support.batched((x, x if is_lm else x[:, 0] % 3))


TINY_RESNET = functools.partial(
    resnet50.build, input_shape=(8, 8, 1), num_classes=3, blocks=(1, 1), width=4
)
CASES = {
    "convnet": (
        functools.partial(
            convnet.build, num_classes=3, widths=(4, 8), dropout=0.1
        ),
        images,
    ),
    "resnet50": (TINY_RESNET, images),
    "transformer_lm": (
        functools.partial(
            transformer_lm.build,
            input_shape=(6,),
            attention_dropout=0.5,  # which the certificate turns off
            **SMALL,
        ),
        functools.partial(sequences, is_lm=True),
    ),
    "encoder": (
        functools.partial(
            encoder.build, input_shape=(6,), num_classes=3, **SMALL
        ),
        functools.partial(sequences, is_lm=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_the_same_on_two_replicas(name):
    model_fn, make_dataset = CASES[name]
    certificate = dist_amp.verify(
        model_fn,
        make_dataset(),
        optimizer_fn=support.make_sgd,
        loss=support.make_loss(),
        precision="float32",
        num_steps=2,
        num_replicas=[2],
        suites=["replicas"],
    )
    assert certificate.passed, str(certificate)


def test_batch_norm_is_synchronized_where_there_are_replicas():
    def flags_of(num_replicas, **options):
        with support.make_strategy(num_replicas).scope():
            model = TINY_RESNET(**options)
        norms = keras.layers.BatchNormalization
        layers = [x for x in model.layers if isinstance(x, norms)]
        return {layer.synchronized for layer in layers}

    assert flags_of(1) == {False}
    assert flags_of(2) == {True}
    assert flags_of(2, synchronized=False) == {False}


def test_a_comparison_takes_the_same_operations_on_one_device():
    for option, expected in ((), True), (("synchronized=false",), False):
        config, data = digits(model="convnet", model_option=option)
        model = models.make_model(config, data, synchronized=True)
        norms = [x for x in model.layers if hasattr(x, "synchronized")]
        assert {layer.synchronized for layer in norms} == {expected}


# ------------------------------------------------------------- by the flags


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"model": "mlp"}, (8, 10)),
        ({"model": "mlp", "model_option": ("hidden=4",)}, (8, 10)),
        ({"model": "convnet", "model_option": ("widths=4,4",)}, (8, 10)),
        (
            {"model": "resnet50", "model_option": ("blocks=1,1", "width=4")},
            (8, 10),
        ),
        ({"model": "convnet", "model_option": ("num_classes=7",)}, (8, 7)),
    ],
)
def test_a_models_name_builds_for_the_data(settings, shape):
    config, data = digits(**settings)
    model = models.make_model(config, data)
    assert model(next(iter(data.train))[0]).shape == shape
    if settings["model"] == "mlp":
        hidden = 4 if "model_option" in settings else 64
        assert model.count_params() == 64 * hidden + hidden + 10 * hidden + 10


def test_a_model_of_keras_scales_nothing_twice(caplog):
    """EfficientNetB0 divides by 255, which cannot be turned off."""
    settings = {"model": "keras.applications:EfficientNetB0"}
    images = inputs.Data(
        tf.data.Dataset.from_tensors(tf.zeros([2, 32, 32, 3])), None, 7
    )
    with pytest.raises(ConfigError, match=r"rescaling.*in \[0, 1\]. Name a"):
        models.make_model(TrainConfig(**settings, dataset="cifar10"), images)
    of_user = TrainConfig(**settings, dataset="tests.support:make_dataset")
    models.make_model(of_user, images)
    assert "which must be in 0..255: those of your data" in caplog.text


def test_a_model_of_keras_is_built_for_the_data():
    config = TrainConfig(
        model="keras.applications:MobileNetV3Small",
        model_option=("alpha=0.35", "minimalistic=true"),
    )
    examples = (tf.zeros([2, 32, 32, 3]), tf.zeros([2], tf.int32))
    batches = tf.data.Dataset.from_tensors(examples)
    with support.make_strategy(2).scope():
        model = models.make_model(config, inputs.Data(batches, None, 7))
    assert model.output_shape == (None, 7)
    assert not models.ends_in_probabilities(model)
    assert not any(
        isinstance(layer, keras.layers.Rescaling) for layer in model.layers
    )
    assert {
        layer.synchronized
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    } == {True}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "depth=3",
            r"must be one of input_shape, num_classes, widths, .*depth",
        ),
        ("dropout=much", "--model_option=dropout=... must be float"),
        ("widths=4,b", r"must be tuple\[int, ...\]. Received 4,b"),
        ("synchronized=yes", r"must be bool \| None"),
    ],
)
def test_wrong_options_are_named(option, message):
    with pytest.raises(ConfigError, match=message):
        models.make_model(*digits(model="convnet", model_option=(option,)))


def test_options_are_typed_as_the_function_has_them():
    def function(a: int, b: float | None, *, c: str, d=2.0, e=None, f=True):
        pass

    texts = ["a=3", "b=none", "c=4", "d=1", "e=x", "f=false"]
    found = read_options("model_option", texts, function)
    assert found == {
        "a": 3,
        "b": None,
        "c": "4",
        "d": 1.0,
        "e": "x",
        "f": False,
    }
    assert isinstance(found["d"], float)


def structured(
    many: list[int],
    some: Sequence[str],
    table: dict[str, int] | None,
    which: Literal["x", 2],
    two: tuple[int, str],
    none: tuple[()],
    rate: float,
    *,
    sizes=(1, 2),
    others=None,
):
    """Takes what can be written as Python writes it."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("many=1,2", [1, 2]),
        ("many=[3]", [3]),
        ("some=a,b", ("a", "b")),
        ("table={'a': 1}", {"a": 1}),
        ("table=none", None),
        ("which=2", 2),
        ("two=1,x", (1, "x")),
        ("none=", ()),
        ("rate=1", 1.0),
        ("sizes=16", (16,)),
        ("sizes=(3, 4)", (3, 4)),
        ("others={[]:1}", "{[]:1}"),
    ],
)
def test_structures_are_read(text, value):
    (found,) = read_options("model_option", [text], structured).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "many=abc",
        "many=[1.5]",
        "some=[1]",
        "table=3",
        "table={[]:1}",
        "table={'a': 'b'}",
        "which=z",
        "two=1,x,3",
        "two=(1, 2)",
        "none=1",
        "rate=nan",
        "rate=1e999",
        "others=1e999",
        f"table={'(' * 5000}",
    ],
)
def test_what_is_of_another_type_is_told(text):
    name = text.partition("=")[0]
    with pytest.raises(ConfigError, match=f"option={name}=... must be"):
        read_options("model_option", [text], structured)


def test_where_nothing_can_be_set_it_is_said():
    with pytest.raises(ConfigError, match="there is nothing to set"):
        read_options("dataset_option", ["a=1"], lambda: None)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
