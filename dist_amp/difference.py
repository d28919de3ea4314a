"""By how much one update differs from another, and in what first."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from dist_amp.subject import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Relative errors that rounding explains.

    Attributes:
        loss: Of the loss and of metrics.
        gradient: Of a variable's gradient, by its norm.
        update: Of the change of a variable, by its norm.
        state: Of other variables, by their norm.
    """

    loss: float
    gradient: float
    update: float
    state: float


TOLERANCES = {
    "float32": Tolerance(loss=1e-5, gradient=1e-4, update=1e-3, state=1e-4),
    "float16": Tolerance(loss=2e-3, gradient=2e-2, update=5e-2, state=5e-3),
    "bfloat16": Tolerance(loss=1e-2, gradient=1e-1, update=3e-1, state=2e-2),
}

# What `what` of a difference may be, in the order in which they are looked at.
SETTING, LOSS, GRADIENT = "setting", "loss", "gradient"
REPLICAS, VARIABLE, STATE = "replicas", "variable", "state"
METRIC = "metric"

# A gradient that is that much smaller than all of them together is noise, as
# is that of a bias before batch normalization.
_NOISE = 1e-3


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
    """What the variables of a record are called, in its order."""

    trainable: Sequence[str]
    others: Sequence[str]
    optimizer: Sequence[str]


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
        before: The trainable variables before the update.
        names: Of the variables.
        tolerance: What rounding explains.

    Yields:
        A `Difference` for everything that was compared, in the order in which
        a mistake would show.
    """
    for name, value in record.settings.items():
        error = _relative(value, reference.settings[name])
        yield Difference(what=SETTING, name=name, error=error, tolerance=1e-6)
    error = _relative(record.loss, reference.loss)
    yield Difference(
        what=LOSS, name="loss", error=error, tolerance=tolerance.loss
    )
    yield from _of_gradients(record, reference, names, tolerance)
    yield from _of_replicas(record, names)
    yield from _of_updates(record, reference, before, names, tolerance)
    for name, values, others in zip(
        names.others, record.others, reference.others, strict=True
    ):
        error = distance(values[0], others[0])
        yield Difference(
            what=STATE, name=name, error=error, tolerance=tolerance.state
        )
    for name, value in record.metrics.items():
        error = _relative(value, reference.metrics[name])
        yield Difference(
            what=METRIC, name=name, error=error, tolerance=tolerance.loss
        )


def _of_gradients(
    record: Record, reference: Record, names: Names, tolerance: Tolerance
) -> Iterator[Difference]:
    for name, gradient, other, floor in zip(
        names.trainable,
        record.gradients,
        reference.gradients,
        _floors(reference),
        strict=True,
    ):
        error = distance(gradient, other, floor)
        yield Difference(
            what=GRADIENT, name=name, error=error, tolerance=tolerance.gradient
        )


def _floors(reference: Record) -> list[float]:
    """Norms below which a variable's gradient is noise."""
    whole = float(np.sqrt(sum(_square(g) for g in reference.gradients)))
    count = sum(g.size for g in reference.gradients)
    return [
        _NOISE * whole * (g.size / count) ** 0.5 for g in reference.gradients
    ]


def _of_replicas(record: Record, names: Names) -> Iterator[Difference]:
    """All replicas must hold the same bits."""
    groups = (
        (names.trainable, record.trainable),
        (names.others, record.others),
        (names.optimizer, record.optimizer),
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
    floors = _floors(reference)
    for i, name in enumerate(names.trainable):
        if _square(reference.gradients[i]) < floors[i] ** 2:
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


def _relative(value: float, other: float) -> float:
    values, others = np.atleast_1d(value), np.atleast_1d(other)
    if np.array_equal(values, others, equal_nan=True):
        return 0.0
    return float(np.max(np.abs(values - others) / (np.abs(others) + 1e-6)))


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
