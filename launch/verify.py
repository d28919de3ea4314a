"""Proves on this host that your model trains alike on any number of replicas.

Each update is made on one device and on 2 and 4 replicas from the same state,
and losses, gradients, variables and metrics are compared: with full and smaller
batches, with an overflow on one replica, with accumulated gradients,
under XLA, after a save and a restore, and in the precision against float32.
What differs is named, with the first update, the first variable and the usual
cause. No GPU is needed. Writes
verify.json, and tells on standard error where, and each case as it ends.

  python -m launch.verify --model=my_package.models:build --dataset=mnist
  python -m launch.verify --precision=mixed_float16 --suites=replicas,overflow

The flags of launch.train that make the model, its data, its optimizer and its
precision hold; the others would be ignored, and are refused. Exit status: 0
equivalent, 1 not, 2 wrong settings.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from typing import Any

from absl import flags

from launch.config import ConfigError, TrainConfig, check_positive, flag
from launch.errors import is_ours
from launch.flags import read_command_line
from launch.quiet import quiet_start
from launch.run_dir import OF_DEVICES, OF_KEEPING

# As in dist_amp.verify, which would bring TensorFlow; a test compares them.
SUITES = (
    "replicas",
    "overflow",
    "accumulation",
    "xla",
    "restart",
    "precision",
)


_OWN_REPLICAS = (
    "this program makes one device and --num_replicas on this host by itself"
)
_EXACT_SUMS = (
    "what gradients lose on their way would be found as a difference, so they "
    "travel exactly"
)
_LENGTH = "each comparison is --num_steps updates long, and ends there"
_NOTHING_KEPT = "nothing is kept but the certificate, which goes to --json"

# Settings of training that would be ignored, and what there is instead.
IGNORED = {
    **dict.fromkeys(OF_DEVICES, _OWN_REPLICAS),
    **dict.fromkeys(
        ("wire_dtype", "wire_check_interval", "wire_error_bound"), _EXACT_SUMS
    ),
    "jit_compile": "the suite xla compares training with it and without",
    "data_service": "batches are read here; a service gives the same ones",
    "compilation_cache": "what XLA compiles here is not kept",
    "deterministic": "on CPUs all runs of one seed have the same bits",
    "test_split": "metrics are those of the training's own examples",
    "initial_weights": "weights are new ones, of --seed",
    **dict.fromkeys(
        (
            "steps_per_loop",
            "eval_steps",
            "max_minutes",
            "profile_steps",
            "dry_run",
        ),
        _LENGTH,
    ),
    **dict.fromkeys(
        (*OF_KEEPING, "tensorboard_graph", "histogram_every_epochs"),
        _NOTHING_KEPT,
    ),
}
_OF_SCHEDULES = ("epochs", "steps", "steps_per_epoch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig(TrainConfig):
    """The settings of training, and of what is compared."""

    num_steps: int = flag(20, "Updates of each comparison.")
    num_replicas: tuple[str, ...] = flag(
        ("2", "4"), "Replicas to compare one device with."
    )
    suites: tuple[str, ...] = flag(SUITES, "Comparisons to make.")
    json: str = flag("verify.json", "Where the certificate goes as JSON.")

    def __post_init__(self) -> None:
        self._check_ignored()
        super().__post_init__()
        check_positive(self, "num_steps")
        unknown = [name for name in self.suites if name not in SUITES]
        if unknown or not self.suites:
            raise ConfigError(
                f"--suites must be out of {', '.join(SUITES)}. Received "
                f"{','.join(self.suites)}."
            )
        for text in self.num_replicas:
            if not text.isdigit() or int(text) < 2:
                raise ConfigError(
                    "--num_replicas must be numbers greater than 1, as 2,4. "
                    f"Received {','.join(self.num_replicas)}."
                )

    def _check_ignored(self) -> None:
        ignored = dict(IGNORED)
        if self.schedule == "constant":
            why = f"{_LENGTH}; only a --schedule asks for training's own length"
            ignored |= dict.fromkeys(_OF_SCHEDULES, why)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ignored and value != field.default:
                raise ConfigError(
                    f"--{field.name} would be ignored: {ignored[field.name]}. "
                    f"Received {_text(value)}; drop it."
                )

    @property
    def replicas(self) -> tuple[int, ...]:
        """`num_replicas` as numbers."""
        return tuple(map(int, self.num_replicas))


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def run() -> None:
    """Entry point of the console command; never returns."""
    sys.path.insert(0, "")  # as `python -m` does: the user's modules
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Prints the certificate; returns the exit status."""
    try:
        config = read_command_line(argv, VerifyConfig, __doc__)
        return 0 if config is None else verify(config)
    except (flags.Error, ValueError) as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _tell(case: Any) -> None:
    """A line as each case ends."""
    verdict = "equal" if case.passed else "DIFFERS"
    print(f"{case.name}: {verdict}", file=sys.stderr, flush=True)


def verify(config: VerifyConfig) -> int:
    """Makes the certificate, prints it, writes it; see `main`."""
    with quiet_start():
        import tensorflow as tf

        import dist_amp
        from dist_amp import strategy
        from dist_amp.verify import num_cases
        from launch import inputs, models, updates

        # Which takes the same function of many trainers for one retraced.
        tf.get_logger().setLevel("ERROR")
        strategy.use_logical_cpus(max(config.replicas))
        strategy.find_devices()  # which initializes them
    number = num_cases(config.suites, config.replicas)
    print(
        f"up to {number} cases of {config.num_steps} updates, on 1 device and "
        f"on {', '.join(config.num_replicas)} replicas",
        file=sys.stderr,
    )
    with contextlib.redirect_stdout(sys.stderr):  # TFDS tells what it prepares
        data = inputs.load_data(config)
    # On one device, too: fused batch norm rounds otherwise.
    model_fn = functools.partial(
        models.make_model, config, data, synchronized=True
    )
    with quiet_start():  # float16 on CPUs has its own chatter
        loss = models.make_loss(config, model_fn())
        certificate = dist_amp.verify(
            model_fn,
            data.train,
            optimizer_fn=functools.partial(
                updates.make_optimizer, config, data
            ),
            loss=loss,
            metrics=models.make_metrics(config, loss),
            precision=config.precision,
            num_steps=config.num_steps,
            num_replicas=config.replicas,
            suites=config.suites,
            seed=config.seed,
            on_case=_tell,
        )
    path = pathlib.Path(config.json)
    path.write_text(certificate.as_json())
    print(certificate)
    print(f"wrote {path.absolute()}", file=sys.stderr)
    return 0 if certificate.passed else 1


if __name__ == "__main__":
    run()
