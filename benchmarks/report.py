"""Results as a Markdown table and as a picture."""

import dataclasses
import datetime
import os
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.contest import LIMIT, OURS, Result
from benchmarks.passes import Setting
from launch import host


def heading() -> str:
    """Date, processor and its cores, for the top of a report."""
    model = host.cpu_model(pathlib.Path("/proc/cpuinfo").read_text())
    return f"{datetime.date.today()}, {model}, {os.cpu_count()} cores\n"


def title(setting: Setting) -> str:
    """What was trained."""
    replicas = f"{setting.replicas} replica{'s'[: setting.replicas - 1]}"
    return (
        f"{setting.workload}, batch {setting.work.batch_size}, {replicas}, "
        f"{setting.precision}"
    )


def ratio(ours: Result, theirs: Result) -> float:
    """Median over the rounds of our speed by theirs."""
    pairs = zip(ours.steps_per_sec, theirs.steps_per_sec, strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(results: Mapping[str, Result]) -> str:
    """Markdown: a row for each contender, fastest first."""
    lines = [
        "| contender | steps/s | lowest - highest | dist_amp is | MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    ran = [item for item in results.items() if item[1].error is None]
    for name, result in sorted(ran, key=lambda item: -item[1].median):
        rates = result.steps_per_sec
        factor = (
            f"{ratio(results[OURS], result):.2f}x" if OURS in dict(ran) else ""
        )
        lines.append(
            f"| {name} | {result.median:,.4g} | {min(rates):,.4g} - "
            f"{max(rates):,.4g} | {factor} | {result.peak_mib:,.0f} |"
        )
    return "\n".join(lines + failures(results))


def failures(results: Mapping[str, Result]) -> list[str]:
    """Rows of those that failed."""
    return [
        f"| {name} | failed: {result.error} |"
        for name, result in results.items()
        if result.error is not None
    ]


def rows(
    all_results: Mapping[Setting, Mapping[str, Result]],
) -> list[dict[str, Any]]:
    """All that was set and measured, for a JSON file."""
    return [
        {
            **dataclasses.asdict(setting),
            "contender": name,
            **dataclasses.asdict(result),
        }
        for setting, results in all_results.items()
        for name, result in results.items()
    ]


def draw(
    all_results: Mapping[Setting, Mapping[str, Result]], path: pathlib.Path
) -> None:
    """A panel for each setting: a bar for each contender, the limit a line."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(all_results),
        figsize=(8, 0.6 + 2.2 * len(all_results)),
        squeeze=False,
        layout="constrained",
    )
    for panel, (setting, results) in zip(
        panels.flat, all_results.items(), strict=True
    ):
        rates = {
            name: result.median
            for name, result in reversed(results.items())
            if result.error is None
        }
        limit = rates.pop(LIMIT, None)
        colors = ["#d1495b" if name == OURS else "#8d99ae" for name in rates]
        bars = panel.barh(list(rates), list(rates.values()), color=colors)
        panel.bar_label(bars, fmt="{:,.4g}", padding=3)
        if limit:
            panel.axvline(limit, color="#2b2d42", linestyle="--")
        panel.set_title(f"{title(setting)} (steps/s; dashed: {LIMIT})", size=10)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
