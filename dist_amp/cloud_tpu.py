"""A named Cloud TPU: what the API says of it, and whether it answers.

Through Google's `cloud_tpu_client`, which has no time limits, waits for a TPU
that will never come, and tells errors by their stack: here each of them is one
line with the next thing to try. TensorFlow is not needed.
"""

import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

# Seconds for one question to the API, which answers within one.
LIMIT = 15.0
_SECONDS_FOR_METADATA = 5.0
_SECONDS_TO_CONNECT = 5.0
_DEFAULT_PORT = 8470

# States that no waiting mends.
ENDED = ("PREEMPTED", "TERMINATED", "DELETING", "STOPPED", "HIDDEN")

_T = TypeVar("_T")


class CloudTpuError(ValueError):
    """A TPU cannot be used; the message says why and what to try next."""


class ApiError(CloudTpuError):
    """The API did not answer as it should; it may in a while."""


class MissingError(CloudTpuError):
    """There is no TPU of that name; perhaps not yet, if it is queued."""


@dataclasses.dataclass(frozen=True)
class Node:
    """What the API says of a TPU.

    Attributes:
        name: Of the TPU.
        state: "READY", "CREATING", "PREEMPTED" and so on, as in the API.
        health: "HEALTHY" and so on; None if the API does not tell.
        accelerator_type: Say "v5litepod-4".
        version: Of the software on it, as TensorFlow's or an image's name.
        symptoms: What its runtime reported, say "OUT_OF_MEMORY".
        addresses: `(host, port)` of each of its hosts, once it is ready.
    """

    name: str
    state: str | None
    health: str | None
    accelerator_type: str | None
    version: str | None
    symptoms: tuple[str, ...]
    addresses: tuple[tuple[str, int], ...]

    @property
    def is_usable(self) -> bool:
        """Whether training may start on it."""
        return self.state == "READY" and self.health in (None, "HEALTHY")

    @property
    def is_ended(self) -> bool:
        """Whether it must be created anew."""
        return self.state in ENDED

    def describe(self) -> str:
        """State, health and what it is, in one line."""
        parts = [f"state {self.state or 'unknown'}"]
        if self.health:
            parts.append(f"health {self.health}")
        parts += [
            text for text in (self.accelerator_type, self.version) if text
        ]
        if self.symptoms:
            parts.append(f"reported {', '.join(self.symptoms)}")
        return f"TPU {self.name!r}: {', '.join(parts)}."


def look_up(
    name: str,
    *,
    zone: str | None = None,
    project: str | None = None,
    credentials: Any = "default",
) -> Node:
    """Asks the Cloud TPU API about a TPU, within `LIMIT` seconds.

    Args:
        name: Of the TPU.
        zone: Say "us-west4-a"; on a machine of Google's, its own by default.
        project: The project's id; likewise.
        credentials: Of google-auth or oauth2client; those of the machine or
            of `gcloud auth application-default login` by default.

    Raises:
        MissingError: There is no such TPU.
        CloudTpuError: It may not be asked for, or nobody knows where.
        ApiError: No answer came, or one that may be another one later.
    """
    client = _make_client(name, zone, project, credentials)
    where = f"TPU {name!r} in {f'zone {zone}' if zone else 'this zone'}"
    try:
        # For all at once: each public method asks anew, and in between the
        # state may change. This client is the last there will be.
        answer = within(
            LIMIT,
            client._fetch_cloud_tpu_metadata,
            f"the Cloud TPU API on {where}",
        )
    except CloudTpuError:
        raise
    except Exception as error:
        raise _explained(error, where) from error
    return _node(name, answer)


def wait_until_usable(
    name: str,
    *,
    zone: str | None = None,
    project: str | None = None,
    timeout: float = 1200.0,
    interval: float = 10.0,
    is_queued: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    credentials: Any = "default",
) -> Node:
    """Asks again and again until training may start on the TPU.

    Args:
        name: Of the TPU.
        zone: See `look_up`.
        project: See `look_up`.
        timeout: Seconds to wait at most.
        interval: Seconds between two questions.
        is_queued: Whether the TPU may not be there yet.
        tell: Called with a line whenever the TPU's state is another one.
        credentials: See `look_up`.

    Raises:
        CloudTpuError: The TPU is preempted, terminated or unknown, at once;
            or it is not usable when the time is over.
    """
    deadline = time.monotonic() + timeout
    patient = (ApiError, MissingError) if is_queued else (ApiError,)
    last = ""
    while True:
        node = None
        try:
            node = look_up(
                name, zone=zone, project=project, credentials=credentials
            )
            line = node.describe()
        except patient as error:
            line = str(error)
        if line != last:
            tell(line)
            last = line
        if node is not None and node.is_usable:
            return node
        if node is not None and node.is_ended:
            raise CloudTpuError(_unusable(node))
        if time.monotonic() + interval > deadline:
            raise CloudTpuError(
                f"TPU {name!r} is not usable after {timeout:g} s. The last "
                f"answer was: {last} Wait longer (--timeout), or create "
                "another one."
            )
        time.sleep(interval)


def check_usable(node: Node) -> None:
    """Whether training may start on it.

    Raises:
        CloudTpuError: It may not.
    """
    if not node.is_usable:
        raise CloudTpuError(_unusable(node))


