"""The replica-equivalence certificate: one's own model, proved on N replicas.

Each update is made twice from the same state, on one device and on several
replicas, and losses, gradients, the model's variables and metrics are compared,
the optimizer's variables among the replicas; then training goes on from what
the one device did. So rounding does not add up, and the first update and
variable that differ are the ones at fault.
"""

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from dist_amp import causes, optimizer, random_state
from dist_amp import difference as difference_lib
from dist_amp import precision as precision_lib
from dist_amp.difference import Difference, Names, Tolerance
from dist_amp.metrics import MetricsLike
from dist_amp.stream import DatasetLike, one_pass
from dist_amp.subject import Parts, Record, Subject, Variation, make_strategy
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
        name: What was compared.
        passed: Whether rounding explains all differences.
        max_error: The worst one, relative; None if it could not be compared.
        tolerance: Of that one.
        first_step: The first update that differs beyond tolerance, from 0.
        first_variable: The first that differs in it, and in what.
        cause: The likeliest, in the user's terms.
    """

    name: str
    passed: bool
    max_error: float | None = None
    tolerance: float | None = None
    first_step: int | None = None
    first_variable: str | None = None
    cause: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """All comparisons of a model.

    Attributes:
        cases: The comparisons.
        precision: Compute dtype that was verified.
        num_steps: Updates of each comparison.
        left_out: What could not be compared, with the reason.
    """

    cases: tuple[Case, ...]
    precision: str
    num_steps: int
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every case did."""
        return all(case.passed for case in self.cases)

    def as_json(self) -> str:
        """`passed`, `precision`, `num_steps`, `left_out` and `cases`."""
        content = {"passed": self.passed, **dataclasses.asdict(self)}
        return json.dumps(_plain(content), indent=2) + "\n"

    def __str__(self) -> str:
        return "\n".join(_table(self))


