"""Looks into the checkpoints of a run.

  python -m launch.checkpoints ls RUN_DIR        what is there, in what state
  python -m launch.checkpoints verify RUN_DIR    compares every checksum
  python -m launch.checkpoints diff RUN_DIR A B  what differs between two steps
  python -m launch.checkpoints export RUN_DIR    weights to a file
  python -m launch.checkpoints average RUN_DIR   the average of some, to a file

RUN_DIR is a run's folder, or one of checkpoints. A and B are steps, or whole
checkpoints of other runs; without them the newest two are compared. A file is
read by `launch.train --initial_weights=FILE`.
"""

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import saved
from launch.quiet import start_tensorflow

if TYPE_CHECKING:
    from dist_amp.storage import Manifest

_FLAGS = """
Flags:
  --step
      The checkpoint to export. Default: the newest.
  --steps
      Checkpoints to average, as 100,200. Default: all.
  --output
      export, average: FILE.safetensors, or FILE.keras with the model itself.
  --all
      export: the optimizer's variables too (.safetensors only).
"""


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Does what the first argument says; returns the exit status."""
    flags.DEFINE_boolean("help", False, "", short_name="h")
    flags.DEFINE_integer("step", None, "")
    flags.DEFINE_list("steps", [], "")
    flags.DEFINE_string("output", None, "")
    flags.DEFINE_boolean("all", False, "")
    try:
        _, *arguments = flags.FLAGS(argv)
        if flags.FLAGS.help or not arguments:
            print(__doc__ + _FLAGS)
            return 0 if flags.FLAGS.help else 2
        name, *rest = arguments
        if name not in _COMMANDS or not rest:
            raise ValueError(
                f"{' '.join(arguments)!r} is not one of "
                f"{', '.join(_COMMANDS)} and a run's folder; see --help."
            )
        start_tensorflow()
        return _call(name, rest)
    except (flags.Error, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _call(name: str, arguments: Sequence[str]) -> int:
    """TensorFlow's errors of files become Python's."""
    import tensorflow as tf

    try:
        return _COMMANDS[name](*arguments)
    except tf.errors.OpError as error:
        raise OSError(error.message) from error


# ------------------------------------------------------------------- commands


def _list(run_dir: str) -> int:
    from dist_amp.callbacks import TRAIN_ONLY
    from dist_amp.checkpoint import readable_size

    rows, total = [], 0
    for path in _find(run_dir):
        manifest, problem = _read(path, is_thorough=False)
        if manifest is None:
            rows.append([path.rpartition("/")[2], "", "", "", problem, ""])
            continue
        total += manifest.num_bytes
        rows.append(
            [
                path.rpartition("/")[2],
                _epochs_of(path),
                readable_size(manifest.num_bytes),
                time.strftime(
                    "%Y-%m-%d %H:%M", time.localtime(manifest.created)
                ),
                "whole" if manifest.is_finite else "whole, holds NaN or inf",
                " ".join(
                    f"{n} {v:.4g}"
                    for n, v in manifest.metrics.items()
                    if n not in TRAIN_ONLY
                ),
            ]
        )
    _print_table(
        ["checkpoint", "epochs", "size", "saved", "state", "results"], rows
    )
    noun = "checkpoint" if len(rows) == 1 else "checkpoints"
    print(f"{len(rows)} {noun}, {readable_size(total)} in all")
    return 0


def _verify(run_dir: str) -> int:
    from dist_amp import storage

    problems = 0
    for path in _find(run_dir):
        _, problem = _read(path, is_thorough=True)
        print(f"{path}: {problem or 'whole'}")
        problems += problem not in ("", _CUT_SHORT)
    for path in storage.find_damaged(saved.folder_of(run_dir)):
        print(f"{path}: set aside as damaged")
        problems += 1
    return 1 if problems else 0


def _diff(run_dir: str, *which: str) -> int:
    import numpy as np

    from dist_amp import storage

    paths = [saved.path_of(run_dir, one) for one in which] or _find(run_dir)[
        -2:
    ]
    if len(paths) != 2:
        raise ValueError(f"two checkpoints are compared. Received {paths}.")
    one, other = (storage.read_verified(path) for path in paths)
    names = sorted({*one, *other})
    num_different, rows = 0, []
    for name in names:
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            rows.append([name, f"only in {paths[a is None]}", "", ""])
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            shown = f"{a.dtype}{list(a.shape)} {b.dtype}{list(b.shape)}"
            rows.append([name, shown, "", ""])
        elif a.tobytes() != b.tobytes():
            difference = np.abs(a.astype("float64") - b.astype("float64"))
            relative = difference.mean() / (
                np.abs(a.astype("float64")).mean() or 1.0
            )
            rows.append(
                [name, "", f"{difference.max():.3g}", f"{relative:.3g}"]
            )
    num_different = len(rows)
    _print_table(["tensor", "", "largest difference", "mean, relative"], rows)
    print(
        f"{len(names) - num_different} of {len(names)} tensors are equal bit "
        f"for bit in {paths[0]} and {paths[1]}"
    )
    for key, value in storage.read_state(paths[0]).items():
        there = storage.read_state(paths[1]).get(key)
        if isinstance(value, int | float | str) and value != there:
            print(f"{key}: {str(value)[:60]} there, {str(there)[:60]} here")
    return 1 if num_different else 0


def _export(run_dir: str) -> int:
    from dist_amp import storage

    step = flags.FLAGS.step
    path = (
        saved.newest(run_dir)
        if step is None
        else saved.path_of(run_dir, str(step))
    )
    prefix = "" if flags.FLAGS.all else "model/"
    _write(path, storage.read_verified(path, prefix))
    return 0


def _average(run_dir: str) -> int:
    """Integers and random states are those of the last one."""
    from dist_amp import storage

    steps = flags.FLAGS.steps
    paths = [saved.path_of(run_dir, step) for step in steps] or saved.whole(
        run_dir
    )
    if len(paths) < 2:
        raise ValueError(f"there must be two or more. Received {paths}.")
    last = storage.read_verified(paths[-1], "model/")
    averaged = dict(last)
    floats = [n for n, tensor in last.items() if "float" in tensor.dtype.name]
    total = {name: last[name].astype("float64") for name in floats}
    for path in paths[:-1]:
        tensors = storage.read_verified(path, "model/")
        if tensors.keys() != last.keys():
            raise ValueError(f"{path} is of another model than {paths[-1]}.")
        for name in floats:
            total[name] += tensors[name].astype("float64")
    for name in floats:
        averaged[name] = (total[name] / len(paths)).astype(last[name].dtype)
    _write(paths[-1], averaged)
    print(f"the average of {', '.join(p.rpartition('/')[2] for p in paths)}")
    return 0


_COMMANDS = {
    "ls": _list,
    "verify": _verify,
    "diff": _diff,
    "export": _export,
    "average": _average,
}
_CUT_SHORT = "cut short: no checkpoint"


# -------------------------------------------------------------------- private


def _find(run_dir: str) -> list[str]:
    from dist_amp import storage

    return storage.find(saved.folder_of(run_dir))


def _read(path: str, *, is_thorough: bool) -> tuple["Manifest | None", str]:
    """Its manifest, and what is wrong with it."""
    from dist_amp import storage

    read = storage.check if is_thorough else storage.read_manifest
    try:
        manifest = read(path)
    except storage.DamagedError as error:
        return None, f"damaged: {error}"
    return manifest, "" if manifest else _CUT_SHORT


def _epochs_of(path: str) -> str:
    """Epochs done; "?" where the file that tells is damaged."""
    from dist_amp import storage

    try:
        return str(storage.read_state(path).get("epoch", 0))
    except (*storage.IO_ERRORS, ValueError, KeyError):
        return "?"


def _write(path: str, tensors: dict[str, Any]) -> None:
    """Weights to `--output`, as its ending says."""
    from dist_amp import weights

    output = flags.FLAGS.output or f"{path.rpartition('/')[2]}.safetensors"
    suffix = pathlib.Path(output).suffix
    if suffix == ".safetensors":
        names = {
            name: _short(name)
            for name in tensors
            if flags.FLAGS.all or weights.is_weight(name)
        }
        if len(set(names.values())) < len(names):
            names = {name: name for name in names}
        weights.save(output, {short: tensors[n] for n, short in names.items()})
    elif suffix == ".keras":
        _remake(path, tensors).save(output)
    else:
        raise ValueError(
            f"--output must end in .safetensors or .keras. Received {output}."
        )
    print(f"{path} -> {output}")


def _short(name: str) -> str:
    """A variable's path, without group and place."""
    group, _, path = name.split("/", maxsplit=2)
    return path if group == "model" else f"{group}/{path}"


def _remake(path: str, tensors: dict[str, Any]) -> Any:
    """The model from what the checkpoint says of it, with these weights."""
    import keras

    from dist_amp import storage

    text = storage.read_state(path).get("model")
    if text is None:
        raise ValueError(
            "Keras cannot make this model from its configuration (a subclass "
            "without get_config?): export to .safetensors, and read that "
            "with --initial_weights or dist_amp.weights.load."
        )
    model = keras.models.model_from_json(text)
    values = [t for n, t in sorted(tensors.items()) if n.startswith("model/")]
    for variable, value in zip(model.variables, values, strict=True):
        variable.assign(value)
    return model


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [
        max(map(len, column)) for column in zip(header, *rows, strict=True)
    ]
    for row in (header, *rows):
        cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    run()
