"""Runs a program of `launch` as a user would, in a folder of its own."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(folder, module, *arguments):
    """Modules in the folder can be named by flags."""
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
