"""Time of a step against the number of replicas and of variables.

python -m benchmarks.growth --out benchmarks/growth
"""

import argparse
import pathlib

from benchmarks import contest, report
from benchmarks.contest import Contender, Result
from benchmarks.passes import Setting
from benchmarks.workloads import WORKLOADS

_POINTS = "offset points"
OURS = (Contender(contest.OURS, "dist_amp_fit"),)


def milliseconds(setting: Setting, passes: int) -> float:
    """Median time of a step."""
    result: Result = contest.hold(setting, OURS, passes=passes)[contest.OURS]
    if result.error:
        raise RuntimeError(result.error)
    return 1000.0 / result.median


def main() -> None:
    """Prints two tables; draws them if asked to."""
    parser = argparse.ArgumentParser("benchmarks.growth")
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument(
        "--variables", nargs="+", type=int, default=[10, 100, 1000]
    )
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="writes OUT.png")
    arguments = parser.parse_args()
    print(report.heading())
    by_replicas = {
        number: milliseconds(
            Setting("mlp", replicas=number, steps=300), arguments.passes
        )
        for number in arguments.replicas
    }
    _print("replicas (mlp, the same global batch)", by_replicas)
    by_variables = {
        number: milliseconds(
            Setting(f"deep{number}", steps=WORKLOADS[f"deep{number}"].steps),
            arguments.passes,
        )
        for number in arguments.variables
    }
    _print("variables", by_variables)
    if arguments.out:
        _draw(by_replicas, by_variables, arguments.out.with_suffix(".png"))


def _print(what: str, times: dict[int, float]) -> None:
    print(f"| {what} | ms a step | ms for each |\n| ---: | ---: | ---: |")
    for number, time in times.items():
        print(f"| {number} | {time:.3f} | {time / number:.4f} |")
    print(flush=True)


def _draw(
    by_replicas: dict[int, float],
    by_variables: dict[int, float],
    path: pathlib.Path,
) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 2, figsize=(8, 3.4), layout="constrained"
    )
    sides = {"replicas": by_replicas, "variables": by_variables}
    for panel, (what, times) in zip(panels, sides.items(), strict=True):
        numbers, values = list(times), list(times.values())
        panel.loglog(numbers, values, "o-", color="#d1495b", label="measured")
        linear = [values[0] * number / numbers[0] for number in numbers]
        panel.loglog(numbers, linear, "--", color="#8d99ae", label="linear")
        for number, value in times.items():
            panel.annotate(
                f"{value:.3g}", (number, value), (4, -12), textcoords=_POINTS
            )
        panel.set_xticks(numbers, map(str, numbers))
        panel.minorticks_off()
        panel.margins(0.15)
        panel.set_xlabel(what)
        panel.set_ylabel("ms a step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
