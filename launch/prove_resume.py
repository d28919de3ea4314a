"""Proves that a killed run goes on as if nothing had happened.

Trains 2N updates at one go; then N and some more, kill -9, and on to 2N from
the newest checkpoint. Compares the last checkpoints (weights, optimizer,
metrics, random states) bit for bit, and metrics.jsonl line by line. With
--onto the rest runs on other devices, and weights and losses are compared
within the tolerance of the precision (dropout draws other masks there).

  python -m launch.prove_resume --precision=mixed_float16 --num_logical_cpus=2
  python -m launch.prove_resume --num_workers=2
  python -m launch.prove_resume --onto=--num_logical_cpus=4
"""

import dataclasses
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch.config import ConfigError
from launch.flags import config_from_flags, define_flags, help_text
from launch.isolation import isolate
from launch.quiet import start_tensorflow
from launch.run_dir import RunDir
from launch.train import train
from launch.worker_process import worker_environments

_OWN_FLAGS = """
Its own flags; all others are those of launch.train:
  --num_updates
      N: updates before the earliest kill, and after them. [20]
  --num_workers
      Processes on this host, under MultiWorkerMirroredStrategy, in a network
      of nothing but loopback. [1]
  --onto
      Flags of launch.train for the rest of the killed run.
  --minutes
      Each of the three runs may take so long. [10]
"""
_TOLERANCES = {
    "float32": (1e-5, 1e-6),
    "float16": (1e-3, 1e-4),
    "layers": (1e-3, 1e-4),  # of auto_layers
    "bfloat16": (1e-2, 5e-3),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What two runs ended with.

    Attributes:
        lines: What to print.
        is_equal: Whether they ended the same.
    """

    lines: Sequence[str]
    is_equal: bool


def main(argv: list[str]) -> int:
    """Runs the three runs; returns 0 if they prove it, 1 if not."""
    define_flags()
    flags.DEFINE_integer("num_updates", 20, "", lower_bound=2)
    flags.DEFINE_integer("num_workers", 1, "", lower_bound=1)
    flags.DEFINE_string("onto", "", "")
    flags.DEFINE_float("minutes", 10.0, "", lower_bound=0.0)
    flags.DEFINE_integer("kill_at", 0, "", lower_bound=0)
    try:
        flags.FLAGS(argv)
        if flags.FLAGS.help:
            print(help_text(__doc__) + "\n" + _OWN_FLAGS)
            return 0
        if flags.FLAGS.kill_at:
            return _train_and_die(flags.FLAGS.kill_at)
        return _prove(_own_flags_removed(argv[1:]))
    except (flags.Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _prove(train_flags: list[str]) -> int:
    n = flags.FLAGS.num_updates
    if flags.FLAGS.num_workers > 1:
        refusal = isolate()
        if refusal is not None:
            print(f"the workers' ports are open to this network: {refusal}")
    folder = flags.FLAGS.run_dir or tempfile.mkdtemp(prefix="prove_resume-")
    common = [*_defaults(train_flags, n), *train_flags, f"--steps={2 * n}"]
    onto = shlex.split(flags.FLAGS.onto)
    kill_at = random.randint(n, 2 * n - 1)
    straight, parts = (f"{folder}/straight", f"{folder}/parts")
    print(f"{2 * n} updates at one go", flush=True)
    _run([*common, f"--run_dir={straight}"])
    print(f"the same, killed (SIGKILL) at update {kill_at}", flush=True)
    _run([*common, f"--run_dir={parts}", f"--kill_at={kill_at}"])
    print(f"the rest of it {' '.join(onto)}", flush=True)
    log = _run([*common, *onto, f"--run_dir={parts}", "--resume=must"])
    print(next(x for x in log.splitlines() if x.startswith("resumed from")))
    outcome = _compare(straight, parts, 2 * n, is_exact=not onto)
    print("\n".join(outcome.lines))
    if not outcome.is_equal:
        print(f"NOT PROVED; see {folder}")
        return 1
    if not flags.FLAGS.run_dir:
        shutil.rmtree(folder)
    print("PROVED")
    return 0


def _defaults(train_flags: Sequence[str], n: int) -> list[str]:
    """Several epochs, and saves that fall within them."""
    given = {flag.lstrip("-").partition("=")[0] for flag in train_flags}
    if given & {"steps", "epochs"}:
        raise ConfigError("the length is --num_updates here.")
    lengths = range(max(1, n // 2), 0, -1)
    wanted = {
        "steps_per_epoch": next(k for k in lengths if 2 * n % k == 0),
        "save_every_steps": 3,
        "keep_checkpoints": 5,
        "deterministic": "true",
    }
    return [f"--{k}={v}" for k, v in wanted.items() if k not in given]


def _run(arguments: Sequence[str]) -> str:
    """One run, of one worker or several; returns worker 0's errors and log."""
    num_workers = flags.FLAGS.num_workers
    is_killed = any(a.startswith("--kill_at") for a in arguments)
    module = "launch.prove_resume" if is_killed else "launch.train"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in worker_environments(num_workers)
    ]
    try:
        # The last worker is the one that dies, and the others wait for it.
        if is_killed:
            processes[-1].communicate(timeout=60 * flags.FLAGS.minutes)
            for process in processes[:-1]:
                process.kill()
        logs = [p.communicate(timeout=60 * flags.FLAGS.minutes)[1] or ""
                for p in processes[: num_workers - is_killed]]  # fmt: skip
    finally:
        for process in processes:
            process.kill()
            process.wait()
    wanted = -signal.SIGKILL if is_killed else 0
    if any(process.returncode != wanted for process in processes):
        codes = [process.returncode for process in processes]
        raise ValueError(
            f"a run ended with {codes} instead of {wanted}:\n{''.join(logs)}"
        )
    return logs[0] if logs else ""


