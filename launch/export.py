r"""Exports the model of a run: .keras, or a SavedModel for serving.

  python -m launch.export --run_dir=runs/mlp-digits --output=digits.keras
  python -m launch.export --run_dir=runs/mlp-digits --output=digits.saved \
      --format=saved_model --dtype=bfloat16

It needs TensorFlow and Keras where it is used, of a SavedModel TensorFlow
alone, but not this library. Before it gets its name it is loaded in a process
of its own, and what it returns for a batch of the run's data is compared with
what the model returns in float32. Exit status: 0; 1 if they differ; 2 for
wrong settings. Weights alone: launch.checkpoints export.
"""

import dataclasses
import pathlib
import shutil
import sys
from typing import Any

from absl import flags

from launch.config import ConfigError, check_positive, flag, same_flag
from launch.errors import is_ours
from launch.evaluate import as_config_error, prepare
from launch.flags import read_command_line
from launch.quiet import quiet_start
from launch.run_dir import settings_to_infer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Every setting of `python -m launch.export`; one flag each."""

    run_dir: str | None = flag(None, "Folder of the run.")
    checkpoint: str | None = flag(
        None,
        "A step, or the path of a checkpoint or of a file of weights. Default: "
        "the newest, or model.keras if it was written since.",
    )
    format: str = flag("keras", "What is written.", ("keras", "saved_model"))
    dtype: str = flag(
        "float32",
        "What layers compute in and keep weights in; those that the run had "
        "in float32 among others in half precision stay so.",
        ("float32", "bfloat16", "float16"),
    )
    output: str | None = flag(
        None, "FILE.keras, or a new folder for a SavedModel."
    )
    split: str = flag("test", "Of the data to compare on; see launch.evaluate.")
    tolerance: float | None = flag(
        None,
        "Largest difference of an output, by its largest value. Default: 1e-5 "
        "in float32, 5e-2 in bfloat16, 1e-2 in float16.",
    )
    data_dir: str | None = same_flag("data_dir")

    def __post_init__(self) -> None:
        for name in ("run_dir", "output"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name} must be given.")
        assert self.output is not None
        check_positive(self, "tolerance")
        if (self.format == "keras") != self.output.endswith(".keras"):
            raise ConfigError(
                "--output must end in .keras with --format=keras, and only "
                f"then. Received {self.output}."
            )
        if self.format == "saved_model" and pathlib.Path(self.output).exists():
            raise ConfigError(
                f"--output={self.output} is there already: name a new folder."
            )


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.path.insert(0, "")  # as `python -m` does: the user's modules
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Exports and compares; returns the exit status."""
    try:
        config = read_command_line(argv, ExportConfig, __doc__)
        return 0 if config is None else export(config)
    except (flags.Error, ValueError) as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def export(config: ExportConfig) -> int:
    """Exports the model if it is right; see `main`."""
    assert config.run_dir is not None
    assert config.output is not None
    of_run = settings_to_infer(
        config.run_dir, strategy="one_device", data_dir=config.data_dir
    )
    trainer, dataset, _ = prepare(of_run, config.split)
    from dist_amp.export import TOLERANCES, UnusableError
    from launch import saved

    source = saved.weights_of(of_run, config.checkpoint)
    with as_config_error(f"--checkpoint={source}"):
        saved.load(trainer, of_run, source)
    tolerance = config.tolerance or TOLERANCES[config.dtype]
    output = pathlib.Path(config.output)
    part = output.with_name(f"part-{output.name}")
    try:
        with quiet_start():
            difference, rows = _try_out(config, trainer.model, dataset, part)
        if not difference <= tolerance:
            print(
                f"error: {output} is not written: exported in {config.dtype}, "
                f"the model's outputs differ by {difference:.2g} of their "
                f"largest value on {rows} examples of --split={config.split}; "
                f"--tolerance={tolerance:g}.",
                file=sys.stderr,
            )
            return 1
        part.replace(output)
    except UnusableError as error:
        print(f"error: {output} is not written: {error}", file=sys.stderr)
        return 1
    finally:
        _remove(part)
    print(
        f"{source} -> {output} ({config.format}, {config.dtype}, "
        f"{_size_of(output)})\nas the model on {rows} examples of "
        f"--split={config.split}: outputs differ by {difference:.2g} of their "
        f"largest value at most (--tolerance={tolerance:g})"
    )
    return 0


# -------------------------------------------------------------------- private


def _try_out(
    config: ExportConfig, model: Any, dataset: Any, path: pathlib.Path
) -> tuple[float, int]:
    """Writes it and uses it elsewhere: how far off, on how many examples."""
    import tensorflow as tf

    from dist_amp import export as export_lib
    from dist_amp.stream import one_pass

    batch = next(iter(one_pass(dataset).take(1)), None)
    if batch is None:
        raise ConfigError(f"--split={config.split} holds no example.")
    x = batch[0] if isinstance(batch, tuple) else batch
    inputs = tf.nest.map_structure(_in_float32, x)
    expected = export_lib.outputs_in_float32(model, inputs)
    with as_config_error(f"--output={config.output}"):
        export_lib.export(
            model, path, inputs=inputs, format=config.format, dtype=config.dtype
        )
    found = export_lib.outputs_elsewhere(path, config.format, inputs)
    difference = export_lib.largest_difference(found, expected)
    return difference, tf.nest.flatten(inputs)[0].shape[0]


def _in_float32(leaf: Any) -> Any:
    import tensorflow as tf

    return tf.cast(leaf, tf.float32) if leaf.dtype.is_floating else leaf


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size_of(path: pathlib.Path) -> str:
    from dist_amp.checkpoint import readable_size

    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return readable_size(sum(f.stat().st_size for f in files if f.is_file()))


if __name__ == "__main__":
    run()
