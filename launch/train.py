"""Trains a model in mixed precision on every device at hand.

With no flag: a small network on handwritten digits, on whatever this machine
has. Results go to --run_dir: config.json, metrics.jsonl, tensorboard/,
checkpoints/ and model.keras. Interrupt it (Ctrl-C or SIGTERM) and start it
again: it goes on where it stopped.

  python -m launch.train --precision=mixed_float16 --num_logical_cpus=2
  python -m launch.train --model=my_package.models:build --dataset=mnist
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from launch.config import ConfigError, TrainConfig
from launch.flags import config_from_flags, define_flags, help_text
from launch.quiet import quiet_start
from launch.run_dir import RunDir

if TYPE_CHECKING:
    from dist_amp import Trainer

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's modules
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Reads the flags and trains; returns the process's exit status."""
    define_flags()
    try:
        arguments = flags.FLAGS(argv)
        if flags.FLAGS.help:
            print(help_text(__doc__))
            return 0
        if arguments[1:]:
            raise ConfigError(
                f"flags start with --. Received {' '.join(arguments[1:])}."
            )
        config = config_from_flags()
        run_dir = RunDir(config.directory)
        run_dir.check(config)
        return train(config, run_dir)
    except (flags.Error, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the training itself
        return 128 + signal.SIGINT


def train(config: TrainConfig, run_dir: RunDir) -> int:
    """Trains as the config says and leaves the results in the folder."""
    _configure_logging()
    with quiet_start():
        from launch import build  # imports TensorFlow

        devices = build.make_devices(config)
    data = build.load_data(config)
    trainer = build.make_trainer(config, devices, data)
    if config.dry_run:
        print(build.describe_plan(config, devices, data, trainer))
        return 0
    moved = run_dir.prepare(config)
    if moved:
        print(f"moved earlier results to {moved}")
    run_dir.write_config(
        config, **build.describe(config, devices, data, trainer)
    )
    with _stopping_on_signals(trainer) as received:
        trainer.fit(
            data.train,
            epochs=config.num_epochs,
            steps_per_epoch=config.num_steps_per_epoch,
            steps_per_loop=config.loop_length,
            validation_data=data.test,
            validation_steps=config.eval_steps,
            callbacks=build.make_callbacks(run_dir, trainer),
            checkpoint_dir=run_dir.checkpoints,
        )
    if trainer.stop_reason:
        print(
            f"stopped by {trainer.stop_reason} at step {trainer.global_step}; "
            "the same command goes on from there"
        )
        return 128 + received[0]
    if not trainer.model.history.epoch and run_dir.model.exists():
        print(
            f"{run_dir.path} holds a finished run of {config.num_epochs} "
            "epochs; raise --epochs, pass another --run_dir, or --resume=never"
        )
        return 0
    trainer.model.save(run_dir.model)
    if config.ema is not None and data.test is not None:
        results = trainer.evaluate(data.test, steps=config.eval_steps)
        print(build.describe_average(results))
    print(f"results are in {run_dir.path}")
    return 0


@contextlib.contextmanager
def _stopping_on_signals(trainer: "Trainer") -> Iterator[list[signal.Signals]]:
    """The first signal stops at the next step; a second one at once."""
    received: list[signal.Signals] = []

    def stop(number: int, _: Any) -> None:
        if received:
            os._exit(128 + number)
        received.append(signal.Signals(number))
        trainer.request_stop(received[0].name)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _configure_logging() -> None:
    """The library's and the launcher's log goes to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("dist_amp", "launch"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


if __name__ == "__main__":
    run()
