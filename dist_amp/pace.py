"""How long compiled calls are, and how fast they go."""

import contextlib
import math
import time
from collections.abc import Iterator

# A compiled call this long makes the host's part of it negligible, and still
# lets a signal or the progress line through in time.
_SECONDS = 0.2
_MAX_STEPS = 10_000
COUNTS = ("examples", "nonfinite_losses", "nonfinite_inputs")


class Pace:
    """How many updates to put in one compiled call, and whether it is traced.

    "auto" starts with one, to hear of errors early, and lengthens the calls
    until one takes about `_SECONDS`.

    Attributes:
        steps: Updates to put in the next call.
        seconds: How long the last call took.
        is_traced: Whether there was a call.
    """

    def __init__(self, steps_per_loop: int | str):
        self._is_auto = steps_per_loop == "auto"
        self.is_traced = False
        self.seconds = 0.0
        self.steps = 1 if steps_per_loop == "auto" else int(steps_per_loop)

    @contextlib.contextmanager
    def observe(self, num_steps: int) -> Iterator[None]:
        """Times one call; the first one, which traces, does not count."""
        begin = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - begin
        seconds_per_step = self.seconds / num_steps
        if self._is_auto and self.is_traced:
            fitting = int(_SECONDS / seconds_per_step)
            longest = min(8 * self.steps, _MAX_STEPS)
            self.steps = max(1, min(fitting, longest))
        self.is_traced = True


class Rates:
    """Steps and examples per second since an epoch began or was resumed."""

    def __init__(self, step: int, num_examples: float):
        self._begin = time.perf_counter()
        self._step = step
        self._num_examples = num_examples

    def add_to(self, logs: dict[str, float], step: int) -> dict[str, float]:
        """Replaces the counts in the logs by the two rates.

        They are NaN where no step was made.
        """
        seconds = time.perf_counter() - self._begin
        if step == self._step:
            seconds = math.nan
        num_examples = logs["examples"] - self._num_examples
        return {
            **{name: logs[name] for name in logs if name not in COUNTS},
            "examples_per_sec": num_examples / seconds,
            "steps_per_sec": (step - self._step) / seconds,
        }
