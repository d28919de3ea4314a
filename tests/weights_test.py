"""Weights from files that other programs wrote, and to them."""

import sys

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dist_amp
from dist_amp import weights
from tests import support


def make_model(num_replicas=1, units=8):
    with dist_amp.scope(support.make_strategy(num_replicas), "float32"):
        return keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                keras.layers.Dense(units, activation="tanh"),
                keras.layers.BatchNormalization(),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(support.NUM_CLASSES),
            ]
        )


def make_other():
    keras.utils.set_random_seed(9)
    model = make_model()
    for variable in model.variables:
        if "float" in variable.dtype:
            variable.assign(variable + 0.25)
    return model


def saved_by_keras(suffix):
    def save(model, folder):
        path = str(folder / f"model{suffix}")
        is_weights = suffix == ".weights.h5"
        (model.save_weights if is_weights else model.save)(path)
        return path

    return save


def saved_as_safetensors(model, folder):
    path = str(folder / "model.safetensors")
    save_file({v.path: v.numpy() for v in model.variables}, path)
    return path


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize(
    "save",
    [
        saved_by_keras(".keras"),
        saved_by_keras(".h5"),
        saved_by_keras(".weights.h5"),
        saved_as_safetensors,
    ],
    ids=["keras", "h5", "weights.h5", "safetensors"],
)
def test_every_replica_gets_the_weights_of_a_file(tmp_path, save, num_replicas):
    other = make_other()
    path = save(other, tmp_path)
    model = make_model(num_replicas)
    weights.load(model, path)
    pairs = zip(model.variables, other.variables, strict=True)
    for mine, theirs in pairs:
        if "float" in mine.dtype:
            for copy in support.local_copies(mine):
                np.testing.assert_array_equal(copy, theirs.numpy())


def test_the_optimizer_keeps_its_own_state(tmp_path):
    """Though Keras saved one in the file."""
    trained = support.fit_trainer(support.make_dataset())
    trained.model.save(tmp_path / "model.keras")
    trainer = support.make_trainer()
    trainer.build(support.make_dataset())
    weights.load(trainer.model, str(tmp_path / "model.keras"))
    assert int(trainer.optimizer.iterations.numpy()) == 0
    assert trainer.model.optimizer is trainer.optimizer
    support.assert_close(support.read(trainer.model.variables), trained.weights)


def test_another_model_is_an_error_that_lists_what_differs(tmp_path):
    path = saved_as_safetensors(make_model(units=9), tmp_path)
    model = make_model()
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"kernel \[6, 9\] there, \[6, 8\]"):
        weights.load(model, path)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
def test_keras_files_of_another_model_change_nothing(tmp_path, suffix):
    """One with a layer more, and one whose last layer is of another size."""
    longer = keras.Sequential([*make_other().layers, keras.layers.Dense(3)])
    longer.build((None, support.NUM_FEATURES))
    wider = make_model()
    wider.pop()
    wider.add(keras.layers.Dense(7))
    wider.build((None, support.NUM_FEATURES))
    for index, other in enumerate((longer, wider)):
        (tmp_path / str(index)).mkdir()
        path = saved_by_keras(suffix)(other, tmp_path / str(index))
        model = make_model(2)
        before = model.get_weights()
        with pytest.raises(ValueError, match="another model"):
            weights.load(model, path)
        for one, now in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, now)


@pytest.mark.parametrize(
    ("name", "error"),
    [("model.pt", ValueError), ("missing.keras", FileNotFoundError)],
)
def test_a_file_of_another_kind_or_none_is_named(tmp_path, name, error):
    with pytest.raises(error, match=name):
        weights.load(make_model(), str(tmp_path / name))


def test_every_float_type_is_written(tmp_path):
    names = ("float32", "float16", "int32")
    arrays = {name: np.arange(6.0).reshape(2, 3).astype(name) for name in names}
    arrays["bfloat16"] = np.asarray(keras.ops.cast(np.arange(4.0), "bfloat16"))
    path = str(tmp_path / "a.safetensors")
    weights.save(path, arrays)
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(
            array.astype("float32"), arrays[name].astype("float32")
        )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
