"""Makes an update of a run once more, to see what in it was not finite.

The log of a run tells which updates were skipped. This goes to one of them,
from the newest checkpoint before it or from the start, and looks at its batch:
in the run's precision on each replica, and in float32 layer by layer. It names
the first layer whose output leaves float16's range, and the first whose
gradient does. Nothing is written to the run's folder.

  python -m launch.replay --run_dir=runs/mlp-digits --step=1234
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from launch.config import ConfigError, check_positive, flag
from launch.errors import is_ours
from launch.flags import read_command_line
from launch.quiet import quiet_start
from launch.run_dir import RunDir, num_replicas_of, settings_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Every setting of `python -m launch.replay`; one flag each."""

    run_dir: str | None = flag(None, "Folder of the run.")
    step: int | None = flag(None, "The update, as the log tells it, from 1.")
    json: str | None = flag(None, "A file for what was found as JSON.")

    def __post_init__(self) -> None:
        for name in ("run_dir", "step"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} must be given.")
        check_positive(self, "step")


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.path.insert(0, "")  # as `python -m` does: the user's modules
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Prints what was found; returns 0, or 2 for wrong settings."""
    try:
        config = read_command_line(argv, ReplayConfig, __doc__)
        return 0 if config is None else replay(config)
    except (flags.Error, ValueError, FloatingPointError) as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def replay(config: ReplayConfig) -> int:
    """Goes there, looks, prints; see `main`."""
    assert config.run_dir is not None
    assert config.step is not None
    train_config = settings_of(config.run_dir)
    # What is not restored, the run's own output, is not wanted here.
    logging.getLogger("dist_amp").setLevel(logging.ERROR)
    with quiet_start():
        from dist_amp import replay as replay_lib  # and TensorFlow
        from dist_amp import weights
        from launch import build, hardware, inputs, observers

        devices = hardware.make_devices(train_config)
    wanted = num_replicas_of(config.run_dir)
    if devices.strategy.num_replicas_in_sync != wanted:
        raise ConfigError(
            f"--run_dir={config.run_dir} was trained on {wanted} replicas, and "
            f"here are {devices.strategy.num_replicas_in_sync}: replay it on a "
            "machine like that one."
        )
    with contextlib.redirect_stdout(sys.stderr):  # TFDS tells what it prepares
        data = inputs.load_data(train_config)
    run_dir = RunDir(config.run_dir, train_config.checkpoint_dir)
    found = replay_lib.newest_before(run_dir.checkpoints, config.step)
    where = found or "the start: there is no whole checkpoint before it"
    print(f"training to step {config.step} from {where}", flush=True)
    with quiet_start():  # float16 on CPUs has its own chatter
        trainer = build.make_trainer(train_config, devices, data)
        if not found and train_config.initial_weights:
            trainer.build(data.train)
            weights.load(trainer.model, train_config.initial_weights)
            trainer.spread_seeds()
        result = replay_lib.replay(
            trainer,
            data.train,
            config.step,
            epochs=train_config.num_epochs,
            checkpoint_dir=run_dir.checkpoints,
            steps_per_epoch=train_config.num_steps_per_epoch,
            callbacks=observers.make_auto_layers(devices, data, trainer),
            rollback=build.rollback_policy(train_config),
        )
    print("\n".join(_lines_of(result)))
    if config.json:
        content = dataclasses.asdict(result) | {
            "report": result.report.to_dict(),
            "is_skipped": result.is_skipped,
        }
        pathlib.Path(config.json).write_text(json.dumps(content) + "\n")
    return 0


def _lines_of(result: Any) -> Iterator[str]:
    report = result.report
    yield (
        f"step {result.step}: batch {result.batch} of epoch {result.epoch}, "
        f"loss scale {result.loss_scale:g}"
    )
    for replica, paths in enumerate(result.replicas):
        told = "finite"
        if paths:
            more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
            told = f"NOT FINITE: {', '.join(paths[:5])}{more}"
        yield f"gradients of replica {replica}: {told}"
    if result.loss is not None:
        yield f"loss in float32: {result.loss:.6g}"
    yield f"first output beyond float16: {result.activation or 'none'}"
    yield f"first gradient beyond float16: {result.gradient or 'none'}"
    for pin in report.advice.pins:
        yield f"{pin.layer} to float32: {'; '.join(pin.reasons)}"
    if report.advice.pins:
        yield "--precision=auto_layers does so by itself"
    else:
        yield "no layer needs float32 for this batch"


if __name__ == "__main__":
    run()
