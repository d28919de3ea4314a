"""The replica-equivalence certificate: one's own model, proved on N replicas.

Each update is made twice from the same state, on one device and on several
replicas, and losses, gradients, variables and metrics are compared, those of
the optimizer and of `Trainer.state` too; then training goes on from what the
one device did. So rounding does not add up, and the first update and
variable that differ are the ones at fault.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from dist_amp import causes, random_state
from dist_amp import difference as difference_lib
from dist_amp import precision as precision_lib
from dist_amp.auto_layers import AutoLayers
from dist_amp.certificate import Case, Certificate
from dist_amp.comparison import (
    NUMERICS,
    Comparison,
    describe_error,
    describe_not_finite,
    first_broken,
    names_of,
)
from dist_amp.difference import Tolerance
from dist_amp.metrics import MetricsLike
from dist_amp.optimizer import MAX_SKIPS_AT_FLOOR, LossScaleOptimizer
from dist_amp.stream import DatasetLike, one_pass
from dist_amp.subject import (
    Parts,
    Record,
    Subject,
    Variation,
    find_devices,
    make_strategy,
    path_of,
)
from dist_amp.trainer import Trainer

SUITES = (
    "replicas",
    "overflow",
    "accumulation",
    "xla",
    "restart",
    "precision",
)

OptimizerFn: TypeAlias = Callable[[], keras.optimizers.Optimizer]

# Of the losses of a training in half precision, from one in float32.
_FREE_TOLERANCE = {"float16": 0.02, "bfloat16": 0.05}


def verify(
    model_fn: Callable[[], keras.Model],
    dataset: DatasetLike,
    *,
    optimizer_fn: Callable[
        [], keras.optimizers.Optimizer
    ] = keras.optimizers.Adam,
    loss: Any = None,
    metrics: MetricsLike = (),
    trainer: Callable[..., Trainer] = Trainer,
    precision: str = "auto",
    num_steps: int = 20,
    num_replicas: Sequence[int] = (2, 4),
    suites: Sequence[str] = SUITES,
    seed: int = 0,
    on_case: Callable[[Case], None] | None = None,
) -> Certificate:
    """Proves on this host that a model trains alike on any number of replicas.

    Compares losses, gradients, variables and metrics of one device with those
    of several replicas, with full and smaller batches, an overflow on one
    replica, accumulated gradients, XLA, after a restart from a checkpoint, and
    in the precision against float32. Dropout, noise and Keras' augmentation are
    turned off: each replica draws its own. The replicas are on GPUs if there
    are enough for the largest number, else all of them on CPUs, the one device
    as well.

    Args:
        model_fn: Makes the model; called in each scope.
        dataset: Global batches as in `Trainer.fit`, at least one; larger
            than the number of replicas.
        optimizer_fn: Makes the Keras optimizer, wrapped or not; a wrapped one
            keeps its loss scale, and its wire is made exact.
        loss: As in `Trainer`.
        metrics: As in `Trainer`.
        trainer: `Trainer` or a class that overrides its steps. If it takes
            more arguments, `functools.partial(MyTrainer, temperature=2.0)`.
        precision: As in `dist_amp.scope`. With "auto_layers" the layers are
            chosen on one device, as `AutoLayers` does before the first epoch.
        num_steps: Updates of each comparison.
        num_replicas: Replicas.
        suites: Which comparisons to make, out of `SUITES`.
        seed: Of the weights.
        on_case: Called with each case as it ends.

    Returns:
        The `Certificate`; print it.

    Raises:
        ValueError: There are not so many devices (`strategy.use_logical_cpus`
            makes them, before TensorFlow has touched one), or an argument is
            out of range.

    Example:
    >>> dataset = tf.data.Dataset.from_tensor_slices(
    ...     (tf.random.normal([16, 4]), tf.range(16) % 3)).batch(8)
    >>> certificate = dist_amp.verify(
    ...     lambda: keras.Sequential([keras.Input((4,)),
    ...                               keras.layers.Dense(3, dtype="float32")]),
    ...     dataset,
    ...     loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ...     precision="float32", num_steps=3, num_replicas=[2])
    >>> certificate.passed
    True
    """
    if not set(suites) <= set(SUITES) or not suites:
        raise ValueError(
            f"`suites` must be out of {', '.join(SUITES)}. Received "
            f"{list(suites)} (--suites)."
        )
    if not num_replicas or min(num_replicas) < 2:
        raise ValueError(
            "`num_replicas` must be numbers greater than 1. Received "
            f"{list(num_replicas)} (--num_replicas)."
        )
    if num_steps < 2:
        raise ValueError(
            f"`num_steps` must be at least 2. Received {num_steps} "
            "(--num_steps)."
        )
    devices = find_devices(max(num_replicas))
    resolved = precision_lib.resolve(precision, make_strategy(devices[:1]))
    parts = Parts(
        model_fn=model_fn,
        optimizer_fn=optimizer_fn,
        loss=loss,
        metrics=metrics,
        trainer=trainer,
        seed=seed,
        precision=resolved.name,
        devices=devices,
    )
    before = random_state.read_host()
    try:
        with precision_lib.keep_rewrites():
            examiner = _Examiner(parts, dataset, num_steps, tuple(num_replicas))
            cases = tuple(_told(examiner.cases(suites), on_case))
    finally:
        random_state.write_host(before)
    return Certificate(
        cases=cases,
        precision=resolved.name,
        num_steps=num_steps,
        devices=tuple(devices),
        turned_off=tuple(examiner.turned_off),
        notes=tuple(examiner.notes),
        left_out=tuple(examiner.left_out),
    )


def num_cases(suites: Sequence[str], num_replicas: Sequence[int]) -> int:
    """How many cases `verify` makes at most.

    Args:
        suites: As in `verify`.
        num_replicas: As in `verify`.
    """
    number = len(num_replicas)
    made = {
        "replicas": 2 * (1 + number),
        "overflow": number,
        "accumulation": number,
        "xla": 2,
        "restart": 1,
        "precision": 1,
    }
    return sum(made[name] for name in set(suites))


def _told(
    cases: Iterator[Case], on_case: Callable[[Case], None] | None
) -> Iterator[Case]:
    for case in cases:
        if on_case is not None:
            on_case(case)
        yield case


class _Examiner:
    """Runs the comparisons of one certificate."""

    def __init__(
        self,
        parts: Parts,
        dataset: DatasetLike,
        num_steps: int,
        num_replicas: tuple[int, ...],
    ):
        self._parts = parts
        self._precision = precision_lib.Precision(parts.precision)
        self._num_steps = num_steps
        self._num_replicas = num_replicas
        first = one_pass(dataset)
        self._spec = tf.nest.map_structure(_without_size, first.element_spec)
        self._batches = _read(first, num_steps, max(num_replicas))
        dtype = self._precision.compute_dtype
        self._tolerance = difference_lib.TOLERANCES[dtype]
        self.turned_off: list[str] = []
        self.notes: list[str] = []
        self.left_out: list[str] = []
        if self._precision.adapts_layers:
            self._choose_layers(first)

    def _choose_layers(self, dataset: tf.data.Dataset) -> None:
        """What `AutoLayers` does before the first epoch, once for all."""
        trainer = self._subject(records=False).trainer
        chosen = AutoLayers(trainer, dataset)
        chosen.on_epoch_begin(0)
        self._parts = dataclasses.replace(
            self._parts,
            pinned=chosen.get_state(),
            first_scale=float(
                tf.convert_to_tensor(trainer.optimizer.loss_scale)
            ),
        )
        self.notes.append(
            "in float32, as `AutoLayers` chose on one device before the first "
            f"update: {', '.join(chosen.pinned) or 'no layer'}"
        )

    def cases(self, suites: Sequence[str]) -> Iterator[Case]:
        """All of some suites, one after another."""
        made = {
            "replicas": self._on_replicas,
            "overflow": self._after_an_overflow,
            "accumulation": self._with_accumulation,
            "xla": self._with_xla,
            "restart": self._after_a_restart,
            "precision": self._in_this_precision,
        }
        for name in SUITES:
            if name in suites:
                yield from made[name]()

    def _subject(self, *, records: bool = True, **variation: Any) -> Subject:
        variation = {"precision": self._precision.name, **variation}
        subject = Subject(
            self._parts, Variation(**variation), self._spec, records=records
        )
        self.turned_off = subject.turned_off
        return subject

    @functools.cached_property
    def _plain(self) -> tuple[Subject, list[np.ndarray]]:
        subject = self._subject()
        return subject, subject.state()

    def _reference(self) -> Subject:
        """The plain training on one device, at its start."""
        subject, start = self._plain
        subject.load(start)
        return subject

    # ------------------------------------------------------------- suites

    def _on_replicas(self) -> Iterator[Case]:
        reference = self._reference()
        again = self._subject()
        subjects = {
            n: self._subject(num_replicas=n) for n in self._num_replicas
        }
        names = {f"{n} replicas": subject for n, subject in subjects.items()}
        for kind, batches in self._kinds(reference).items():
            runs = {
                f"{name}, {kind}": one
                for name, one in {"1 device again": again, **names}.items()
            }
            yield from self._compare(reference, runs, batches)

    def _after_an_overflow(self) -> Iterator[Case]:
        has_scale = isinstance(
            self._plain[0].trainer.optimizer, LossScaleOptimizer
        )
        if not has_scale and self._precision.needs_loss_scale:
            self.left_out.append(
                "overflow: the optimizer has no loss scale, so that no update "
                "is skipped; drop `loss_scale=None` (--loss_scale)"
            )
            return
        if not has_scale:
            self.notes.append(
                "overflow: with a dynamic loss scale, which training in "
                f"{self._precision.name} has not"
            )
        options: dict[str, Any] = {"loss_scale": "dynamic", "overflows": True}
        reference = self._subject(**options)
        subjects = {
            f"{n} replicas, overflow on replica {n - 1}": self._subject(
                num_replicas=n, **options
            )
            for n in self._num_replicas
        }
        batches = self._groups(reference)
        yield from self._compare(reference, subjects, batches, overflows=True)

    def _with_accumulation(self) -> Iterator[Case]:
        options: dict[str, Any] = {"accumulation": 2}
        try:
            reference = self._subject(**options)
            subjects = {
                f"{n} replicas, 2 accumulated batches": self._subject(
                    num_replicas=n, **options
                )
                for n in self._num_replicas
            }
            batches = self._groups(reference)
            reference.step(batches[0])  # it may be refused when it is traced
        except ValueError as error:
            self.left_out.append(
                f"accumulated gradients: {describe_error(error)}"
            )
            return
        yield from self._compare(reference, subjects, batches)

    def _with_xla(self) -> Iterator[Case]:
        if self._precision.rewrites_graph:
            self.left_out.append(
                "XLA: Grappler cannot rewrite what it compiles"
            )
            return
        for n in (1, self._num_replicas[0]):
            name = f"{n} {'replicas' if n > 1 else 'device'}, XLA"
            try:
                subject = self._subject(num_replicas=n, jit_compile=True)
            except ValueError as error:  # a combination that is refused
                self.left_out.append(f"{name}: {error}")
                continue
            reference = self._reference()
            batches = self._groups(reference)
            yield from self._compare(reference, {name: subject}, batches)

    def _after_a_restart(self) -> Iterator[Case]:
        n = self._num_replicas[0]
        straight, first, second = (
            self._subject(num_replicas=n, records=False) for _ in range(3)
        )
        groups = self._groups(straight)
        dataset = straight.dataset([b for group in groups for b in group])
        length = straight.batches_per_step * len(groups)
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(length))
        half = max(1, len(groups) // 2)
        _fit(straight, dataset)
        with tempfile.TemporaryDirectory() as folder:
            _fit(first, dataset, stop_at=half, checkpoint_dir=folder)
            _fit(second, dataset, checkpoint_dir=folder)
        name = f"{n} replicas, after a save and a restore"
        tolerance = restart_tolerance(self._parts.devices, self._tolerance)
        yield _case_of_restart(
            name, (second, straight), dataset, tolerance=tolerance
        )

    def _in_this_precision(self) -> Iterator[Case]:
        dtype = self._precision.compute_dtype
        if dtype == "float32":
            return
        half = self._reference()
        groups = self._groups(half)
        full = self._subject(precision="float32", loss_scale=None)
        full.load_weights(half)
        with precision_lib.keep_rewrites(turned_off=True):
            wanted = [full.step(group) for group in groups]
        case = Case(name=f"losses in {dtype} and in float32", passed=False)
        broken = first_broken(wanted, names_of(full))
        if broken is not None:
            step, what = broken
            yield _failed(
                case, step, what, describe_not_finite("float32", step, what)
            )
            return
        try:
            records = [_applied(half, group) for group in groups]
        except FloatingPointError:
            cause = f"{dtype} overflows at any loss scale; {NUMERICS}"
            yield _failed(case, 0, None, cause)
            return
        yield _case_of_losses(case, half, records, wanted)
        if self._precision.rewrites_graph and all(
            a.loss == b.loss for a, b in zip(records, wanted, strict=True)
        ):
            self.notes.append(
                f"{self._precision.name}: Grappler rewrote nothing of this "
                "model here, so that float32 was verified"
            )

    # --------------------------------------------------------- comparisons

    def _kinds(self, subject: Subject) -> dict[str, list[list[Any]]]:
        """Full batches, and smaller ones that replicas cannot share alike."""
        full = self._groups(subject)
        size = _size(self._batches[0])
        odd = max(1, size // 2 + 1 - (size // 2) % 2)
        sizes = [odd, size - 1, 1]
        smaller = [
            [_cut(batch, sizes[(i + j) % 3]) for j, batch in enumerate(group)]
            for i, group in enumerate(full)
        ]
        return {"full batches": full, "smaller batches": smaller}

    def _groups(self, subject: Subject) -> list[list[Any]]:
        """The batches of each update."""
        number = subject.batches_per_step
        endless = [
            self._batches[i % len(self._batches)]
            for i in range(number * self._num_steps)
        ]
        return [endless[i : i + number] for i in range(0, len(endless), number)]

    def _compare(
        self,
        reference: Subject,
        subjects: Mapping[str, Subject],
        groups: Sequence[Sequence[Any]],
        *,
        overflows: bool = False,
    ) -> Iterator[Case]:
        """Steps all subjects from each state of the reference."""
        comparisons = [
            Comparison(name, subject, reference, self._tolerance)
            for name, subject in subjects.items()
        ]
        num_applied, skips = 0, 0
        for step, batches in enumerate(groups):
            is_hit = overflows and step % 3 == 1
            state = reference.state()
            wanted = reference.step(batches, overflows=is_hit)
            num_applied += not wanted.is_skipped
            skips = skips + 1 if wanted.is_skipped else 0
            broken = first_broken([wanted], names_of(reference))
            if broken is not None:
                for one in comparisons:
                    one.end(step, broken[1])
            if broken is not None or skips == MAX_SKIPS_AT_FLOOR - 1:
                break  # before the optimizer ends it
            for one in comparisons:
                if not one.has_failed:
                    one.take(step, batches, (state, wanted), overflows=is_hit)
        self._note_scale(reference)
        for one in comparisons:
            self.notes += one.notes()
            is_over = not num_applied or skips == MAX_SKIPS_AT_FLOOR - 1
            yield _nothing(one.case()) if is_over else one.case()

    def _note_scale(self, subject: Subject) -> None:
        """What another precision would show, once."""
        note = (
            f"{causes.where(subject)} never called `optimizer.scale_loss`: in "
            "float16 it would train without a loss scale"
        )
        if not subject.scales_loss and note not in self.notes:
            self.notes.append(note)


def _failed(case: Case, step: int, what: str | None, cause: str) -> Case:
    return dataclasses.replace(
        case, passed=False, first_step=step, first_variable=what, cause=cause
    )


def _nothing(case: Case) -> Case:
    """A case in which updates are skipped on and on proves nothing."""
    return dataclasses.replace(
        case,
        passed=False,
        cause=case.cause
        or "nothing was compared: one update after another was skipped on one "
        "device, too, since gradients were not finite at any loss scale; "
        + NUMERICS,
    )


def _applied(subject: Subject, batches: Sequence[Any]) -> Record:
    """An update, made again at a lower loss scale for as long as it is skipped.

    Raises:
        FloatingPointError: No lower scale is left, or none would help: the
            loss itself is not finite.
    """
    scale = math.inf
    while True:
        record = subject.step(batches)
        if not record.is_skipped:
            return record
        lower = record.settings["loss_scale"]
        if lower >= scale or not math.isfinite(record.loss):
            raise FloatingPointError("skipped at any loss scale")
        scale = lower


class _StopAt(keras.callbacks.Callback):
    """Ends a fit, as a signal would."""

    def __init__(self, trainer: Trainer, step: int | None):
        super().__init__()
        self._trainer = trainer
        self._step = step

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Asks to stop after so many updates."""
        if batch + 1 == self._step:
            self._trainer.request_stop("to be restarted")


