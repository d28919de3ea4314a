"""Compares dist_amp with its peers and with the bare step.

python -m benchmarks.run --all --out benchmarks/speed
python -m benchmarks.run --workloads mlp --replicas 1 2 --passes 7
"""

import argparse
import itertools
import json
import pathlib
import sys

from benchmarks import contest, report
from benchmarks.passes import Setting
from benchmarks.workloads import WORKLOADS

EVERYTHING = (
    ("mlp", 1, "float32"),
    ("mlp", 2, "float32"),
    ("lm", 1, "float32"),
    ("lm", 1, "mixed_bfloat16"),
    ("conv", 1, "float32"),
)
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")


def main() -> int:
    """Runs what the command line asks for; prints tables, writes files."""
    arguments = _read_arguments()
    names = arguments.contenders
    contenders = [c for c in contest.CONTENDERS if c.name in names]
    all_results = {}
    print(report.heading())
    for setting in _settings(arguments):
        results = contest.hold(setting, contenders, passes=arguments.passes)
        print(f"{report.title(setting)}\n\n{report.table(results)}\n")
        sys.stdout.flush()
        all_results[setting] = results
    if arguments.out:
        _write(arguments.out, all_results)
    return int(any(r.error for rs in all_results.values() for r in rs.values()))


def _settings(arguments: argparse.Namespace) -> list[Setting]:
    combinations = itertools.product(
        arguments.workloads, arguments.replicas, arguments.precisions
    )
    if arguments.all:
        combinations = iter(EVERYTHING)
    return [
        Setting(
            name, replicas, precision, arguments.steps or WORKLOADS[name].steps
        )
        for name, replicas, precision in combinations
    ]


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [contender.name for contender in contest.CONTENDERS]
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=["mlp"]
    )
    parser.add_argument(
        "--all", action="store_true", help="what benchmarks/README.md shows"
    )
    parser.add_argument("--replicas", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["float32"]
    )
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--passes", type=int, default=5, help="counted passes of each"
    )
    parser.add_argument(
        "--steps", type=int, help="steps in a pass (the workload's own)"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="writes OUT.json and OUT.png"
    )
    return parser.parse_args()


def _write(out: pathlib.Path, all_results: dict) -> None:
    rows = report.rows(all_results)
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    report.draw(all_results, out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
