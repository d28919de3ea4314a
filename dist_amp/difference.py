"""By how much one update differs from another, and in what first."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dist_amp.subject import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Relative errors that rounding explains.

    Attributes:
        loss: Of the loss, and of metrics in float32.
        gradient: Of a variable's gradient, by its norm.
        update: Of the change of a variable, the optimizer's too, by its norm.
        state: Of other variables, by their norm.
        noise: A gradient that is smaller than this share of all of them, by
            the size of an entry, may be what rounding left of larger terms,
            as that of a bias before batch normalization: its error is taken
            by the share.
        flips: Share of the examples, and at least one, for which rounding may
            change what a metric counts, as whether the class is right.
    """

    loss: float
    gradient: float
    update: float
    state: float
    noise: float
    flips: float = 0.0


TOLERANCES = {
    "float32": Tolerance(
        loss=1e-5, gradient=1e-4, update=1e-3, state=1e-4, noise=0.5
    ),
    "float16": Tolerance(
        loss=2e-3, gradient=8e-2, update=0.2, state=5e-3, noise=0.1, flips=0.05
    ),
    "bfloat16": Tolerance(
        loss=1e-2, gradient=0.1, update=0.3, state=2e-2, noise=0.3, flips=0.1
    ),
}

# What `what` of a difference may be, in the order in which they are looked at.
SETTING, LOSS, GRADIENT = "setting", "loss", "gradient"
REPLICAS, VARIABLE, STATE = "replicas", "variable", "state"
OPTIMIZER, EXTRA, METRIC = "optimizer", "Trainer.state", "metric"

# A loss that is nearer to 0 is a difference of larger numbers; so may a metric
# be, behind which there is no gradient.
_LOSS_FLOOR, _METRIC_FLOOR = 0.1, 1e-3

# A slot that hardly changes in an update is compared with its own norm.
_SLOT_FLOOR = 0.1

# What `Trainer.state` adds may follow an optimizer, which makes steps of
# gradients that are noise: groups are compared, and roughly.
_EXTRA_TOLERANCE, _EXTRA_FLOOR = 0.3, 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that is not the same.

    Attributes:
        what: "loss", "gradient", "variable" and so on; see above.
        name: Which one: a variable's path, a metric's name.
        error: Relative.
        tolerance: What rounding explains.
        step: Of the comparison, from 0.
    """

    what: str
    name: str
    error: float
    tolerance: float
    step: int = 0

    @property
    def is_beyond(self) -> bool:
        """Whether rounding does not explain it; NaN never is explained."""
        return not self.error <= self.tolerance

    @property
    def severity(self) -> float:
        """Error as a multiple of the tolerance."""
        if np.isnan(self.error):
            return float("inf")
        return self.error / self.tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What the variables of a record are called, in its order.

    Attributes:
        trainable: Paths of the model's trainable variables.
        others: Of its others.
        optimizer: Of the optimizer's.
        owners: For each of the optimizer's the trainable variable, by number,
            that it is kept for, if any.
        extras: Group and path of what else `Trainer.state` holds.
    """

    trainable: Sequence[str]
    others: Sequence[str]
    optimizer: Sequence[str]
    owners: Sequence[int | None]
    extras: Sequence[tuple[str, str]]

    def split(
        self, state: Sequence[np.ndarray]
    ) -> tuple[list[np.ndarray], ...]:
        """What `Subject.state` returns, by the four kinds of names."""
        rest = iter(state)
        kinds = (self.trainable, self.others, self.optimizer, self.extras)
        return tuple([next(rest) for _ in kind] for kind in kinds)