def _fit(
    subject: Subject,
    dataset: tf.data.Dataset,
    *,
    stop_at: int | None = None,
    checkpoint_dir: str | None = None,
) -> None:
    subject.trainer.fit(
        dataset,
        callbacks=[_StopAt(subject.trainer, stop_at)],
        steps_per_loop=1,
        checkpoint_dir=checkpoint_dir,
        verbose=0,
    )


def _case_of_losses(
    case: Case,
    subject: Subject,
    records: Sequence[Record],
    wanted: Sequence[Record],
) -> Case:
    """The losses of a training in half precision beside those in float32."""
    dtype = precision_lib.Precision(subject.variation.precision).compute_dtype
    scale = records[0].settings["loss_scale"]
    if causes.lacks_loss_scale(records[0], wanted[0], loss_scale=scale):
        first = names_of(subject).trainable[0]
        cause = causes.of_missing_scale(subject)
        return _failed(case, 0, f"{first} (gradient)", cause)
    errors = [
        difference_lib.relative_loss(one.loss, other.loss)
        for one, other in zip(records, wanted, strict=True)
    ]
    error, tolerance = float(np.mean(errors)), _FREE_TOLERANCE[dtype]
    measured = dataclasses.replace(case, max_error=error, tolerance=tolerance)
    if error <= tolerance:
        return dataclasses.replace(measured, passed=True)
    step = next(i for i, one in enumerate(errors) if not one <= tolerance)
    cause = f"{dtype} loses what this model needs: {NUMERICS}"
    return _failed(measured, step, "loss", cause)


