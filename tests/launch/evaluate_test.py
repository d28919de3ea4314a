"""`python -m launch.evaluate`, on a run that was made here."""

import json
import shutil
import sys

import numpy as np
import pytest

from dist_amp import data, storage
from dist_amp.datasets import cifar10, imagenet, text, tokens
from launch import build, evaluate, hardware, inputs, observers, saved
from launch.config import ConfigError, TrainConfig
from launch.evaluate import EvaluateConfig
from launch.imported import takes_none
from launch.run_dir import RunDir, settings_of, settings_to_infer
from tests import support

NAME = "tests.launch.evaluate_test"
SIZES = {"train": 24, "test": 27}  # a last batch of three
TWO = ("CPU:0", "CPU:1")


def make_data(split, global_batch_size):
    return support.make_dataset(SIZES[split], global_batch_size)


def train(folder, epochs, *, is_finished=True, **settings):
    """What launch.train does, in this process."""
    config = TrainConfig(
        model="tests.support:make_mlp",
        dataset=f"{NAME}:make_data",
        precision="mixed_float16",
        global_batch_size=support.GLOBAL_BATCH,
        epochs=epochs,
        run_dir=str(folder),
        **settings,
    )
    run_dir = RunDir(config.directory)
    devices = hardware.make_devices(config)
    data = inputs.load_data(config)
    trainer = build.make_trainer(config, devices, data)
    with build.open_run_dir(config, run_dir):
        run_dir.write_config(
            config, **build.describe(config, devices, data, trainer)
        )
        trainer.fit(
            data.train,
            epochs=config.num_epochs,
            checkpoint_dir=run_dir.checkpoints,
            save_policy=build.save_policy(config),
            verbose=0,
        )
        if is_finished:
            build.save_model(trainer, run_dir.model)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    return folder, train(folder, 3)


def test_it_equals_the_training_s_own_results(trained, tmp_path, capsys):
    folder, trainer = trained
    file = str(tmp_path / "predicted.npz")
    config = EvaluateConfig(
        run_dir=str(folder), devices=TWO, predictions=file, strategy="mirrored"
    )
    assert evaluate.evaluate(config) == 0
    first, *lines, written = capsys.readouterr().out.splitlines()
    assert first == (
        f"{folder}/model.keras: --split=test, 2 replicas, mixed_float16"
    )
    assert written == f"written: {file}"
    test = make_data("test", support.GLOBAL_BATCH)
    expected = trainer.evaluate(test)
    found = {name: float(value) for name, value in map(str.split, lines)}
    assert found == pytest.approx(expected, rel=1e-3)
    predicted = np.load(file)["predictions"]
    support.assert_close([predicted], [trainer.predict(test)], "mixed_float16")


def test_a_step_of_the_run_and_another_split(trained, capsys):
    folder, _ = trained
    config = EvaluateConfig(
        run_dir=str(folder), checkpoint="3", split="train", eval_steps=2
    )
    assert evaluate.evaluate(config) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{folder}/checkpoints/ckpt-3: --split=train")


def test_the_best_checkpoint_is_the_one_that_was_kept(tmp_path, capsys):
    train(tmp_path, 2, keep_best="loss")
    config = EvaluateConfig(run_dir=str(tmp_path), checkpoint="best")
    assert evaluate.evaluate(config) == 0
    assert "/ckpt-6: " in capsys.readouterr().out  # the loss falls
    with pytest.raises(ConfigError, match="the run had no --keep_best"):
        saved.weights_of(TrainConfig(run_dir=str(tmp_path)), "best")


def test_a_run_of_an_earlier_version_has_its_defaults(tmp_path):
    RunDir(str(tmp_path)).write_config(TrainConfig(), precision="float32")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["settings"] |= {"max_rollbacks": 3, "rollback_factor": 0.5}
    path.write_text(json.dumps(content))
    assert settings_of(str(tmp_path)) == TrainConfig(run_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"checkpoint": "4"}, "there is no step 4, but 3, 6, 9"),
        ({"devices": ("CPU:0", "CPU:1", "CPU:2")}, "pass 6 or 9"),
        ({"precision": "float8"}, "--precision must be one of"),
    ],
)
def test_what_does_not_fit_is_told(trained, settings, told):
    config = EvaluateConfig(run_dir=str(trained[0]), **settings)
    with pytest.raises(ConfigError, match=told):
        evaluate.evaluate(config)


def as_asked(split, global_batch_size, seed: int | None):
    """Shuffled by the pass and the seed; in order without a seed."""
    arrays = support.make_arrays(SIZES[split])
    return data.from_arrays(arrays, global_batch_size, seed)


def shuffled(split, global_batch_size, seed):
    return as_asked(split, global_batch_size, seed)


def plain(split, global_batch_size):
    return support.make_dataset(SIZES[split], global_batch_size)


@pytest.mark.parametrize("name", ["as_asked", "plain"])
def test_the_split_trained_on_comes_in_its_own_order(name):
    config = TrainConfig(dataset=f"{NAME}:{name}", global_batch_size=8)
    found = inputs.load_split(config, "train", needs_order=True).train
    rows = np.concatenate([x for x, _ in found])
    np.testing.assert_array_equal(rows, support.make_arrays(24)[0])


