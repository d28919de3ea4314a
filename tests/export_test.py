"""Exported models: Keras' own, in one dtype, used where this library is not."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_amp import export
from dist_amp.models import transformer_lm
from launch import export as program
from launch.config import ConfigError
from launch.export import ExportConfig
from tests import support
from tests.launch.evaluate_test import train


def make_many_layers():
    """Embedding, batch norm, GELU, a layer in float32; two outputs."""
    layers = keras.layers
    tokens = keras.Input((3,), dtype="int32", name="tokens")
    x = keras.Input((support.NUM_FEATURES,), name="x")
    y = layers.Flatten()(layers.Embedding(12, 8)(tokens))
    y = layers.BatchNormalization()(layers.Dense(8)(y))
    y = layers.Add()([y, layers.Dense(8, activation="gelu")(x)])
    y = layers.Dropout(0.5)(layers.LayerNormalization()(y))
    outputs = {
        "classes": layers.Dense(3, dtype="float32", name="classes")(y),
        "hidden": layers.Dense(2, name="hidden")(y),
    }
    return keras.Model({"tokens": tokens, "x": x}, outputs)


def make_inputs():
    x, _ = support.make_arrays(5)
    tokens = np.random.default_rng(0).integers(0, 12, size=(5, 3))
    return {"tokens": tokens.astype("int32"), "x": x}


def make_trainer(**options):
    """On two replicas, each layer as the trainer has changed it."""
    trainer = support.make_trainer(
        make_many_layers, num_replicas=2, loss=None, **options
    )
    trainer.predict(support.batched(make_inputs()))
    trainer.prepare_layers()
    for variable in trainer.model.variables:
        if "moving" in variable.path:
            variable.assign(variable + 0.3)
    return trainer


DTYPES = {
    ("mixed_float16", "float32"): {"float32"},
    ("mixed_float16", "bfloat16"): {"bfloat16", "float32"},
    ("float32", "float16"): {"float16", "float32"},
}


@pytest.mark.parametrize(("precision", "dtype"), DTYPES)
def test_it_is_the_model_in_another_dtype(precision, dtype):
    trainer, inputs = make_trainer(precision=precision), make_inputs()
    expected = export.outputs_in_float32(trainer.model, inputs)
    made = export.remade(trainer.model, dtype)
    outputs = [x.numpy() for x in tf.nest.flatten(made(inputs))]
    difference = export.largest_difference(outputs, expected)
    assert difference <= export.TOLERANCES[dtype]
    floats = [v for v in made.variables if "float" in v.dtype]
    assert {v.dtype for v in floats} == DTYPES[precision, dtype]
    is_mixed = precision != "float32"
    of_classes = "float32" if is_mixed else dtype
    assert made.get_layer("classes").compute_dtype == of_classes
    assert made.get_layer("hidden").kernel.dtype == dtype
    (norm,) = (x for x in made.layers if "batch_norm" in x.name)
    assert norm.moving_variance.dtype == "float32"
    again = export.outputs_in_float32(trainer.model, inputs)
    assert export.largest_difference(expected, again) == 0  # it is as it was


def test_it_works_where_this_library_is_not(tmp_path):
    trainer, inputs = make_trainer(precision="mixed_bfloat16"), make_inputs()
    path = tmp_path / "model.keras"
    export.export(trainer.model, path, inputs=inputs, dtype="bfloat16")
    found = export.outputs_elsewhere(path, "keras", inputs)
    expected = export.outputs_in_float32(trainer.model, inputs)
    difference = export.largest_difference(found, expected)
    assert difference <= export.TOLERANCES["bfloat16"]
    path = tmp_path / "model"
    export.export(trainer.model, path, inputs=inputs, format="saved_model")
    loaded = tf.saved_model.load(path)
    found = [x.numpy() for x in tf.nest.flatten(loaded.serve(inputs))]
    difference = export.largest_difference(found, expected)
    assert difference <= export.TOLERANCES["float32"]


class Mine(keras.Model):
    """Keras cannot make it from a configuration."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def call(self, x):
        return self.dense(x)


def make_mine():
    return Mine(keras.layers.Dense(3))


def test_a_model_without_configuration_is_a_saved_model(tmp_path):
    trainer = support.make_trainer(make_mine, precision="mixed_float16")
    x, _ = support.make_arrays(4)
    trainer.predict(support.batched(x))
    with pytest.raises(ValueError, match="--format=saved_model"):
        export.export(trainer.model, tmp_path / "m.keras", inputs=x)
    path = tmp_path / "model"
    export.export(trainer.model, path, inputs=x, format="saved_model")
    loaded = tf.saved_model.load(path)
    found = loaded.serve(x).numpy()
    (expected,) = export.outputs_in_float32(trainer.model, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert trainer.model.dense.compute_dtype == "float16"


def test_layers_of_this_library_are_in_no_keras_file(tmp_path):
    model = transformer_lm.build(
        input_shape=(4,), num_layers=1, width=8, num_heads=2, vocabulary=11
    )
    tokens = np.array([[1, 2, 3, 4]], "int32")
    with pytest.raises(ValueError, match="needs dist_amp, for its layers"):
        export.export(model, tmp_path / "model.keras", inputs=tokens)
    path = tmp_path / "model"
    export.export(model, path, inputs=tokens, format="saved_model")
    loaded = tf.saved_model.load(path)
    np.testing.assert_allclose(loaded.serve(tokens), model(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("path", "options", "told"),
    [
        ("model", {}, "must end in .keras"),
        ("model.keras", {"format": "saved_model"}, "must end in .keras"),
        ("model.keras", {"format": "onnx"}, "--format"),
        ("model.keras", {"dtype": "float64"}, "--dtype"),
    ],
)
def test_wrong_arguments_are_told(path, options, told):
    with pytest.raises(ValueError, match=told):
        export.export(support.make_mlp(), path, inputs=None, **options)


def test_a_difference_is_relative_and_nan_is_infinite():
    ones = np.ones([2, 3])
    assert export.largest_difference([ones], [ones]) == 0
    assert export.largest_difference([ones * 1.5], [ones * 2]) == 0.25
    assert export.largest_difference([ones * np.nan], [ones]) == np.inf
    assert export.largest_difference([ones], [ones[:1]]) == np.inf


# ------------------------------------------------------------------ a program


def test_the_program_writes_what_is_right_and_nothing_else(tmp_path, capsys):
    train(tmp_path / "run", 1)
    settings = {"run_dir": str(tmp_path / "run"), "format": "saved_model"}
    output = tmp_path / "served"
    config = ExportConfig(**settings, output=str(output), dtype="float16")
    assert program.export(config) == 0
    assert "as the model on 8 examples of --split=test" in (
        capsys.readouterr().out
    )
    signatures = tf.saved_model.load(output).signatures
    _, inputs = signatures["serving_default"].structured_input_signature
    assert [x.shape.as_list() for x in inputs.values()] == [[None, 6]]
    bad = tmp_path / "bad.keras"
    status = program.export(
        ExportConfig(
            run_dir=settings["run_dir"],
            output=str(bad),
            dtype="bfloat16",
            tolerance=1e-9,
        )
    )
    assert status == 1
    assert f"{bad} is not written: exported in bfloat16" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.glob("*.keras"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"run_dir": "r"}, "--output must be given"),
        ({"run_dir": "r", "output": "m"}, "must end in .keras"),
        ({"run_dir": "r", "output": "m.keras", "tolerance": 0.0}, "positive"),
    ],
)
def test_wrong_settings_are_told(settings, told):
    with pytest.raises(ConfigError, match=told):
        ExportConfig(**settings)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
