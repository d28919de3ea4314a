"""launch.cloud_tpu: what it asks the API, and the commands it makes."""

import dataclasses
import pathlib
import shlex
import subprocess
import sys

import pytest

from launch import cloud_tpu
from tests.launch.train_test import environment
from tests.tpu.api_server import PROJECT, READY, ZONE, ApiServer

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SECONDS = 90
PLACE = [f"--tpu_zone={ZONE}", f"--tpu_project={PROJECT}"]
GCLOUD = ["gcloud", "compute", "tpus"]
WHERE = [f"--zone={ZONE}", f"--project={PROJECT}"]

# In place of gcloud: writes down what it was called with, one word a line.
STUB = """#!/bin/sh
printf '%s\\n' gcloud "$@" end >> {record}
case "$*" in {failing}) echo "out of capacity" >&2; exit 7 ;; esac
"""


@pytest.fixture
def call(capsys):
    """Runs the program; returns status, output, errors."""

    def call(*arguments):
        status = cloud_tpu.main(["cloud_tpu", *arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def render(call):
    """The commands, as a shell reads them."""

    def render(*arguments):
        status, out, err = call(*arguments, "--dry_run")
        assert (status, err) == (0, "")
        return [shlex.split(line) for line in out.splitlines()]

    return render


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Puts a program of ours in place of gcloud; returns the calls."""
    record = tmp_path / "calls"

    def gcloud(failing="nothing"):
        path = tmp_path / "bin" / "gcloud"
        path.parent.mkdir()
        path.write_text(STUB.format(record=record, failing=failing))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

        def calls():
            *parts, rest = record.read_text().split("\nend\n")
            assert rest == ""
            return [part.split("\n") for part in parts]

        return calls

    return gcloud


def ask(api, *arguments):
    """The program as a process that takes our server for Google Cloud."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cloud_tpu", *arguments],
        env=environment(**api.environment()),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def test_status():
    with ApiServer(a=[READY]) as api:
        done = ask(api, "status", "--tpu=a", *PLACE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "TPU 'a': state READY, health HEALTHY, v5litepod-4.\n"
    )


def test_the_status_of_what_cannot_be_used():
    with ApiServer(a=[{"state": "PREEMPTED"}]) as api:
        done = ask(api, "status", "--tpu=a", *PLACE)
    assert done.returncode == 1
    assert done.stdout == "TPU 'a': state PREEMPTED.\n"
    assert done.stderr.startswith(
        "error: TPU 'a': state PREEMPTED. It cannot be used. Create it anew "
    )


def test_waiting_for_a_queued_tpu():
    creating = {"state": "CREATING"}
    with ApiServer(a=[404, creating, creating, READY]) as api:
        done = ask(
            api, "wait", "--tpu=a", *PLACE, "--queued", "--interval=0.01"
        )
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first.startswith("there is no TPU 'a' in zone us-west4-a.")
    assert lines == [
        "TPU 'a': state CREATING.",
        "TPU 'a': state READY, health HEALTHY, v5litepod-4.",
    ]


def test_waiting_ends_when_the_tpu_is_taken_back():
    states = [{"state": "CREATING"}, {"state": "PREEMPTED"}, READY]
    with ApiServer(a=states) as api:
        done = ask(api, "wait", "--tpu=a", *PLACE, "--interval=0.01")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "TPU 'a': state PREEMPTED."
    assert done.stderr.startswith("error: TPU 'a': state PREEMPTED. It cannot")
    assert done.stderr.count("\n") == 1


def test_creating(render):
    assert render("create", "--tpu=a", *PLACE) == [
        [
            *GCLOUD,
            *("tpu-vm", "create", "a"),
            *WHERE,
            "--accelerator-type=v5litepod-4",
            "--version=v2-alpha-tpuv5-lite",
        ]
    ]
    assert render(
        "create",
        "--tpu=a",
        "--tpu_zone=z",
        "--accelerator_type=v3-32",
        "--runtime_version=tpu-vm-tf-2.17.1-pod-pjrt",
        "--spot",
    ) == [
        [
            *GCLOUD,
            *("tpu-vm", "create", "a", "--zone=z"),
            "--accelerator-type=v3-32",
            "--version=tpu-vm-tf-2.17.1-pod-pjrt",
            "--spot",
        ]
    ]


def test_queueing(render):
    flags = ("--tpu=a", *PLACE, "--queued")
    assert render("create", *flags, "--spot", "--accelerator_type=v6e-8") == [
        [
            *GCLOUD,
            *("queued-resources", "create", "a"),
            *WHERE,
            "--node-id=a",
            "--accelerator-type=v6e-8",
            "--runtime-version=v2-alpha-tpuv6e",
            "--spot",
        ]
    ]
    assert render("delete", *flags) == [
        [
            *GCLOUD,
            *("queued-resources", "delete", "a"),
            *WHERE,
            "--force",
            "--quiet",
        ]
    ]


def test_deleting(render):
    assert render("delete", "--tpu=a", *PLACE) == [
        [*GCLOUD, "tpu-vm", "delete", "a", *WHERE, "--quiet"]
    ]


def test_training_on_one_host(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").touch()
    training = ["--model=mine:build", "--run_dir=it's", "--seed=1"]
    status, out, err = call(
        "run", "--tpu=a", *PLACE, "--dry_run", "--", *training
    )
    assert (status, err) == (0, "")
    folder, copy, install, train = map(shlex.split, out.splitlines())
    ssh = [*GCLOUD, "tpu-vm", "ssh", "a", *WHERE]
    assert folder == [
        *ssh,
        "--worker=all",
        "--command=mkdir -p dist_amp_run",
    ]
    assert copy == [
        *GCLOUD,
        *("tpu-vm", "scp"),
        *(str(ROOT / "dist_amp"), str(ROOT / "launch")),
        *(str(ROOT / "requirements.txt"), "mine.py"),
        "a:dist_amp_run",
        *WHERE,
        "--recurse",
        "--worker=all",
    ]
    assert install[:-1] == [*ssh, "--worker=all"]
    assert install[-1].startswith("--command=cd dist_amp_run && ")
    assert "'libtpu<=0.0.30'" in install[-1]
    assert train[:-1] == [*ssh, "--worker=0", "--ssh-flag=-t"]
    # The shell there makes of it what was typed here.
    remote = train[-1].removeprefix("--command=cd dist_amp_run && ")
    assert shlex.split(remote) == [
        *(".venv/bin/python", "-m", "launch.train"),
        "--tpu=local",
        *training,
    ]


def test_several_hosts_are_driven_by_the_first(call):
    status, out, err = call(
        "run",
        "--tpu=a",
        f"--tpu_zone={ZONE}",
        "--accelerator_type=v5litepod-16",
        "--install=make it",
        "--dry_run",
        "--",
        "--epochs=2",
    )
    assert (status, err) == (0, "")
    *_, install, train = map(shlex.split, out.splitlines())
    assert install[-2:] == [
        "--worker=all",
        "--command=cd dist_amp_run && make it",
    ]
    assert "--worker=0" in train
    assert train[-1] == (
        "--command=cd dist_amp_run && TPU_LOAD_LIBRARY=0 .venv/bin/python -m "
        f"launch.train --tpu=a --tpu_zone={ZONE} --epochs=2"
    )


def test_the_installation_is_a_script_that_a_shell_reads():
    done = subprocess.run(
        ["sh", "-n"],
        input=cloud_tpu._INSTALL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commands_run_in_order(call, render, gcloud):
    calls = gcloud()
    flags = ("run", "--tpu=a", *PLACE)
    expected = render(*flags)
    status, out, err = call(*flags)
    assert (status, out) == (0, "")
    assert calls() == expected
    assert [line[:2] for line in err.splitlines()] == ["$ "] * 4


def test_a_command_that_fails_ends_it(call, gcloud):
    calls = gcloud(failing="*scp*")
    status, _, err = call("run", "--tpu=a", *PLACE)
    assert status == 7
    assert len(calls()) == 2
    assert err.splitlines()[-1] == "error: exit status 7"
    assert err.splitlines()[-2].startswith("$ gcloud compute tpus tpu-vm scp")


def test_without_gcloud_it_says_so(call, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = call("create", "--tpu=a")
    assert (status, out) == (2, "")
    assert "there is no gcloud on this machine: install" in err
    assert "--dry_run" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the first argument must be status, wait, create, run or delete"),
        (["--tpu=a"], "the first argument must be"),
        (["start", "--tpu=a"], "Received 'start'"),
        (["create"], "--tpu must be a TPU's name"),
        (["create", "--tpu=local:"], "--tpu must be a TPU's name"),
        (["status", "--tpu=grpc://a"], "--tpu must be a TPU's name"),
        (["status", "--tpu=a", "--spot"], "--spot would be ignored by status"),
        (["wait", "--tpu=a", "--dry_run"], "--dry_run would be ignored by"),
        (["delete", "--tpu=a", "--timeout=1"], "--timeout would be ignored"),
        (["wait", "--tpu=a", "--timeout=0"], "--timeout must be positive"),
        (["wait", "--tpu=a", "--interval=0"], "--interval must be positive"),
        (
            ["create", "--tpu=a", "--accelerator_type=v5e"],
            "--accelerator_type must be a kind and a number",
        ),
        (
            ["create", "--tpu=a", "--accelerator_type=v9-4"],
            "--runtime_version is needed for --accelerator_type=v9-4",
        ),
        (
            ["create", "--tpu=a", "--accelerator_type=v5litepod-16"],
            "pass --runtime_version, as tpu-vm-tf-2.17.1-pod-pjrt",
        ),
        (
            ["run", "--tpu=a", "--accelerator_type=v5litepod-16"],
            "pass --install",
        ),
        (["create", "--tpu=a", "--", "--epochs=1"], "flags after -- are for"),
        (["run", "--tpu=a", "--epochs=1"], "put it after --"),
        (["run", "--tpu=a", "--", "--epochs=0"], "--epochs must be positive"),
        (
            ["run", "--tpu=a", "--", "--tpu=a"],
            "--tpu is not for a job's training",
        ),
        (
            ["run", "--tpu=a", "--", "--strategy=mirrored"],
            "--tpu contradicts --strategy=mirrored",
        ),
        (
            ["run", "--tpu=a", "--", "--num_logical_cpus=2"],
            "--num_logical_cpus contradicts a TPU",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(call, arguments, message):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_help_names_every_flag(call):
    status, out, _ = call("--help")
    assert status == 0
    for field in dataclasses.fields(cloud_tpu.CloudTpuJob):
        assert f"  --{field.name}\n" in out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