def restart_tolerance(devices: Sequence[str], tolerance: Tolerance) -> float:
    """CPUs must give the same bits; a GPU adds up in another order."""
    return 0.0 if devices[0].startswith("CPU") else tolerance.update


def _case_of_restart(
    name: str,
    pair: tuple[Subject, Subject],
    dataset: tf.data.Dataset,
    *,
    tolerance: float,
) -> Case:
    subject, reference = pair
    values = zip(
        reference.paths(), subject.state(), reference.state(), strict=True
    )
    errors = {
        path: difference_lib.distance(value, other)
        for path, value, other in values
    }
    beyond = (path for path, error in errors.items() if not error <= tolerance)
    first = next(beyond, None)
    cause = None
    if first is not None:
        missing = [path_of(v) for v in subject.trainer.untracked(dataset)]
        cause = (
            f"checkpoints do not hold {', '.join(missing)}: add it to "
            "`Trainer.state`"
            if missing
            else "something that the step uses is in no checkpoint: add its "
            "variables to `Trainer.state`"
        )
    return Case(
        name=name,
        passed=first is None,
        max_error=max(errors.values()),
        tolerance=tolerance,
        first_variable=first,
        cause=cause,
    )


# --------------------------------------------------------------- the batches


def _read(dataset: tf.data.Dataset, number: int, rows: int) -> list[Any]:
    """Full batches, as arrays: those of the first batch's size."""
    batches: list[Any] = []
    for batch in dataset.take(4 * number):
        arrays = tf.nest.map_structure(lambda leaf: leaf.numpy(), batch)
        if batches and _size(arrays) != _size(batches[0]):
            continue
        batches.append(arrays)
        if len(batches) == number:
            break
    if not batches or _size(batches[0]) < max(3, rows):
        raise ValueError(
            "`dataset` must hold a batch with an example for each replica at "
            f"least. Received batches of {_size(batches[0]) if batches else 0} "
            f"examples for {rows} replicas (--global_batch_size)."
        )
    return batches


def _without_size(spec: tf.TensorSpec) -> tf.TensorSpec:
    return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)


def _size(batch: Any) -> int:
    return len(tf.nest.flatten(batch)[0])


def _cut(batch: Any, rows: int) -> Any:
    return tf.nest.map_structure(lambda leaf: leaf[:rows], batch)
