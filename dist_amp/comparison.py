"""One training beside another, update by update, until something differs."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_amp import causes
from dist_amp import difference as difference_lib
from dist_amp import precision as precision_lib
from dist_amp.certificate import Case
from dist_amp.difference import Difference, Names, Tolerance
from dist_amp.subject import Record, Subject, path_of

NUMERICS = "`python -m launch.numerics` tells which layers to keep in float32"


class Comparison:
    """One subject beside the reference, until something differs.

    Args:
        name: Of the case.
        subject: On any number of replicas.
        reference: On one device; `take` is given what it did.
        tolerance: What rounding explains.
    """

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
        self._names = names_of(reference)
        self._worst: Difference | None = None
        self._first: Difference | None = None
        self._cause: str | None = None
        self._num_taken = 0
        self._apart: list[int] = []

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
        """Makes an update from the reference's state, and compares.

        Args:
            step: Of the comparison, from 0.
            batches: Of the update.
            expected: The reference's state before it, and what it did.
            overflows: Whether the last replica's gradients are infinite.
        """
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
            self._cause = describe_error(error)
            return
        self._num_taken += 1
        found = self._compared(record, wanted, state, overflows=overflows)
        found = [dataclasses.replace(one, step=step) for one in found]
        worst = max(found, key=lambda one: one.severity, default=self._worst)
        if worst and (
            self._worst is None or worst.severity > self._worst.severity
        ):
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

    def _compared(
        self,
        record: Record,
        wanted: Record,
        state: Sequence[np.ndarray],
        *,
        overflows: bool,
    ) -> list[Difference]:
        """All of an update, or what is left where only one of two skipped.

        A sum of float16 that leaves its range on one device may not in parts,
        nor need parts that do as a whole.
        """
        is_apart = record.is_skipped != wanted.is_skipped
        if is_apart and self._is_float16 and not overflows:
            self._apart.append(self._num_taken)
            return list(difference_lib.of_replicas(record, self._names))
        return list(
            difference_lib.differences(
                record,
                wanted,
                before=state,
                names=self._names,
                tolerance=self._tolerance,
            )
        )

    @property
    def _is_float16(self) -> bool:
        name = self._subject.variation.precision
        return precision_lib.Precision(name).needs_loss_scale

    def notes(self) -> Iterator[str]:
        """On updates that only one of the two skipped."""
        if self._apart:
            yield (
                f"{self._name}: update {', '.join(map(str, self._apart))} was "
                "skipped on one side only: a sum of float16 may leave its "
                "range as a whole and not in parts, or in parts only"
            )

    def end(self, step: int, what: str) -> None:
        """Fails, since there is nothing to compare with, unless it has.

        Args:
            step: Of the comparison, from 0.
            what: What the reference has made that is not finite.
        """
        if self.has_failed:
            return
        name = self._reference.variation.precision
        self._first = Difference(
            what="not finite", name=what, error=math.nan, tolerance=0, step=step
        )
        self._cause = describe_not_finite(name, step, what)

    def case(self) -> Case:
        """The verdict."""
        worst, first = self._worst, self._first
        if first is None and 2 * len(self._apart) > self._num_taken:
            self._cause = (
                "most updates were skipped on one device or on the replicas, "
                "not on both, so that next to nothing was compared: start "
                "with a lower loss scale (`initial_scale`, "
                "--loss_scale_initial)"
            )
        return Case(
            name=self._name,
            passed=self._cause is None,
            max_error=worst.error if worst else None,
            tolerance=worst.tolerance if worst else None,
            first_step=first.step if first else None,
            first_variable=_named(first) if first else None,
            cause=self._cause,
        )


def _named(first: Difference) -> str:
    """A variable and in what it differs; a loss says so itself."""
    is_plain = first.what in ("not finite", difference_lib.LOSS)
    return first.name if is_plain else f"{first.name} ({first.what})"


def names_of(subject: Subject) -> Names:
    """What the variables of a subject's records are called."""
    trainer = subject.trainer
    return Names(
        trainable=[v.path for v in trainer.model.trainable_variables],
        others=[v.path for v in subject.others],
        optimizer=[v.path for v in subject.slots],
        owners=subject.owners_of_slots(),
        extras=[(group, path_of(v)) for group, v in subject.extras],
    )


def first_broken(
    records: Sequence[Record], names: Names
) -> tuple[int, str] | None:
    """The first update that made something not finite, and what."""
    for step, record in enumerate(records):
        what = difference_lib.first_not_finite(record, names)
        if what is not None:
            return step, what
    return None


def describe_not_finite(precision: str, step: int, what: str) -> str:
    """The cause, where there is nothing to compare with.

    Args:
        precision: Of the training on one device.
        step: The update, from 0.
        what: What `first_broken` found.
    """
    mend = (
        "look for a division by 0, a logarithm, a learning rate that is too "
        "high"
        if precision == "float32"
        else NUMERICS
    )
    return (
        f"not finite on one device in {precision}: update {step + 1}, {what}; "
        f"{mend}"
    )


def describe_error(error: Exception) -> str:
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
