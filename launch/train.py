"""Trains a model in mixed precision on every device at hand.

With no flag: a small network on handwritten digits, on whatever this machine
has. Results go to --run_dir: config.json, metrics.jsonl, tensorboard/,
checkpoints/ and model.keras. Interrupt it (Ctrl-C, SIGTERM, SIGUSR1), or let
the machine die under it, and start it again: it goes on where it was.

  python -m launch.train --precision=mixed_float16 --num_logical_cpus=2
  python -m launch.train --model=my_package.models:build --dataset=mnist
"""

import contextlib
import faulthandler
import functools
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch import compilation_cache
from launch.config import TrainConfig
from launch.errors import is_ours
from launch.flags import read_command_line
from launch.heartbeat import Beat, Heart
from launch.quiet import quiet_start
from launch.run_dir import RunDir


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's modules
    try:
        status = main(sys.argv)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status:  # TensorFlow's teardown may wait for workers that are gone
        os._exit(status)
    sys.exit(status)


def main(argv: list[str]) -> int:
    """Reads the flags and trains; returns the process's exit status."""
    try:
        config = read_command_line(argv, TrainConfig, __doc__)
        if config is None:
            return 0
        run_dir = RunDir(config.directory, config.checkpoint_dir)
        run_dir.check(config)
        return train(config, run_dir)
    except (flags.Error, ValueError, FloatingPointError) as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the training itself
        return 128 + signal.SIGINT


def train(
    config: TrainConfig, run_dir: RunDir, callbacks: Sequence[Any] = ()
) -> int:
    """Trains as the config says and leaves the results in the folder.

    Args:
        config: The settings.
        run_dir: Where results go; only the chief of several workers writes.
        callbacks: Keras callbacks besides its own.

    Returns:
        The process's exit status.
    """
    _configure_logging()
    # For whoever finds it hanging: `kill -USR2` shows the stacks.
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    heart = Heart()
    with heart.beating():
        return _train(config, run_dir, callbacks, heart)


def _train(
    config: TrainConfig,
    run_dir: RunDir,
    callbacks: Sequence[Any],
    heart: Heart,
) -> int:
    if config.compilation_cache:
        compilation_cache.enable(config.compilation_cache)
    with quiet_start():
        from dist_amp import preemption, rendezvous, watchdog  # and TensorFlow
        from dist_amp.data_service import DataServiceLostError
        from launch import build, hardware

        try:
            devices = hardware.make_devices(config)
        except rendezvous.AbsentError as error:
            print(f"error: {error}", file=sys.stderr)
            return preemption.exit_status("peer")
    try:
        with watchdog.watching(devices.strategy):
            data, trainer = _build(config, run_dir, devices)
        heart.read = functools.partial(_beat, trainer.beacon)
        if config.dry_run:
            print(build.describe_plan(config, devices, data, trainer))
            return 0
        _fit(config, run_dir, devices, data, trainer, callbacks)
    except (watchdog.PeerError, DataServiceLostError) as error:
        print(f"error: {error}", file=sys.stderr)
        return preemption.exit_status("peer")
    reason = trainer.stop_reason
    return preemption.exit_status(reason) if reason else 0


def _build(
    config: TrainConfig, run_dir: RunDir, devices: Any
) -> tuple[Any, Any]:
    """Data and trainer, with the weights that it starts from."""
    from launch import build, inputs

    # TFDS prints what it prepares, on the worker that comes first.
    stdout = sys.stdout if devices.is_chief else sys.stderr
    with contextlib.redirect_stdout(stdout):
        data = inputs.load_data(config)
    trainer = build.make_trainer(config, devices, data)
    if not config.dry_run:
        build.load_initial_weights(config, run_dir, data, trainer)
    trainer.report_dir = run_dir.path
    return data, trainer


def _fit(
    config: TrainConfig,
    run_dir: RunDir,
    devices: Any,
    data: Any,
    trainer: Any,
    callbacks: Sequence[Any],
) -> None:
    """Trains to the end, or until asked to stop; the chief leaves results."""
    from dist_amp import preemption
    from launch import build, observers

    profiler = None
    with contextlib.ExitStack() as stack:
        if devices.is_chief:
            profiler = observers.make_profiler(config, run_dir)
            stack.enter_context(build.open_run_dir(config, run_dir))
            trainer.run_info = run_dir.write_config(
                config, **build.describe(config, devices, data, trainer)
            )
            callbacks = [
                *observers.make_callbacks(run_dir, trainer),
                *callbacks,
            ]
        watching = [
            *observers.make_auto_layers(devices, data, trainer),
            *observers.make_histograms(config, devices, run_dir, trainer),
        ]
        observers.write_graph(config, devices, run_dir, data, trainer)
        stack.enter_context(
            preemption.watch(
                trainer.request_stop, max_minutes=config.max_minutes
            )
        )
        trainer.fit(
            data.train,
            epochs=config.num_epochs,
            steps_per_epoch=config.num_steps_per_epoch,
            steps_per_loop=config.loop_length,
            validation_data=data.test,
            validation_steps=config.eval_steps,
            callbacks=[
                observers.make_mfu(config, data, trainer),
                *watching,
                *callbacks,
            ],
            profiler=profiler,
            checkpoint_dir=run_dir.checkpoints,
            save_policy=build.save_policy(config),
            rollback=build.rollback_policy(config),
        )
        results = None
        if config.ema is not None and data.test and not trainer.stop_reason:
            results = trainer.evaluate(data.test, steps=config.eval_steps)
        if devices.is_chief:
            print(_conclude(config, run_dir, trainer, results))


def _conclude(
    config: TrainConfig, run_dir: RunDir, trainer: Any, results: Any
) -> str:
    """Saves the model of a run that came to its end; tells how it ended."""
    from launch import build, observers

    if trainer.stop_reason:
        where = "there"
        if trainer.save_error:
            where = "the checkpoint before it: this one could not be saved"
        return (
            f"stopped by {trainer.stop_reason} at step {trainer.global_step}; "
            f"the same command goes on from {where}"
        )
    is_new = trainer.global_step > trainer.resumed_step
    if not is_new and run_dir.model.exists():
        return (
            f"{run_dir.path} holds a finished run of {config.num_epochs} "
            "epochs; raise --epochs, pass another --run_dir, or --resume=never"
        )
    build.save_model(trainer, run_dir.model)
    lines = [] if results is None else [observers.describe_average(results)]
    size = build.describe_checkpoints(run_dir.checkpoints)
    return "\n".join([*lines, f"results are in {run_dir.path} ({size})"])


def _beat(beacon: Any) -> Beat:
    """What the launcher is told every second."""
    place = beacon.read()
    must_end = place.must_end and place.patience == 1
    return Beat(place.doing, place.seconds, must_end)


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
