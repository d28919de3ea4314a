"""What a config becomes: losses, data, devices."""

import sys

import keras
import pytest
import tensorflow as tf

from launch import build, hardware, inputs, models, observers
from launch.config import TrainConfig
from launch.run_dir import RunDir

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
        ([], True),
    ],
)
def test_cross_entropies_take_what_the_model_ends_in(name, last, from_logits):
    loss = models.make_loss(TrainConfig(loss=name), model_of(*last))
    assert loss.get_config()["from_logits"] is from_logits


def test_other_losses_are_keras_own():
    loss = models.make_loss(TrainConfig(loss="mean_squared_error"), model_of())
    assert isinstance(loss, keras.losses.MeanSquaredError)


EXAMPLES = tf.data.Dataset.from_tensor_slices(
    (tf.zeros([64, 4]), tf.zeros([64], tf.int32))
)


@pytest.mark.parametrize(
    ("dataset", "batch_size"),
    [
        (EXAMPLES, 32),
        (EXAMPLES.batch(16), 16),
        (EXAMPLES.batch(16, drop_remainder=True), 16),
    ],
)
def test_examples_are_batched_and_batches_are_left_alone(dataset, batch_size):
    data = inputs._data_of(lambda: dataset, TrainConfig())
    assert next(iter(data.train))[0].shape == (batch_size, 4)
    assert data.test is None


def test_a_function_gets_what_it_takes():
    def make(split, global_batch_size):
        return EXAMPLES.take(64 if split == "train" else 8).batch(
            global_batch_size
        )

    data = inputs._data_of(make, TrainConfig(global_batch_size=16))
    assert (len(data.train), len(data.test)) == (4, 1)


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
        trainer = build.make_trainer(config, hardware.make_devices(config), data)
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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
