"""What a config becomes: losses, data, devices."""

import dataclasses
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from launch import build, hardware, inputs, models, observers
from launch.config import ConfigError, TrainConfig
from launch.errors import is_ours
from launch.run_dir import RunDir
from tests import support

NAME = "tests.launch.build_test"


def images(global_batch_size):
    examples = tf.data.Dataset.from_tensor_slices(
        (tf.zeros([64, 8, 8]), tf.zeros([64], tf.int32))
    )
    return examples.batch(global_batch_size)


def model_of(*last):
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), *last]
    )


@pytest.mark.parametrize(
    "name", ["sparse_categorical_crossentropy", "SparseCategoricalCrossentropy"]
)
@pytest.mark.parametrize(
    ("last", "from_logits"),
    [
        ([keras.layers.Dense(3)], True),
        ([keras.layers.Dense(3, activation="softmax")], False),
        ([keras.layers.Dense(3), keras.layers.Softmax()], False),
        ([keras.layers.Dense(3), keras.layers.Activation("sigmoid")], False),
        (
            [
                keras.layers.Dense(3, activation=tf.nn.softmax),
                keras.layers.Activation("linear", dtype="float32"),
            ],
            False,
        ),
        (
            [
                keras.layers.Dense(3, activation="sigmoid"),
                keras.layers.Reshape((3, 1)),
                keras.layers.Flatten(),
                keras.layers.Identity(),
            ],
            False,
        ),
        (
            [
                keras.layers.Dense(3, activation="sigmoid"),
                keras.layers.Dense(3),
                keras.layers.Activation("linear", dtype="float32"),
            ],
            True,
        ),
        ([], True),
    ],
)
def test_cross_entropies_take_what_the_model_ends_in(name, last, from_logits):
    loss = models.make_loss(TrainConfig(loss=name), model_of(*last))
    assert loss.get_config()["from_logits"] is from_logits


def functional(*last):
    """A model whose output is what some functions make of a hidden layer."""
    first = keras.Input((4,))
    hidden = keras.layers.Dense(3, activation="sigmoid")(first)
    x = keras.layers.Dense(3)(hidden)
    for function in last:
        x = function(x)
    return keras.Model(first, x)


def in_parallel(x):
    return keras.layers.Add()([x, keras.ops.softmax(x)])


@pytest.mark.parametrize(
    ("last", "from_logits"),
    [
        ([keras.ops.softmax], False),
        ([keras.ops.sigmoid, lambda x: keras.ops.cast(x, "float32")], False),
        ([in_parallel], True),
        ([], True),
    ],
)
def test_the_operation_behind_the_output_is_looked_at(last, from_logits):
    model = functional(*last)
    loss = models.make_loss(TrainConfig(), model)
    assert loss.from_logits is from_logits
    nested = keras.Sequential([keras.Input((4,)), model])
    assert models.ends_in_probabilities(nested) is not from_logits


