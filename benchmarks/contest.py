"""Contenders that take turns: A B C A B C, so that all meet the same noise."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from benchmarks.passes import Setting

_SECONDS_A_PASS = 600


@dataclasses.dataclass(frozen=True)
class Contender:
    """A program of `benchmarks.contenders` and how it is set.

    Attributes:
        name: As in the tables.
        module: Its file.
        options: Fields of `Setting` that are its own.
        most_replicas: What it can train on in one process.
    """

    name: str
    module: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    most_replicas: int = 1000


OURS, LIMIT = "dist_amp", "bare step"
CONTENDERS = (
    Contender(OURS, "dist_amp_fit"),
    Contender(LIMIT, "bare_step"),
    Contender("Keras fit", "keras_fit"),
    # Several steps a call fail under MirroredStrategy.
    Contender(
        "Keras fit, 50 steps a call",
        "keras_fit",
        {"steps_per_call": 50},
        most_replicas=1,
    ),
    Contender("tutorial's loop", "tutorial_loop"),
    Contender("Orbit", "orbit_trainer"),
    # DistributedDataParallel wants a process for each replica.
    Contender("PyTorch", "pytorch", most_replicas=1),
    Contender(
        "PyTorch, compiled", "pytorch", {"compiles": True}, most_replicas=1
    ),
)


@dataclasses.dataclass
class Result:
    """The passes of one contender.

    Attributes:
        steps_per_sec: Of each counted pass.
        loss: Of the last pass.
        peak_mib: Most memory that its process held.
        device_mib: Most memory in use on its GPU.
        error: Last words of one that failed, else None.
    """

    steps_per_sec: list[float] = dataclasses.field(default_factory=list)
    loss: float = float("nan")
    peak_mib: float = 0.0
    device_mib: float = 0.0
    error: str | None = None

    @property
    def median(self) -> float:
        """Steps per second."""
        return statistics.median(self.steps_per_sec)


class Process:
    """A contender that waits for its turn."""

    def __init__(
        self,
        contender: Contender,
        setting: Setting,
        environment: Mapping[str, str] | None = None,
    ):
        self.result = Result()
        setting = dataclasses.replace(setting, **contender.options)
        self._steps = setting.steps
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"benchmarks.contenders.{contender.module}",
                setting.to_json(),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **os.environ,
                "TF_CPP_MIN_LOG_LEVEL": "2",
                # Several contenders at a time share a GPU.
                "TF_FORCE_GPU_ALLOW_GROWTH": "true",
                **(environment or {}),
            },
        )

    def run_pass(self, *, counts: bool) -> None:
        """Asks for a pass and waits for it."""
        self.ask()
        self.hear(counts=counts)

    def ask(self) -> None:
        """Asks for a pass."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def hear(self, *, counts: bool) -> None:
        """Waits for the answer; notes an end that is none.

        Args:
            counts: Whether the pass is one of the results.
        """
        assert self._process.stdout is not None
        limit = threading.Timer(_SECONDS_A_PASS, self._process.kill)
        limit.start()
        answer = self._process.stdout.readline()
        limit.cancel()
        if not answer:
            self._process.wait()
            self.result.error = self.result.error or self._last_words()
            return
        numbers = json.loads(answer)
        self.result.loss = numbers["loss"]
        self.result.peak_mib = numbers["peak_mib"]
        self.result.device_mib = numbers["device_mib"]
        if counts:
            rate = self._steps / numbers["seconds"]
            self.result.steps_per_sec.append(rate)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else f"status {self._process.returncode}"

    def end(self) -> None:
        """Asks for no more passes."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def hold(
    setting: Setting,
    contenders: Sequence[Contender],
    *,
    passes: int,
    warm_up: int = 2,
) -> dict[str, Result]:
    """All contenders that can, in turn.

    Args:
        setting: What to train.
        contenders: Who trains.
        passes: Counted passes of each.
        warm_up: Passes before them, in which contenders trace and compile.

    Returns:
        The results by name; those that failed say why.
    """
    processes = {
        contender.name: Process(contender, setting)
        for contender in contenders
        if setting.replicas <= contender.most_replicas
    }
    try:
        for number in range(warm_up + passes):
            for process in processes.values():
                process.run_pass(counts=number >= warm_up)
    finally:
        for process in processes.values():
            process.end()
    return {name: process.result for name, process in processes.items()}
