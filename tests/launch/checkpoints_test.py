"""launch.checkpoints as a user calls it, on a run that was made here."""

import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from launch import checkpoints
from tests.launch.train_test import SECONDS, environment, launch


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("run")
    done = launch(cwd, f"--data_dir={cwd}", "--epochs=3", "--run_dir=run")
    assert done.returncode == 0, done.stderr
    return cwd / "run"


@pytest.fixture
def call(run_dir, capsys, monkeypatch):
    """Runs a command in this process; returns status, output, errors."""

    def call(*arguments):
        from absl import flags

        monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
        for name in ("boolean", "integer", "list", "string"):
            define = getattr(flags, f"DEFINE_{name}")
            monkeypatch.setattr(
                flags,
                f"DEFINE_{name}",
                lambda *a, define=define, **k: define(
                    *a, **{"flag_values": flags.FLAGS, **k}
                ),
            )
        status = checkpoints.main(["checkpoints", *map(str, arguments)])
        monkeypatch.undo()
        return (status, *capsys.readouterr())

    return call


def test_ls_shows_what_is_there(call, run_dir):
    status, out, _ = call("ls", run_dir)
    assert status == 0
    header, *lines, total = out.splitlines()
    assert header.split()[:3] == ["checkpoint", "epochs", "size"]
    assert [line.split()[0] for line in lines] == [
        "ckpt-45",
        "ckpt-90",
        "ckpt-135",
    ]
    assert all("whole" in line and "val_loss" in line for line in lines)
    assert total.startswith("3 checkpoints, ")


def test_verify_finds_what_was_changed(call, run_dir, tmp_path):
    assert call("verify", run_dir)[0] == 0
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    path = copy / "checkpoints" / "ckpt-90" / "tensors.index"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (copy / "checkpoints" / "ckpt-45" / "manifest.json").unlink()
    status, out, _ = call("verify", copy)
    assert status == 1
    assert "ckpt-45: cut short: no checkpoint" in out
    assert "ckpt-90: damaged: tensors.index has another checksum" in out
    assert "ckpt-135: whole" in out


@pytest.mark.parametrize("is_missing", [True, False])
def test_what_is_damaged_is_shown_and_not_used(
    call, run_dir, tmp_path, is_missing
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    state = copy / "checkpoints" / "ckpt-135" / "state.json"
    state.unlink() if is_missing else state.write_bytes(b"{")
    status, out, _ = call("ls", copy)
    assert status == 0
    assert "ckpt-135    ?" in out
    for command in ("diff", "export", "average"):
        status, _, err = call(command, copy, f"--output={tmp_path}/a.keras")
        assert status == 2
        assert "ckpt-135 is damaged: state.json" in err
        assert len(err.splitlines()) == 1


def test_diff_names_what_differs(call, run_dir):
    status, out, _ = call("diff", run_dir, 45, 90)
    assert status == 1
    assert "model/00000/MyModel/dense/kernel" in out
    assert "epoch: 1 there, 2 here" in out
    status, out, _ = call("diff", run_dir, 90, 90)
    assert status == 0


def test_export_gives_the_weights_of_a_step(call, run_dir, tmp_path):
    """The last checkpoint is the model that the run saved."""
    assert call("export", run_dir, f"--output={tmp_path}/a.safetensors")[0] == 0
    assert call("export", run_dir, f"--output={tmp_path}/a.keras")[0] == 0
    expected = keras.models.load_model(run_dir / "model.keras")
    exported = keras.models.load_model(tmp_path / "a.keras")
    arrays = load_file(tmp_path / "a.safetensors")
    for one, other in zip(exported.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    for name, array in arrays.items():
        (other,) = (v for v in expected.variables if name.endswith(v.path))
        np.testing.assert_array_equal(array, other)


def test_average_is_the_mean(call, run_dir, tmp_path):
    arrays = []
    for step in (45, 90, 135):
        output = tmp_path / f"{step}.safetensors"
        call("export", run_dir, f"--step={step}", f"--output={output}")
        arrays.append(load_file(output))
    output = tmp_path / "average.safetensors"
    status, out, _ = call("average", run_dir, f"--output={output}")
    assert status == 0
    assert "the average of ckpt-45, ckpt-90, ckpt-135" in out
    for name, value in load_file(output).items():
        mean = np.mean([one[name] for one in arrays], axis=0)
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-8)
    output = tmp_path / "two.safetensors"
    call("average", run_dir, "--steps=45,135", f"--output={output}")
    for name, value in load_file(output).items():
        mean = (arrays[0][name] + arrays[2][name]) / 2
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-8)


def test_a_run_starts_from_exported_weights(call, run_dir, tmp_path):
    call("export", run_dir, f"--output={tmp_path}/a.safetensors")
    done = launch(
        tmp_path,
        f"--data_dir={run_dir.parent}",
        f"--initial_weights={tmp_path}/a.safetensors",
        "--learning_rate=1e-9",
        "--epochs=1",
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.splitlines()[0].rpartition(" ")[2])
    assert accuracy > 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "RUN"], "'show RUN' is not one of ls, verify"),
        (["ls", "nowhere"], "there is no checkpoint in nowhere"),
        (["diff", "RUN", "1", "2"], "there is no step 1, but 45, 90, 135"),
        (["export", "RUN", "--output=a.pt"], "must end in .safetensors"),
        (["average", "RUN", "--steps=45"], "two or more"),
    ],
)
def test_a_mistake_is_one_line(call, run_dir, arguments, message):
    arguments = [run_dir if a == "RUN" else a for a in arguments]
    status, _, err = call(*arguments)
    assert status == 2
    assert message.replace("RUN", str(run_dir)) in err
    assert len(err.splitlines()) == 1


def test_it_runs_as_a_program_without_chatter(run_dir):
    done = subprocess.run(
        [sys.executable, "-m", "launch.checkpoints", "ls", str(run_dir)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "3 checkpoints" in done.stdout


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