def addresses_of(tpu: str) -> tuple[tuple[str, int], ...]:
    """The hosts in "grpc://host:port,host:port".

    Raises:
        CloudTpuError: A port is no number.

    Example:
    >>> addresses_of("grpc://10.0.0.2:8470,10.0.0.3")
    (('10.0.0.2', 8470), ('10.0.0.3', 8470))
    """
    found = []
    for part in tpu.split(","):
        host, _, port = part.removeprefix("grpc://").partition(":")
        if not host or not (port or "0").isdigit():
            raise CloudTpuError(
                "`tpu` must be a name, 'local', or grpc://host:port. Received "
                f"{tpu!r} (--tpu)."
            )
        found.append((host, int(port or _DEFAULT_PORT)))
    return tuple(found)


def check_answers(addresses: Sequence[tuple[str, int]], what: str) -> None:
    """Whether something listens at every address.

    TensorFlow itself would wait there for many minutes.

    Args:
        addresses: `(host, port)` each.
        what: What an error calls the TPU.

    Raises:
        CloudTpuError: Nothing listens at one of them.
    """
    for host, port in addresses:
        try:
            socket.create_connection((host, port), _SECONDS_TO_CONNECT).close()
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
            raise CloudTpuError(
                f"nobody listens at {host}:{port} of {what} ({why}). Start "
                "the program in the TPU's own network (on a TPU VM "
                "--tpu=local), and look at the TPU's state with `python -m "
                "launch.cloud_tpu status`."
            ) from error


def within(seconds: float, function: Callable[[], _T], what: str) -> _T:
    """Calls what may never return, and gives up after a while.

    What was called goes on in a thread that does not keep the process alive.

    Args:
        seconds: To wait at most.
        function: What is called.
        what: What an error says has not answered.

    Raises:
        ApiError: The time is over.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise ApiError(f"no answer of {what} within {seconds:g} s.")
    if errors:
        raise errors[0]
    return results[0]


# -------------------------------------------------------------------- private


def _make_client(
    name: str, zone: str | None, project: str | None, credentials: Any
) -> Any:
    """Google's client, which asks the machine where it is, if need be."""
    from cloud_tpu_client import client as api  # defines flags, takes 0.5 s

    try:
        return within(
            _SECONDS_FOR_METADATA,
            lambda: api.Client(name, zone, project, credentials),
            "the metadata server",
        )
    except (ApiError, OSError) as error:
        raise CloudTpuError(
            f"the zone and the project of TPU {name!r} are unknown, since "
            "this is no machine of Google Cloud: pass both (--tpu_zone, "
            "--tpu_project)."
        ) from error


def _node(name: str, answer: Mapping[str, Any]) -> Node:
    points = answer.get("networkEndpoints", ())
    symptoms = answer.get("symptoms", ())
    return Node(
        name=name,
        state=answer.get("state"),
        health=answer.get("health"),
        accelerator_type=answer.get("acceleratorType"),
        version=answer.get("tensorflowVersion"),
        symptoms=tuple(str(s.get("symptomType")) for s in symptoms),
        addresses=tuple(
            (point["ipAddress"], int(point.get("port") or _DEFAULT_PORT))
            for point in points
            if point.get("ipAddress")  # has none until it is ready
        ),
    )


def _unusable(node: Node) -> str:
    if node.is_ended:
        mend = (
            "Create it anew (`python -m launch.cloud_tpu delete`, then "
            "`create`); training goes on from its last checkpoint."
        )
    elif node.state != "READY":
        mend = "Wait for it (`python -m launch.cloud_tpu wait`)."
    else:
        mend = (
            "Wait for it (`python -m launch.cloud_tpu wait`); if that does "
            "not help, `delete` it and `create` it anew."
        )
    return f"{node.describe()} It cannot be used. {mend}"


def _explained(error: Exception, where: str) -> CloudTpuError:
    """One line for what the client and the libraries below it raise."""
    # The client makes a ValueError of whatever the question itself raised.
    is_answer = type(error) is ValueError and error.__context__ is not None
    cause = error.__context__ if is_answer else error
    status = getattr(getattr(cause, "resp", None), "status", None)
    said = _said(cause)
    if re.search("Credentials|Refresh", type(cause).__name__):
        return CloudTpuError(
            f"there are no valid credentials to ask about {where} ({said}): "
            "run `gcloud auth application-default login`, or name a key file "
            "in GOOGLE_APPLICATION_CREDENTIALS."
        )
    if is_answer and status == 404:
        return MissingError(
            f"there is no {where}. Look for it with `gcloud compute tpus "
            "tpu-vm list --zone=-` (--tpu, --tpu_zone, --tpu_project)."
        )
    if status in (401, 403):
        return CloudTpuError(
            f"these credentials may not ask about {where} (HTTP {status}: "
            f"{said}): the account needs the role TPU Viewer in the project, "
            "and the project the Cloud TPU API (--tpu_project)."
        )
    if status is not None:
        return ApiError(
            f"the Cloud TPU API answered HTTP {status} ({said}) on {where}."
        )
    return ApiError(f"the Cloud TPU API cannot be reached on {where} ({said}).")


def _said(error: BaseException | None) -> str:
    """The server's words if there are any, else the error's, in one line."""
    text = " ".join(str(error).split())
    quoted = re.search('returned "(.+?)"', text)
    return quoted[1] if quoted else f"{type(error).__name__}: {text[:200]}"
