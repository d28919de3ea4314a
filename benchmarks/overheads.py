"""What a feature costs: training with it and without it, in turn.

python -m benchmarks.overheads
python -m benchmarks.overheads --features checkpoints --passes 3
"""

import argparse
import dataclasses
import statistics

from benchmarks import contest, report
from benchmarks.contest import Contender
from benchmarks.passes import Setting


@dataclasses.dataclass(frozen=True)
class Feature:
    """Something to switch on.

    Attributes:
        setting: What to train.
        off: Fields of `Setting` without it,
        on: and with it.
    """

    setting: Setting
    off: dict[str, object]
    on: dict[str, object]


_SCALING = ({"loss_scale": "none"}, {"loss_scale": "dynamic"})

FEATURES = {
    "loss scaling": Feature(
        Setting("lm", precision="mixed_float16", steps=10), *_SCALING
    ),
    # In float32, where nothing underflows: denormal numbers are slow.
    "loss scaling of 100 variables": Feature(
        Setting("deep100", steps=500), *_SCALING
    ),
    "checkpoints": Feature(  # in each pass one that counts
        Setting("lm", steps=100), {"save_every": 0}, {"save_every": 100}
    ),
}


def costs(feature: Feature, passes: int) -> list[float]:
    """Share of the time that the feature takes, a number for each round."""
    contenders = [
        Contender("off", "dist_amp_fit", feature.off),
        Contender("on", "dist_amp_fit", feature.on),
    ]
    results = contest.hold(feature.setting, contenders, passes=passes)
    for result in results.values():
        if result.error:
            raise RuntimeError(result.error)
    pairs = zip(
        results["off"].steps_per_sec, results["on"].steps_per_sec, strict=True
    )
    return [1.0 - on / off for off, on in pairs]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser("benchmarks.overheads")
    parser.add_argument(
        "--features", nargs="+", choices=FEATURES, default=[*FEATURES]
    )
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    print(report.heading())
    print("| feature | of the time | lowest - highest |")
    print("| --- | ---: | ---: |")
    for name in arguments.features:
        found = costs(FEATURES[name], arguments.passes)
        print(
            f"| {name} ({report.title(FEATURES[name].setting)}) "
            f"| {statistics.median(found):.1%} "
            f"| {min(found):.1%} - {max(found):.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
