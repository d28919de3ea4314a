"""Settings check themselves and name the flag."""

import dataclasses
import subprocess
import sys
import time

import pytest

from launch.config import ConfigError, TrainConfig
from launch.run_dir import RunDir


def test_defaults_are_the_tutorials_job():
    config = TrainConfig()
    assert (config.model, config.dataset) == ("mlp", "digits")
    assert config.num_epochs == 5
    assert config.directory == "runs/mlp-digits"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": "resnet"},
            "--model must be one of mlp, .*or module:function",
        ),
        ({"model": "no_module:build"}, "no module 'no_module'"),
        ({"precision": "float8"}, "--precision must be one of"),
        ({"epochs": 0}, "--epochs must be positive"),
        ({"epochs": 2, "steps": 3}, "--steps contradicts --epochs"),
        ({"steps": 10, "steps_per_epoch": 4}, "multiple of --steps_per_epoch"),
        ({"steps_per_loop": "fast"}, "--steps_per_loop must be auto"),
        ({"loss_scale": "big"}, "--loss_scale must be auto, dynamic"),
        ({"loss_scale": "-2"}, "--loss_scale must be auto, dynamic"),
        (
            {"loss_scale": "128", "loss_scale_initial": 8.0},
            "--loss_scale_initial contradicts --loss_scale=128",
        ),
        (
            {"precision": "float32", "loss_scale_growth_interval": 5},
            "--loss_scale_growth_interval contradicts",
        ),
        (
            {"precision": "float32", "wire_dtype": "float16"},
            "--wire_dtype contradicts --loss_scale=auto --precision=float32",
        ),
        ({"wire_dtype": "int4"}, "--wire_dtype must be one of"),
        (
            {"strategy": "one_device", "wire_dtype": "int8"},
            "--wire_dtype contradicts --strategy=one_device",
        ),
        (
            {"wire_check_interval": 10},
            "--wire_check_interval contradicts --wire_dtype=float32",
        ),
        (
            {"wire_dtype": "int8", "wire_check_interval": -1},
            "--wire_check_interval must not be negative",
        ),
        (
            {"wire_dtype": "int8", "wire_error_bound": 0.0},
            "--wire_error_bound must be positive",
        ),
        (
            {
                "wire_dtype": "int8",
                "wire_check_interval": 0,
                "wire_error_bound": 0.1,
            },
            "--wire_error_bound contradicts --wire_check_interval=0",
        ),
        (
            {"loss_scale": "dynamic", "loss_scale_max": 8.0},
            "--loss_scale_initial must be between",
        ),
        (
            {"clipnorm": 1.0, "clipvalue": 1.0},
            "--clipvalue contradicts --clipnorm",
        ),
        ({"momentum": 0.9}, "--momentum contradicts --optimizer=adam"),
        ({"keep_checkpoints": 0}, "--keep_checkpoints must be positive"),
        ({"save_every_epochs": -1}, "--save_every_epochs must not be"),
        ({"max_minutes": 0.0}, "--max_minutes must be positive"),
        ({"rollback_on": ("inf",)}, "--rollback_on must be of nan, spike"),
        ({"rollback_factor": 1.0}, r"--rollback_factor must be in \(0, 1\)"),
        (
            {"rollback_lower": "learning_rate"},
            "--rollback_lower contradicts no --rollback_on",
        ),
        ({"profile_steps": "7"}, "--profile_steps must be FIRST:END"),
        ({"profile_steps": "9:9"}, "--profile_steps must be FIRST:END"),
        (
            {"profile_steps": "50:60", "steps": 50},
            "--profile_steps contradicts --steps=50: training ends before",
        ),
        (
            {"warmup_steps": 51, "steps": 50},
            "--warmup_steps contradicts --steps=50: training ends before",
        ),
        ({"max_rollbacks": 2}, "--max_rollbacks contradicts no --rollback_on"),
        (
            {"rollback_on": ("nan",), "rollback_factor": 0.1},
            "--rollback_factor contradicts no --rollback_lower",
        ),
        ({"weight_decay": float("nan")}, "--weight_decay must be finite"),
        ({"learning_rate": float("inf")}, "--learning_rate must be finite"),
        ({"seed": -1}, r"--seed must be from 0 to 2\*\*32 - 1. Received -1"),
        ({"seed": 2**32}, "--seed must be from 0"),
        ({"initial_weights": "a.pt"}, "--initial_weights must end in .keras"),
        ({"ema": 1.0}, r"--ema must be in \[0, 1\)"),
        ({"ema_overwrite_frequency": 5}, "pass --ema"),
        ({"weight_decay": -0.1}, "--weight_decay must not be negative"),
        (
            {"strategy": "one_device", "devices": ("GPU:0", "GPU:1")},
            "pass --strategy=mirrored",
        ),
        (
            {"strategy": "one_device", "num_logical_cpus": 2},
            "--num_logical_cpus contradicts",
        ),
        ({"strategy": "mirrored", "tpu": "x"}, "--tpu contradicts"),
        ({"tpu": "x", "num_logical_cpus": 2}, "--num_logical_cpus contradicts"),
        ({"tpu_zone": "z"}, "--tpu_zone contradicts no --tpu: pass"),
        (
            {"strategy": "tpu", "tpu_project": "p"},
            "--tpu_project contradicts no --tpu: pass",
        ),
        (
            {"tpu": "local", "tpu_zone": "z"},
            "--tpu_zone contradicts --tpu=local: .* drop it",
        ),
        (
            {"tpu": "grpc://10.0.0.2", "tpu_project": "p"},
            "--tpu_project contradicts --tpu=grpc://10.0.0.2",
        ),
        (
            {"jit_compile": True, "precision": "graph_float16"},
            "--jit_compile contradicts",
        ),
        (
            {"global_batch_size": 30, "num_logical_cpus": 4},
            "pass 28 or 32. Received 30",
        ),
        (
            {"global_batch_size": 4, "gradient_accumulation_steps": 3},
            "pass 3 or 6. Received 4",
        ),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_the_flag(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_steps_are_one_epoch_or_several():
    assert TrainConfig(steps=12).num_epochs == 1
    assert TrainConfig(steps=12).num_steps_per_epoch == 12
    split = TrainConfig(steps=12, steps_per_epoch=4)
    assert (split.num_epochs, split.num_steps_per_epoch) == (3, 4)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    before = TrainConfig(seed=1)
    run_dir = RunDir(str(tmp_path))
    run_dir.check(before)
    run_dir.write_config(before)
    run_dir.check(TrainConfig(seed=2))  # there is nothing to go on from
    checkpoint = tmp_path / "checkpoints" / "ckpt-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    run_dir.check(dataclasses.replace(before, epochs=9))
    with pytest.raises(ConfigError, match="--seed=1 there, 2 here"):
        run_dir.check(TrainConfig(seed=2))


def test_an_earlier_run_is_moved_aside(tmp_path):
    run_dir = RunDir(str(tmp_path / "run"))
    assert run_dir.move_aside() is None
    for number in (1, 2):
        run_dir.path.mkdir()
        run_dir.metrics.touch()
        moved = run_dir.move_aside()
        assert moved == tmp_path / f"run.{number}"
        assert (moved / "metrics.jsonl").exists()
        assert not run_dir.path.exists()


def test_a_must_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="--resume=must: there is no"):
        RunDir(str(tmp_path)).check(TrainConfig(resume="must"))


def test_help_names_every_flag_and_needs_no_tensorflow():
    """The fastest of three, since a shared machine may stall."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run(
            [
                sys.executable,
                "-X",
                "importtime",
                "-m",
                "launch.train",
                "--help",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        seconds.append(time.perf_counter() - begin)
    assert done.returncode == 0
    assert "tensorflow" not in done.stderr
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}\n" in done.stdout
    assert min(seconds) < 1.0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