def test_predictions_in_an_order_that_nobody_knows_are_refused():
    config = TrainConfig(dataset=f"{NAME}:shuffled", global_batch_size=8)
    assert inputs.load_split(config, "train").train
    with pytest.raises(ConfigError, match="Annotate its `seed` as `int"):
        inputs.load_split(config, "train", needs_order=True)


def test_images_of_our_own_are_not_changed_where_order_is_wanted():
    for module in (cifar10, imagenet, text, tokens):
        assert takes_none(module.build, "seed")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "--run_dir must be given"),
        ({"run_dir": "r", "timeout": 3.0}, "pass --watch"),
        ({"run_dir": "r", "watch": True, "checkpoint": "3"}, "--checkpoint"),
        ({"run_dir": "r", "predictions": "p.csv"}, "must end in .npz"),
    ],
)
def test_wrong_settings_are_told(settings, told):
    with pytest.raises(ConfigError, match=told):
        EvaluateConfig(**settings)


def test_a_run_of_replicas_is_looked_at_on_one_device(tmp_path):
    """Settings of updates are the run's own business."""
    config = TrainConfig(
        devices=TWO,
        precision="auto",
        global_batch_size=8,
        gradient_accumulation_steps=2,
        loss_scale_initial=2.0**10,
        wire_dtype="int8",
        jit_compile=True,
        seed=3,
    )
    RunDir(str(tmp_path)).write_config(config, precision="mixed_float16")
    found = settings_to_infer(
        str(tmp_path), strategy="one_device", data_dir=None
    )
    assert found == TrainConfig(
        strategy="one_device",
        precision="mixed_float16",
        global_batch_size=4,
        seed=3,
        run_dir=str(tmp_path),
    )
    with pytest.raises(ConfigError, match="holds no run"):
        settings_to_infer(str(tmp_path / "nowhere"))


def watcher_of(folder):
    config = EvaluateConfig(run_dir=str(folder), watch=True)
    of_run = config.of_run()
    trainer, dataset, _ = evaluate.prepare(of_run, config.split)
    return evaluate._Watcher(config, of_run, trainer, dataset)


def steps_in(folder):
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_each_whole_checkpoint_is_evaluated_once(tmp_path):
    train(tmp_path, 2, is_finished=False)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "ckpt-5").mkdir()  # being written: no manifest yet
    shutil.copytree(checkpoints / "ckpt-6", checkpoints / "ckpt-7")
    damaged = checkpoints / "ckpt-7" / "tensors.index"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    watcher = watcher_of(tmp_path)
    assert watcher.look()
    assert steps_in(tmp_path) == [3, 6]
    assert not watcher.look()
    assert not watcher._evaluate(str(checkpoints / "ckpt-1"), 0.0)  # removed
    shutil.rmtree(checkpoints / "ckpt-7")
    train(tmp_path, 3)
    assert watcher_of(tmp_path).look()  # another one goes on
    assert steps_in(tmp_path) == [3, 6, 9]


def test_it_ends_when_training_has(tmp_path, capsys):
    train(tmp_path, 1)
    config = EvaluateConfig(
        run_dir=str(tmp_path), watch=True, timeout=0.02, poll_seconds=0.01
    )
    with storage.lock(str(tmp_path)):  # it goes on
        assert storage.is_locked(str(tmp_path))
        assert evaluate.watch(config) == 1
    assert "no new checkpoint since" in capsys.readouterr().err
    assert evaluate.watch(config) == 0
    assert "holds a finished run" in capsys.readouterr().out
    assert not storage.is_locked(str(tmp_path))


def test_it_waits_for_a_run_that_is_to_begin(tmp_path, capsys):
    config = EvaluateConfig(
        run_dir=str(tmp_path / "later"),
        watch=True,
        timeout=0.02,
        poll_seconds=0.01,
    )
    assert evaluate.watch(config) == 1
    assert "--timeout=0.02" in capsys.readouterr().err


def test_layers_that_were_pinned_are_pinned_again(tmp_path):
    """A checkpoint of auto_layers is of a model with layers in float32."""

    settings = {"model": f"{NAME}:make_steep", "precision": "auto_layers"}
    config = TrainConfig(
        dataset=f"{NAME}:make_data",
        global_batch_size=support.GLOBAL_BATCH,
        epochs=1,
        run_dir=str(tmp_path),
        **settings,
    )
    run_dir = RunDir(config.directory)
    devices = hardware.make_devices(config)
    data = inputs.load_data(config)
    trainer = build.make_trainer(config, devices, data)
    run_dir.path.mkdir(exist_ok=True)
    run_dir.write_config(
        config, **build.describe(config, devices, data, trainer)
    )
    (adapting,) = observers.make_auto_layers(devices, data, trainer)
    trainer.fit(
        data.train,
        checkpoint_dir=run_dir.checkpoints,
        callbacks=[adapting],
        verbose=0,
    )
    assert adapting.pinned
    of_run = settings_to_infer(str(tmp_path))
    other, dataset, _ = evaluate.prepare(of_run, "test")
    saved.load(other, of_run, saved.weights_of(of_run, None))
    assert [x.compute_dtype for x in other.model.layers] == [
        x.compute_dtype for x in trainer.model.layers
    ]
    expected = trainer.evaluate(dataset)
    assert other.evaluate(dataset) == pytest.approx(expected)


def make_steep():
    import keras

    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(8),
            keras.layers.Rescaling(1e6),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
