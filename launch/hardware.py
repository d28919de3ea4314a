"""From a config to devices, a strategy and a precision."""

import dataclasses
import hashlib
import importlib.util
import logging
import pathlib

import keras
import tensorflow as tf

import dist_amp
from dist_amp import cluster as cluster_lib
from dist_amp import strategy as strategy_lib
from launch.config import TrainConfig

_log = logging.getLogger(__name__)

# Settings that may differ among the workers of a job.
_OWN_OF_A_WORKER = ("task_index", "data_dir", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class Devices:
    """What the replicas run on, and why "auto" chose it."""

    strategy: tf.distribute.Strategy
    strategy_kind: str
    strategy_reason: str
    precision: dist_amp.Precision

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run's folder."""
        return strategy_lib.task_index(self.strategy) == 0


def make_devices(config: TrainConfig) -> Devices:
    """Seeds, splits the CPU, builds the strategy, resolves the precision."""
    seed(config)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    devices = list(config.devices) or None
    if config.num_logical_cpus:
        cpus = strategy_lib.use_logical_cpus(config.num_logical_cpus)
        devices = devices or cpus
    cluster = None
    if config.strategy in ("auto", "multi_worker"):
        cluster = cluster_lib.find(config.workers, config.task_index)
    is_tpu = config.strategy == "tpu" or config.tpu
    found = [] if is_tpu or cluster else strategy_lib.find_devices(devices)
    kind, reason = strategy_lib.choose(
        config.strategy, devices=found, cluster=cluster, tpu=config.tpu
    )
    strategy = dist_amp.make_strategy(
        kind,
        devices=devices,
        all_reduce=config.all_reduce,
        cluster=cluster if kind == "multi_worker" else None,
        tpu=config.tpu,
        tpu_zone=config.tpu_zone,
        tpu_project=config.tpu_project,
        timeouts=cluster_lib.Timeouts(
            startup=config.startup_timeout,
            collective=config.collective_timeout,
            heartbeat=config.heartbeat_timeout,
        ),
        facts=_facts(config) if cluster else None,
    )
    # Entered once for its checks, so that they come before any data is read.
    with dist_amp.scope(strategy, config.precision) as precision:
        pass
    number = strategy.num_replicas_in_sync
    noun = "replica" if number == 1 else "replicas"
    _log.info("strategy: %s, %d %s (%s)", kind, number, noun, reason)
    _log.info("precision: %s (%s)", precision.name, precision.reason)
    return Devices(strategy, kind, reason, precision)


def seed(config: TrainConfig) -> None:
    """All generators; TensorFlow's own with no 0.

    A global seed of 0 makes `shuffle(n, seed=number)` in a function of the
    pass fail (TensorFlow 2.21).
    """
    keras.utils.set_random_seed(config.seed)
    tf.random.set_seed(config.seed + 1)


def _facts(config: TrainConfig) -> dict[str, str]:
    """What all workers must be started with alike: flags, the user's code."""
    facts = {
        f"--{name}": str(value)
        for name, value in dataclasses.asdict(config).items()
        if name not in _OWN_OF_A_WORKER
    }
    for name in ("model", "dataset", "parse", "loss"):
        module, _, function = (getattr(config, name) or "").partition(":")
        if function.isidentifier():
            found = importlib.util.find_spec(module)
            path = pathlib.Path(found.origin or "") if found else None
            if path and path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                facts[f"code of {module}"] = digest[:16]
    return facts
