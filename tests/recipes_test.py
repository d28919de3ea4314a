"""The recipes: each is read, built at full size, and traced on its data."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import dist_amp
from dist_amp import stream
from dist_amp.datasets import cifar10, imagenet, tokens
from launch import build, hardware, inputs, models
from launch.config import TrainConfig
from launch.flags import read_command_line
from tests import support

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.flags"))}


def read(name):
    argv = ["train", f"--flagfile={RECIPES[name]}"]
    return read_command_line(argv, TrainConfig, "", flags.FlagValues())


def stub(shape, dtype, labels=(), num_classes=None):
    """Data of the recipe's shapes, longer than its warm-up."""
    x = tf.zeros([4, *shape], dtype)
    batches = tf.data.Dataset.from_tensors(
        (x, tf.zeros([4, *labels], tf.int32))
    )
    return inputs.Data(batches.repeat(2000), None, num_classes)


STUBS = {
    "digits-mlp": ((8, 8, 1), "float32", (), 10),
    "digits-convnet": ((8, 8, 1), "float32", (), 10),
    "cifar10": ((32, 32, 3), "float32"),
    "imagenet-resnet50": ((224, 224, 3), "float32"),
    "gpt2-124m": ((1024,), "int32", (1024,)),
}
# Trainable ones. GPT-2's 124,439,808, and 47 rows that fill its vocabulary up.
NUM_PARAMETERS = {
    "digits-mlp": 64 * 256 + 256 + 256 * 10 + 10,
    "digits-convnet": 65_834,
    "cifar10": 23_520_842,
    "imagenet-resnet50": 25_557_032,
    "gpt2-124m": 124_439_808 + 47 * 768,
}
# What makes a model small enough to be traced in a test.
SMALLER = {
    "cifar10": ("blocks=1,1", "width=4"),
    "imagenet-resnet50": ("blocks=1,1", "width=4"),
    "gpt2-124m": ("num_layers=1", "width=8", "num_heads=2", "vocabulary=64"),
}


def test_every_recipe_is_known_here():
    assert set(RECIPES) == set(STUBS) == set(NUM_PARAMETERS)


@pytest.mark.parametrize("name", STUBS)
def test_a_recipe_says_what_it_reaches_and_whether_it_was_run(name):
    text = RECIPES[name].read_text()
    assert ("Reached here:" in text) != ("NOT RUN by this project" in text)
    assert f"--flagfile=recipes/{name}.flags" in text
    assert read(name).directory == f"runs/{name}"


@pytest.mark.parametrize("name", STUBS)
def test_a_recipes_model_has_the_published_size(name):
    model = models.make_model(read(name), stub(*STUBS[name]))
    if not model.built:
        model.build((None, *STUBS[name][0]))
    found = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert found == NUM_PARAMETERS[name]


@pytest.mark.parametrize("name", SMALLER)  # the others were run
def test_a_recipes_step_is_traced_on_two_replicas(name):
    config = read(name)
    smaller = (*config.model_option, *SMALLER[name])
    config = dataclasses.replace(config, model_option=smaller)
    strategy = support.make_strategy(2)
    with dist_amp.scope(strategy, "float32") as precision:
        pass
    devices = hardware.Devices(strategy, "mirrored", "", precision)
    data = stub(*STUBS[name])
    trainer = build.make_trainer(config, devices, data)
    trainer.build(data.train)
    assert trainer.trace(data.train) > 0


# ----------------------------------------------------------------- their data


def first_batch(passes, number):
    return next(iter(passes(tf.constant(number, tf.int64))))


def assert_changes_each_pass(passes):
    """The same for the same pass, another order and images for another."""
    again, first, second = (first_batch(passes, n) for n in (0, 0, 1))
    np.testing.assert_array_equal(again[0], first[0])
    in_a_graph = tf.data.Dataset.range(2).flat_map(passes)  # as in training
    np.testing.assert_array_equal(next(iter(in_a_graph))[0], first[0])
    assert np.abs(first[0].numpy() - second[0].numpy()).max() > 0.1


def examples(side, number=6):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (number, side, side, 3), np.uint8)
    return tf.data.Dataset.from_tensor_slices((images, np.arange(number)))


def test_cifar10_is_shifted_and_mirrored():
    passes = cifar10.batches(examples(32), 4, seed=3)
    assert_changes_each_pass(passes)
    x, y = first_batch(passes, 0)
    assert (x.shape, y.shape) == ((4, 32, 32, 3), (4,))
    rows = stream.one_pass(cifar10.batches(examples(32), 1, None)).unbatch()
    plain = {int(y): x for x, y in rows.as_numpy_iterator()}
    for image, label in zip(x.numpy(), y.numpy(), strict=True):
        assert is_shifted(plain[int(label)], image)


def is_shifted(plain, image):
    """Whether the middle of one is somewhere in the other, or mirrored."""
    return any(
        np.allclose(plain[8:24, 8:24], seen[8 + i : 24 + i, 8 + j : 24 + j])
        for seen in (image, image[:, ::-1])
        for i in range(-4, 5)
        for j in range(-4, 5)
    )


def test_imagenet_is_cropped_to_one_size():
    jpegs = examples(90).map(lambda x, y: (tf.io.encode_jpeg(x[:70]), y))
    passes = imagenet.batches(jpegs, 4, seed=3)
    assert_changes_each_pass(passes)
    assert first_batch(passes, 0)[0].shape == (4, 224, 224, 3)
    x, y = first_batch(imagenet.batches(jpegs, 4, None), 0)
    assert x.shape == (4, 224, 224, 3)
    assert list(y.numpy()) == [0, 1, 2, 3]
    # The middle square of 61 of 70 rows, its top left corner in place.
    image, _ = next(iter(jpegs))
    corner = tf.io.decode_jpeg(image)[4, 14].numpy() / 255
    expected = (corner - imagenet._MEAN) / imagenet._DEVIATION
    np.testing.assert_allclose(x[0, 0, 0], expected, atol=1e-4)


def test_tokens_are_followed_by_the_next_ones(tmp_path):
    np.arange(23, dtype="<u2").tofile(tmp_path / "val.bin")
    x, y = next(iter(tokens.build("test", 8, 3, str(tmp_path), length=4)))
    np.testing.assert_array_equal(x[1], [5, 6, 7, 8])
    np.testing.assert_array_equal(y, x + 1)
    assert x.shape == (4, 4)  # of 23 tokens, three are left over
    np.arange(9 * 1025, dtype="<u2").tofile(tmp_path / "train.bin")
    passes = tokens.build("train", 4, 3, str(tmp_path))
    assert_changes_each_pass(passes)
    assert len(passes(tf.constant(0, tf.int64))) == 3
    with pytest.raises(FileNotFoundError, match="pass as --data_dir"):
        tokens.build("test", 4, 3, str(tmp_path / "nowhere"))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
