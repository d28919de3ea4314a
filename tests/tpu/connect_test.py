"""From make_strategy up to the TPU that is not there: each way to fail.

Real clients, a TPU API of our own, and TensorFlow's real server without a TPU,
on a loopback of their own. A process connects to one cluster only, so those
that come so far have a process each.
"""

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading

import pytest
import tensorflow as tf

from launch.isolation import isolate
from tests.launch.train_test import command, environment
from tests.tpu.api_server import PROJECT, READY, TOKEN, ZONE, ApiServer

SECONDS = 90
# What everything but a silent host must stay within.
LIMIT = 30
PLACE = {"tpu_zone": ZONE, "tpu_project": PROJECT}
OURS = tf.__version__

PROGRAM = """
import json, os, sys, time
import dist_amp
from dist_amp.cloud_tpu import CloudTpuError
from dist_amp.cluster import Timeouts

for line in sys.stdin:
    case = json.loads(line)
    os.environ.update(case.pop("environment", {}))
    timeouts = Timeouts(startup=case.pop("timeout", 60.0))
    begin = time.monotonic()
    try:
        dist_amp.make_strategy("tpu", timeouts=timeouts, **case)
    except CloudTpuError as error:
        seconds = time.monotonic() - begin
        print(json.dumps([str(error), seconds]), flush=True)
"""

SERVER = """
import sys
import tensorflow as tf

with open(sys.argv[1]) as file:
    workers = {"worker": file.read().split()}
server = tf.distribute.Server(workers, job_name="worker", task_index=0)
print("up", flush=True)
server.join()
"""


@pytest.fixture(scope="module", autouse=True)
def isolated_network():
    """TensorFlow's server listens on every interface: on loopback only."""
    refusal = isolate()
    if refusal is not None:
        pytest.skip(f"needs a network namespace of its own: {refusal}")


@pytest.fixture(scope="module")
def api(isolated_network):
    with ApiServer() as server:
        yield server


@pytest.fixture(scope="module")
def port(isolated_network, tmp_path_factory):
    """Of TensorFlow's server, in a process that has no TPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    workers = tmp_path_factory.mktemp("server") / "workers"
    workers.write_text(f"127.0.0.1:{port}")
    with start(["-c", SERVER, str(workers)]) as server:
        assert server.stdout.readline() == "up\n"
        yield port


@contextlib.contextmanager
def start(arguments, **variables):
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(TF_CPP_MIN_LOG_LEVEL="3", **variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def errors_of(*cases, api=None):
    """What make_strategy says in each case, and after how many seconds."""
    variables = api.environment() if api else {}
    with start(["-c", PROGRAM], **variables) as process:
        lines = "".join(f"{json.dumps(case)}\n" for case in cases)
        out, err = process.communicate(lines, timeout=SECONDS)
    assert process.returncode == 0, err
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == len(cases), err
    return results


def endpoints(port):
    return {"networkEndpoints": [{"ipAddress": "127.0.0.1", "port": port}]}


@pytest.fixture
def foreign_version():
    """A TPU host's page of another version, at its fixed port."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"currentVersion": "2.8.0"}')

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 8475), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def test_what_shows_before_tensorflow_connects(api, port, foreign_version):
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = server.getsockname()[1]
    image = "tpu-vm-tf-2.18.0-pod-pjrt"
    api.nodes |= {
        "ill": [READY | {"health": "UNHEALTHY_TPU"}],
        "new": [{"state": "CREATING"}],
        "old": [READY | {"tensorflowVersion": image} | endpoints(port)],
        "deaf": [READY | {"tensorflowVersion": OURS} | endpoints(nobody)],
    }
    expected = [
        (
            {"tpu": "none", **PLACE},
            "there is no TPU 'none' in zone us-west4-a. Look for it with",
        ),
        (
            {"tpu": "new", **PLACE, "tpu_zone": "us-east1-d"},
            "there is no TPU 'new' in zone us-east1-d. Look for it with",
        ),
        (
            {"tpu": "ill", **PLACE},
            "TPU 'ill': state READY, health UNHEALTHY_TPU, v5litepod-4. It "
            "cannot be used. Wait for it",
        ),
        (
            {"tpu": "new", **PLACE},
            "TPU 'new': state CREATING. It cannot be used. Wait for it",
        ),
        (
            {"tpu": "old", **PLACE},
            f"TPU 'old' runs TensorFlow 2.18 ({image}) and this program "
            f"{OURS[:4]}, and they must be the same",
        ),
        (
            {"tpu": "deaf", **PLACE},
            f"nobody listens at 127.0.0.1:{nobody} of TPU 'deaf' (Connection "
            "refused). Start the program in the TPU's own network",
        ),
        (
            {"tpu": f"grpc://127.0.0.1:{nobody}"},
            f"nobody listens at 127.0.0.1:{nobody} of TPU at grpc://",
        ),
        (
            {"tpu": f"grpc://127.0.0.1:{port}"},
            f"TPU at grpc://127.0.0.1:{port} runs TensorFlow 2.8 (2.8.0) and",
        ),
        (
            {"tpu": f"grpc://127.0.0.1:{port}", "tpu_project": PROJECT},
            "`tpu_project` would be ignored with `tpu='grpc://",
        ),
        (
            {"tpu": "local", "tpu_zone": ZONE},
            "`tpu_zone` would be ignored with `tpu='local'`: drop it",
        ),
        (
            {"tpu": "local"},
            "TensorFlow finds no TPU in this machine. On a TPU VM install "
            "`tensorflow-tpu`",
        ),
        (
            {"tpu": "local", "environment": {"TPU_WORKER_HOSTNAMES": "a,b"}},
            "this TPU has 2 hosts, and `tpu='local'` is for one that has a "
            "single host: run the program on its first host only",
        ),
    ]
    results = errors_of(*(case for case, _ in expected), api=api)
    for (message, seconds), (_, begin) in zip(results, expected, strict=True):
        assert message.startswith(begin)
        assert "\n" not in message
        assert seconds < LIMIT


