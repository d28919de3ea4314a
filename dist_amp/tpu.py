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

    def initialize() -> tf.distribute.TPUStrategy:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            tpu=tpu, zone=zone, project=project
        )
        if tpu != LOCAL:
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)

    try:
        return cloud_tpu.within(
            timeout, initialize, f"TPU {tpu!r}, which is to be initialized,"
        )
    except cloud_tpu.ApiError as error:
        raise CloudTpuError(
            f"{error} Another process may hold it: end it, or restart the "
            "TPU. On one of several hosts of a TPU pass its name (--tpu)."
        ) from error
    except (tf.errors.OpError, RuntimeError) as error:
        raise CloudTpuError(_explained(tpu, error)) from error


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
    if tpu == LOCAL:
        _check_local(zone, project)
        return
    if tpu.startswith("grpc://"):
        addresses = cloud_tpu.addresses_of(tpu)
        cloud_tpu.check_answers(addresses, f"the TPU at {tpu}")
        _check_version(f"the TPU at {tpu}", _version_at(tpu))
        return
    node = cloud_tpu.look_up(tpu, zone=zone, project=project)
    cloud_tpu.check_usable(node)
    _check_version(f"TPU {tpu!r}", node.version)
    cloud_tpu.check_answers(node.addresses, f"TPU {tpu!r}")


def _check_local(zone: str | None, project: str | None) -> None:
    for flag, value in (("tpu_zone", zone), ("tpu_project", project)):
        if value is not None:
            raise CloudTpuError(
                f"`{flag}` would be ignored with `tpu='local'`: drop it, or "
                f"pass the TPU's name (--tpu, --{flag})."
            )
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


def _check_version(what: str, version: str | None) -> None:
    """A remote host must run this TensorFlow; some images' names tell."""
    found = re.search(r"(?:^|tf-)(\d+\.\d+)", version or "")
    ours = ".".join(tf.__version__.split(".")[:2])
    if found and found[1] != ours:
        raise CloudTpuError(
            f"{what} runs TensorFlow {found[1]} ({version}) and this program "
            f"{ours}: install `tensorflow~={found[1]}.0` here, or create the "
            "TPU with an image of this version (--runtime_version)."
        )


def _explained(tpu: str, error: Exception) -> str:
    """One line; TensorFlow's own, which is long, stays the cause."""
    first = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, tf.errors.NotFoundError) or "TPU" not in first:
        why = f"no TPU was found in {_place(tpu)}"
    else:
        why = f"the TPU of {_place(tpu)} cannot be initialized"
    if tpu == LOCAL:
        mend = (
            "On a TPU VM install `tensorflow-tpu` in place of `tensorflow`, "
            "and end other programs that hold the TPU; elsewhere pass the "
            "TPU's name (--tpu), or --strategy=auto"
        )
    else:
        mend = "Pass the address of a TPU's host, or the TPU's name (--tpu)"
    return f"{why} ({type(error).__name__}: {first}). {mend}."


def _place(tpu: str) -> str:
    return "this machine" if tpu == LOCAL else repr(tpu)
