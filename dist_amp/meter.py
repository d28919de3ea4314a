"""How fast training is, and what its time goes to: measured between calls.

Nothing is added to a compiled step: the host takes the time of the calls, and
reads what tf.data notes anyway.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dist_amp.stopwatch import Stopwatch
from dist_amp.stream import DatasetLike, one_pass, times_of

_log = logging.getLogger(__name__)

# Fields of the logs that no two runs have alike, however equal they are.
MEASURED = (
    "time",
    "examples_per_sec",
    "steps_per_sec",
    "tokens_per_sec",
    "step_ms_p50",
    "step_ms_p95",
    "input_wait",
    "all_reduce_share",
    "mfu",
    "memory_bytes",
    "peak_memory_bytes",
)
# Bars of the histogram of step times to a factor of e: 1% of a time each.
_BARS = 100
_SECONDS_BETWEEN_LOOKS = 0.5
# What tf.data keeps of the times between two batches: the newest.
_MAX_GAPS = 100
# From this share of an epoch on the input is said to bound the steps; epochs
# shorter than that many seconds prove nothing.
_MAX_WAIT, _LEAST_SECONDS = 1 / 3, 2.0


def tokens_per_example(dataset: DatasetLike) -> int | None:
    """Length of the sequences of integers that a model reads.

    Args:
        dataset: As in `Trainer.fit`; only its shapes are looked at.

    Returns:
        None where `x` is no integer tensor `[batch, length]`, or where its
        length varies. Padding counts.
    """
    spec = one_pass(dataset).element_spec
    x = spec[0] if isinstance(spec, tuple) else spec
    is_tensor = isinstance(x, tf.TensorSpec) and x.shape.rank == 2
    return x.shape[1] if is_tensor and x.dtype.is_integer else None


class StepTimes:
    """Percentiles of the time of a step.

    A compiled call runs many steps, and only the call has a time that the
    host can take: each of its steps counts with the call's mean. So a single
    slow step in a long call is not seen, and a percentile says: of all steps,
    so many were in calls whose mean step took at most this. With
    `steps_per_loop=1` they are the steps' own times. To within 1%, in a
    histogram, which does not grow with the epoch.
    """

    def __init__(self) -> None:
        self._bars: Counter[int] = Counter()

    def add(self, num_steps: int, seconds: float) -> None:
        """Takes a call of so many steps."""
        mean = max(seconds / num_steps, 1e-9)
        self._bars[round(_BARS * math.log(mean))] += num_steps

    def percentile(self, percent: float) -> float | None:
        """Seconds of a step; None if there was no call."""
        left = self._bars.total() * percent / 100
        for bar in sorted(self._bars):
            left -= self._bars[bar]
            if left <= 0:
                return math.exp(bar / _BARS)
        return None


class InputWait:
    """Share of the time that a loop stood in its input.

    tf.data notes how long its consumer took between two batches. What is left
    of the time, the consumer waited in the iterator. Of calls with more than
    100 batches the newest 100 stand for all. Where a device works on while
    its loop asks for the next batch (a GPU, whose operations are queued), a
    wait may cover work, so that the share is an upper bound there.

    Args:
        clock: Seconds, as `time.perf_counter`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._iterator: Any = None
        self._is_told, self._taken = False, 0
        self._looked_at = self._in_calls = 0.0
        self.seconds = self.waited = 0.0

    def restart(self, iterator: Any) -> None:
        """Counts from now, on what this iterator yields."""
        self.seconds = self.waited = 0.0
        self._iterator, self._in_calls = iterator, 0.0
        times = times_of(iterator)
        self._is_told = times is not None
        self._taken = times.taken if times else 0
        self._looked_at = self._clock()

    def add(self, iterator: Any, num_steps: int, seconds: float) -> None:
        """Takes a call; looks at its input if it is time."""
        if iterator is not self._iterator:
            waited = self.seconds, self.waited
            self.restart(iterator)
            self.seconds, self.waited = waited
            return
        self._in_calls += seconds
        if self._clock() - self._looked_at >= _SECONDS_BETWEEN_LOOKS:
            self.look(num_steps)

    def look(self, num_steps: int) -> None:
        """Reads what tf.data has noted since the last look.

        Args:
            num_steps: Of the last call.
        """
        times = times_of(self._iterator)
        if times is None or times.taken <= self._taken or not times.gaps:
            return
        number, self._taken = times.taken - self._taken, times.taken
        gaps = times.gaps[-number:]
        now = self._clock()
        passed, self._looked_at = now - self._looked_at, now
        if num_steps > _MAX_GAPS:  # no gap reaches out of the call
            passed = self._in_calls
        self._in_calls = 0.0
        busy = number * sum(gaps) / len(gaps)
        self.seconds += passed
        self.waited += passed - busy

    @property
    def share(self) -> float | None:
        """From 0 to 1; None if tf.data does not tell."""
        if not self.seconds:  # nothing was asked for
            return 0.0 if self._is_told else None
        return min(1.0, max(0.0, self.waited / self.seconds))


