"""TensorFlow's coordination service: who is alive, messages, last words.

It runs in every job of several workers, on worker 0, over the connections that
TensorFlow has anyway. Python reaches it through private names only, so this
file holds all of them (tensorflow 2.21, `tensorflow.python`):

* `eager.context.Context`: `configure_coordination_service`,
  `_coordination_service_config`, `report_error_to_cluster`,
  `set_config_key_value`, `get_config_key_value`, `delete_config_key_value`
* `distribute.collective_all_reduce_strategy.CollectiveAllReduceExtended`:
  `_initialize_local_devices`, which knows one CPU device only and lets nobody
  choose among GPUs
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.python.distribute import collective_all_reduce_strategy
from tensorflow.python.eager import context

from dist_amp.cluster import Timeouts

# How what `fail` said begins where it arrives.
FAILURE = "dist_amp: "


def configure(num_workers: int, timeouts: Timeouts) -> None:
    """Sets the service's time limits; before the strategy is built.

    Args:
        num_workers: Workers of the job; worker 0 leads.
        timeouts: How long to wait for a worker and for a sign of life.
    """
    ours = context.context()
    ours.configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=int(1000 * timeouts.startup),
        heartbeat_timeout_in_ms=int(1000 * timeouts.heartbeat),
        coordinated_jobs=[
            coordination_config_pb2.CoordinatedJob(
                name="worker", num_tasks=num_workers
            )
        ],
    )
    # Without it the time limit of the start is not kept.
    service = ours.coordination_service
    service.cluster_register_with_barrier = True


@contextlib.contextmanager
def local_devices(devices: Sequence[str]) -> Iterator[None]:
    """The replicas of a strategy that is built within are on these devices.

    Args:
        devices: Of this host, all GPUs or all CPUs, as "GPU:0".
    """
    extended: Any = collective_all_reduce_strategy.CollectiveAllReduceExtended
    before = extended._initialize_local_devices

    def initialize(
        self: Any, resolver: Any, worker_device: str
    ) -> tuple[tuple[str, ...], str]:
        del self, resolver
        names = tuple(f"{worker_device}/device:{name}" for name in devices)
        return names, devices[0].partition(":")[0]

    extended._initialize_local_devices = initialize
    try:
        yield
    finally:
        extended._initialize_local_devices = before


def publish(key: str, value: str) -> None:
    """Tells all workers something, in place of what the key told before."""
    ours = context.context()
    with contextlib.suppress(tf.errors.OpError):
        ours.delete_config_key_value(key)
    ours.set_config_key_value(key, value)


def look_up(key: str, seconds: float) -> str | None:
    """What a worker published; None if nothing comes in time."""
    try:
        return context.context().get_config_key_value(key, int(1000 * seconds))
    except tf.errors.OpError:
        return None


def wait_for(key: str) -> bool:
    """Returns when a worker has published it; False if the service is gone."""
    while True:
        try:
            context.context().get_config_key_value(key, 1000)
        except (tf.errors.DeadlineExceededError, tf.errors.NotFoundError):
            continue
        except tf.errors.OpError:
            return False
        return True


def fail(message: str) -> None:
    """Ends all other workers: their collectives raise with this message."""
    with contextlib.suppress(ValueError, tf.errors.OpError):
        context.context().report_error_to_cluster(
            tf.errors.ABORTED, FAILURE + message
        )
