"""Workers meet on a loopback of their own: TensorFlow's server has no lock."""

import ctypes
import fcntl
import os
import socket
import struct

import pytest

_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS = 0x8914
_IFF_UP_AND_RUNNING = 0x41


@pytest.fixture(scope="session", autouse=True)
def isolated_network():
    """A network namespace for this process's thread and its children."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        pytest.skip(f"needs a network namespace of its own: {reason}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        request = struct.pack("16sH14s", b"lo", _IFF_UP_AND_RUNNING, b"")
        fcntl.ioctl(one, _SIOCSIFFLAGS, request)