@pytest.mark.parametrize(
    ("name", "loss", "num_outputs"),
    [
        ("accuracy", "binary_crossentropy", 1),
        ("accuracy", "bce", 3),
        ("BinaryAccuracy", "binary_crossentropy", 1),
        ("binary_crossentropy", "bce", 1),
        ("auc", "binary_crossentropy", 1),
        ("precision", "BinaryFocalCrossentropy", 3),
        ("recall", "binary_crossentropy", 1),
        ("f1_score", "categorical_crossentropy", 3),
        ("mse", "categorical_crossentropy", 3),
        ("categorical_accuracy", "categorical_crossentropy", 3),
        ("sparse_categorical_crossentropy", None, 3),
        ("accuracy", None, 3),
    ],
)
def test_metrics_are_those_of_probabilities(name, loss, num_outputs):
    """A model that ends in logits has the results of one with an activation."""
    loss = loss or "sparse_categorical_crossentropy"
    is_binary = loss.lower().startswith("b")
    random = np.random.default_rng(1)
    x = random.normal(size=(16, 4)).astype("float32")
    y = random.integers(0, 2, size=(16, num_outputs)).astype("float32")
    if not is_binary:
        y = np.eye(3, dtype="float32")[random.integers(0, 3, size=16)]
    if loss.startswith("sparse"):
        y = y.argmax(axis=-1)
    config = TrainConfig(
        loss=loss, metrics=(name,), model=f"{NAME}:ending", precision="float32"
    )
    results = []
    for activation in (None, "sigmoid" if is_binary else "softmax"):
        data = inputs.Data(support.batched((x, y)), None, None)
        options = (f"activation={activation}", f"units={num_outputs}")
        trainer = build.make_trainer(
            dataclasses.replace(config, model_option=options),
            hardware.make_devices(config),
            data,
        )
        trainer.build(data.train)
        for variable in trainer.model.variables:
            variable.assign(random_like(variable))
        results.append(trainer.evaluate(data.train))
    assert list(results[0]) == list(results[1])
    for one, other in zip(*(r.values() for r in results), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert not any(key[-1].isdigit() for key in results[0])


def random_like(variable):
    return np.random.default_rng(2).normal(size=variable.shape)


def ending(activation: str | None, units: int):
    last = keras.layers.Dense(units, activation=activation, dtype="float32")
    return keras.Sequential([keras.Input((4,)), last])


def test_metrics_of_logits_are_kept_apart_on_replicas():
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    config = TrainConfig(
        loss="binary_crossentropy", metrics=("auc", "accuracy")
    )
    x, y = support.make_arrays(27)
    dataset = support.batched((x, (y > 0).astype("float32")[:, None]))
    one, two = (
        support.make_trainer(
            lambda: keras.Sequential(
                [keras.Input((6,)), keras.layers.Dense(1)]
            ),
            num_replicas=number,
            loss=loss,
            metrics=models.make_metrics(config, loss),
        )
        for number in (1, 2)
    )
    assert two.evaluate(dataset) == pytest.approx(one.evaluate(dataset))
    assert two.metrics.direction_of("accuracy") == "max"


@pytest.mark.parametrize(
    "name", ["mse", "kld", "kl_divergence", "log_cosh", "huber", "KLD"]
)
def test_short_names_of_losses(name):
    loss = models.make_loss(TrainConfig(loss=name), model_of())
    function = keras.losses.get(name)
    y, predicted = tf.random.uniform([2, 3, 4], seed=1)
    assert float(loss(y, predicted)) == pytest.approx(
        float(tf.reduce_mean(function(y, predicted)))
    )


@pytest.mark.parametrize("name", ["acuracy", "MeanIoU"])
def test_metrics_that_cannot_be_made(name):
    config = TrainConfig(metrics=(name,))
    with pytest.raises(
        ConfigError, match=f"--metrics must be.*Received {name}"
    ):
        models.make_metrics(config, None)


def test_other_losses_are_keras_own():
    loss = models.make_loss(TrainConfig(loss="mean_squared_error"), model_of())
    assert isinstance(loss, keras.losses.MeanSquaredError)


EXAMPLES = tf.data.Dataset.from_tensor_slices(
    (tf.zeros([64, 4]), tf.zeros([64], tf.int32))
)
IMAGES = tf.data.Dataset.from_tensor_slices(tf.zeros([64, 28, 28]))


@pytest.mark.parametrize(
    "dataset",
    [
        EXAMPLES,
        EXAMPLES.batch(16),
        EXAMPLES.batch(16).map(lambda x, y: (x + 1.0, y)),
        EXAMPLES.batch(16, drop_remainder=True).shuffle(9).prefetch(1),
        tf.data.Dataset.zip(EXAMPLES.batch(16, True), EXAMPLES.batch(16, True)),
        IMAGES.map(lambda image: (image, image[0, :3])),
    ],
)
def test_examples_are_batched_and_batches_are_left_alone(dataset):
    config = TrainConfig(global_batch_size=16)
    data = inputs._data_of(lambda: dataset, config)
    sizes = {x.shape[0] for x in tf.nest.flatten(next(iter(data.train)))}
    assert sizes == {16}
    assert data.test is None


@pytest.mark.parametrize(
    "dataset",
    [
        IMAGES.map(lambda image: (image, image)),
        # A sequence and what follows each of it, made by `batch` and by `map`.
        EXAMPLES.batch(16, drop_remainder=True).map(lambda x, y: (x, y)),
        EXAMPLES.batch(16).map(lambda x, y: (y, y)),
        tf.data.Dataset.from_generator(list, tf.float32),
    ],
)
def test_what_may_be_batches_or_examples_is_asked_for(dataset):
    with pytest.raises(ConfigError, match="take `global_batch_size`"):
        inputs._data_of(lambda: dataset, TrainConfig())


@pytest.mark.parametrize(
    ("dataset", "settings", "told"),
    [
        (EXAMPLES.batch(64), {"global_batch_size": 16}, "size=64, or"),
        (EXAMPLES.batch(8), {"global_batch_size": 16}, "size=8, or"),
        (
            EXAMPLES.batch(16, drop_remainder=True),
            {"global_batch_size": 16, "gradient_accumulation_steps": 2},
            "=16 in 2 parts makes batches of 8.*of 16: pass .*=32",
        ),
        (
            dist_amp.LoadedBatches(EXAMPLES.batch(8), lambda x, y: (x, y)),
            {},
            "=32 makes batches of 32.*returns batches of 8",
        ),
    ],
)
def test_batches_of_another_size_than_the_flag_s(dataset, settings, told):
    with pytest.raises(ConfigError, match=told):
        inputs._data_of(lambda: dataset, TrainConfig(**settings))


def test_a_function_that_takes_no_heed_of_the_size():
    def make(global_batch_size):
        return EXAMPLES.batch(global_batch_size // 2, drop_remainder=True)

    with pytest.raises(ConfigError, match="returns batches of 16: pass"):
        inputs._data_of(make, TrainConfig())


def test_a_dataset_smaller_than_a_batch_is_one():
    for number in (1, 63, 64):
        dataset = EXAMPLES.take(number).batch(64)
        data = inputs._data_of(
            lambda dataset=dataset: dataset, TrainConfig(global_batch_size=64)
        )
        assert data.train is dataset


def test_a_function_gets_what_it_takes():
    def make(split, global_batch_size):
        return EXAMPLES.take(64 if split == "train" else 8).batch(
            global_batch_size
        )

    data = inputs._data_of(make, TrainConfig(global_batch_size=16))
    assert (len(data.train), len(data.test)) == (4, 1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"profile_steps": "20:25"}, "--profile_steps contradicts a training"),
        ({"warmup_steps": 21}, "--warmup_steps contradicts.*of 20 updates"),
        ({"eval_steps": 3}, "--eval_steps contradicts.*there is no test"),
        ({"data_dir": "there"}, "--data_dir contradicts.*takes no `data_dir`"),
    ],
)
def test_what_would_be_ignored_with_these_data_is_told(settings, told):
    config = TrainConfig(dataset=f"{NAME}:images", epochs=10, **settings)
    with pytest.raises(ConfigError, match=told):
        build.make_trainer(
            config, hardware.make_devices(config), inputs.load_data(config)
        )


