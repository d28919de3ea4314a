"""The script of launch.slurm: what is in it, and what is refused before.

tests/multi_worker/slurm_job_test.py runs it in a real Slurm.
"""

import dataclasses
import subprocess
import sys

import pytest

from launch import job as job_lib
from launch import slurm
from launch.config import TrainConfig

NASTY = "a 'b' \"c\" $HOME `id` \\ * # %j;|&\n!"


@pytest.fixture
def call(capsys):
    """Runs the program; returns status, output, errors."""

    def call(*arguments):
        status = slurm.main(["slurm", *arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def render(call):
    def render(*arguments):
        status, out, err = call("--dry_run", *arguments)
        assert status == 0, err
        return out

    return render


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Puts a program of ours in place of sbatch."""

    def stub(script):
        path = tmp_path / "bin" / "sbatch"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        monkeypatch.chdir(tmp_path)

    return stub


def directives(script):
    lines = script.splitlines()
    return [line[8:] for line in lines if line.startswith("#SBATCH ")]


def words_of_srun(script):
    """What the shell makes of the command that starts the workers."""
    begin = script.index("\nsrun ") + 1
    command = script[begin : script.index("\nstatus=$?\n")]
    done = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\0' srun \"$@\"; }}\n{command}"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done.stdout.split("\0")[:-1]


def test_what_the_script_asks_for(render):
    script = render(
        "--nodes=2",
        "--tasks_per_node=4",
        "--gpus_per_task=1",
        "--cpus_per_task=8",
        "--mem=64G",
        "--time=4:00:00",
        "--partition=gpu",
        "--account=me",
        "--signal_seconds=600",
        "--sbatch=--qos=high",
        "--sbatch=--exclusive",
        "--",
        "--global_batch_size=64",
        "--run_dir=/shared/runs/big",
    )
    assert set(directives(script)) == {
        "--job-name=big",
        "--partition=gpu",
        "--account=me",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=8",
        "--gpus-per-task=1",
        "--mem=64G",
        "--time=4:00:00",
        "--signal=USR1@600",
        "--output=slurm-%j.out",
        "--open-mode=append",
        "--requeue",
        "--qos=high",
        "--exclusive",
    }
    words = words_of_srun(script)
    assert words[:5] == [
        "srun",
        "--kill-on-bad-exit=1",
        "--wait=0",
        "--distribution=block",
        "--cpus-per-task=8",
    ]
    assert words[-5:] == [
        sys.executable,
        "-m",
        "launch.train",
        "--global_batch_size=64",
        "--run_dir=/shared/runs/big",
    ]


def test_modules_and_a_virtual_environment(render):
    script = render(
        "--modules=cuda/12.5,it's", "--venv=/my venv", "--env=A=b c"
    )
    assert script.startswith("#!/bin/bash -l\n")
    assert "module load cuda/12.5 'it'\"'\"'s' || exit\n" in script
    assert "source '/my venv/bin/activate' || exit\n" in script
    assert "export A='b c'\n" in script
    assert words_of_srun(script)[-3:] == ["python", "-m", "launch.train"]


def test_a_container(render):
    script = render(
        "--container_image=nvcr.io#nvidia/tensorflow:25.02",
        "--container_mounts=/data:/data,/my runs:/runs",
        "--",
        "--model=only_in_the_image:build",
        "--run_dir=/runs/a",
    )
    words = words_of_srun(script)
    assert "--container-image=nvcr.io#nvidia/tensorflow:25.02" in words
    assert "--container-mounts=/data:/data,/my runs:/runs" in words
    assert "python" in words


def test_every_value_is_quoted_for_the_shell(render, tmp_path):
    script = render(
        f"--python={NASTY}",
        f"--env=NASTY={NASTY}",
        "--",
        f"--run_dir={NASTY}",
        "--data_dir",
        NASTY,
    )
    words = words_of_srun(script)
    begin = words.index(NASTY)
    assert words[begin:] == [
        NASTY,
        "-m",
        "launch.train",
        f"--run_dir={NASTY}",
        "--data_dir",
        NASTY,
    ]
    preparation = script[: script.index("\n# Each worker")]
    done = subprocess.run(
        ["bash", "-c", f'{preparation}\nprintf "%s" "$NASTY"'],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stdout == NASTY


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--modules=a", "--venv=/v", "--cpus_per_task=2", "--max_restarts=0"],
        [f"--env=A={NASTY}", '--sbatch=--comment="it\'s"', "--", "--epochs=2"],
    ],
)
def test_bash_can_read_it(render, flags):
    done = subprocess.run(
        ["bash", "-n"],
        input=render(*flags),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_flags_of_a_flagfile_come_along(render, tmp_path):
    path = tmp_path / "flags"
    path.write_text("--epochs=3\n--precision=float32\n")
    script = render("--", f"--flagfile={path}", "--seed=1")
    assert words_of_srun(script)[-3:] == [
        "--epochs=3",
        "--precision=float32",
        "--seed=1",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--epochs=0"], "--epochs must be positive"),
        (["--", "--epoch=1"], "Unknown command line flag 'epoch'"),
        (["--", "--epochs=many"], "--epochs=many"),
        (["--", "--model=none_such:build"], "no module 'none_such'"),
        (["--", "train"], "flags of launch.train and nothing else"),
        (["--", "--help"], "its own --help lists them"),
        (["--epochs=1"], "--epochs is a flag of launch.train: put it after --"),
        (["--node=1"], "Unknown command line flag 'node'"),
        (["train.sh"], "flags start with --. Received train.sh"),
        (["--nodes=0"], "--nodes must be positive"),
        (["--gpus_per_task=-1"], "--gpus_per_task must not be negative"),
        (["--max_restarts=-1"], "--max_restarts must not be negative"),
        (["--time=soon"], "--time must be minutes, minutes:seconds"),
        (["--time=5"], "--time must be longer than --signal_seconds (300 s)"),
        (["--signal_seconds=5"], "--signal_seconds must be in [60, 65535]"),
        (["--signal_seconds=99999"], "--signal_seconds must be in [60, 65535]"),
        (["--env=NAME"], "--env must be NAME=VALUE. Received 'NAME'"),
        (["--env=A-B=1"], "--env must be NAME=VALUE"),
        (["--env=A=1", "--env=A=2"], "--env names A more than once"),
        (["--env=TF_CONFIG={}"], "--env=TF_CONFIG contradicts the job"),
        (["--job_name=a\nb"], "--job_name must be one line of text"),
        (["--sbatch=--comment=a\nb"], "--sbatch must be one line of text"),
        (["--sbatch=qos"], "--sbatch must be a long option of sbatch"),
        (["--sbatch=--nodes=3"], "pass --nodes"),
        (["--sbatch=--signal=USR2@3"], "pass --signal_seconds"),
        (["--sbatch=--no-requeue"], "pass --max_restarts"),
        (["--sbatch=--array=0-3"], "--sbatch=--array=0-3 is not for a job"),
        (["--container_mounts=/a:/a"], "contradicts no --container_image"),
        (
            ["--container_image=i", "--venv=v"],
            "--venv contradicts --container_image",
        ),
        (
            ["--container_image=i", "--container_mounts=/a:/b"],
            "--run_dir must be in a folder of --container_mounts",
        ),
        (
            ["--nodes=2", "--", "--workers=a:1,b:1"],
            "--workers is not for a job's training",
        ),
        (["--", "--tpu=local"], "--tpu is not for a job's training"),
        (
            ["--nodes=2", "--", "--strategy=mirrored"],
            "--strategy=mirrored contradicts 2 processes",
        ),
        (
            ["--", "--strategy=multi_worker"],
            "--strategy=multi_worker contradicts a job of one process",
        ),
        (
            ["--", "--resume=never"],
            "--resume=never contradicts restarts",
        ),
        (
            ["--nodes=3", "--gpus_per_task=2", "--", "--global_batch_size=32"],
            "(3 processes x 2 devices) times --gradient_accumulation_steps "
            "(1); pass 30 or 36. Received 32",
        ),
        (
            ["--gpus_per_task=1", "--", "--devices=GPU:0,GPU:1"],
            "--devices names 2 GPUs, and each process of the job has 1",
        ),
        (
            ["--time=60", "--", "--max_minutes=56"],
            "--max_minutes=56 would never be reached",
        ),
    ],
)
def test_what_is_wrong_is_said_before_it_is_submitted(call, arguments, message):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_what_is_right_is_not_refused(render):
    render("--", "--strategy=mirrored", "--num_logical_cpus=2")
    render("--max_restarts=0", "--", "--resume=never")
    render("--time=60", "--", "--max_minutes=55")
    render("--nodes=2", "--sbatch=--gres=gpu:3", "--", "--devices=GPU:0,GPU:2")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("2-12", 216_000),
        ("1-0:30", 88_200),
        ("1-2:03:04", 93_784),
    ],
)
def test_every_form_of_a_time_limit(text, seconds):
    assert slurm.seconds_of(text) == seconds


def test_it_tells_the_number_of_the_job(call, stub, tmp_path):
    stub('cat > script; echo "$@" > arguments; echo "123;cluster"')
    status, out, err = call("--nodes=2", "--", "--run_dir=runs/a")
    assert status == 0, err
    assert out == (
        "submitted job 123: 2 nodes x 1 task\n"
        f"results go to {tmp_path}/runs/a, which all nodes must share\n"
        "output goes to slurm-123.out\n"
    )
    assert (tmp_path / "arguments").read_text() == "--parsable\n"
    script = (tmp_path / "script").read_text()
    assert script == call("--nodes=2", "--dry_run", "--", "--run_dir=runs/a")[1]


def test_what_sbatch_says_is_passed_on(call, stub):
    stub("echo 'sbatch: error: invalid partition' >&2; exit 1")
    status, out, err = call()
    assert (status, out) == (2, "")
    assert err == (
        "error: sbatch refused the job: sbatch: error: invalid partition\n"
    )


def test_without_sbatch_it_says_so(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = call()
    assert (status, out) == (2, "")
    assert "there is no sbatch on this machine: submit from a login" in err
    assert "--dry_run" in err


def test_a_virtual_environment_must_be_there(call, stub, tmp_path):
    stub("echo 1")
    status, _, err = call(f"--venv={tmp_path}")
    assert status == 2
    assert f"--venv: there is no {tmp_path}/bin/activate" in err


def test_help_names_every_flag(call):
    status, out, _ = call("--help")
    assert status == 0
    for field in dataclasses.fields(slurm.SlurmJob):
        assert f"  --{field.name}\n" in out


def test_every_way_to_stop_but_ctrl_c_asks_for_a_restart():
    from dist_amp import preemption

    statuses = set(preemption.EXIT_STATUS.values()) - {130}
    no_requests = {preemption.EXIT_STATUS[name] for name in ("hang", "peer")}
    assert statuses - no_requests == set(job_lib.STOPPED)
    assert statuses <= set(job_lib.RESTART)
    assert list(job_lib.RESTART) == sorted(job_lib.RESTART)
    assert not {0, 1, 2, 126, 127, 128, 130} & set(job_lib.RESTART)


def test_the_job_needs_no_tensorflow():
    for program in ("slurm", "kubernetes", "cloud_tpu"):
        done = subprocess.run(
            [
                sys.executable,
                "-X",
                "importtime",
                "-m",
                f"launch.{program}",
                "--help",
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0
        assert "launch.config" in done.stderr
        for heavy in ("tensorflow", "keras", "numpy", "dist_amp"):
            assert f" {heavy}" not in done.stderr


def test_the_flags_of_training_are_those_of_launch_train():
    training = job_lib.read_training(["--epochs=3"])
    assert training.config == TrainConfig(epochs=3)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