def differences(
    record: Record,
    reference: Record,
    *,
    before: Sequence[np.ndarray],
    names: Names,
    tolerance: Tolerance,
) -> Iterator[Difference]:
    """Compares an update with another one from the same state.

    Args:
        record: Of any number of replicas.
        reference: Of one.
        before: `Subject.state` before the update.
        names: Of the variables.
        tolerance: What rounding explains.

    Yields:
        A `Difference` for everything that was compared, in the order in which
        a mistake would show.
    """
    trainable, _, slots, extras = names.split(before)
    for name, value in record.settings.items():
        error = _relative(value, reference.settings[name])
        yield Difference(what=SETTING, name=name, error=error, tolerance=1e-6)
    error = relative_loss(record.loss, reference.loss)
    yield Difference(
        what=LOSS, name="loss", error=error, tolerance=tolerance.loss
    )
    if not reference.is_skipped:  # else they are those of an earlier update
        yield from _of_gradients(record, reference, names, tolerance)
    yield from of_replicas(record, names)
    yield from _of_updates(record, reference, trainable, names, tolerance)
    yield from _of_slots(record, reference, slots, names, tolerance)
    for name, values, others in zip(
        names.others, record.others, reference.others, strict=True
    ):
        error = distance(values[0], others[0])
        yield Difference(
            what=STATE, name=name, error=error, tolerance=tolerance.state
        )
    yield from _of_extras(record, reference, extras, names)
    for name, value in record.metrics.items():
        yield of_metric(
            name,
            value,
            reference.metrics[name],
            tolerance=tolerance,
            num_examples=reference.num_examples,
        )


def of_metric(
    name: str,
    value: Any,
    other: Any,
    *,
    tolerance: Tolerance,
    num_examples: float,
) -> Difference:
    """In half precision, by what a metric of some examples may jump by."""
    floor, limit = _METRIC_FLOOR, tolerance.loss
    if tolerance.flips:
        floor, limit = 1.0, max(tolerance.flips, 1.5 / max(num_examples, 1.0))
    error = _relative(value, other, floor)
    return Difference(what=METRIC, name=name, error=error, tolerance=limit)


def first_not_finite(record: Record, names: Names) -> str | None:
    """What of one update is no finite number, the loss first; None: all are.

    Of an update that was skipped nothing is looked at.
    """
    if record.is_skipped:
        return None
    if not np.isfinite(record.loss):
        return "loss"
    for what, values in (
        (GRADIENT, record.gradients),
        (VARIABLE, [first for first, *_ in record.trainable]),
    ):
        for name, value in zip(names.trainable, values, strict=True):
            if not np.isfinite(value.astype("float64")).all():
                return f"{name} ({what})"
    return None


def _of_gradients(
    record: Record, reference: Record, names: Names, tolerance: Tolerance
) -> Iterator[Difference]:
    for name, gradient, other, floor in zip(
        names.trainable,
        record.gradients,
        reference.gradients,
        _floors(reference, tolerance),
        strict=True,
    ):
        error = distance(gradient, other, floor)
        yield Difference(
            what=GRADIENT, name=name, error=error, tolerance=tolerance.gradient
        )


def _floors(reference: Record, tolerance: Tolerance) -> list[float]:
    """Norms by which the errors of smaller gradients are taken."""
    whole = float(np.sqrt(sum(_square(g) for g in reference.gradients)))
    count = sum(g.size for g in reference.gradients)
    return [
        tolerance.noise * whole * (g.size / count) ** 0.5
        for g in reference.gradients
    ]


def _are_noise(reference: Record, tolerance: Tolerance) -> list[bool]:
    """Whether gradients are so small that an update may not be compared.

    The error that they may have is more than an update's then; twice that of
    a gradient is its square's, which some optimizers keep.
    """
    share = 2 * tolerance.gradient / tolerance.update
    return [
        _square(gradient) < (share * floor) ** 2
        for gradient, floor in zip(
            reference.gradients, _floors(reference, tolerance), strict=True
        )
    ]


def of_replicas(record: Record, names: Names) -> Iterator[Difference]:
    """All replicas must hold the same bits."""
    groups = (
        (names.trainable, record.trainable),
        (names.others, record.others),
        (names.optimizer, record.optimizer),
        ([path for _, path in names.extras], record.extras),
    )
    for paths, variables in groups:
        for name, (first, *rest) in zip(paths, variables, strict=True):
            error = max((distance(copy, first) for copy in rest), default=0.0)
            yield Difference(
                what=REPLICAS, name=name, error=error, tolerance=1e-7
            )


