"""Runs a program of `launch` as a user would, in a folder of its own.

Importing TensorFlow takes longer than what most tests do with it. So a process
that has imported it, and done nothing else, forks for each program.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

SECONDS = 300
ROOT = pathlib.Path(__file__).resolve().parents[2]

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["tensorflow", "keras", "tensorflow_datasets", "tests.launch.programs"]
)


def run(folder, module, *arguments, is_fresh=False):
    """Runs it to its end; modules in the folder can be named by flags.

    Args:
        folder: Where it runs.
        module: Of `launch`.
        *arguments: Of the command line.
        is_fresh: Whether Python itself is started for it, as a user does.
    """
    command = [sys.executable, "-m", f"launch.{module}", *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    environ = {**clean, "PYTHONPATH": f"{ROOT}:{folder}"}
    if is_fresh:
        return subprocess.run(
            command,
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    with tempfile.TemporaryDirectory() as outputs:
        process = _forks.Process(
            target=_forked, args=(command[2:], str(folder), environ, outputs)
        )
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, SECONDS)
        out, err = (
            pathlib.Path(outputs, name).read_text() for name in ("out", "err")
        )
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _forked(command, folder, environ, outputs):
    """Makes of a fork what `python -m` would have started."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{outputs}/{name}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.path[:0] = ["", *environ["PYTHONPATH"].split(":")]
    module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__", alter_sys=True)
