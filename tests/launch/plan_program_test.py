"""`python -m launch.plan`: the table, the JSON, what it refuses."""

import json
import sys

import pytest

from dist_amp import ahead_of_time
from tests.launch import programs

MODEL = """
import keras
import tensorflow as tf


class Tells(keras.layers.Layer):
    def call(self, inputs):
        tf.print(tf.reduce_sum(inputs))
        return inputs


def build(num_classes):
    return keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(),
        Tells(),
        keras.layers.Dense(num_classes, dtype="float32"),
    ])
"""

needs_compiler = pytest.mark.skipif(
    not ahead_of_time.has_compiler(),
    reason=f"the TPU's compiler is not installed: {ahead_of_time.EXTRA}",
)


def value(done, name):
    """The second column of the table."""
    (line,) = (x for x in done.stdout.splitlines() if x.startswith(name))
    return line.removeprefix(name).strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    done = programs.run(folder, "train", "--epochs=1")
    assert done.returncode == 0, done.stderr
    return folder


def test_what_was_measured_stands_beside_it(trained):
    done = programs.run(
        trained, "plan", "--precision=float32", "--json=plan.json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads((trained / "plan.json").read_text())
    assert content["parameters"] == 64 * 64 + 64 + 64 * 10 + 10
    forward = 2 * 32 * (64 * 64 + 64 * 10)
    assert content["flops"] == 2 * forward + 2 * 32 * 64 * 10
    assert content["all_reduce_bytes"] == 0
    assert value(done, "FLOPs a step") == "647.2 kFLOP"
    measured = content["measured"]
    assert measured["flops_per_sec"] == pytest.approx(
        content["flops"] * measured["steps_per_sec"]
    )
    assert measured["peak_memory_bytes"] > 2**27
    assert "steps/s" in value(done, "measured in runs/mlp-digits")


def test_replicas_that_are_not_here(tmp_path):
    done = programs.run(
        tmp_path,
        "plan",
        "--num_replicas=8",
        "--global_batch_size=1024",
        "--device_memory_gib=0.0001",
        "--json=plan.json",
    )
    assert done.returncode == 1  # it does not fit
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["per_replica_batch_size"] == 128
    assert content["all_reduce_bytes"] == 4 * content["parameters"]
    assert content["fits"] is False
    assert value(done, "fits") == "NO: more than 0.0001 GiB"


@needs_compiler
def test_a_tpu_is_planned_by_its_compiler(tmp_path):
    done = programs.run(
        tmp_path, "plan", "--topology=v5e:2x2", "--json=plan.json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["num_replicas"] == 4
    assert content["precision"] == "bfloat16"
    assert content["fits"] is True
    assert 0 < content["hbm_used_bytes"] < content["hbm_bytes"]
    assert content["compile_secs"] > 0
    assert value(done, "collectives") == "1 all-reduce among {{0,1,2,3}}"


@needs_compiler
def test_what_a_tpu_cannot_run_is_named(tmp_path):
    (tmp_path / "telling.py").write_text(MODEL)
    done = programs.run(
        tmp_path,
        "plan",
        "--model=telling:build",
        "--topology=v5e:2x2",
        "--json=plan.json",
    )
    assert done.returncode == 1
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("error"))
    assert "StringFormat" in line
    assert "telling.py:8: tf.print(tf.reduce_sum(inputs))" in line
    content = json.loads((tmp_path / "plan.json").read_text())
    assert [one["op"] for one in content["unsupported"]] == ["StringFormat"]
    assert content["fits"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology=v5e:3x9"], "v5e:2x2"),
        (["--largest_batch"], "--topology"),
        (["--topology=v5e:2x2", "--num_replicas=4"], "--num_replicas"),
        (["--topology=v5e:2x2", "--strategy=mirrored"], "--strategy"),
        (["--num_replicas=0"], "--num_replicas must be positive"),
    ],
)
def test_wrong_settings_are_told(tmp_path, arguments, told):
    done = programs.run(tmp_path, "plan", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_help_needs_no_tensorflow(tmp_path):
    done = programs.run(tmp_path, "plan", "--help", is_fresh=True)
    assert done.returncode == 0
    assert "--topology" in done.stdout
    assert "--global_batch_size" in done.stdout


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