def _of_updates(
    record: Record,
    reference: Record,
    before: Sequence[np.ndarray],
    names: Names,
    tolerance: Tolerance,
) -> Iterator[Difference]:
    """Of what each variable changed by, where its gradient is no noise."""
    is_noise = _are_noise(reference, tolerance)
    for i, name in enumerate(names.trainable):
        if is_noise[i]:
            continue
        new, old = record.trainable[i][0], before[i]
        expected = reference.trainable[i][0]
        gradient = np.abs(reference.gradients[i])
        is_clear = gradient >= tolerance.gradient * gradient.max(initial=0.0)
        change, wanted = (new - old)[is_clear], (expected - old)[is_clear]
        floor = 1e-6 * float(np.linalg.norm(expected))
        error = distance(change, wanted, floor)
        yield Difference(
            what=VARIABLE, name=name, error=error, tolerance=tolerance.update
        )


def _of_slots(
    record: Record,
    reference: Record,
    before: Sequence[np.ndarray],
    names: Names,
    tolerance: Tolerance,
) -> Iterator[Difference]:
    """Of what each of the optimizer's variables changed by; counters exactly.

    Those of a gradient that is noise are noise.
    """
    is_noise = _are_noise(reference, tolerance)
    for i, (name, owner) in enumerate(
        zip(names.optimizer, names.owners, strict=True)
    ):
        if owner is not None and is_noise[owner]:
            continue
        new, expected = record.optimizer[i][0], reference.optimizer[i][0]
        floor = _SLOT_FLOOR * _square(expected) ** 0.5
        error = _error_of_change(new, expected, before[i], floor)
        yield Difference(
            what=OPTIMIZER, name=name, error=error, tolerance=tolerance.update
        )


def _of_extras(
    record: Record,
    reference: Record,
    before: Sequence[np.ndarray],
    names: Names,
) -> Iterator[Difference]:
    """Of what `Trainer.state` adds: group by group, counters exactly."""
    new, expected = (
        [first for first, *_ in one.extras] for one in (record, reference)
    )
    floors = _floors_of_groups(expected, before, names)
    for i, (group, name) in enumerate(names.extras):
        yield Difference(
            what=EXTRA,
            name=name,
            error=_error_of_change(
                new[i], expected[i], before[i], floors[group]
            ),
            tolerance=_EXTRA_TOLERANCE,
        )


def _floors_of_groups(
    expected: Sequence[np.ndarray], before: Sequence[np.ndarray], names: Names
) -> dict[str, float]:
    """The norm of each group's change, unless it hardly changes."""
    squares: dict[str, tuple[float, float]] = {}
    for (group, _), new, old in zip(
        names.extras, expected, before, strict=True
    ):
        change, size = squares.get(group, (0.0, 0.0))
        if _is_float(old):
            change, size = change + _square(new - old), size + _square(new)
        squares[group] = change, size
    return {
        group: max(change**0.5, _EXTRA_FLOOR * size**0.5)
        for group, (change, size) in squares.items()
    }


def _error_of_change(
    new: np.ndarray, expected: np.ndarray, old: np.ndarray, floor: float
) -> float:
    """By the norm of the change or the floor; 0 or 1 of what only counts."""
    if not _is_float(old):
        return float(not np.array_equal(new, expected))
    return distance(new - old, expected - old, floor)


def _is_float(values: np.ndarray) -> bool:
    return values.dtype.kind not in "biuSUO"


def relative_loss(loss: float, other: float) -> float:
    """How far a loss is from another one, relative unless it is near 0."""
    return _relative(loss, other, _LOSS_FLOOR)


def _relative(value: Any, other: Any, floor: float = 1e-6) -> float:
    values, others = np.atleast_1d(value), np.atleast_1d(other)
    if np.array_equal(values, others, equal_nan=True):
        return 0.0
    sizes = np.maximum(np.abs(others), floor)
    return float(np.max(np.abs(values - others) / sizes))


def distance(
    values: np.ndarray, others: np.ndarray, floor: float = 0.0
) -> float:
    """Norm of the difference over the larger of the norm and the floor.

    Args:
        values: Of any shape.
        others: Of the same shape; what should be.
        floor: Least that is divided by.
    """
    if np.array_equal(values, others):
        return 0.0
    values, others = values.astype("float64"), others.astype("float64")
    size = max(float(np.linalg.norm(others)), floor, 1e-30)
    return float(np.linalg.norm(values - others)) / size


def _square(values: np.ndarray) -> float:
    return float(np.sum(values.astype("float64") ** 2))
