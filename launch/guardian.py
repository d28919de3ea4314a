"""Ends what a program has started, should the program itself be killed.

Linux; standard library only.
"""

import contextlib
import os
import signal

_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Guardian:
    """A small process that waits for this one's end, however it comes.

    Then it kills (SIGKILL) each process group that is still entrusted to it.
    Make it before this process has threads or other children.
    """

    def __init__(self) -> None:
        ours, self._pipe = os.pipe()
        if os.fork() == 0:
            try:
                os.close(self._pipe)
                os.setsid()  # Ctrl-C is not for it
                for number in _SIGNALS:  # nor what ends a whole job
                    signal.signal(number, signal.SIG_IGN)
                _let_go_of_files()
                _wait_and_kill(ours)
            finally:
                os._exit(0)
        os.close(ours)

    def join(self) -> None:
        """Entrusts this process's group; for the child's side of a fork."""
        self._tell(b"+%d\n" % os.getpid())

    def forget(self, group: int) -> None:
        """The group has ended, and its number may be another's soon."""
        self._tell(b"-%d\n" % group)

    def _tell(self, line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was killed
            os.write(self._pipe, line)


def kill_group(group: int) -> None:
    """Ends all processes of a group, if there are any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _let_go_of_files() -> None:
    """Whoever reads what the program prints shall see its end."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)


def _wait_and_kill(pipe: int) -> None:
    groups = set()
    with open(pipe, "rb") as lines:
        for line in lines:
            group = int(line[1:])
            if line.startswith(b"+"):
                groups.add(group)
            else:
                groups.discard(group)
    for group in groups:
        kill_group(group)
