"""What a training step takes, before it is paid for.

From one trace, without any device: parameters, FLOPs, memory, all-reduced
bytes. With --topology the TPU's own compiler compiles the step here: how much
of the HBM it uses, whether it fits, which collectives are left, and which
operations a TPU cannot run, with the line of your code that makes them. Where
--run_dir holds a run, what was measured stands beside it.

  python -m launch.plan --global_batch_size=4096 --num_replicas=8
  python -m launch.plan --topology=v5e:2x2 --largest_batch --json=plan.json

All flags of launch.train hold; --topology needs the extra tpu-plan.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from launch.config import ConfigError, TrainConfig, check_positive, flag
from launch.errors import is_ours
from launch.flags import read_command_line
from launch.quiet import quiet_start
from launch.run_dir import RunDir

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """The settings of training, and what is planned for them."""

    topology: str | None = flag(
        None, "A TPU to compile for, as v5e:2x2, v4:2x2x1 or v6e:2x4."
    )
    largest_batch: bool = flag(
        False,
        "With --topology: searches for the largest batch of a core that fits; "
        "compiles some times.",
    )
    num_replicas: int | None = flag(
        None,
        "Replicas that are to share the global batch. Default: the cores of "
        "--topology, else --devices or what this machine has.",
    )
    device_memory_gib: float | None = flag(
        None, "Memory of a device without --topology, to tell whether it fits."
    )
    json: str | None = flag(None, "A file for the plan as JSON.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_replicas", "device_memory_gib")
        if self.topology is None and self.largest_batch:
            raise ConfigError(
                "--largest_batch asks the TPU's compiler: pass --topology."
            )
        if self.topology is None:
            return
        for name in ("devices", "num_logical_cpus", "workers", "num_replicas"):
            if getattr(self, name):
                raise ConfigError(
                    f"--{name} contradicts --topology, which tells how many "
                    "replicas there are: drop it."
                )
        if self.strategy not in ("auto", "tpu") or self.device_memory_gib:
            name = "device_memory_gib" if self.device_memory_gib else "strategy"
            raise ConfigError(f"--{name} contradicts --topology: drop it.")


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.path.insert(0, "")  # as `python -m` does: the user's modules
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Prints the plan.

    Returns:
        0; or 1 if the step does not fit, or cannot run on a TPU; or 2 if
        settings are wrong.
    """
    try:
        config = read_command_line(argv, PlanConfig, __doc__)
        if config is None:
            return 0
        return plan(config)
    except (flags.Error, ValueError) as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(config: PlanConfig) -> int:
    """Makes the plan, prints it, writes it; see `main`."""
    with quiet_start():
        from dist_amp import ahead_of_time
        from launch import build, inputs

        devices, num_replicas = _devices(config)
    with contextlib.redirect_stdout(sys.stderr):  # TFDS tells what it prepares
        data = inputs.load_data(config)
    traced = dataclasses.replace(
        config,
        jit_compile=False,
        wire_dtype=config.wire_dtype if config.topology else "float32",
        wire_check_interval=None,
        wire_error_bound=None,
    )
    trainer = build.make_trainer(traced, devices, data)
    rows = math.ceil(config.batch_size / num_replicas)
    content = _planned(config, trainer, data, (num_replicas, rows))
    status = 0
    if config.topology:
        try:
            content |= _for_tpu(config, trainer, data, rows)
        except ahead_of_time.UnsupportedError as error:
            content |= {
                "fits": None,
                "unsupported": [dataclasses.asdict(e) for e in error.found],
            }
            print(f"error: {error}", file=sys.stderr)
            status = 1
    content |= _measured(config, content)
    print(_table(config, devices, content))
    if config.json:
        text = json.dumps(content, indent=2) + "\n"
        pathlib.Path(config.json).write_text(text)
    return 1 if content.get("fits") is False else status


def _devices(config: PlanConfig) -> tuple[Any, int]:
    """What the step is traced under, and how many replicas are planned for."""
    import dist_amp
    from dist_amp import ahead_of_time, strategy
    from launch import hardware

    if config.topology:
        number = ahead_of_time.num_cores(config.topology)
        # Two stand for all: each has its own copy of the variables here.
        made: Any = ahead_of_time.make_strategy(min(2, number))
        kind, reason = "tpu", config.topology
    else:
        number = config.num_replicas or _num_devices(config)
        made = strategy.make_strategy("one_device", devices=["CPU:0"])
        kind, reason = "one_device", "the trace of one replica"
    with dist_amp.scope(made, config.precision) as precision:
        pass
    return hardware.Devices(made, kind, reason, precision), number


def _num_devices(config: PlanConfig) -> int:
    from dist_amp import strategy

    if config.workers:
        return len(config.workers)
    given = len(config.devices) or config.num_logical_cpus
    return given or len(strategy.find_devices())