def test_a_profile_goes_where_tensorboard_looks(tmp_path):
    run_dir = RunDir(str(tmp_path))
    assert observers.make_profiler(TrainConfig(), run_dir) is None
    config = TrainConfig(profile_steps="2:3")
    profiler = observers.make_profiler(config, run_dir)
    assert [profiler.cut(9, step) for step in (0, 2, 3)] == [2, 1, 9]
    assert list((tmp_path / "tensorboard" / "plugins").rglob("*.xplane.pb"))


@pytest.mark.parametrize("num_cpus", [1, 2])
def test_an_update_in_parts_takes_as_many_flops(num_cpus):
    """Of the mlp: 64 x 64 and 64 x 10, for 32 examples."""
    counts = []
    for parts in (1, 4):
        config = TrainConfig(
            dataset=f"{NAME}:images",
            devices=tuple(f"CPU:{index}" for index in range(num_cpus)),
            precision="float32",
            gradient_accumulation_steps=parts,
        )
        data = inputs.load_data(config)
        trainer = build.make_trainer(
            config, hardware.make_devices(config), data
        )
        mfu = observers.make_mfu(config, data, trainer)
        mfu._peak = 1e12
        mfu.on_train_begin()
        counts.append(mfu._flops)
    examples = 32 // num_cpus
    forward = 2 * examples * (64 * 64 + 64 * 10)
    assert counts == [2 * forward + 2 * examples * 64 * 10] * 2


def test_an_error_in_the_users_function_keeps_its_traceback():
    def broken():
        raise ValueError("no file")

    with pytest.raises(RuntimeError, match=r"broken raised.*no file"):
        inputs._data_of(broken, TrainConfig())


def test_errors_of_our_own_speak_for_themselves():
    text = {"dataset": "dist_amp.datasets.text:build"}
    with pytest.raises(ConfigError, match="nowhere holds no"):
        inputs.load_data(TrainConfig(**text, data_dir="nowhere"))
    data = inputs.Data(EXAMPLES.batch(8), None, None)
    pooled = TrainConfig(model="encoder", model_option=("pooling=most",))
    with pytest.raises(ValueError, match="`pooling` must be one of") as caught:
        models.make_model(pooled, data)
    assert is_ours(caught.value)


def no_file():
    raise FileNotFoundError("of the user's")


def test_errors_that_are_not_ours_are_not_told_as_ours():
    with pytest.raises(FileNotFoundError) as caught:
        inputs.load_data(TrainConfig(dataset=f"{NAME}:no_file"))
    assert not is_ours(caught.value)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dtype", "units", "num_classes", "message"),
    [
        ("float32", 1, None, r"\[.., 1\] and labels are float32: pass --loss"),
        ("float32", 3, None, "wants integer labels"),
        ("int32", 1, None, "labels are int32: pass --loss=mean_squared_error"),
        ("int32", 3, 4, "of 4 classes: give the last layer 4 units"),
        ("int32", 4, 4, None),
    ],
)
def test_a_sparse_cross_entropy_wants_classes(
    dtype, units, num_classes, message, label_smoothing
):
    config = TrainConfig(
        model=f"{NAME}:ending",
        model_option=(f"units={units}", "activation=none"),
        precision="float32",
        label_smoothing=label_smoothing,
    )
    arrays = np.zeros((8, 4), "float32"), np.zeros(8, dtype)
    data = inputs.Data(support.batched(arrays), None, num_classes)
    devices = hardware.make_devices(config)
    if message is None:
        build.make_trainer(config, devices, data)
        return
    with pytest.raises(ConfigError, match=message):
        build.make_trainer(config, devices, data)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
