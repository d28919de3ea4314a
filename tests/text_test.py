"""Text files as data: every byte once, in pieces, and a model learns them."""

import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

from dist_amp import data
from dist_amp.datasets import text
from launch import build, hardware, inputs
from launch.config import ConfigError, TrainConfig

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def rows_of(dataset):
    if callable(dataset):
        dataset = dataset(tf.constant(2, tf.int64))
    batches = [(x.numpy(), y.numpy()) for x, y in dataset]
    x, y = (np.concatenate(leaves) for leaves in zip(*batches, strict=True))
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    return x, np.concatenate([x, y[:, -1:]], axis=1)


@pytest.fixture(params=["in memory", "from files"])
def _place(request, monkeypatch):
    if request.param == "from files":
        monkeypatch.setattr(data, "MAX_BYTES_IN_MEMORY", 0)


@pytest.mark.usefixtures("_place")
def test_nine_tenths_of_each_file_are_to_train_on(tmp_path):
    (tmp_path / "b.txt").write_bytes(bytes(range(100)))
    (tmp_path / "a.txt").write_text("Größe " * 20)
    of_b = [bytes(range(k, k + 5)) for k in range(0, 90, 5)]
    coded = ("Größe " * 20).encode()
    cut = len(coded) - len(coded) // 10
    of_a = [coded[k : k + 5] for k in range(0, cut - 4, 5)]
    x, found = rows_of(text.build("train", 4, 7, str(tmp_path), length=4))
    assert x.dtype == np.int32
    in_order = [bytes(row.tolist()) for row in found]
    assert sorted(in_order) == sorted(of_a + of_b)
    assert in_order != of_a + of_b  # shuffled
    _, found = rows_of(text.build("test", 4, 7, str(tmp_path), length=4))
    expected = [coded[cut + k : cut + k + 5] for k in range(0, 12, 5)]
    expected += [bytes(range(90, 95)), bytes(range(95, 100))]
    assert [bytes(row.tolist()) for row in found] == expected


def test_files_of_their_own_for_both_splits_come_first(tmp_path):
    for name in ("train", "test", "other"):
        (tmp_path / f"{name}.txt").write_text(name * 2)
    _, found = rows_of(text.build("test", 4, 7, str(tmp_path), length=3))
    assert [bytes(row.tolist()) for row in found] == [b"test", b"test"]
    with pytest.raises(ValueError, match=r"Received 900 \(--dataset_option"):
        text.build("train", 4, 7, str(tmp_path), length=900)
    (tmp_path / "test.txt").rename(tmp_path / "val.txt")
    _, found = rows_of(text.build("test", 4, 7, str(tmp_path), length=3))
    assert [bytes(row.tolist()) for row in found] == [b"test", b"test"]
    (tmp_path / "train.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds val\.txt alone"):
        text.build("train", 4, 7, str(tmp_path), length=3)
    with pytest.raises(FileNotFoundError, match="no folder holds no"):
        text.build("train", 4, 7, None)
    with pytest.raises(FileNotFoundError, match="txt: pass as --data_dir"):
        text.build("train", 4, 7, str(tmp_path / "nowhere"))


def test_a_transformer_learns_the_readme(tmp_path):
    (tmp_path / "readme.txt").write_bytes(README.read_bytes())
    config = TrainConfig(
        model="transformer_lm",
        model_option=(
            "vocabulary=256",
            "num_layers=1",
            "width=32",
            "num_heads=2",
        ),
        dataset="dist_amp.datasets.text:build",
        dataset_option=("length=32",),
        data_dir=str(tmp_path),
        global_batch_size=64,
        learning_rate=1e-2,
        precision="float32",
        devices=("CPU:0", "CPU:1"),
    )
    devices = hardware.make_devices(config)
    found = inputs.load_data(config)
    trainer = build.make_trainer(config, devices, found)
    before = trainer.evaluate(found.test)["loss"]
    trainer.fit(found.train, epochs=3, verbose=0)
    after = trainer.evaluate(found.test)["loss"]
    assert before == pytest.approx(np.log(256), rel=0.02)
    assert after < 3.3  # letters' frequencies alone: about 4.9


def test_an_option_that_the_data_does_not_take_is_an_error():
    with pytest.raises(ConfigError, match="only module:function takes opt"):
        TrainConfig(dataset_option=("length=4",))
    name = "dist_amp.datasets.text:build"
    config = TrainConfig(dataset=name, dataset_option=("lengt=4",))
    with pytest.raises(ConfigError, match="must be one of length"):
        inputs.load_data(config)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
