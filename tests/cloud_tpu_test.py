"""A named TPU: the real client of the API, against a server of our own."""

import json
import socket
import sys
import threading
import time

import oauth2client.client
import pytest
import rsa
from cloud_tpu_client import client as google
from google.oauth2 import service_account

from dist_amp import cloud_tpu
from dist_amp.cloud_tpu import ApiError, CloudTpuError, MissingError
from tests.tpu.api_server import PROJECT, READY, SILENCE, ZONE, ApiServer


@pytest.fixture
def api(monkeypatch):
    with ApiServer() as server:
        discovery = server.environment()["TPU_API_DISCOVERY_URL"]
        monkeypatch.setenv("TPU_API_DISCOVERY_URL", discovery)
        yield server


@pytest.fixture(scope="module")
def key():
    return rsa.newkeys(1024)[1].save_pkcs1().decode()


@pytest.fixture
def place(api, key):
    """Where and as whom to ask: a service account that gets a token."""
    account = {
        "client_email": "someone@a-project",
        "token_uri": f"{api.url}/token",
        "private_key": key,
    }
    make = service_account.Credentials.from_service_account_info
    return {"zone": ZONE, "project": PROJECT, "credentials": make(account)}


def node(**fields):
    return READY | fields


def test_a_tpu_that_can_be_used(api, place):
    points = [{"ipAddress": "10.0.0.2", "port": 8470}, {"ipAddress": "h"}]
    api.nodes["a"] = [node(tensorflowVersion="2.21.0", networkEndpoints=points)]
    found = cloud_tpu.look_up("a", **place)
    assert found == cloud_tpu.Node(
        name="a",
        state="READY",
        health="HEALTHY",
        accelerator_type="v5litepod-4",
        version="2.21.0",
        symptoms=(),
        addresses=(("10.0.0.2", 8470), ("h", 8470)),
    )
    assert api.num_questions == 1
    cloud_tpu.check_usable(found)


@pytest.mark.parametrize(
    ("fields", "described", "mend"),
    [
        ({"state": "CREATING"}, "TPU 'a': state CREATING.", "Wait for it"),
        ({}, "TPU 'a': state unknown.", "Wait for it"),
        (
            node(health="UNHEALTHY_TPU"),
            "TPU 'a': state READY, health UNHEALTHY_TPU, v5litepod-4.",
            "`delete` it and `create` it anew",
        ),
        (
            node(
                health="UNHEALTHY_TENSORFLOW",
                symptoms=[{"symptomType": "OUT_OF_MEMORY"}],
            ),
            "TPU 'a': state READY, health UNHEALTHY_TENSORFLOW, v5litepod-4, "
            "reported OUT_OF_MEMORY.",
            "`delete` it and `create` it anew",
        ),
        *(
            ({"state": state}, f"TPU 'a': state {state}.", "Create it anew")
            for state in cloud_tpu.ENDED
        ),
    ],
)
def test_a_tpu_that_cannot_be_used(api, place, fields, described, mend):
    # Without an address yet, as the real API answers meanwhile.
    api.nodes["a"] = [{"networkEndpoints": [{"port": 8470}], **fields}]
    found = cloud_tpu.look_up("a", **place)
    assert found.describe() == described
    assert found.addresses == ()
    with pytest.raises(CloudTpuError) as caught:
        cloud_tpu.check_usable(found)
    assert str(caught.value).startswith(f"{described} It cannot be used. ")
    assert mend in str(caught.value)


def test_a_tpu_whose_health_the_api_does_not_tell(api, place):
    api.nodes["a"] = [{"state": "READY"}]
    cloud_tpu.check_usable(cloud_tpu.look_up("a", **place))


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (404, MissingError, "there is no TPU 'a' in zone us-west4-a. Look"),
        (
            403,
            CloudTpuError,
            "these credentials may not ask about TPU 'a' in zone us-west4-a "
            "(HTTP 403: this is a 403): the account needs the role TPU Viewer",
        ),
        (401, CloudTpuError, "(HTTP 401: this is a 401)"),
        (
            500,
            ApiError,
            "the Cloud TPU API answered HTTP 500 (this is a 500) on TPU 'a' "
            "in zone us-west4-a.",
        ),
    ],
)
def test_what_the_api_refuses(api, place, answer, kind, message):
    api.nodes["a"] = [answer]
    with pytest.raises(CloudTpuError) as caught:
        cloud_tpu.look_up("a", **place)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [404, 503])
def test_an_api_that_cannot_be_discovered_is_no_missing_tpu(api, place, answer):
    api.discovery = answer
    with pytest.raises(ApiError, match="the Cloud TPU API"):
        cloud_tpu.look_up("a", **place)


def test_another_zone(api, place):
    api.nodes["a"] = [READY]
    with pytest.raises(MissingError, match="no TPU 'a' in zone us-east1-d"):
        cloud_tpu.look_up("a", **place | {"zone": "us-east1-d"})


def test_an_api_that_is_not_there(api, place, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}/discovery"
    monkeypatch.setenv("TPU_API_DISCOVERY_URL", url)
    with pytest.raises(ApiError, match="cannot be reached on TPU 'a'"):
        cloud_tpu.look_up("a", **place)


def test_an_api_that_never_answers(api, place, monkeypatch):
    monkeypatch.setattr(cloud_tpu, "LIMIT", 0.2)
    api.nodes["a"] = [SILENCE]
    begin = time.monotonic()
    with pytest.raises(ApiError) as caught:
        cloud_tpu.look_up("a", **place)
    assert str(caught.value) == (
        "no answer of the Cloud TPU API on TPU 'a' in zone us-west4-a within "
        "0.2 s."
    )
    assert time.monotonic() - begin < 10


