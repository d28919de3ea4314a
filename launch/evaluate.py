"""Evaluates what a run has saved: loss and metrics, exact, on any devices.

  python -m launch.evaluate --run_dir=runs/mlp-digits
  python -m launch.evaluate --run_dir=runs/mlp-digits --checkpoint=90
  python -m launch.evaluate --run_dir=runs/mlp-digits --predictions=all.npz
  python -m launch.evaluate --run_dir=runs/mlp-digits --watch

Model, data, loss, metrics and precision are the run's; devices are what this
machine has, or what the flags say. With --watch it stays beside a training
under way and evaluates each of its checkpoints once, oldest first, into the
run's evaluations.jsonl, until model.keras is there and training has ended.
Exit status: 0; 1 if --timeout ended it; 2 for wrong settings; 130 for Ctrl-C.
"""

import contextlib
import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

from launch.config import (
    ConfigError,
    TrainConfig,
    check_positive,
    flag,
    same_flag,
)
from launch.errors import is_ours
from launch.flags import read_command_line
from launch.quiet import quiet_start
from launch.run_dir import RunDir, settings_to_infer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Every setting of `python -m launch.evaluate`; one flag each."""

    run_dir: str | None = flag(None, "Folder of the run.")
    checkpoint: str | None = flag(
        None,
        "A step, best (in --keep_best), or the path of a checkpoint or of a "
        "file of weights. Default: "
        "the newest, or model.keras if it was written since.",
    )
    split: str = flag(
        "test",
        "Of the data: train, test, what else TFDS has (as test[:10%]), or "
        "what your function takes. All are read in their own order; your "
        "function is asked for that by seed=None, if its seed is annotated as "
        "int | None, and else gives the first pass as in training.",
    )
    eval_steps: int | None = flag(None, "Batches to use. Default: all.")
    predictions: str | None = flag(
        None,
        "A file for what the model returns, .npz: a row for each example, in "
        "the data's order.",
    )
    watch: bool = flag(False, "Evaluates each new checkpoint of a training.")
    timeout: float | None = flag(
        None, "Ends --watch after so many seconds without a new checkpoint."
    )
    poll_seconds: float = flag(5.0, "Between two looks of --watch.")
    precision: str | None = flag(
        None, "As in launch.train. Default: the run's."
    )
    global_batch_size: int | None = flag(
        None, "Examples in a batch over all replicas. Default: the run's."
    )
    data_dir: str | None = same_flag("data_dir")
    data_service: str | None = same_flag("data_service")
    strategy: str = same_flag("strategy")
    devices: tuple[str, ...] = same_flag("devices")
    num_logical_cpus: int = same_flag("num_logical_cpus")
    tpu: str | None = same_flag("tpu")
    tpu_zone: str | None = same_flag("tpu_zone")
    tpu_project: str | None = same_flag("tpu_project")
    workers: tuple[str, ...] = same_flag("workers")
    task_index: int | None = same_flag("task_index")

    def __post_init__(self) -> None:
        if self.run_dir is None:
            raise ConfigError("--run_dir must be given.")
        check_positive(self, "eval_steps", "timeout", "poll_seconds")
        if self.predictions and not self.predictions.endswith(".npz"):
            raise ConfigError(
                f"--predictions must end in .npz. Received {self.predictions}."
            )
        for name in ("checkpoint", "predictions", "workers"):
            if self.watch and getattr(self, name):
                raise ConfigError(
                    f"--{name} contradicts --watch, which evaluates every new "
                    "checkpoint in one process: drop one of them."
                )
        if self.timeout and not self.watch:
            raise ConfigError("--timeout contradicts no --watch: pass --watch.")

    def of_run(self) -> TrainConfig:
        """The run's settings, with those given here.

        Raises:
            ConfigError: There is no such run, or they do not go together.
        """
        assert self.run_dir is not None
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in TrainConfig.__dataclass_fields__
        }
        return settings_to_infer(**own)


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.path.insert(0, "")  # as `python -m` does: the user's modules
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Evaluates, prints; returns the exit status."""
    try:
        config = read_command_line(argv, EvaluateConfig, __doc__)
        if config is None:
            return 0
        return watch(config) if config.watch else evaluate(config)
    except (flags.Error, ValueError) as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def evaluate(config: EvaluateConfig) -> int:
    """Evaluates one checkpoint; see `main`."""
    of_run = config.of_run()
    trainer, dataset, is_chief = prepare(
        of_run, config.split, needs_order=config.predictions is not None
    )
    from launch import saved

    source = saved.weights_of(of_run, config.checkpoint)
    _agree(trainer.strategy, source)
    with as_config_error(f"--checkpoint={source}"):
        saved.load(trainer, of_run, source)
    results = trainer.evaluate(dataset, steps=config.eval_steps)
    if is_chief:
        print(
            f"{source}: --split={config.split}, {_where(trainer)}, "
            f"{of_run.precision}"
        )
        print("\n".join(_lines_of(results)))
    if config.predictions:
        predicted = trainer.predict(dataset, steps=config.eval_steps)
        if is_chief:
            _write_predictions(config.predictions, predicted)
            print(f"written: {config.predictions}")
    return 0


