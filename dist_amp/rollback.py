"""What is done when training blows up: when it is one, and the way back."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

KINDS = ("nan", "spike")
LOWERED = ("nothing", "loss_scale", "learning_rate")

# Calls whose losses a spike is measured against, and how many it takes.
NUM_RECENT = 32
_MIN_RECENT = 8


class BlowUpError(FloatingPointError):
    """Training cannot go on from where it is.

    Attributes:
        kind: "nan" or "spike".
        first: First batch of the epoch that may have done it.
        end: The batch after the last one.
        is_exact: Whether these batches are known to be the ones.
    """

    def __init__(
        self, message: str, *, kind: str, first: int, end: int, is_exact: bool
    ):
        super().__init__(message)
        self.kind, self.first, self.end = kind, first, end
        self.is_exact = is_exact


@dataclasses.dataclass(frozen=True)
class RollbackPolicy:
    """Going back to the last good checkpoint, past the batches that did it.

    The loss of each compiled call is looked at. "nan": the loss is NaN or
    infinite, or the loss scale stays at its floor; the batch that did it is
    searched for, one update a call, and passed over. "spike": the loss is
    far above that of recent calls; all batches of the call are passed over
    (as PaLM's authors did, arXiv:2204.02311, section 5.1), so
    `steps_per_loop` bounds how many. Data of a fixed order bring a bad batch
    again in each pass, and each time is a rollback: clean them.

    Attributes:
        on: Which of "nan" and "spike" to go back on.
        max_rollbacks: After so many, the next one is an error.
        lower: What is multiplied by `factor` each time: "nothing",
            "loss_scale" or "learning_rate".
        factor: In (0, 1).
        spike_threshold: How many robust standard deviations (1.4826 times
            the median absolute deviation, or 1% of the median if that is
            more) above the median of recent calls a spike is.

    Raises:
        ValueError: A value is not among those.

    Example:
    >>> policy = dist_amp.RollbackPolicy(on=("nan", "spike"))
    >>> policy.is_spike(9.0, [1.0, 1.1, 0.9, 1.0, 1.0, 1.1, 0.9, 1.0])
    True
    """

    on: Sequence[str] = ("nan",)
    max_rollbacks: int = 3
    lower: str = "nothing"
    factor: float = 0.5
    spike_threshold: float = 10.0

    def __post_init__(self) -> None:
        if not self.on or not set(self.on) <= set(KINDS):
            raise ValueError(
                f"`on` must be of {', '.join(KINDS)}. Received {self.on!r} "
                "(--rollback_on)."
            )
        if self.lower not in LOWERED:
            raise ValueError(
                f"`lower` must be one of {', '.join(LOWERED)}. Received "
                f"{self.lower!r} (--rollback_lower)."
            )
        if not 0 < self.factor < 1:
            raise ValueError(
                f"`factor` must be in (0, 1). Received {self.factor!r} "
                "(--rollback_factor)."
            )
        if self.max_rollbacks < 1 or not self.spike_threshold > 0:
            raise ValueError(
                "`max_rollbacks` and `spike_threshold` must be positive. "
                f"Received {self.max_rollbacks!r} and "
                f"{self.spike_threshold!r}."
            )

    def is_spike(self, loss: float, recent: Sequence[float]) -> bool:
        """Whether a call's loss is far above those of recent calls.

        Args:
            loss: Mean loss of the examples of one call.
            recent: The same of earlier calls, the newest `NUM_RECENT`.
        """
        if "spike" not in self.on or len(recent) < _MIN_RECENT:
            return False
        median = statistics.median(recent)
        deviations = [abs(one - median) for one in recent]
        scale = 1.4826 * statistics.median(deviations)
        scale = max(scale, 0.01 * abs(median))
        return math.isfinite(loss) and (
            loss > median + self.spike_threshold * scale
        )


def call_loss(
    mean: float, examples: float, mean_before: float, examples_before: float
) -> float:
    """Mean loss of one call, from the epoch's mean before and after it."""
    new = examples - examples_before
    if new <= 0:
        return math.nan
    before = mean_before * examples_before if examples_before else 0.0
    return (mean * examples - before) / new