def test_credentials_that_get_no_token(api, place):
    api.has_valid_tokens = False
    with pytest.raises(CloudTpuError) as caught:
        cloud_tpu.look_up("a", **place)
    assert str(caught.value).startswith("there are no valid credentials to ask")
    assert "invalid_grant" in str(caught.value)
    assert not isinstance(caught.value, ApiError)


def test_no_credentials(api, monkeypatch, tmp_path):
    monkeypatch.setattr(oauth2client.client, "NO_GCE_CHECK", "True")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    with pytest.raises(CloudTpuError) as caught:
        cloud_tpu.look_up("a", zone=ZONE, project=PROJECT)
    assert "gcloud auth application-default login" in str(caught.value)
    assert not isinstance(caught.value, ApiError)


def test_zone_and_project_are_those_of_the_machine(api, place, monkeypatch):
    monkeypatch.setattr(google, "_GCE_METADATA_ENDPOINT", api.url)
    api.nodes["a"] = [READY]
    credentials = place["credentials"]
    assert cloud_tpu.look_up("a", credentials=credentials).is_usable
    with pytest.raises(MissingError, match="no TPU 'b' in this zone"):
        cloud_tpu.look_up("b", credentials=credentials)


@pytest.mark.parametrize("given", [{}, {"zone": ZONE}, {"project": PROJECT}])
def test_no_machine_of_google_cloud(api, monkeypatch, given):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nobody = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(google, "_GCE_METADATA_ENDPOINT", nobody)
    with pytest.raises(CloudTpuError, match="pass both") as caught:
        cloud_tpu.look_up("a", **given)
    assert not isinstance(caught.value, ApiError)


def wait(place, **more):
    """What is told meanwhile, and how it ends."""
    lines = []
    options = {"timeout": 60.0, "interval": 0.01, **more}
    try:
        end = cloud_tpu.wait_until_usable(
            "a", **place, **options, tell=lines.append
        )
    except CloudTpuError as error:
        end = error
    return lines, end


def test_waiting_tells_each_change_once(api, place):
    creating, unhealthy = {"state": "CREATING"}, node(health="UNHEALTHY_TPU")
    api.nodes["a"] = [*[creating] * 3, 500, 500, *[unhealthy] * 3, READY]
    lines, end = wait(place)
    assert lines == [
        "TPU 'a': state CREATING.",
        "the Cloud TPU API answered HTTP 500 (this is a 500) on TPU 'a' in "
        "zone us-west4-a.",
        "TPU 'a': state READY, health UNHEALTHY_TPU, v5litepod-4.",
        "TPU 'a': state READY, health HEALTHY, v5litepod-4.",
    ]
    assert end.is_usable
    assert api.num_questions == 9


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_waiting_for_what_never_comes_ends_at_once(api, place, state):
    api.nodes["a"] = [{"state": "CREATING"}, {"state": state}, READY]
    lines, end = wait(place)
    assert lines[-1] == f"TPU 'a': state {state}."
    assert "Create it anew" in str(end)
    assert api.num_questions == 2


@pytest.mark.parametrize("answer", [403, 404])
def test_waiting_for_what_is_refused_ends_at_once(api, place, answer):
    api.nodes["a"] = [answer, READY]
    assert "TPU 'a' in zone us-west4-a" in str(wait(place)[1])
    assert api.num_questions == 1


def test_a_queued_tpu_is_not_there_at_first(api, place):
    api.nodes["a"] = [404, 404, READY]
    lines, end = wait(place, is_queued=True)
    assert end.is_usable
    assert [line[:15] for line in lines] == [
        "there is no TPU",
        "TPU 'a': state ",
    ]


def test_waiting_has_an_end(api, place):
    api.nodes["a"] = [{"state": "CREATING"}]
    lines, end = wait(place, timeout=0.1)
    assert lines == ["TPU 'a': state CREATING."]
    assert str(end) == (
        "TPU 'a' is not usable after 0.1 s. The last answer was: TPU 'a': "
        "state CREATING. Wait longer (--timeout), or create another one."
    )


@pytest.mark.parametrize(
    ("tpu", "addresses"),
    [
        ("grpc://10.0.0.2", (("10.0.0.2", 8470),)),
        ("grpc://a:1,b", (("a", 1), ("b", 8470))),
        ("grpc://a:1,grpc://b:2", (("a", 1), ("b", 2))),
    ],
)
def test_addresses(tpu, addresses):
    assert cloud_tpu.addresses_of(tpu) == addresses


@pytest.mark.parametrize("tpu", ["grpc://", "grpc://a:x", "grpc://a,,b"])
def test_what_is_no_address(tpu):
    with pytest.raises(CloudTpuError, match=r"grpc://host:port.*--tpu"):
        cloud_tpu.addresses_of(tpu)


def test_whether_somebody_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        cloud_tpu.check_answers([address], "this TPU")
    with pytest.raises(CloudTpuError) as caught:
        cloud_tpu.check_answers([address], "this TPU")
    assert str(caught.value).startswith(
        f"nobody listens at 127.0.0.1:{address[1]} of this TPU (Connection "
        "refused). "
    )


def test_an_error_within_the_limit_is_that_error():
    assert cloud_tpu.within(10, lambda: 7, "it") == 7
    with pytest.raises(json.JSONDecodeError):
        cloud_tpu.within(10, lambda: json.loads("{"), "it")


def test_what_never_returns_is_given_up():
    over = threading.Event()
    with pytest.raises(ApiError, match="no answer of it within"):
        cloud_tpu.within(0.1, over.wait, "it")
    over.set()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