def watch(config: EvaluateConfig) -> int:
    """Evaluates each new checkpoint until the run has ended; see `main`."""
    assert config.run_dir is not None
    patience = _Patience(config.timeout)
    while not RunDir(config.run_dir).config.exists():  # about to begin
        if patience.has_ended():
            return _tell_timeout(config)
        time.sleep(config.poll_seconds)
    of_run = config.of_run()
    trainer, dataset, _ = prepare(of_run, config.split)
    watcher = _Watcher(config, of_run, trainer, dataset)
    while True:
        is_finished = watcher.is_finished()  # before the last look
        if watcher.look():
            patience.renew()
        if is_finished:
            print(f"{config.run_dir} holds a finished run")
            return 0
        if patience.has_ended():
            return _tell_timeout(config)
        time.sleep(config.poll_seconds)


def prepare(
    of_run: TrainConfig, split: str, *, needs_order: bool = False
) -> tuple[Any, Any, bool]:
    """The run's model on these devices, its data, whether we write.

    Args:
        of_run: From `settings_to_infer`.
        split: See `inputs.load_split`.
        needs_order: Likewise.

    Returns:
        A built trainer, global batches in order, and whether this process is
        the chief.
    """
    with quiet_start():
        from launch import build, hardware, inputs  # and TensorFlow

        devices = hardware.make_devices(of_run)
    with contextlib.redirect_stdout(sys.stderr):  # what TFDS prepares
        data = inputs.load_split(of_run, split, needs_order=needs_order)
    with quiet_start():  # float16 on CPUs has its own chatter
        trainer = build.make_trainer(of_run, devices, data, trains=False)
        trainer.build(data.train)
    return trainer, data.test, devices.is_chief


@contextlib.contextmanager
def as_config_error(told: str) -> Iterator[None]:
    """What cannot be read is the caller's to mend."""
    from dist_amp import storage

    try:
        yield
    except (*storage.IO_ERRORS, ValueError) as error:
        raise ConfigError(f"{told}: {error}") from error


# -------------------------------------------------------------------- private


class _Patience:
    """How long to wait for something new."""

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        self._since = time.monotonic()

    def has_ended(self) -> bool:
        waited = time.monotonic() - self._since
        return self._seconds is not None and waited >= self._seconds


