"""Makes one page of one or more runs, to look at and to send around.

  python -m launch.report runs/mlp-digits
  python -m launch.report runs/first runs/second --out=report.html

Curves of losses, metrics, learning rate, loss scale with skipped updates, and
speed, the runs over each other; a table of results; which settings differ;
versions and devices. The page needs nothing beside itself: no network, no
other file. Runs may be under way; make the page again to see more.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from launch import report_page
from launch.config import ConfigError, flag
from launch.flags import define_flags, help_text, read_flags
from launch.run_record import read_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What `python -m launch.report` takes beside the folders of runs."""

    out: str = flag("report.html", "The page to write.")


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Writes the page; returns the exit status: 0, or 2 for a mistake."""
    registry = flags.FlagValues()
    define_flags(ReportConfig, registry)
    try:
        _, *paths = registry(argv)
        if registry["help"].value:
            print(help_text(__doc__, ReportConfig))
            return 0
        if not paths:
            raise ConfigError("name the folder of a run, or several.")
        config = read_flags(ReportConfig, registry)
        runs = read_runs(paths)
        pathlib.Path(config.out).write_text(
            report_page.to_html(runs), encoding="utf-8"
        )
    except (flags.Error, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {config.out} ({_size(config.out)})")
    return 0


def _size(path: str) -> str:
    return f"{pathlib.Path(path).stat().st_size / 1024:.0f} KiB"


if __name__ == "__main__":
    run()
