"""Which worker failed first, and what of: for people, in a few lines.

Standard library only.
"""

import re
import signal
from collections.abc import Sequence

from launch.job import HANG, PEER
from launch.worker_process import Ending

_LINES_SHOWN = 30
# Lines of a traceback that point at a part of the line before.
_MARKS = re.compile(r"[ ^~]*")
# Between the tracebacks of an exception and of what it led to.
_LINKS = ("The above exception was", "During handling of the above")
_MEANINGS = {
    0: "it was done",
    1: "an exception",
    2: "wrong settings",
    PEER: "another worker failed or was lost",
    HANG: "no progress",
    138: "asked to stop by SIGUSR1 or --max_minutes",
    143: "asked to stop by SIGTERM",
    -signal.SIGKILL: "the kernel does that if memory runs out",
    -signal.SIGSEGV: "a fault of native code",
    -signal.SIGABRT: "native code gave up",
    -signal.SIGBUS: "a file or memory went away under it",
}


def first_to_fail(
    endings: Sequence[Ending], hung: int | None = None
) -> Ending | None:
    """The worker whose fault it was; None if all ended well.

    Args:
        endings: Of all workers.
        hung: Index of a worker that gave no sign of life, if there was one.
    """
    failed = sorted(
        (e for e in endings if e.status != 0), key=lambda e: e.seconds
    )
    if hung is None and failed and failed[0].status == HANG:
        hung = _who_held_up(failed[0])
    is_hung = [e for e in failed if e.index == hung]
    own = [
        e
        for e in failed
        if e.status not in (PEER, -signal.SIGTERM) and not e.killed
    ]
    # One that had to be killed kept the others waiting; one that was told to
    # end may have been about to say what was wrong.
    kept_others = [e for e in failed if e.killed]
    told = [e for e in failed if e.status == -signal.SIGTERM]
    return next(iter([*is_hung, *own, *kept_others, *told, *failed]), None)


def exit_status(ending: Ending) -> int:
    """As a shell would give it: 128 and more for a signal."""
    return 128 - ending.status if ending.status < 0 else ending.status


def describe(
    first: Ending, endings: Sequence[Ending], *, why: str = "", log: str = ""
) -> str:
    """Some lines on a failure.

    Args:
        first: The worker that failed first.
        endings: Of all workers.
        why: What the launcher knows of it beyond its end.
        log: Where its output is.
    """
    what = why or _status_in_words(first)
    verb = "held up the others" if first.status == HANG else "failed first"
    lines = [
        f"worker {first.index} {verb}, {first.seconds:.0f} s after the start: "
        f"{what}. {first.silent_seconds:.1f} s before its end it was "
        f"{first.beat.place}."
    ]
    lines += [f"  | {line}" for line in excerpt(first.lines)]
    lines += [
        f"  then worker {e.index}: {_status_in_words(e)}, "
        f"{e.seconds:.0f} s after the start"
        for e in sorted(endings, key=lambda e: e.seconds)
        if e.index != first.index and e.status != 0
    ]
    if log:
        lines.append(f"  all that worker {first.index} said: {log}")
    return "\n".join(lines)


def describe_service(status: int, lines: Sequence[str], *, log: str) -> str:
    """Some lines on a data service that ended before its workers.

    Args:
        status: Exit status; minus the number of the signal that killed it.
        lines: What it said.
        log: Where its output is.
    """
    first = (
        "the data service (--data_service_workers) ended before the workers, "
        f"which cannot go on without it: {status_in_words(status)}"
    )
    said = [f"  | {line}" for line in excerpt(lines)[-1:]]
    last = f"  all that the data service said: {log}"
    return "\n".join([first, *said, last])


def _who_held_up(ending: Ending) -> int | None:
    """Whom a worker names that ended since nothing went on."""
    for line in ending.lines:
        found = re.match(r"no progress for [^:]*timeout\): worker (\d+)", line)
        if found:
            return int(found[1])
    return None


def excerpt(lines: Sequence[str]) -> Sequence[str]:
    """What of a worker's last lines tells why: a traceback, or an error."""
    lines = [line for line in lines if line and not _MARKS.fullmatch(line)]
    for sign in ("Traceback (most recent call", "no progress for ", "error: "):
        starts = [i for i, line in enumerate(lines) if line.startswith(sign)]
        if starts and sign.startswith("Traceback"):
            begin = _start_of_chain(lines, starts)
            return _shortened(lines[begin : _end_of(lines, starts[-1])])
        if starts:
            return [lines[starts[-1]]]
    return lines[-3:]


def _end_of(lines: Sequence[str], start: int) -> int:
    """Past a traceback's last line: the first that is not indented."""
    for number in range(start + 1, len(lines)):
        if not lines[number].startswith((" ", "\t")):
            return number + 1
    return len(lines)


def _start_of_chain(lines: Sequence[str], starts: Sequence[int]) -> int:
    """Where the first traceback begins of those that led to the last one."""
    *earlier, start = starts
    for previous in reversed(earlier):
        between = lines[max(previous, start - 3) : start]
        if not any(line.startswith(_LINKS) for line in between):
            break
        start = previous
    return start


def _shortened(lines: Sequence[str]) -> Sequence[str]:
    if len(lines) <= _LINES_SHOWN:
        return lines
    half = _LINES_SHOWN // 2
    left_out = len(lines) - 2 * half
    return [*lines[:half], f"  ({left_out} lines)", *lines[-half:]]


def _status_in_words(ending: Ending) -> str:
    if ending.killed:
        return f"killed, since {ending.killed}"
    return status_in_words(ending.status)


def status_in_words(status: int) -> str:
    """An exit status, or minus the signal that killed a process."""
    name = f"exit status {status}"
    if status < 0:
        name = f"killed by {signal.Signals(-status).name}"
    meaning = _MEANINGS.get(status)
    return f"{name} ({meaning})" if meaning else name
