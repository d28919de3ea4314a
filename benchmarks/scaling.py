"""Two workers on loopback, a core each, against one worker on one core.

python -m benchmarks.scaling
"""

import argparse
import dataclasses
import itertools
import pathlib
import re
import statistics
import sys

from benchmarks import report
from benchmarks.contest import Contender, Process
from benchmarks.passes import Setting
from launch import isolation, worker_process

WIRES = ("", "float16", "bfloat16", "int8")
_WARM_UP = 2


def start(number: int, setting: Setting) -> list[Process]:
    """Workers with an equal part of the setting's global batch, a core each."""
    environments = worker_process.worker_environments(number)
    return [
        Process(
            Contender(f"worker {core}", "dist_amp_fit", {"core": core}),
            setting,
            environment,
        )
        for core, environment in enumerate(environments)
    ]


def run_pass(workers: list[Process], *, counts: bool) -> None:
    """One pass of all of them together."""
    for worker in workers:
        worker.ask()
    for worker in workers:
        worker.hear(counts=counts)
        if worker.result.error:
            raise RuntimeError(worker.result.error)


def bytes_on_loopback() -> int:
    """What this network namespace has sent over loopback so far."""
    text = pathlib.Path("/proc/self/net/dev").read_text()
    found = re.search(r"lo: *(\d+)", text)
    assert found
    return int(found[1])


def compare(
    one: Setting, wire_dtype: str, passes: int
) -> tuple[list[float], list[float]]:
    """Efficiency of each round, and MB that a step sent in it."""
    two = dataclasses.replace(
        one, batch_size=2 * one.batch_size, wire_dtype=wire_dtype
    )
    groups = [start(1, one), start(2, two)]
    efficiency, megabytes = [], []
    try:
        for number in range(_WARM_UP + passes):
            counts = number >= _WARM_UP
            run_pass(groups[0], counts=counts)
            before = bytes_on_loopback()
            run_pass(groups[1], counts=counts)
            if counts:
                sent = bytes_on_loopback() - before
                megabytes.append(sent / one.steps / 1e6)
                alone, together = (
                    group[0].result.steps_per_sec[-1] for group in groups
                )
                efficiency.append(together / alone)
    finally:
        for worker in (*groups[0], *groups[1]):
            worker.end()
    return efficiency, megabytes


def main() -> int:
    """Prints a table; returns the exit status."""
    parser = argparse.ArgumentParser("benchmarks.scaling")
    parser.add_argument("--workloads", nargs="+", default=["lm", "mlp"])
    parser.add_argument("--per_worker", type=int, default=16, help="batch")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of lm, in a pass")
    arguments = parser.parse_args()
    if refusal := isolation.isolate():
        print(f"error: no network of its own: {refusal}", file=sys.stderr)
        return 1
    print(report.heading())
    print(
        "| workload | wire | efficiency | lowest - highest | MB sent a step |"
    )
    print("| --- | --- | ---: | ---: | ---: |")
    for workload, wire in itertools.product(arguments.workloads, WIRES):
        steps = arguments.steps if workload == "lm" else 300
        one = Setting(
            workload,
            steps=steps,
            batch_size=arguments.per_worker,
            loss_scale="dynamic",  # float16 on the wire needs it
        )
        found, megabytes = compare(one, wire, arguments.passes)
        print(
            f"| {workload}, batch {arguments.per_worker} a worker "
            f"| {wire or 'float32'} "
            f"| {statistics.median(found):.2f} "
            f"| {min(found):.2f} - {max(found):.2f} "
            f"| {statistics.median(megabytes):.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
