"""A network of nothing but loopback, as root and as anybody."""

import os
import shutil
import subprocess
import sys

import pytest

SECONDS = 60
SCRIPT = """
import os, pathlib, socket
from launch.isolation import isolate
user = os.geteuid()
refusal = isolate()
if refusal is not None:
    print("refused:", refusal)
    raise SystemExit
print([name for _, name in socket.if_nameindex()])
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname(), timeout=5).close()
print("loopback")
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print(error.strerror)
print(os.geteuid() == user)
"""


def run(*prefix):
    done = subprocess.run(
        [*prefix, sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    if lines[0].startswith("refused"):
        pytest.skip(lines[0])
    return lines


@pytest.mark.parametrize("is_plain_user", [False, True])
def test_loopback_works_and_nothing_else_does(is_plain_user):
    prefix = []
    if is_plain_user:
        if shutil.which("setpriv") is None or os.geteuid() != 0:
            pytest.skip("only root can become another user, with setpriv")
        # Root's files stay readable; every capability is gone.
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
        prefix += ["--reuid=65534", "--keep-groups"]
        if subprocess.run([*prefix, sys.executable, "-c", ""]).returncode:
            pytest.skip("another user cannot run this Python")
    assert run(*prefix) == [
        "['lo']",
        "loopback",
        "Network is unreachable",
        "True",
    ]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
