"""Who asks to stop: signals, the clock, Compute Engine's metadata server."""

import http.server
import os
import signal
import subprocess
import sys
import threading

import pytest

from dist_amp import preemption

SECONDS = 60


class Asked:
    """Collects reasons, and waits for the first."""

    def __init__(self):
        self.reasons = []
        self.event = threading.Event()

    def __call__(self, reason):
        self.reasons.append(reason)
        self.event.set()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_is_a_reason(name):
    asked = Asked()
    before = signal.getsignal(signal.Signals[name])
    with preemption.watch(asked):
        os.kill(os.getpid(), signal.Signals[name])
        assert asked.event.wait(SECONDS)
    assert asked.reasons == [name]
    assert signal.getsignal(signal.Signals[name]) == before


def test_sigterm_twice_does_not_end_the_save():
    """As Slurm sends them: ahead of the limit, and at it."""
    asked = Asked()
    with preemption.watch(asked):
        for name in ("SIGUSR1", "SIGTERM", "SIGTERM", "SIGINT"):
            os.kill(os.getpid(), signal.Signals[name])
    assert asked.reasons == ["SIGUSR1", "SIGTERM", "SIGTERM", "SIGINT"]


def test_a_second_ctrl_c_ends_the_process_at_once():
    script = (
        "import os, signal\n"
        "from dist_amp import preemption\n"
        "with preemption.watch(print):\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-u", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 130
    assert done.stdout == "SIGINT\n"


def test_a_signal_that_is_ignored_stays_so():
    """As SIGINT under nohup."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    asked = Asked()
    try:
        with preemption.watch(asked):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert asked.reasons == []


def test_the_clock_asks():
    asked = Asked()
    with preemption.watch(asked, max_minutes=0.001):
        assert asked.event.wait(SECONDS)
    assert asked.reasons == ["max_minutes"]


class Metadata(http.server.BaseHTTPRequestHandler):
    """Speaks like Compute Engine's server; `notices` may be changed."""

    notices: dict[str, str] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        if self.headers["Metadata-Flavor"] != "Google":
            self.send_error(403)
            return
        name = self.path.rpartition("/")[2]
        self.asked.append(self.path)
        if name not in self.notices:
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.notices[name].encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(preemption, "_SECONDS_BETWEEN_LOOKS", 0.01)
    Metadata.notices = {"maintenance-event": "NONE", "preempted": "FALSE"}
    Metadata.asked = []
    yield Metadata
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("preempted", "TRUE"),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
    ],
)
def test_a_notice_of_the_metadata_server_is_a_reason(metadata, name, value):
    asked = Asked()
    with preemption.watch(asked):
        while len(metadata.asked) < 4:  # two looks at both, without a notice
            pass
        migrates = {"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}
        metadata.notices = {**metadata.notices, **migrates}
        while len(metadata.asked) < 8:
            pass
        assert asked.reasons == []
        metadata.notices = {**metadata.notices, name: value}
        assert asked.event.wait(SECONDS)
    assert asked.reasons == ["maintenance"]
    assert metadata.asked[0] == (
        "/computeMetadata/v1/instance/maintenance-event"
    )


def test_a_server_that_fails_is_asked_again(metadata):
    metadata.notices = {}
    asked = Asked()
    with preemption.watch(asked):
        while len(metadata.asked) < 4:
            pass
        metadata.notices = {"preempted": "TRUE"}
        assert asked.event.wait(SECONDS)


def test_no_server_is_asked_elsewhere(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    product = tmp_path / "product_name"
    monkeypatch.setattr(preemption, "_PRODUCT_NAME", product)
    assert preemption._metadata_server() is None
    product.write_text("PowerEdge\n")
    assert preemption._metadata_server() is None
    product.write_text("Google Compute Engine\n")
    assert preemption._metadata_server() == "metadata.google.internal"


def test_every_reason_is_a_status_that_kubeflow_starts_again():
    for reason in (*preemption.EXIT_STATUS, "something else"):
        assert preemption.exit_status(reason) >= 128


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
