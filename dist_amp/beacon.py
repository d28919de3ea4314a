"""Where a worker is in its work, and what that says about a standstill.

The code that works tells which phase it enters; what happens within a compiled
call is read off its input. Nothing is added to a step. Standard library only.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

# What a worker does in each phase, as in "worker 2 has been ...".
PHASES = {
    "start": "making the model and its data",
    "compile": "compiling the step or reading the first batch",
    "input": "waiting for input",
    "step": "in the step",
    "evaluation": "evaluating",
    "checkpoint": "saving a checkpoint",
    "agreement": "ready for the next steps",
    "callbacks": "in callbacks or other code between two compiled calls",
    "end": "past training",
}
# Of these a step is not known.
OUTSIDE = ("start", "end")
# Within these a worker may be waiting for another one.
MAY_WAIT = ("step", "evaluation", "agreement")
# No worker stays in these for ever unless something is wrong.
MUST_END = (*MAY_WAIT, "input", "compile")
# How many times as long as others it may last.
PATIENCE = {"compile": 6}


@dataclasses.dataclass(frozen=True)
class Counts:
    """The input of a compiled loop.

    Attributes:
        taken: Batches that the loop has taken.
        is_starved: Whether none is ready for it.
    """

    taken: int
    is_starved: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker is.

    Attributes:
        phase: One of `PHASES`.
        step: Number of the update under way, from 1.
        seconds: How long nothing has changed.
    """

    phase: str
    step: int
    seconds: float = 0.0

    @property
    def doing(self) -> str:
        """What the worker does, as "waiting for input, at step 118"."""
        what = PHASES[self.phase]
        return what if self.is_outside else f"{what}, at step {self.step}"

    @property
    def is_outside(self) -> bool:
        """Whether it is before or after training."""
        return self.phase in OUTSIDE

    @property
    def must_end(self) -> bool:
        """Whether it cannot last for ever unless something is wrong."""
        return self.phase in MUST_END

    @property
    def patience(self) -> int:
        """How many times the time limit it may last."""
        return PATIENCE.get(self.phase, 1)

    def __str__(self) -> str:
        return f"{self.doing}, for {self.seconds:.0f} s"


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What runs now, as `Beacon.phase` was told; read as one value."""

    phase: str
    count: Callable[[], Counts | None] | None = None
    taken: int = 0
    batches_per_step: int = 1


class Beacon:
    """Tells where this process is.

    Args:
        clock: Seconds, as `time.monotonic`.

    Attributes:
        looks: How often `read` found it in a compiled loop,
        starved_looks: and how often the loop had no batch then.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._loop = _Loop("start")
        self._broken: _Loop | None = None  # which an error has left
        self._step = 0
        self._seen: object = None
        self._seen_at = clock()
        self.looks = self.starved_looks = 0

    def at_step(self, step: int) -> None:
        """Sets the number of updates attempted so far."""
        self._step = step

    @contextlib.contextmanager
    def phase(
        self,
        name: str,
        count: Callable[[], Counts | None] | None = None,
        *,
        taken: int = 0,
        batches_per_step: int = 1,
    ) -> Iterator[None]:
        """What the code within does; the phase around it comes back.

        Where an error ends everything, the place is kept.

        Args:
            name: One of `PHASES`.
            count: Reads the input of the compiled loop that runs within.
            taken: Batches that were taken of it before.
            batches_per_step: Batches that an update of it takes.
        """
        before = self._loop
        self._loop = _Loop(name, count, taken, batches_per_step)
        self._broken = None
        is_outermost = before.phase in OUTSIDE
        try:
            yield
        except BaseException:
            self._broken = self._broken or self._loop
            self._loop = self._broken if is_outermost else before
            raise
        self._loop = _Loop("end") if is_outermost else before

    def start(self) -> None:
        """Somebody begins to watch: what has not changed counts from now."""
        self._seen_at = self._clock()

    def read(self) -> Place:
        """The place now. One thread calls it often: it notices changes."""
        loop, step = self._loop, self._step + 1
        phase, counts = loop.phase, loop.count() if loop.count else None
        if counts:
            taken = max(0, counts.taken - loop.taken)
            if counts.is_starved:
                finished = taken // loop.batches_per_step
            else:
                finished = max(0, taken - 1) // loop.batches_per_step
            is_first = phase == "compile" and taken <= 1
            if phase == "compile" and not is_first:
                phase = "step"  # it runs already
            if phase != "evaluation" and not is_first:
                step += finished
            # XLA compiles when the first batch is there.
            phase = "input" if counts.is_starved and not is_first else phase
            self.looks += 1
            self.starved_looks += counts.is_starved
        seen = (phase, step, counts)
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
        return Place(phase, step, self._clock() - self._seen_at)


def explain(places: Sequence[Place | None], names: Sequence[str]) -> str:
    """Says who holds up whom.

    Args:
        places: Of every worker; None for one that does not answer.
        names: What to call each worker.

    Returns:
        Sentences for people.
    """
    absent = [n for n, place in zip(names, places, strict=True) if not place]
    present = [
        (name, place)
        for name, place in zip(names, places, strict=True)
        if place
    ]
    held_up = [(n, p) for n, p in present if p.phase in MAY_WAIT]
    busy = [(n, p) for n, p in present if p.phase not in MAY_WAIT]
    parts = [f"{name} has been {place}" for name, place in busy]
    if absent:
        verb = "does" if len(absent) == 1 else "do"
        parts.append(f"{_listed(absent)} {verb} not answer")
    if not parts:
        parts.append(
            "no worker is behind the others, and none goes on: a connection "
            "between two of them may be cut, or a device hangs"
        )
        parts += [f"{name} has been {place}" for name, place in held_up]
        return "; ".join(parts)
    if held_up:
        who = _listed([name for name, _ in held_up])
        steps = sorted({place.step for _, place in held_up})
        verb = "waits" if len(held_up) == 1 else "wait"
        at = " or ".join(map(str, steps))
        parts.append(f"{who} {verb} for it in the all-reduce of step {at}")
    return "; ".join(parts)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
