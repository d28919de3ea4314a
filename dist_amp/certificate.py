"""What a certificate says: its cases, as a table and as JSON."""

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any


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
        precision: What was verified: one of `PRECISIONS`, never "auto".
        num_steps: Updates of each comparison.
        devices: What the replicas were on; the first is the one device.
        turned_off: Layers that drop out or add noise, which did not.
        notes: What else was made otherwise than in training, or not compared
            in an update.
        left_out: What could not be compared, with the reason.
    """

    cases: tuple[Case, ...]
    precision: str
    num_steps: int
    devices: tuple[str, ...] = ()
    turned_off: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there are cases, and every one did."""
        return bool(self.cases) and all(case.passed for case in self.cases)

    def as_json(self) -> str:
        """`passed`, and each attribute."""
        content = {"passed": self.passed, **dataclasses.asdict(self)}
        return json.dumps(_plain(content), indent=2) + "\n"

    def __str__(self) -> str:
        return "\n".join(_table(self))


def _table(certificate: Certificate) -> Iterator[str]:
    cases = certificate.cases
    width = max((len(case.name) for case in cases), default=0)
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
    yield ""
    yield from _circumstances(certificate)
    yield ""
    yield _verdict(certificate)


def _verdict(certificate: Certificate) -> str:
    cases = certificate.cases
    if not cases:
        return "NOT EQUIVALENT: nothing was compared"
    number = sum(not case.passed for case in cases)
    if number:
        return f"NOT EQUIVALENT: {number} of {len(cases)} cases differ"
    return (
        f"EQUIVALENT: {len(cases)} case{'s' * (len(cases) > 1)}, "
        f"{certificate.num_steps} updates each, in {certificate.precision}"
    )


def _circumstances(certificate: Certificate) -> Iterator[str]:
    if certificate.devices:
        yield f"on {', '.join(certificate.devices)}"
    if certificate.turned_off:
        yield f"turned off: {', '.join(certificate.turned_off)}"
    for note in certificate.notes:
        yield f"note: {note}"
    for reason in certificate.left_out:
        yield f"left out: {reason}"


def _failure(case: Case) -> Iterator[str]:
    where = []
    if case.first_step is not None:
        where.append(f"update {case.first_step + 1}")
    if case.first_variable is not None:
        where.append(case.first_variable)
    yield ": ".join([case.name, *filter(None, [", ".join(where)])])
    yield f"  {case.cause}"


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
