"""`python -m launch.verify`: the table, the JSON, the exit status."""

import json
import sys

import pytest

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
    assert (done.returncode, done.stderr) == (0, "")
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
    assert (done.returncode, done.stderr) == (1, "")
    assert "2 replicas, full batches         DIFFERS" in done.stdout
    assert "BatchNormalization without synchronized=True" in done.stdout
    content = json.loads((tmp_path / "here.json").read_text())
    assert content["passed"] is False
    verdicts = {one["name"]: one["passed"] for one in content["cases"]}
    assert verdicts["1 device again, full batches"] is True
    assert verdicts["2 replicas, full batches"] is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--suites=replica"], "--suites"),
        (["--num_replicas=1"], "--num_replicas"),
        (["--num_logical_cpus=2"], "--num_logical_cpus"),
        (["--num_steps=0"], "--num_steps"),
        (["--global_batch_size=2"], "--global_batch_size"),
    ],
)
def test_wrong_settings_are_told(tmp_path, arguments, told):
    done = programs.run(tmp_path, "verify", *arguments)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
