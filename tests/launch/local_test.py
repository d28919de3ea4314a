"""What launch.local makes of its flags, before any worker is started."""

import os
import pathlib
import subprocess
import sys

import pytest

from launch import job as job_lib
from launch import local
from launch.config import ConfigError
from launch.local import LocalJob

SECONDS = 60


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def plan(*training, **settings):
    return local.make_plan(
        LocalJob(**settings), job_lib.read_training(training)
    )


def run(cwd, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "launch.local", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_workers_find_each_other_and_have_the_same_flags():
    starts = plan("--epochs=2", num_workers=4).starts([0, 1, 2])
    assert [start.index for start in starts] == [0, 1, 2]
    for start in starts:
        assert start.command[1:] == ["-m", "launch.train", "--epochs=2"]
        assert '"worker": ["127.0.0.1:' in start.variables["TF_CONFIG"]
        assert start.log == pathlib.Path(
            f"runs/mlp-digits/logs/worker-{start.index}.log"
        )
    assert '"index": 2' in starts[2].variables["TF_CONFIG"]


def test_a_single_worker_is_no_cluster():
    (start,) = plan(num_workers=1).starts([0])
    assert "TF_CONFIG" not in start.variables


def test_gpus_are_divided(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,6,7")
    starts = plan("--global_batch_size=32").starts([0, 1])
    seen = [start.variables["CUDA_VISIBLE_DEVICES"] for start in starts]
    assert seen == ["3,4", "5,6"]
    starts = plan(devices_per_worker=1, num_workers=4).starts([0, 3])
    seen = [start.variables["CUDA_VISIBLE_DEVICES"] for start in starts]
    assert seen == ["3", "6"]


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", " ,0"])
def test_no_gpu_is_visible(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert plan().gpus == []


def test_too_few_gpus_are_an_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match="more than the 3 GPUs"):
        plan(devices_per_worker=2)
    with pytest.raises(ConfigError, match="--num_workers=4"):
        plan(num_workers=4)


def test_without_gpus_the_cpu_is_split():
    start, _ = plan(devices_per_worker=2).starts([0, 1])
    assert start.command[-1] == "--num_logical_cpus=2"
    with pytest.raises(ConfigError, match="--devices_per_worker contradicts"):
        plan("--num_logical_cpus=2", devices_per_worker=2)


def test_cores_are_divided_if_there_are_enough(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 2, 9, 7, 1})
    assert [s.cores for s in plan().starts([0, 1])] == [[1, 2], [4, 7]]
    assert [s.cores for s in plan().starts([1])] == [[4, 7]]
    assert plan(pin_cores=False).cores == [[], []]
    assert plan(num_workers=8).cores == [[]] * 8


@pytest.mark.parametrize(
    ("training", "settings", "text"),
    [
        (["--global_batch_size=31"], {}, "--global_batch_size must be"),
        (["--strategy=mirrored"], {}, "--strategy=mirrored contradicts"),
        (["--workers=a:1,b:1"], {}, "--workers is not for a job"),
        (["--resume=never"], {}, "--resume=never contradicts restarts"),
        (["--resume=never"], {"max_restarts": 0}, "--log_dir=FOLDER"),
        ([], {"num_workers": 0}, "--num_workers must be positive"),
        ([], {"max_restarts": -1}, "--max_restarts must not be negative"),
        ([], {"min_workers": 3}, "--min_workers must be at most"),
    ],
)
def test_mistakes_are_errors_that_name_the_flag(training, settings, text):
    with pytest.raises(ConfigError, match=text):
        plan(*training, **settings)


@pytest.mark.parametrize(
    ("training", "where"),
    [
        ([], None),
        (["--dataset=json:loads"], None),
        (["--checkpoint_dir=gs://a/b"], "--checkpoint_dir=gs://a/b"),
        (["--dataset=mnist", "--data_dir=nowhere"], "--dataset=mnist"),
    ],
)
def test_who_may_need_the_network_keeps_it(training, where):
    assert local.what_is_elsewhere(job_lib.read_training(training)) == where


def test_data_that_is_here_needs_no_network(tmp_path):
    (tmp_path / "mnist").mkdir()
    training = ["--dataset=mnist", f"--data_dir={tmp_path}"]
    assert local.what_is_elsewhere(job_lib.read_training(training)) is None


def slots_left(failed, *training, slots=(0, 1, 2, 3), **settings):
    settings = {"num_workers": 4, **settings}
    return local.slots_left(
        LocalJob(**settings), plan(*training, **settings), list(slots), failed
    )


def test_a_restart_keeps_all_workers():
    assert slots_left(2) == [0, 1, 2, 3]
    assert slots_left(None, min_workers=1) == [0, 1, 2, 3]  # nobody's fault


def test_a_restart_leaves_out_the_failed_one_if_asked():
    assert slots_left(1, "--global_batch_size=12", min_workers=2) == [0, 2, 3]
    assert slots_left(0, slots=[0, 2, 3], min_workers=2) == [2, 3]


def test_as_many_start_again_as_the_batch_can_be_divided_by():
    assert slots_left(1, min_workers=2) == [0, 2]  # 32 examples, not by 3
    assert slots_left(1, min_workers=3) == [0, 1, 2, 3]


def test_help_and_errors_need_no_tensorflow(tmp_path):
    helped = run(tmp_path, "--help")
    assert helped.returncode == 0
    assert "--min_workers" in helped.stdout
    wrong = run(tmp_path, "--epochs=3")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --epochs is a flag of launch.train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_obstacle(tmp_path, closed):
    command = f"{sys.executable} -m launch.local --num_workers=0 {closed}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=SECONDS,
    )
    assert done.returncode == 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