class Meter:
    """What the logs of an epoch tell about its time.

    Args:
        dataset: As in `Trainer.fit`; its shapes tell whether there are tokens.
        stopwatch: Of the optimizer, if it has one: on several workers.
    """

    def __init__(
        self, dataset: DatasetLike, stopwatch: Stopwatch | None = None
    ):
        self._tokens = tokens_per_example(dataset)
        self._stopwatch = stopwatch
        self._input = InputWait()
        self._steps = StepTimes()
        self._seconds = self._reduced = 0.0
        self._num_steps = 0
        self._times, self._says_at = 0, 1

    def restart(self, iterator: Any) -> None:
        """Forgets all: an epoch begins, or the call that traces is over."""
        self._steps = StepTimes()
        self._seconds, self._num_steps = 0.0, 0
        self._input.restart(iterator)
        if self._stopwatch:
            self._reduced = self._stopwatch.seconds()

    def add(self, iterator: Any, num_steps: int, seconds: float) -> None:
        """Takes a call that did not trace.

        Args:
            iterator: What it took batches of.
            num_steps: Updates in it.
            seconds: How long it took.
        """
        self._steps.add(num_steps, seconds)
        self._seconds += seconds
        self._num_steps = num_steps
        self._input.add(iterator, num_steps, seconds)

    def read(self, examples_per_sec: float) -> dict[str, float]:
        """Fields for the logs of an epoch; NaN where nothing was measured.

        `step_ms_p50` and `step_ms_p95`, see `StepTimes`; `input_wait`, see
        `InputWait`; `all_reduce_share`, of the time in calls, that this worker
        waited in all-reduces; `tokens_per_sec`.
        """
        fields: dict[str, float | None] = {}
        if self._tokens:
            fields["tokens_per_sec"] = self._tokens * examples_per_sec
        if not self._seconds:
            fields |= dict.fromkeys(_OF_CALLS)
            if self._stopwatch:
                fields["all_reduce_share"] = None
            return _with_nan(fields)
        for percent in (50, 95):
            seconds = self._steps.percentile(percent)
            fields[f"step_ms_p{percent}"] = seconds and 1e3 * seconds
        self._input.look(self._num_steps)
        fields["input_wait"] = self._input.share
        if self._stopwatch:
            waited = self._stopwatch.seconds() - self._reduced
            fields["all_reduce_share"] = min(1.0, waited / self._seconds)
        return _with_nan(fields)

    def warn(self, epoch: int) -> bool:
        """Says so if the input, and not the device, bounds the steps.

        The first time, then more and more rarely.

        Args:
            epoch: That has ended, from 1.
        """
        share = self._input.share or 0.0
        if share <= _MAX_WAIT or self._input.seconds < _LEAST_SECONDS:
            return False
        self._times += 1
        if self._times < self._says_at:
            return False
        self._says_at *= 2
        _log.warning(
            "training waited for input in %.0f%% of epoch %d: the input, not "
            "the device, bounds the steps. Keep what is slow to make "
            "(`dataset.cache()`), make it in parallel (`map(..., "
            "num_parallel_calls=tf.data.AUTOTUNE)`), or read from a nearer "
            "disk",
            100 * share,
            epoch,
        )
        return True


_OF_CALLS = ("step_ms_p50", "step_ms_p95", "input_wait")


def _with_nan(fields: dict[str, float | None]) -> dict[str, float]:
    """NaN for what was not measured: Keras' History has a number an epoch."""
    return {k: math.nan if v is None else v for k, v in fields.items()}
