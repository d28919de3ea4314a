"""Who asks a run to stop: signals, a maintenance notice, the clock.

Each source calls `request_stop(reason)`, and the run ends after the compiled
call under way with everything saved. Standard library only.
"""

import contextlib
import logging
import os
import pathlib
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

# Exit status by reason. Kubeflow's `restartPolicy: ExitCode` starts a pod
# again from 128 on, and names 138 for what a user finds worth a new try. The
# last two are no requests: a standstill, and another worker that is gone.
EXIT_STATUS = {
    "SIGINT": 128 + signal.SIGINT,
    "SIGTERM": 128 + signal.SIGTERM,
    "SIGUSR1": 128 + signal.SIGUSR1,
    "maintenance": 128 + signal.SIGTERM,
    "max_minutes": 128 + signal.SIGUSR1,
    "hang": 128 + signal.SIGALRM,
    "peer": 128 + signal.SIGHUP,
}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_PRODUCT_NAME = pathlib.Path("/sys/class/dmi/id/product_name")
_NOTICES = ("maintenance-event", "preempted")
# A live migration does not stop the machine.
_NO_NOTICE = ("NONE", "FALSE", "MIGRATE_ON_HOST_MAINTENANCE")
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_SECONDS_BETWEEN_LOOKS = 1.0


@contextlib.contextmanager
def watch(
    request_stop: Callable[[str], None], *, max_minutes: float | None = None
) -> Iterator[None]:
    """Asks to stop on any of the reasons in `EXIT_STATUS`.

    SIGINT (Ctrl-C), SIGTERM (Slurm, Kubernetes, spot machines) and SIGUSR1
    (`sbatch --signal=USR1@300`, ahead of a time limit); a second SIGINT ends
    the process at once. On Compute Engine also a maintenance event or a
    preemption that the metadata server announces. Signals that were ignored,
    as under `nohup`, stay so.

    Enter it in the main thread, after the strategy was built: TensorFlow's
    coordination service takes SIGTERM for itself before.

    Args:
        request_stop: Takes the reason; called from a signal handler or a
            thread.
        max_minutes: Minutes from now, at whose end "max_minutes" is asked.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_on_signals(request_stop))
        if max_minutes is not None:
            timer = threading.Timer(
                60 * max_minutes, request_stop, ["max_minutes"]
            )
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
        server = _metadata_server()
        if server is not None:
            ended = threading.Event()
            stack.callback(ended.set)
            threading.Thread(
                target=_watch_notices,
                args=(server, request_stop, ended),
                daemon=True,
            ).start()
        yield


def exit_status(reason: str) -> int:
    """What a run that was stopped for a reason exits with."""
    return EXIT_STATUS.get(reason, EXIT_STATUS["SIGTERM"])


@contextlib.contextmanager
def _on_signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    has_interrupted = False

    def stop(number: int, _: object) -> None:
        nonlocal has_interrupted
        if number == signal.SIGINT and has_interrupted:
            os._exit(EXIT_STATUS["SIGINT"])
        has_interrupted = has_interrupted or number == signal.SIGINT
        request_stop(signal.Signals(number).name)

    heard = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _metadata_server() -> str | None:
    """Address of Compute Engine's metadata server; None elsewhere.

    `GCE_METADATA_HOST` names it, as in Google's own libraries; otherwise the
    firmware tells, so that no other machine is asked for anything.
    """
    host = os.environ.get("GCE_METADATA_HOST")
    if host:
        return host
    try:
        is_google = "Google" in _PRODUCT_NAME.read_text()
    except OSError:
        return None
    return "metadata.google.internal" if is_google else None


def _watch_notices(
    server: str, request_stop: Callable[[str], None], ended: threading.Event
) -> None:
    """Looks every second until there is a notice or the run has ended.

    Source: cloud.google.com/compute/docs/metadata, `instance/preempted` and
    `instance/maintenance-event`.
    """
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        for name in _NOTICES:
            value = _read_notice(server, name)
            if value and value not in _NO_NOTICE:
                _log.warning("the metadata server says %s: %s", name, value)
                request_stop("maintenance")
                return


def _read_notice(server: str, name: str) -> str | None:
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with _NO_PROXY.open(request, timeout=5) as response:
            return response.read().decode().strip()
    except (OSError, urllib.error.URLError):
        return None  # the next look may do better
