"""Tells which layers need float32, and which loss scales suit the others.

Runs the model of a job in float32 on some of its batches and looks at every
activation and gradient: how large and how small, what float16 cannot hold, how
far off each layer is in float16 and bfloat16. Its flags are those of
launch.train, with the same meaning, and a few of its own. With --run_dir the
weights are those of the run's newest checkpoint, or of its model.keras.

  python -m launch.numerics
  python -m launch.numerics --model=mine:model --dataset=mine:data --out=look
  python -m launch.numerics --run_dir=runs/mlp-digits --num_batches=8

Prints the layers, those with the most trouble first, and what to do; writes
numerics.json, numerics.html and, where matplotlib is installed, numerics.png
to --out. Nothing is trained. Exit status: 0, or 2 for wrong flags.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from launch.config import ConfigError, TrainConfig, check_positive, flag
from launch.flags import read_command_line
from launch.quiet import quiet_start
from launch.run_dir import RunDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumericsConfig(TrainConfig):
    """The settings of training, and what is looked at."""

    out: str = flag("numerics", "Folder to write to.")
    num_batches: int = flag(2, "Training batches to look at.")
    max_error: float = flag(
        0.05, "Relative error in float16 from which on a layer needs float32."
    )
    max_lost: float = flag(
        0.05, "Share of a gradient that may become 0 in float16."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_batches", "max_error", "max_lost")
        if self.workers or self.strategy in ("multi_worker", "tpu") or self.tpu:
            raise ConfigError(
                "this looks at one replica, in one process: drop --workers, "
                "--strategy and --tpu."
            )


def main(argv: list[str]) -> int:
    """Reads the flags, looks, prints, writes; returns the exit status."""
    try:
        config = read_command_line(argv, NumericsConfig, __doc__)
        if config is None:
            return 0
        _check_source(config)
        out = _folder(config.out)
        report, source = _look(config)
    except (flags.Error, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"weights: {source}\n")
    print("\n".join(_table(report)), end="\n\n")
    print("\n".join(describe_advice(report)))
    print(f"written: {', '.join(_write(report, out))}")
    return 0


def describe_advice(report: Any) -> Iterator[str]:
    """What to do, line by line."""
    advice = report.advice
    for pin in advice.pins:
        yield f"{pin.layer} to float32: {'; '.join(pin.reasons)}"
    if not advice.pins:
        yield "no layer needs float32"
    if advice.window is not None:
        yield f"loss scale: {advice.window}"
    yield from advice.notes


# -------------------------------------------------------------------- private


def _check_source(config: NumericsConfig) -> None:
    """Whether there are weights where the flags say; touches no device."""
    run_dir = RunDir(config.directory, config.checkpoint_dir)
    is_named = config.run_dir or config.checkpoint_dir
    if not is_named or config.initial_weights or run_dir.model.exists():
        return
    if "://" in run_dir.checkpoints:
        return  # only TensorFlow can look there
    manifests = pathlib.Path(run_dir.checkpoints).glob("ckpt-*/manifest.json")
    if not any(manifests):
        raise ConfigError(
            f"--run_dir={config.directory} holds neither a checkpoint nor "
            "model.keras; drop it to look at new weights."
        )


def _folder(path: str) -> pathlib.Path:
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={path} cannot be made: {error}") from error
    return folder


def _look(config: NumericsConfig) -> tuple[Any, str]:
    """The report, and where the weights come from."""
    with quiet_start():
        from dist_amp import numerics  # and TensorFlow
        from dist_amp.stream import one_pass
        from launch import build, hardware, inputs

        devices = hardware.make_devices(config)
    with contextlib.redirect_stdout(sys.stderr):  # what TFDS prepares
        data = inputs.load_data(config)
    trainer = build.make_trainer(config, devices, data)
    trainer.build(data.train)
    source = _load_weights(config, trainer)
    with quiet_start():  # kernels for float16 have their say, too
        report = numerics.report(
            trainer,
            one_pass(data.train).take(config.num_batches),
            max_error=config.max_error,
            max_lost=config.max_lost,
        )
    return report, source


def _load_weights(config: NumericsConfig, trainer: Any) -> str:
    """Those of the run, or of a file; returns where they come from."""
    from dist_amp import storage, weights
    from dist_amp.checkpoint import whole_manifests

    run_dir = RunDir(config.directory, config.checkpoint_dir)
    checkpoints = list(whole_manifests(run_dir.checkpoints))
    is_named = config.run_dir or config.checkpoint_dir
    try:
        if is_named and checkpoints:
            weights.load(trainer.model, checkpoints[-1])
            return checkpoints[-1]
        if is_named and run_dir.model.exists():
            weights.load(trainer.model, str(run_dir.model))
            return str(run_dir.model)
        if config.initial_weights:
            weights.load(trainer.model, config.initial_weights)
            return config.initial_weights
    except (*storage.IO_ERRORS, ValueError) as error:
        raise ConfigError(f"the weights cannot be taken: {error}") from error
    if is_named:  # remote, and nothing there
        raise ConfigError(f"{run_dir.checkpoints} holds no whole checkpoint.")
    return f"new ones (--seed={config.seed})"


def _table(report: Any) -> list[str]:
    """Aligned; layers to pin first, then by their error in float16."""
    from dist_amp.heat_map import percent, rows_of

    header = [
        "layer",
        "output",
        "over",
        "gradient",
        "loss scales",
        "float16 off",
        "bfloat16 off",
    ]
    rows = sorted(
        rows_of(report),
        key=lambda row: (
            not row.reasons,
            -(row.numbers.float16_error or 0.0),
        ),
    )
    lines = [header]
    for row in rows:
        output, gradient = row.strips[0], row.strips[2] or row.strips[1]
        lines.append(
            [
                row.numbers.path + " !" * bool(row.reasons),
                _span(output),
                f"{output.share_over:.1%}" if output else "-",
                _span(gradient),
                str(gradient.window or "-") if gradient else "-",
                percent(row.numbers.float16_error),
                percent(row.numbers.bfloat16_error),
            ]
        )
    return _aligned(lines)


def _span(found: Any) -> str:
    if found is None:
        return "-"
    odd = "" if found.is_finite else ", inf or NaN"
    return f"{found.smallest:.1e} to {found.largest:.1e}{odd}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]


def _write(report: Any, out: pathlib.Path) -> Iterator[str]:
    """Writes the files; gives their names."""
    from dist_amp import heat_map

    path = out / "numerics.json"
    path.write_text(report.to_json(indent=1) + "\n")
    yield str(path)
    path = out / "numerics.html"
    heat_map.write_html(report, path)
    yield str(path)
    path = out / "numerics.png"
    try:
        heat_map.write_png(report, path)
    except ImportError as error:
        print(f"no {path}: {error}", file=sys.stderr)
        return
    yield str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