def test_a_server_without_a_tpu(port):
    ((message, seconds),) = errors_of({"tpu": f"grpc://127.0.0.1:{port}"})
    assert message.startswith(
        f"TensorFlow finds no TPU at grpc://127.0.0.1:{port}. Look at its state"
    )
    assert seconds < LIMIT


def test_a_named_tpu_without_a_tpu(api, port):
    fields = {"tensorflowVersion": OURS, **endpoints(port)}
    api.nodes["bare"] = [READY | fields]
    ((message, seconds),) = errors_of({"tpu": "bare", **PLACE}, api=api)
    assert message.startswith("TensorFlow finds no TPU 'bare'. Look at its")
    assert seconds < LIMIT


def test_a_host_that_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        tpu = f"grpc://127.0.0.1:{server.getsockname()[1]}"
        ((message, seconds),) = errors_of({"tpu": tpu, "timeout": 3.0})
    assert message.startswith(
        f"no answer of TPU at {tpu}, which is to be initialized, within 3 s. "
    )
    assert seconds < LIMIT


def test_what_follows_runs_on_the_tpus_first_host(port):
    """All but the two calls that only a TPU answers is real."""
    program = f"""
import tensorflow as tf
import dist_amp

tf.tpu.experimental.initialize_tpu_system = lambda resolver: None
tf.distribute.TPUStrategy = lambda resolver: resolver
dist_amp.make_strategy("tpu", tpu="grpc://127.0.0.1:{port}")
print((tf.constant(1) + 1).device)
"""
    with start(["-c", program]) as process:
        out, err = process.communicate(timeout=SECONDS)
    assert out.startswith("/job:worker/replica:0/task:0/"), err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tpu=local"], "error: TensorFlow finds no TPU in this machine. "),
        (
            ["--tpu=a", f"--tpu_zone={ZONE}", f"--tpu_project={PROJECT}"],
            "error: these credentials may not ask about TPU 'a' in zone "
            "us-west4-a (HTTP 403: this is a 403): ",
        ),
    ],
)
def test_launch_train_says_it_in_one_line(api, flags, message, tmp_path):
    api.nodes["a"] = [403]
    done = subprocess.run(
        command(*flags),
        cwd=tmp_path,
        env=environment(**api.environment()),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert TOKEN not in done.stderr
    assert not (tmp_path / "runs").exists()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
