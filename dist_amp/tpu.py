"""Connects TensorFlow to a TPU: looks before it leaps.

TensorFlow waits for minutes, or for ever, at an address where nobody listens,
and tells a missing TPU by an IndexError. So the TPU's state, its addresses and
its version are looked at first, and what TensorFlow does has a time limit.
"""

import os
import re

import tensorflow as tf

from dist_amp import cloud_tpu
from dist_amp.cloud_tpu import CloudTpuError

LOCAL = "local"

# On each host of a TPU of several, as Google sets it.
_HOSTS_VARIABLE = "TPU_WORKER_HOSTNAMES"
_SECONDS_FOR_VERSION = 5.0
_FIRST_HOST = "/job:worker/replica:0/task:0"


def connect(
    tpu: str = LOCAL,
    *,
    zone: str | None = None,
    project: str | None = None,
    timeout: float = 300.0,
) -> tf.distribute.TPUStrategy:
    """The strategy over all cores of a TPU, initialized.

    Args:
        tpu: "local" for the TPU of this machine, a TPU's name, or its
            "grpc://host:port".
        zone: Of a named TPU; see `cloud_tpu.look_up`.
        project: Of a named TPU.
        timeout: Seconds that the TPU's initialization may take. What is
            known to be wrong before it shows within 30.

    Raises:
        CloudTpuError: There is no such TPU, it cannot be used, or it does not
            answer; the message says what to try.
    """
    check(tpu, zone=zone, project=project)
    try:
        strategy = cloud_tpu.within(
            timeout,
            lambda: _initialize(tpu, zone, project),
            f"{_name(tpu)}, which is to be initialized,",
        )
    except cloud_tpu.ApiError as error:
        raise CloudTpuError(f"{error} {_mend(tpu)}") from error
    except tf.errors.NotFoundError as error:
        raise CloudTpuError(
            f"TensorFlow finds no {_name(tpu)}. {_mend(tpu)}"
        ) from error
    except (tf.errors.OpError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise CloudTpuError(
            f"{_name(tpu)} cannot be initialized ({type(error).__name__}: "
            f"{first}). {_mend(tpu)}"
        ) from error
    if tpu != LOCAL:
        # As TensorFlow does itself, but for the thread that connects: what is
        # not for the TPU's cores runs on its first host, with the data.
        tf.device(_FIRST_HOST).__enter__()
    return strategy


def check(
    tpu: str, *, zone: str | None = None, project: str | None = None
) -> None:
    """Whether the TPU is there, usable, of this version, and answers.

    Args:
        tpu: See `connect`.
        zone: See `connect`.
        project: See `connect`.

    Raises:
        CloudTpuError: It is not; the message says what to try.
    """
    is_address = tpu.startswith("grpc://")
    if tpu == LOCAL or is_address:
        _check_no_place(tpu, zone, project)
    if tpu == LOCAL:
        _check_has_one_host()
        return
    if is_address:
        addresses = cloud_tpu.addresses_of(tpu)
        cloud_tpu.check_answers(addresses, _name(tpu))
        _check_version(tpu, _version_at(tpu))
        return
    node = cloud_tpu.look_up(tpu, zone=zone, project=project)
    cloud_tpu.check_usable(node)
    _check_version(tpu, node.version)
    cloud_tpu.check_answers(node.addresses, _name(tpu))


def _check_no_place(tpu: str, zone: str | None, project: str | None) -> None:
    for flag, value in (("tpu_zone", zone), ("tpu_project", project)):
        if value is not None:
            raise CloudTpuError(
                f"`{flag}` would be ignored with `tpu={tpu!r}`: drop it, or "
                f"pass the TPU's name (--tpu, --{flag})."
            )


def _check_has_one_host() -> None:
    hosts = os.environ.get(_HOSTS_VARIABLE, "").split(",")
    if len(hosts) > 1:
        raise CloudTpuError(
            f"this TPU has {len(hosts)} hosts, and `tpu='local'` is for one "
            "that has a single host: run the program on its first host only, "
            "with the TPU's name (--tpu)."
        )


def _version_at(tpu: str) -> str | None:
    """What the TPU's host says; None if it says nothing."""
    from cloud_tpu_client import client

    try:
        return cloud_tpu.within(
            _SECONDS_FOR_VERSION, client.Client(tpu).runtime_version, tpu
        )
    except (CloudTpuError, OSError, ValueError):
        return None


def _check_version(tpu: str, version: str | None) -> None:
    """A remote host must run this TensorFlow; some images' names tell."""
    found = re.search(r"(?:^|tf-)(\d+\.\d+)", version or "")
    ours = ".".join(tf.__version__.split(".")[:2])
    if found and found[1] != ours:
        raise CloudTpuError(
            f"{_name(tpu)} runs TensorFlow {found[1]} ({version}) and this "
            f"program {ours}, and they must be the same: create the TPU with "
            "an image of this version (--runtime_version)."
        )


def _initialize(
    tpu: str, zone: str | None, project: str | None
) -> tf.distribute.TPUStrategy:
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
        tpu=tpu, zone=zone, project=project
    )
    if tpu != LOCAL:
        tf.config.experimental_connect_to_cluster(
            resolver, make_master_device_default=False
        )
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _name(tpu: str) -> str:
    if tpu == LOCAL:
        return "TPU in this machine"
    return f"TPU at {tpu}" if tpu.startswith("grpc://") else f"TPU {tpu!r}"


def _mend(tpu: str) -> str:
    if tpu == LOCAL:
        return (
            "On a TPU VM install `tensorflow-tpu` in place of `tensorflow`, "
            "and end other programs that hold the TPU; elsewhere pass the "
            "TPU's name (--tpu), or train without one (--strategy=auto)."
        )
    return (
        "Look at its state (`python -m launch.cloud_tpu status`), end other "
        "programs that hold it, and pass the TPU's name or the address of its "
        "TensorFlow server (--tpu)."
    )