def verify(
    model_fn: Callable[[], keras.Model],
    dataset: DatasetLike,
    *,
    optimizer_fn: Callable[
        [], keras.optimizers.Optimizer
    ] = keras.optimizers.Adam,
    loss: Any = None,
    metrics: MetricsLike = (),
    trainer: type[Trainer] = Trainer,
    precision: str = "auto",
    num_steps: int = 20,
    num_replicas: Sequence[int] = (2, 4),
    suites: Sequence[str] = SUITES,
    seed: int = 0,
) -> Certificate:
    """Proves on this host that a model trains alike on any number of replicas.

    Compares losses, gradients, variables and metrics of one device with those
    of several replicas, with full and smaller batches, an overflow on one
    replica, accumulated gradients, XLA, after a restart from a checkpoint, and
    in the precision against float32. Dropout and noise are turned off: each
    replica draws its own.

    Args:
        model_fn: Makes the model; called in each scope.
        dataset: Global batches as in `Trainer.fit`, at least one; larger
            than the number of replicas.
        optimizer_fn: Makes the Keras optimizer.
        loss: As in `Trainer`.
        metrics: As in `Trainer`.
        trainer: `Trainer` or a class that overrides its steps.
        precision: As in `dist_amp.scope`.
        num_steps: Updates of each comparison.
        num_replicas: Replicas, on GPUs or on logical CPUs.
        suites: Which comparisons to make, out of `SUITES`.
        seed: Of the weights.

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
    if num_steps < 2:
        raise ValueError(
            f"`num_steps` must be at least 2. Received {num_steps} "
            "(--num_steps)."
        )
    parts = Parts(
        model_fn=model_fn,
        optimizer_fn=optimizer_fn,
        loss=loss,
        metrics=metrics,
        trainer=trainer,
        seed=seed,
    )
    resolved = precision_lib.resolve(precision, make_strategy(1))
    before = random_state.read_host()
    try:
        examiner = _Examiner(
            parts, dataset, resolved.name, num_steps, tuple(num_replicas)
        )
        cases = tuple(examiner.cases(suites))
    finally:
        random_state.write_host(before)
    return Certificate(
        cases=cases,
        precision=resolved.name,
        num_steps=num_steps,
        left_out=tuple(examiner.left_out),
    )


class _Examiner:
    """Runs the comparisons of one certificate."""

    def __init__(
        self,
        parts: Parts,
        dataset: DatasetLike,
        precision: str,
        num_steps: int,
        num_replicas: tuple[int, ...],
    ):
        self._parts = parts
        self._precision = precision
        self._num_steps = num_steps
        self._num_replicas = num_replicas
        first = one_pass(dataset)
        self._spec = tf.nest.map_structure(_without_size, first.element_spec)
        self._batches = _read(first, num_steps, max(num_replicas))
        dtype = precision_lib.Precision(precision).compute_dtype
        self._tolerance = difference_lib.TOLERANCES[dtype]
        self.left_out: list[str] = []

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
        variation = {"precision": self._precision, **variation}
        return Subject(
            self._parts, Variation(**variation), self._spec, records=records
        )

    # ------------------------------------------------------------- suites

    def _on_replicas(self) -> Iterator[Case]:
        reference = self._subject()
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
            self.left_out.append(f"accumulated gradients: {_described(error)}")
            return
        yield from self._compare(reference, subjects, batches)

    def _with_xla(self) -> Iterator[Case]:
        reference = self._subject()
        for n in (1, self._num_replicas[0]):
            name = f"{n} {'replicas' if n > 1 else 'device'}, XLA"
            if n > 1 and optimizer.is_synchronized(reference.trainer.model):
                self.left_out.append(
                    f"{name}: synchronized layers cannot be compiled there"
                )
                continue
            subject = self._subject(num_replicas=n, jit_compile=True)
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
        yield _case_of_restart(name, second, straight, dataset)

    def _in_this_precision(self) -> Iterator[Case]:
        dtype = precision_lib.Precision(self._precision).compute_dtype
        if dtype == "float32":
            return
        half = self._subject()
        full = self._subject(precision="float32", loss_scale=None)
        full.load_weights(half)
        pairs = [
            (half.step(group).loss, full.step(group).loss)
            for group in self._groups(half)
        ]
        errors = [abs(a - b) / (abs(b) + 1e-6) for a, b in pairs]
        error, tolerance = float(np.mean(errors)), _FREE_TOLERANCE[dtype]
        passed = error <= tolerance
        yield Case(
            name=f"losses in {dtype} and in float32",
            passed=passed,
            max_error=error,
            tolerance=tolerance,
            first_step=None if passed else int(np.nanargmax(errors)),
            cause=None if passed else _OF_PRECISION.format(dtype=dtype),
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
            _Comparison(name, subject, reference, self._tolerance)
            for name, subject in subjects.items()
        ]
        first_skipped = _num_applied(reference)
        for step, batches in enumerate(groups):
            is_hit = overflows and step % 3 == 1
            state = reference.state()
            wanted = reference.step(batches, overflows=is_hit)
            for one in comparisons:
                if not one.has_failed:
                    one.take(step, batches, (state, wanted), overflows=is_hit)
        was_applied = _num_applied(reference) > first_skipped
        for one in comparisons:
            yield one.case() if was_applied else _nothing(one.case())


def _num_applied(subject: Subject) -> int:
    iterations = subject.trainer.optimizer.iterations
    return int(keras.ops.convert_to_numpy(iterations))


def _nothing(case: Case) -> Case:
    """A case in which not one update was applied proves nothing."""
    return dataclasses.replace(
        case,
        passed=False,
        cause=case.cause
        or "nothing was compared: all updates were skipped on one device, too, "
        "since gradients were not finite at any loss scale; `python -m "
        "launch.numerics` tells which layers to keep in float32",
    )


class _Comparison:
    """One subject beside the reference, until something differs."""

    def __init__(
        self,
        name: str,
        subject: Subject,
        reference: Subject,
        tolerance: Tolerance,
    ):
        self._name = name
        self._subject = subject
        self._reference = reference
        self._tolerance = tolerance
        self._names = _names(reference)
        self._worst: Difference | None = None
        self._first: Difference | None = None
        self._cause: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it need not go on."""
        return self._cause is not None

    def take(
        self,
        step: int,
        batches: Sequence[Any],
        expected: tuple[list[np.ndarray], Record],
        *,
        overflows: bool,
    ) -> None:
        """Makes an update from the reference's state, and compares."""
        state, wanted = expected
        try:
            self._subject.load(state)
            record = self._subject.step(batches, overflows=overflows)
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            self._first = Difference(
                what="error",
                name="the step",
                error=math.inf,
                tolerance=0.0,
                step=step,
            )
            self._cause = _described(error)
            return
        found = [
            dataclasses.replace(one, step=step)
            for one in difference_lib.differences(
                record,
                wanted,
                before=state[: len(self._names.trainable)],
                names=self._names,
                tolerance=self._tolerance,
            )
        ]
        worst = max(found, key=lambda one: one.severity)
        if self._worst is None or worst.severity > self._worst.severity:
            self._worst = worst
        beyond = [one for one in found if one.is_beyond]
        if beyond:
            self._first = beyond[0]
            self._cause = causes.explain(
                self._subject,
                self._reference,
                records=(record, wanted),
                found=beyond,
                batches=batches,
            )

    def case(self) -> Case:
        """The verdict."""
        worst, first = self._worst, self._first
        return Case(
            name=self._name,
            passed=first is None,
            max_error=worst.error if worst else None,
            tolerance=worst.tolerance if worst else None,
            first_step=first.step if first else None,
            first_variable=f"{first.name} ({first.what})" if first else None,
            cause=self._cause,
        )


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