def _own_flags_removed(arguments: Sequence[str]) -> list[str]:
    """What is left for launch.train; `--name value` counts as one flag."""
    own = {"num_updates", "num_workers", "onto", "minutes", "run_dir"}
    left, skips = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        if skips or name in own:
            skips = not skips and not equals
            continue
        left.append(argument)
    return left


def _train_and_die(step: int) -> int:
    """Trains like launch.train, until a step; only the last worker dies."""
    import keras

    from dist_amp import cluster

    config = config_from_flags()

    class Death(keras.callbacks.Callback):
        """The end of a machine: nothing is flushed, nothing is said."""

        num_updates = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            del logs
            updates = config.num_steps_per_epoch or 0
            if self.params["epoch"] * updates + batch + 1 >= step and is_last:
                os.kill(os.getpid(), signal.SIGKILL)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            del logs
            self.params["epoch"] = epoch

    workers = cluster.find()
    is_last = not workers or workers.task_index == workers.num_workers - 1
    run_dir = RunDir(config.directory, config.checkpoint_dir)
    return train(config, run_dir, [Death()])


def _compare(
    straight: str, parts: str, step: int, *, is_exact: bool
) -> Outcome:
    start_tensorflow()
    from dist_amp import storage

    paths = [f"{run}/checkpoints/ckpt-{step}" for run in (straight, parts)]
    one, other = (storage.read_tensors(path) for path in paths)
    states = [storage.read_state(path) for path in paths]
    rtol = atol = 0.0
    how = "bit for bit"
    if not is_exact:
        precision = states[0]["info"]["resolved"]["precision"]
        rtol, atol = _TOLERANCES[precision.split("_")[-1]]
        how = f"within rtol {rtol:g}, atol {atol:g}"
        one = {
            name: tensor
            for name, tensor in one.items()
            if name.startswith("model/") and "seed_generator" not in name
        }
    different = [
        name
        for name, tensor in one.items()
        if name not in other or not _is_close(tensor, other[name], rtol, atol)
    ]
    counters = [
        [state[n] for n in ("epoch", "batch", "examples_consumed")]
        for state in states
    ]
    has_equal_lines = _has_equal_lines(straight, parts, rtol, atol)
    lines = [
        f"{len(one) - len(different)} of {len(one)} tensors are equal {how}",
        *(f"  differs: {name}" for name in different[:10]),
        f"counters {'are equal' if counters[0] == counters[1] else counters}",
        f"metrics.jsonl {'is' if has_equal_lines else 'is not'} equal",
    ]
    is_equal = not different and counters[0] == counters[1]
    return Outcome(lines, is_equal and has_equal_lines)


def _is_close(one: Any, other: Any, rtol: float, atol: float) -> bool:
    import numpy as np

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if rtol == 0:
        return one.tobytes() == other.tobytes()
    pair = (one.astype("float64"), other.astype("float64"))
    return np.allclose(*pair, rtol, atol)


def _has_equal_lines(
    straight: str, parts: str, rtol: float, atol: float
) -> bool:
    """Compares metrics.jsonl, what is measured by a clock aside."""
    from dist_amp.meter import MEASURED

    runs = []
    for run in (straight, parts):
        with open(f"{run}/metrics.jsonl") as file:
            runs.append([json.loads(line) for line in file])
    pairs = [
        (line[name], other.get(name))
        for line, other in zip(*runs, strict=False)
        for name in line
        if name not in MEASURED
    ]
    return len(runs[0]) == len(runs[1]) and all(
        math.isclose(a, b, rel_tol=rtol, abs_tol=atol)
        if isinstance(a, float) and isinstance(b, float)
        else a == b
        for a, b in pairs
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
