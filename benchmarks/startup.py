"""From the start of a process to its first step, and the memory it takes.

python -m benchmarks.startup
"""

import argparse
import statistics
import subprocess
import sys
import time

from benchmarks import contest, report
from benchmarks.contest import Contender
from benchmarks.passes import Setting

CONTENDERS = (
    Contender(contest.OURS, "dist_amp_fit"),
    Contender("Keras fit", "keras_fit"),
)


def first_step(contender: Contender, workload: str) -> tuple[float, float]:
    """Seconds until the first loss is known, and peak memory in MiB."""
    begin = time.perf_counter()
    process = contest.Process(contender, Setting(workload))
    try:
        process.run_pass(counts=True)
        seconds = time.perf_counter() - begin
    finally:
        process.end()
    if process.result.error:
        raise RuntimeError(process.result.error)
    return seconds, process.result.peak_mib


def help_text() -> float:
    """Seconds that `launch.train --help` takes."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "launch.train", "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser("benchmarks.startup")
    parser.add_argument("--workloads", nargs="+", default=["mlp", "lm"])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(report.heading())
    print("| workload | contender | s to the first step | MiB |")
    print("| --- | --- | ---: | ---: |")
    for workload in arguments.workloads:
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(arguments.rounds):
            for contender in CONTENDERS:
                pair = first_step(contender, workload)
                found.setdefault(contender.name, []).append(pair)
        for name, pairs in found.items():
            seconds, mib = map(statistics.median, zip(*pairs, strict=True))
            print(f"| {workload} | {name} | {seconds:.2f} | {mib:,.0f} |")
    times = [help_text() for _ in range(arguments.rounds)]
    print(f"\nlaunch.train --help: {statistics.median(times):.2f} s")


if __name__ == "__main__":
    main()