_OF_PRECISION = (
    "{dtype} loses what this model needs: `python -m launch.numerics` tells "
    "which layers to keep in float32"
)


def _case_of_restart(
    name: str, subject: Subject, reference: Subject, dataset: tf.data.Dataset
) -> Case:
    pairs = zip(
        reference.paths(), subject.state(), reference.state(), strict=True
    )
    errors = {
        path: difference_lib.distance(value, other)
        for path, value, other in pairs
    }
    first = next((path for path, error in errors.items() if error), None)
    cause = None
    if first is not None:
        missing = [v.name for v in subject.trainer.untracked(dataset)]
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
        tolerance=0.0,
        first_variable=first,
        cause=cause,
    )


def _names(subject: Subject) -> Names:
    trainer = subject.trainer
    return Names(
        trainable=[v.path for v in trainer.model.trainable_variables],
        others=[v.path for v in subject.others],
        optimizer=[v.path for v in trainer.optimizer.variables],
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


# ----------------------------------------------------------------- the table


def _table(certificate: Certificate) -> Iterator[str]:
    cases = certificate.cases
    width = max(len(case.name) for case in cases)
    yield f"{'':{width}}  verdict  largest error  tolerance"
    for case in cases:
        verdict = "equal" if case.passed else "DIFFERS"
        numbers = ""
        if case.max_error is not None:
            numbers = f"{case.max_error:13.1e}  {case.tolerance:9.0e}"
        yield f"{case.name:{width}}  {verdict:7}  {numbers}".rstrip()
    for case in cases:
        if not case.passed:
            yield from ("", *_failure(case))
    for reason in certificate.left_out:
        yield f"left out: {reason}"
    number = sum(not case.passed for case in cases)
    yield ""
    yield (
        f"NOT EQUIVALENT: {number} of {len(cases)} cases differ"
        if number
        else f"EQUIVALENT: {len(cases)} cases, {certificate.num_steps} updates "
        f"each, in {certificate.precision}"
    )


def _failure(case: Case) -> Iterator[str]:
    where = []
    if case.first_step is not None:
        where.append(f"update {case.first_step + 1}")
    if case.first_variable is not None:
        where.append(case.first_variable)
    yield f"{case.name}: {', '.join(where)}"
    yield f"  {case.cause}"


def _described(error: Exception) -> str:
    """What TensorFlow says in many lines, in one."""
    text = str(error)
    operations = re.findall(r"No registered '(\w+)' OpKernel", text)
    if operations:
        return (
            f"XLA has no {', '.join(dict.fromkeys(operations))}: leave it out "
            "of the model, or train without `jit_compile`"
        )
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith(_FRAMES)]
    return f"{type(error).__name__}: {(told or [''])[0][:300]}"


_FRAMES = ("Graph execution error", "Detected at node", "File ", "The op is")


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
