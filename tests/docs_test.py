"""The code in README.md, docs/ and the docstrings runs, and is right."""

import doctest
import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp

ROOT = pathlib.Path(__file__).resolve().parent.parent
# docs/moving.md has a test of its own.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "moving.md")
TEXT = "\n".join(page.read_text() for page in PAGES)
MODULES = ["optimizer", "precision", "strategy", "trainer", "loss_scale"]
MODULES += ["schedule", "checkpoint", "rollback", "cloud_tpu", "verify"]
MODULES += ["ranges", "numerics", "auto_layers", "lars", "losses", "export"]
MODULES += ["loading"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_pages_runs(code):
    exec(compile(code, "page.md", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [x for x in links if not (page.parent / x).exists()]
    assert not missing


def test_the_readmes_loop_is_the_same_on_two_replicas():
    (code,) = (code for code in blocks("python") if "strategy.run" in code)
    weights = []
    for devices in ('["CPU:0"]', '["CPU:0", "CPU:1"]'):
        keras.utils.set_random_seed(0)
        names = {"__name__": "readme"}
        made = code.replace('("auto")', f'("auto", devices={devices})')
        exec(compile(made, "README.md", "exec"), names)
        weights.append(names["model"].get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_the_readmes_own_model_and_data_train(tmp_path):
    (script,) = (code for code in blocks("sh") if "mine.py" in code)
    script = script.replace("python -m", f"{sys.executable} -m")
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=tmp_path,
        env={
            "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Epoch 5, Loss" in done.stdout
    assert (tmp_path / "runs" / "mine" / "model.keras").exists()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(f"dist_amp.{name}")
    names = {**vars(module), "dist_amp": dist_amp, "keras": keras, "tf": tf}
    failed, attempted = doctest.testmod(
        module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert attempted
    assert not failed


def test_every_public_name_has_an_example():
    classes = [getattr(dist_amp, name) for name in dist_amp.__all__]
    missing = [
        one.__name__ for one in classes if ">>>" not in (one.__doc__ or "")
    ]
    assert not missing


def test_the_jobs_of_the_readme_can_be_submitted(capsys):
    from launch import kubernetes, slurm

    programs = {"launch.slurm": slurm, "launch.kubernetes": kubernetes}
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    jobs = [
        shlex.split(line)[2:]
        for line in lines
        if any(f" {name} " in line for name in programs)
    ]
    assert len(jobs) >= 3
    for name, *arguments in jobs:
        status = programs[name].main([name, "--dry_run", *arguments])
        assert status == 0, capsys.readouterr().err


def test_the_tpu_of_the_readme_can_be_created(capsys, tmp_path, monkeypatch):
    from launch import cloud_tpu

    (script,) = (code for code in blocks("sh") if "launch.cloud_tpu" in code)
    flagfile, *lines = script.replace("\\\n", " ").splitlines()
    monkeypatch.chdir(tmp_path)
    subprocess.run(["sh", "-ec", flagfile], check=True, timeout=20)
    for line in lines:
        _, _, name, command, *arguments = shlex.split(line)
        if command != "wait":
            arguments = ["--dry_run", *arguments]
            status = cloud_tpu.main([name, command, *arguments])
            out, err = capsys.readouterr()
            assert status == 0, err
            assert out.startswith("gcloud compute tpus ")
            assert "--zone=us-west4-a" in out


def test_the_flags_of_the_readme_exist():
    from launch.cloud_tpu import CloudTpuJob
    from launch.data_service import DataServiceConfig
    from launch.evaluate import EvaluateConfig
    from launch.export import ExportConfig
    from launch.kubernetes import KubernetesJob
    from launch.local import LocalJob
    from launch.numerics import NumericsConfig
    from launch.plan import PlanConfig
    from launch.replay import ReplayConfig
    from launch.slurm import SlurmJob
    from launch.verify import VerifyConfig

    words = re.findall(r"--(\w+)", "".join(blocks("sh")))
    kinds = (
        PlanConfig,
        VerifyConfig,
        NumericsConfig,
        ReplayConfig,
        EvaluateConfig,
        ExportConfig,
        SlurmJob,
        KubernetesJob,
        LocalJob,
        CloudTpuJob,
        DataServiceConfig,
    )
    fields = {name for kind in kinds for name in kind.__dataclass_fields__}
    # Of other programs than launch.train, and of all.
    own = {"help", "onto", "output", "flagfile", "out"}
    assert set(words) - own - {"signal"} <= fields


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
