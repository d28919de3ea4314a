"""What all workers of a job decide together, between two compiled calls."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from dist_amp import strategy as strategy_lib
from dist_amp.beacon import Beacon

# Bytes of a reason that travel: enough for "worker 3 got SIGTERM".
_REASON_BYTES = 48


class StopRequest:
    """Whether to stop, and why: one worker is asked, and all agree on when.

    Args:
        strategy: Whose workers they are.
        beacon: Told that this worker waits for the others.

    Attributes:
        reason: What was agreed on; None to go on.
        shared: The `numbers` of each worker at the last `agree`, int64
            `[num_workers, len(numbers)]`; empty on one worker.
    """

    def __init__(
        self, strategy: tf.distribute.Strategy, beacon: Beacon | None = None
    ):
        self._strategy = strategy
        self._beacon = beacon or Beacon()
        self._is_alone = strategy_lib.num_workers(strategy) == 1
        self._asked: str | None = None
        self.reason: str | None = None
        self.shared = np.zeros((1, 0), np.int64)

    def ask(self, reason: str) -> None:
        """Safe in a signal handler; heard by the next `agree`."""
        self._asked = self._asked or reason

    def clear(self) -> None:
        """Forgets what was asked and agreed on."""
        self._asked = self.reason = None

    def agree(
        self,
        length: int = 1,
        *,
        is_due: bool = False,
        numbers: Sequence[int] = (),
    ) -> tuple:
        """All workers call it at the same place of the program.

        Args:
            length: How many steps this worker would put in the next call.
            is_due: Whether this worker finds that something is due.
            numbers: For `shared`; as many on every worker.

        Returns:
            The smallest length, and whether any worker finds it due.
        """
        if self._is_alone:
            self.reason = self._asked
            return length, is_due
        text = (self._asked or "").encode()[:_REASON_BYTES]
        mine = [length, int(is_due), *_packed(text), *numbers]
        with self._beacon.phase("agreement"):
            rows = strategy_lib.gather_workers(self._strategy, mine)
        rows, self.shared = np.split(rows, [len(mine) - len(numbers)], axis=1)
        reasons = [_unpacked(row[2:]) for row in rows]
        self.reason = next(filter(None, reasons), None)
        return int(rows[:, 0].min()), bool(rows[:, 1].any())


def _packed(text: bytes) -> list[int]:
    padded = text.ljust(_REASON_BYTES, b"\0")
    return [
        int.from_bytes(padded[begin : begin + 6], "big")
        for begin in range(0, _REASON_BYTES, 6)
    ]


def _unpacked(numbers: Sequence[int]) -> str:
    padded = b"".join(int(number).to_bytes(6, "big") for number in numbers)
    return padded.rstrip(b"\0").decode(errors="replace")
