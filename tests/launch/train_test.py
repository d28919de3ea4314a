"""The main job as a user runs it: processes, folders, signals."""

import json
import os
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from dist_amp.meter import MEASURED
from tests.launch import programs

SECONDS = 180


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def command(*flags):
    return [sys.executable, "-m", "launch.train", *flags]


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    return {**clean, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def launch(cwd, *flags, **options):
    return programs.run(cwd, "train", *flags, **options)


def read_lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory, data_dir):
    cwd = tmp_path_factory.mktemp("default")
    return cwd, launch(cwd, f"--data_dir={data_dir}", is_fresh=True)


def test_with_no_flag_it_reaches_95_percent(default_run):
    cwd, done = default_run
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("Epoch")]
    assert [line.split(",")[0] for line in lines] == [
        f"Epoch {epoch}" for epoch in range(1, 6)
    ]
    assert float(lines[-1].rpartition(" ")[2]) > 95
    last = read_lines(cwd / "runs" / "mlp-digits")[-1]
    assert last["split"] == "test"
    assert last["accuracy"] > 0.95


def test_its_folder_holds_what_was_promised(default_run):
    run_dir = default_run[0] / "runs" / "mlp-digits"
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["global_batch_size"] == 32
    assert config["resolved"]["precision_reason"]
    assert config["resolved"]["strategy_reason"]
    assert config["resolved"]["from_logits"] is True
    assert config["versions"]["keras"] == keras.__version__
    train = [x for x in read_lines(run_dir) if x["split"] == "train"]
    assert [line["epoch"] for line in train] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in train] == [45, 90, 135, 180, 225]
    assert set(train[0]) == {
        "step",
        "epoch",
        "split",
        "loss",
        "accuracy",
        "loss_scale",
        "skipped_updates",
        "examples_per_sec",
        "steps_per_sec",
        "step_ms_p50",
        "step_ms_p95",
        "input_wait",
        "learning_rate",
        "memory_bytes",
        "peak_memory_bytes",
        "time",
    }
    assert list((run_dir / "tensorboard").rglob("events*"))
    checkpoints = run_dir / "checkpoints"
    assert (checkpoints / "ckpt-225" / "manifest.json").exists()


def test_its_model_loads_and_knows_the_digits(default_run, data_dir):
    from dist_amp import sources

    model = keras.models.load_model(
        default_run[0] / "runs" / "mlp-digits" / "model.keras"
    )
    builder = sources.prepare_tfds("digits", str(data_dir))
    ((x, y),) = sources.read_tfds(builder, "test", global_batch_size=360)
    predicted = np.argmax(model.predict(x, verbose=0), axis=-1)
    assert np.mean(predicted == y.numpy()) > 0.95


def test_its_standard_error_has_two_lines_and_no_chatter(default_run):
    lines = default_run[1].stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "strategy",
        "precision",
    ]


def test_a_finished_run_says_so(default_run, data_dir):
    again = launch(default_run[0], f"--data_dir={data_dir}")
    assert again.returncode == 0
    assert "raise --epochs" in again.stdout


INTERRUPTED = [
    "--epochs=15",
    "--precision=mixed_float16",
    "--num_logical_cpus=2",
]


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory, data_dir):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    flags = [*INTERRUPTED, f"--data_dir={data_dir}", f"--run_dir={run_dir}"]
    done = launch(run_dir.parent, *flags)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_started_again_it_ends_the_same(
    tmp_path, data_dir, straight_run, number
):
    flags = [*INTERRUPTED, f"--data_dir={data_dir}"]
    stopped = subprocess.Popen(
        command(*flags, "--run_dir=parts"),
        cwd=tmp_path,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in stopped.stdout:
            if line.startswith("Epoch 2"):
                stopped.send_signal(number)
                break
        rest = stopped.communicate(timeout=SECONDS)[0]
    finally:
        stopped.kill()
    assert stopped.returncode == 128 + number
    assert "the same command goes on from there" in rest
    resumed = launch(tmp_path, *flags, "--run_dir=parts", "--resume=must")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    run_dirs = (straight_run, tmp_path / "parts")
    one, other = (
        keras.models.load_model(run_dir / "model.keras") for run_dir in run_dirs
    )
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    plain = [
        [{k: v for k, v in line.items() if k not in MEASURED} for line in run]
        for run in map(read_lines, run_dirs)
    ]
    assert plain[0] == plain[1]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, data_dir):
    done = launch(
        tmp_path,
        f"--data_dir={data_dir}",
        "--dry_run",
        "--num_logical_cpus=4",
        "--precision=mixed_float16",
        "--gradient_accumulation_steps=2",
    )
    assert done.returncode == 0, done.stderr
    assert "4,810 parameters" in done.stdout
    assert "32 examples an update, in 2 part(s), 4 a replica" in done.stdout
    assert "traced" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch=3"], "Unknown command line flag 'epoch'.*epochs"),
        (["--epochs=three"], "--epochs=three"),
        (["--precision=float8"], "--precision=float8.*mixed_bfloat16"),
        (["--clipnorm=1", "--clipvalue=1"], "--clipvalue contradicts"),
        (["train"], "flags start with --"),
        (["--resume=must"], "--resume=must: there is no checkpoint"),
    ],
)
def test_a_mistake_is_one_line_before_tensorflow_starts(
    tmp_path, flags, message
):
    done = subprocess.run(
        command(*flags),
        cwd=tmp_path,
        env=environment(PYTHONPROFILEIMPORTTIME="1"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2
    errors = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith("import time:")
    ]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert_matches(message, errors[0])
    assert "tensorflow" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices=GPU:0"], "devices of this host.*--devices"),
        (["--strategy=mirrored", "--devices=GPU:0,GPU:1"], "of this host"),
        (["--precision=graph_float16"], "pass mixed_float16"),
        (["--dataset=os:data"], "--dataset must be module:function"),
        (["--dataset=no_such_name"], "no dataset of TFDS"),
        (["--model=os:model"], "--model must be module:function"),
        (["--metrics=acuracy"], "--metrics must be names"),
        (["--loss=hing"], "--loss must be a Keras loss"),
    ],
)
def test_a_mistake_that_the_machine_decides_is_one_error(
    tmp_path, data_dir, flags, message
):
    done = launch(tmp_path, f"--data_dir={data_dir}", *flags)
    assert done.returncode == 2
    assert_matches(message, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


def test_flags_come_from_a_file_and_reach_the_optimizer(tmp_path, data_dir):
    (tmp_path / "flags").write_text(
        "--steps=20\n--steps_per_epoch=10\n--optimizer=adamw\n"
        "--weight_decay=0.01\n--global_clipnorm=1\n--ema=0.9\n"
        "--schedule=cosine\n--warmup_steps=5\n--jit_compile\n"
        "--gradient_accumulation_steps=2\n--deterministic\n"
    )
    done = launch(
        tmp_path,
        f"--data_dir={data_dir}",
        "--flagfile=flags",
        "--run_dir=run",
    )
    assert done.returncode == 0, done.stderr
    train = [x for x in read_lines(tmp_path / "run") if x["split"] == "train"]
    assert [line["step"] for line in train] == [10, 20]
    assert train[-1]["learning_rate"] == pytest.approx(0.0, abs=1e-6)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    optimizer = config["resolved"]["optimizer"]
    assert optimizer["global_clipnorm"] == 1.0
    assert optimizer["use_ema"]
    assert optimizer["weight_decay"] == 0.01
    assert optimizer["gradient_accumulation_steps"] == 2


def assert_matches(pattern, text):
    assert re.search(pattern, text), text


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
