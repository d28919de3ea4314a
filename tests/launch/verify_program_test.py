"""`python -m launch.verify`: the table, the JSON, the exit status."""

import dataclasses
import json
import sys

import pytest

from dist_amp.verify import SUITES as LIBRARY_SUITES
from launch.config import ConfigError, TrainConfig
from launch.verify import IGNORED, SUITES, VerifyConfig
from tests.launch import programs

MODEL = """
import keras


def build(num_classes):
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(num_classes, dtype="float32"),
    ])
"""


def test_the_tutorials_model_is_equivalent(tmp_path):
    done = programs.run(
        tmp_path,
        "verify",
        "--precision=mixed_float16",
        "--num_steps=2",
        "--num_replicas=2",
        "--suites=replicas,overflow",
    )
    assert done.returncode == 0, done.stderr
    first, *cases, path = done.stderr.splitlines()
    assert first == "up to 5 cases of 2 updates, on 1 device and on 2 replicas"
    assert cases[1] == "2 replicas, full batches: equal"
    assert len(cases) == 5
    assert path == f"wrote {tmp_path / 'verify.json'}"
    *_, last = done.stdout.splitlines()
    assert last == "EQUIVALENT: 5 cases, 2 updates each, in mixed_float16"
    content = json.loads((tmp_path / "verify.json").read_text())
    assert content["passed"] is True
    assert len(content["cases"]) == 5


def test_a_difference_is_named_with_its_cause(tmp_path):
    (tmp_path / "normed.py").write_text(MODEL)
    done = programs.run(
        tmp_path,
        "verify",
        "--model=normed:build",
        "--precision=float32",
        "--num_steps=2",
        "--num_replicas=2",
        "--suites=replicas",
        "--json=here.json",
    )
    assert done.returncode == 1, done.stderr
    assert "2 replicas, full batches: DIFFERS\n" in done.stderr
    assert "2 replicas, full batches         DIFFERS" in done.stdout
    assert "BatchNormalization without synchronized=True" in done.stdout
    content = json.loads((tmp_path / "here.json").read_text())
    assert content["passed"] is False
    verdicts = {one["name"]: one["passed"] for one in content["cases"]}
    assert verdicts["1 device again, full batches"] is True
    assert verdicts["2 replicas, full batches"] is False


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"suites": ("replica",)}, "--suites must be out of replicas, "),
        ({"num_replicas": ("1",)}, "--num_replicas must be numbers"),
        ({"num_steps": 0}, "--num_steps must be positive"),
        ({"num_logical_cpus": 2}, "--num_logical_cpus would be ignored: .*2;"),
        ({"devices": ("CPU:0",)}, "--devices would be .*Received CPU:0; drop"),
        ({"strategy": "mirrored"}, "--strategy would be .*--num_replicas"),
        ({"wire_dtype": "int8"}, "--wire_dtype would be .* travel exactly"),
        ({"jit_compile": True}, "--jit_compile would be .* suite xla"),
        ({"initial_weights": "a.h5"}, "--initial_weights would be .*--seed"),
        ({"deterministic": True}, "--deterministic would be ignored"),
        ({"run_dir": "runs/a"}, "--run_dir would be ignored: .*--json"),
        ({"steps": 9}, "--steps would be ignored: .*--num_steps.*--schedule"),
    ],
)
def test_wrong_and_ignored_settings_are_told(settings, told):
    with pytest.raises(ConfigError, match=told):
        VerifyConfig(**settings)


def test_the_length_of_training_is_for_schedules():
    config = VerifyConfig(schedule="cosine", steps=9)
    assert config.steps == 9


def test_every_setting_of_training_is_used_or_refused():
    """A new one must be given its place."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(IGNORED) <= known
    assert known - set(IGNORED) == {
        *("model", "model_option", "loss", "label_smoothing", "metrics"),
        *("dataset", "dataset_option", "data_dir", "parse", "train_split"),
        *("input_dtype", "global_batch_size"),
        *("precision", "loss_scale", "loss_scale_initial", "loss_scale_min"),
        *("loss_scale_max", "loss_scale_growth_interval", "seed"),
        *("gradient_accumulation_steps", "optimizer", "optimizer_option"),
        *("learning_rate", "momentum", "warmup_steps", "schedule"),
        *("epochs", "steps", "steps_per_epoch"),  # for schedules
        *("weight_decay", "weight_decay_exclude", "clipnorm", "clipvalue"),
        *("global_clipnorm", "ema", "ema_overwrite_frequency"),
    }


def test_the_suites_are_those_of_the_library():
    assert SUITES == LIBRARY_SUITES


def test_wrong_settings_end_the_program(tmp_path):
    done = programs.run(tmp_path, "verify", "--global_batch_size=2")
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "--global_batch_size" in line


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
