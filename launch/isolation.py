"""A network of their own for programs on this host: nothing but loopback.

TensorFlow's server listens on every interface and does what anyone asks who
reaches it. In a network namespace workers reach each other and nobody else
does. Linux; standard library only.
"""

import ctypes
import fcntl
import os
import pathlib
import socket
import struct

# Of <linux/sched.h>, <linux/sockios.h> and <linux/if.h>.
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP_AND_RUNNING = 0x41


def isolate() -> str | None:
    """Moves this thread, and what it starts, into a network of their own.

    Without privileges it takes a user namespace too, which only a process of
    one thread may enter. There is no way back, so another process tries it
    first: some systems allow the first step and refuse a later one.

    Returns:
        Why it cannot be; None if it is done.
    """
    return _tried_by_a_child() or _enter()


def _tried_by_a_child() -> str:
    """Why it cannot be; empty if it can."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(theirs, (_enter() or "").encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        refusal = pipe.read()
    os.waitpid(child, 0)
    return refusal


def _enter() -> str | None:
    user, group = os.geteuid(), os.getegid()
    try:
        if user == 0:
            _unshare(_CLONE_NEWNET)
        else:
            _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
            own = pathlib.Path("/proc/self")
            (own / "setgroups").write_text("deny")
            (own / "uid_map").write_text(f"{user} {user} 1")
            (own / "gid_map").write_text(f"{group} {group} 1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            request = struct.pack("16sH14s", b"lo", _IFF_UP_AND_RUNNING, b"")
            fcntl.ioctl(one, _SIOCSIFFLAGS, request)
        _check_loopback()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _check_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def _unshare(flags: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare"):
        raise OSError(None, "this system has no network namespaces")
    if library.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