def _planned(
    config: PlanConfig, trainer: Any, data: Any, shape: tuple[int, int]
) -> dict[str, Any]:
    from dist_amp import plan as plan_lib

    num_replicas, rows = shape
    made = plan_lib.make(
        trainer,
        data.train,
        num_replicas=num_replicas,
        per_replica_batch_size=rows,
        wire_dtype=config.wire_dtype,
    )
    content = dataclasses.asdict(made)
    content |= {
        "global_batch_size": config.global_batch_size,
        "memory_bytes": made.memory_bytes,
    }
    if config.device_memory_gib:
        limit = int(config.device_memory_gib * _GIB)
        content["fits"] = made.memory_bytes <= limit
    return content


def _for_tpu(
    config: PlanConfig, trainer: Any, data: Any, rows: int
) -> dict[str, Any]:
    from dist_amp import plan as plan_lib

    found = plan_lib.make_for_tpu(
        trainer,
        data.train,
        topology=config.topology or "",
        per_replica_batch_size=rows,
        searches=config.largest_batch,
    )
    return dataclasses.asdict(found)


def _measured(config: PlanConfig, content: dict[str, Any]) -> dict[str, Any]:
    """What the last epoch of the run in the folder took."""
    path = RunDir(config.directory).metrics
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    if not trained:
        return {}
    last = trained[-1]
    rate = last["steps_per_sec"]
    measured = {
        "run_dir": config.directory,
        "steps_per_sec": rate,
        "flops_per_sec": rate * content["flops"],
        "peak_memory_bytes": last.get("peak_memory_bytes"),
    }
    return {"measured": measured}


# ----------------------------------------------------------------- the table


def _table(config: PlanConfig, devices: Any, content: dict[str, Any]) -> str:
    lines = [
        *_lines_of_plan(config, devices, content),
        *_lines_of_tpu(content),
        *_lines_of_run(content.get("measured")),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _lines_of_plan(
    config: PlanConfig, devices: Any, content: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    precision = devices.precision
    yield "model", f"{config.model}, {content['parameters']:,} parameters"
    yield "precision", f"{precision.name} ({precision.reason})"
    yield (
        "batch",
        f"{config.global_batch_size} examples a step, at most "
        f"{content['per_replica_batch_size']} on each of "
        f"{content['num_replicas']} replica(s)",
    )
    more = content["uncounted_products"]
    more_text = f", and {more} products in loops" if more else ""
    yield "FLOPs a step", f"{_si(content['flops'])}FLOP{more_text}"
    for name in ("parameter", "optimizer", "gradient"):
        yield f"{name} memory", _size(content[f"{name}_bytes"])
    yield "activation memory", f"at most {_size(content['activation_bytes'])}"
    yield "together", f"{_size(content['memory_bytes'])} on each replica"
    number = content["num_all_reduces"]
    yield (
        "all-reduced",
        f"{_size(content['all_reduce_bytes'])} from each replica"
        + (f", in {number} operation(s)" if number is not None else ""),
    )
    if config.device_memory_gib:
        yield "fits", _yes(content["fits"], f"{config.device_memory_gib:g} GiB")


def _lines_of_tpu(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "hbm_bytes" not in content:
        return
    used, limit = content["hbm_used_bytes"], content["hbm_bytes"]
    yield "TPU", content["topology"]
    told = "more than there is" if used is None else _size(used)
    yield "HBM used", f"{told} of {_size(limit)} on each core"
    yield "fits", _yes(content["fits"], _size(limit))
    compiled = content["compiled"]
    if compiled:
        yield "compiled in", f"{compiled['seconds']:.1f} s"
        yield (
            "FLOPs of a core",
            f"{_si(compiled['flops'])}FLOP, by its compiler",
        )
        for name, number in compiled["collectives"].items():
            yield "collectives", f"{number} {name}"
    largest = content["largest_per_replica_batch_size"]
    if largest == 0:
        yield "largest batch", "not even one example fits"
    elif largest is not None:
        total = largest * content["num_replicas"]
        yield "largest batch", f"{largest:,} examples a core, {total:,} in all"


def _lines_of_run(
    measured: dict[str, Any] | None,
) -> Iterator[tuple[str, str]]:
    if not measured:
        return
    yield (
        f"measured in {measured['run_dir']}",
        f"{measured['steps_per_sec']:,.1f} steps/s, "
        f"{_si(measured['flops_per_sec'])}FLOP/s",
    )
    peak = measured["peak_memory_bytes"]
    if peak:
        yield "most memory in use", f"{_size(peak)} on a device"


def _size(number: float) -> str:
    """Bytes, in a unit that suits."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def _si(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} P"


def _yes(fits: bool, limit: str) -> str:
    return "yes" if fits else f"NO: more than {limit}"


if __name__ == "__main__":
    run()
