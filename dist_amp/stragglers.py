"""Which worker all others wait for, and whether its input is the reason."""

import logging
import statistics
from collections.abc import Sequence

import numpy as np

from dist_amp.beacon import Beacon
from dist_amp.stopwatch import Stopwatch

_log = logging.getLogger(__name__)

# Seconds and steps that are compared at a time. One worker must be the slow
# one twice running to be named.
_SECONDS, _STEPS = 5.0, 20
_TIMES = 2
# How much longer than the others' its own part of a step must take.
_RATIO = 1.25
_LEAST_SECONDS = 0.0005
# Share of looks that find no batch ready, from which on the input is to blame.
_STARVED = 0.5


class Stragglers:
    """Compares how long the workers' own parts of a step take.

    All workers leave a step together, so the time that a step takes tells
    nothing. Without what a worker waits in the all-reduce of the gradients, it
    is the time that this worker needs itself.

    Args:
        names: What to call each worker.
        stopwatch: Tells how long this one waits.
        beacon: Tells how often its input was found empty.
    """

    def __init__(
        self, names: Sequence[str], stopwatch: Stopwatch, beacon: Beacon
    ):
        self._names, self._stopwatch, self._beacon = names, stopwatch, beacon
        self._waited = stopwatch.seconds()
        self._own = np.zeros(4, np.int64)
        self._before: np.ndarray | None = None
        self._suspect: int | None = None
        self._times, self._says_at = 0, _TIMES

    def add(self, num_steps: int, seconds: float, *, counts: bool) -> None:
        """Takes what a compiled call took.

        Args:
            num_steps: Updates in the call.
            seconds: How long it took.
            counts: Whether it counts; one that traces does not.
        """
        waited = self._stopwatch.seconds()
        if counts:
            own = max(0.0, seconds - (waited - self._waited))
            self._own[:2] += (num_steps, int(1e6 * own))
        self._waited = waited

    def numbers(self) -> list[int]:
        """What the other workers must know: totals since the start."""
        looks = (self._beacon.looks, self._beacon.starved_looks)
        return [*map(int, self._own[:2]), *looks]

    def compare(self, totals: np.ndarray, step: int) -> str | None:
        """Says which worker is slow, if one is; and logs it.

        Args:
            totals: The `numbers` of each worker, `[num_workers, 4]`.
            step: Updates so far.
        """
        if self._before is None:
            self._before = totals
        num_steps, micros, looks, starved = (totals - self._before).T
        if num_steps[0] < _STEPS or micros.max() < 1e6 * _SECONDS:
            return None
        self._before = totals
        own = micros / num_steps / 1e6
        slow = int(own.argmax())
        others = statistics.median(np.delete(own, slow))
        excess = own[slow] - others
        is_slow = own[slow] > _RATIO * others and excess > _LEAST_SECONDS
        if not is_slow or slow != self._suspect:
            self._suspect = slow if is_slow else None
            self._times, self._says_at = int(is_slow), _TIMES
            return None
        self._times += 1
        if self._times < self._says_at:
            return None
        self._says_at *= 2
        share = starved[slow] / max(1, looks[slow])
        said = (
            f"{self._names[slow]} is slow: its own part of a step takes "
            f"{1e3 * own[slow]:.3g} ms, that of the others "
            f"{1e3 * others:.3g} ms, and they wait for it (step {step}). "
            f"{_reason(share)}"
        )
        _log.warning("%s", said)
        return said


def _reason(share: float) -> str:
    if share >= _STARVED:
        return (
            f"It was waiting for input in {100 * share:.0f}% of the looks: "
            "its input is slow."
        )
    return (
        "Its input is not the reason: look for other load on its host, "
        "throttling, or a slower device."
    )