class _Watcher:
    """Evaluates whole checkpoints that were not, into evaluations.jsonl."""

    def __init__(
        self,
        config: EvaluateConfig,
        of_run: TrainConfig,
        trainer: Any,
        dataset: Any,
    ):
        self._config = config
        self._of_run = of_run
        self._trainer = trainer
        self._dataset = dataset
        self._run_dir = RunDir(of_run.directory, of_run.checkpoint_dir)
        self._path = self._run_dir.path / "evaluations.jsonl"
        self._done = set(_done_in(self._path, config.split))

    def is_finished(self) -> bool:
        """Whether training has left its model and the folder."""
        from dist_amp import storage

        path = self._run_dir.path
        return self._run_dir.model.exists() and not storage.is_locked(str(path))

    def look(self) -> bool:
        """Evaluates what is new; returns whether there was anything.

        What was removed meanwhile is passed over, what is damaged is told.
        """
        is_new = False
        while (found := self._oldest_new()) is not None:
            path, created = found
            self._done.add((_name_of(path), created))
            is_new |= self._evaluate(path, created)
        return is_new

    def _oldest_new(self) -> tuple[str, float] | None:
        """Looked for anew each time: evaluating takes long."""
        from dist_amp.checkpoint import whole_manifests

        for path, manifest in whole_manifests(
            self._run_dir.checkpoints
        ).items():
            if (_name_of(path), manifest.created) not in self._done:
                return path, manifest.created
        return None

    def _evaluate(self, path: str, created: float) -> bool:
        from dist_amp import storage
        from dist_amp.callbacks import as_json
        from launch import saved

        try:
            saved.load(self._trainer, self._of_run, path)
        except (*storage.IO_ERRORS, storage.DamagedError) as error:
            if path in storage.find(self._run_dir.checkpoints):
                print(f"{path}: {error}", file=sys.stderr)
            return False
        results = self._trainer.evaluate(
            self._dataset, steps=self._config.eval_steps
        )
        line = {
            "step": storage.step_of(path),
            "checkpoint": _name_of(path),
            "created": created,
            "split": self._config.split,
            **results,
            "time": time.time(),
        }
        with self._path.open("a") as file:
            file.write(as_json(line) + "\n")
        shown = ", ".join(f"{n} {v:.6g}" for n, v in _scalars(results).items())
        print(f"{_name_of(path)}: {shown}", flush=True)
        return True


def _done_in(path: pathlib.Path, split: str) -> Iterator[tuple[str, float]]:
    """What an earlier watch has evaluated; a last line may be cut short."""
    if not path.exists():
        return
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if line["split"] == split:
                yield line["checkpoint"], line["created"]


def _name_of(path: str) -> str:
    return path.rpartition("/")[2]


def _tell_timeout(config: EvaluateConfig) -> int:
    print(
        f"error: --timeout={config.timeout:g}: {config.run_dir} has no new "
        "checkpoint since, and the run has not ended.",
        file=sys.stderr,
    )
    return 1


def _agree(strategy: Any, source: str) -> None:
    """Whether all workers have found the same."""
    from dist_amp import storage
    from dist_amp import strategy as strategy_lib

    key = (-1, 0)
    if storage.is_checkpoint(source):
        key = storage.key_of(source)
    keys = strategy_lib.gather_workers(strategy, key)
    if (keys != keys[0]).any():
        raise ConfigError(
            "the workers have found different checkpoints: name one "
            "(--checkpoint), on storage that all share."
        )


def _where(trainer: Any) -> str:
    number = trainer.strategy.num_replicas_in_sync
    return f"{number} replica{'s' * (number > 1)}"


def _scalars(results: Mapping[str, Any]) -> dict[str, float]:
    return {n: v for n, v in results.items() if isinstance(v, int | float)}


def _lines_of(results: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, results))
    for name, value in results.items():
        is_number = isinstance(value, int | float)
        yield f"{name:<{width}}  {f'{value:.7g}' if is_number else value}"


def _write_predictions(path: str, predicted: Any) -> None:
    """Arrays by the outputs' names or places; bfloat16 as float32."""
    import numpy as np

    named = {"predictions": predicted}
    if isinstance(predicted, Mapping):
        named = dict(predicted)
    elif isinstance(predicted, list | tuple):
        named = {str(place): leaf for place, leaf in enumerate(predicted)}
    plain = {
        name: leaf.astype("float32") if leaf.dtype.name == "bfloat16" else leaf
        for name, leaf in named.items()
    }
    with as_config_error(f"--predictions={path}"):
        np.savez(path, **plain)


if __name__ == "__main__":
    run()
