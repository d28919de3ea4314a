"""A Cloud TPU API of our own on loopback, for the real clients of it.

It speaks what cloud_tpu_client, oauth2client, google-auth and TensorFlow's
TPUClusterResolver ask on their way to a TPU: the discovery document, nodes.get,
OAuth tokens and Compute Engine's metadata.
"""

import json
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT, ZONE = "a-project", "us-west4-a"
READY = {
    "state": "READY",
    "health": "HEALTHY",
    "acceleratorType": "v5litepod-4",
}
# In place of an answer: the connection stays open and nothing comes.
SILENCE = "silence"

TOKEN = "a-token-that-nobody-may-print"
_METADATA = "/computeMetadata/v1/"
_ACCOUNT = f"{_METADATA}instance/service-accounts/default/"
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"

# A node's fields, an HTTP status, or SILENCE.
Answer = Mapping[str, Any] | int | str


class ApiServer:
    """Serves until it is closed.

    Attributes:
        nodes: What nodes.get answers on each TPU of `ZONE`, in turn; the last
            one again and again.
        discovery: What the discovery document's address answers; None: it.
        num_questions: How often nodes.get was asked.
        has_valid_tokens: Whether a token is granted to who asks.
    """

    def __init__(self, **nodes: Sequence[Answer]):
        self.nodes = {name: list(answers) for name, answers in nodes.items()}
        self.discovery: Answer | None = None
        self.num_questions = 0
        self.has_valid_tokens = True
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.api = self
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}"
        threading.Thread(
            target=self._server.serve_forever, args=[0.02], daemon=True
        ).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Makes a child process take this for Google Cloud.

        Only the client's own questions for zone and project have a fixed
        address: `cloud_tpu_client.client._GCE_METADATA_ENDPOINT`.
        """
        return {
            "TPU_API_DISCOVERY_URL": f"{self.url}/discovery",
            "GCE_METADATA_IP": self.host,  # of oauth2client, as the next
            "GCE_METADATA_ROOT": self.host,
            "GCE_METADATA_HOST": self.host,  # of google-auth
            "CLOUDSDK_CONFIG": "/nonexistent",  # the user's own credentials
        }

    def next_answer(self, path: str) -> Answer:
        """What nodes.get answers on the node of a path."""
        parent, _, name = path.rpartition("/")
        if parent != f"/v1/projects/{PROJECT}/locations/{ZONE}/nodes":
            return 404
        with self._lock:
            self.num_questions += 1
            answers = self.nodes.get(name, [404])
            return answers.pop(0) if len(answers) > 1 else answers[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    @property
    def api(self) -> ApiServer:
        return self.server.api

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        if path == "/discovery":
            discovery = self.api.discovery
            self.answer(discovery if discovery else _document(self.api.url))
        elif path.startswith("/v1/"):
            self.answer_node(path)
        elif path == "/" or path.startswith(_METADATA):
            self.answer_metadata(path)
        else:
            self.answer(404)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer_token()

    def answer_node(self, path):
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401)
        answer = self.api.next_answer(path)
        if isinstance(answer, Mapping):
            answer = {"name": path.removeprefix("/v1/"), **answer}
        self.answer(answer)

    def answer_metadata(self, path):
        texts = {
            "/": "",  # oauth2client asks whether anybody is there
            f"{_METADATA}project/project-id": PROJECT,
            f"{_METADATA}instance/zone": f"projects/1/zones/{ZONE}",
        }
        if path in texts:
            self.write(200, texts[path], "text/plain")
        elif path.endswith("/token"):
            self.answer_token()
        elif path == _ACCOUNT:
            self.answer({"email": "someone@a-project", "scopes": [_SCOPE]})
        else:
            self.answer(404)

    def answer_token(self):
        if not self.api.has_valid_tokens:
            return self.write(400, '{"error": "invalid_grant"}')
        self.answer(
            {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
        )

    def answer(self, answer: Answer):
        if answer == SILENCE:
            self.api.closing.wait()
        elif isinstance(answer, int):
            error = {"code": answer, "message": f"this is a {answer}"}
            self.write(answer, json.dumps({"error": error}))
        else:
            self.write(200, json.dumps(answer))

    def write(self, status, text, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(text.encode())


def _document(url: str) -> dict[str, Any]:
    """The part of the discovery document that the clients read."""
    pattern = "^projects/[^/]+/locations/[^/]+/nodes/[^/]+$"
    name = {
        "type": "string",
        "required": True,
        "location": "path",
        "pattern": pattern,
    }
    get = {
        "id": "tpu.projects.locations.nodes.get",
        "path": "v1/{+name}",
        "httpMethod": "GET",
        "parameterOrder": ["name"],
        "parameters": {"name": name},
        "response": {"$ref": "Node"},
    }
    nodes = {"nodes": {"methods": {"get": get}}}
    return {
        "kind": "discovery#restDescription",
        "name": "tpu",
        "version": "v1",
        "rootUrl": f"{url}/",
        "servicePath": "",
        "baseUrl": f"{url}/",
        "batchPath": "batch",
        "parameters": {},
        "schemas": {"Node": {"id": "Node", "type": "object"}},
        "auth": {"oauth2": {"scopes": {_SCOPE: {}}}},
        "resources": {
            "projects": {"resources": {"locations": {"resources": nodes}}}
        },
    }
