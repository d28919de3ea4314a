"""Signs of life of a training process, for the launcher that started it.

A thread writes a line of JSON to an inherited pipe every second: where the
process is, and for how long. Standard library only: it beats before TensorFlow
is there.
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator

# Holds the number of the pipe's file descriptor.
VARIABLE = "DIST_AMP_HEARTBEAT"
_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Beat:
    """Where a process is.

    Attributes:
        place: What it does, in words, as "in the step, at step 118".
        seconds: How long nothing has changed.
        must_end: Whether it cannot do that for ever unless something is wrong.
    """

    place: str
    seconds: float = 0.0
    must_end: bool = False


_STARTING = Beat("starting")


class Heart:
    """Beats within `beating`; in a process that nobody watches, nothing.

    Attributes:
        read: What tells where the process is; runs in a thread.
    """

    def __init__(self) -> None:
        self.read: Callable[[], Beat] = lambda: _STARTING

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beats until it is left."""
        number = os.environ.pop(VARIABLE, None)  # not for its own children
        if number is None:
            yield
            return
        pipe = int(number)
        os.set_inheritable(pipe, False)
        os.set_blocking(pipe, False)
        is_over = threading.Event()
        threading.Thread(
            target=self._beat, args=(pipe, is_over), daemon=True
        ).start()
        try:
            yield
        finally:
            is_over.set()

    def _beat(self, pipe: int, is_over: threading.Event) -> None:
        while True:
            line = json.dumps(dataclasses.asdict(self.read())) + "\n"
            try:
                os.write(pipe, line.encode())
            except BlockingIOError:
                pass  # nobody reads just now
            except OSError:
                return  # the launcher is gone
            if is_over.wait(_SECONDS):
                return


def parsed(line: bytes) -> Beat | None:
    """A line that `Heart` wrote; None if it is no such line."""
    try:
        return Beat(**json.loads(line))
    except (TypeError, ValueError):
        return None
