"""Who am I: this process's place among the hosts of a job.

Standard library only, so that a mistake is found before TensorFlow starts.
"""

import dataclasses
import json
import os
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ClusterSpec:
    """The workers of a job and which of them this process is.

    Attributes:
        workers: "host:port" of every worker, in task order.
        task_index: Index of this process in `workers`.
        source: Where this was read, for the log.
    """

    workers: tuple[str, ...]
    task_index: int
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.task_index < len(self.workers):
            raise ValueError(
                f"The task index must be in [0, {len(self.workers)}). "
                f"Received {self.task_index} from {self.source}."
            )
        if len(set(self.workers)) != len(self.workers):
            raise ValueError(
                f"Each worker needs an address of its own. Received "
                f"{list(self.workers)} from {self.source}."
            )

    @property
    def num_workers(self) -> int:
        """Number of worker processes."""
        return len(self.workers)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return self.task_index == 0


def from_environment(
    environment: Mapping[str, str] | None = None,
) -> ClusterSpec | None:
    """Reads `TF_CONFIG`; None for a job of one process.

    Args:
        environment: `os.environ` by default.

    Raises:
        ValueError: `TF_CONFIG` is malformed; the message says how.
    """
    text = (os.environ if environment is None else environment).get("TF_CONFIG")
    if not text:
        return None
    try:
        config = json.loads(text)
        workers = tuple(config.get("cluster", {}).get("worker", ()))
        task = config.get("task", {})
        index = int(task.get("index", 0))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"TF_CONFIG must be a JSON object. Received {text!r}: {error}."
        ) from error
    if len(workers) < 2:
        return None
    if task.get("type", "worker") != "worker":
        raise ValueError(
            "Every task in TF_CONFIG must be a worker. Received task type "
            f"{task['type']!r}; list all hosts under cluster.worker."
        )
    return ClusterSpec(workers, index, "TF_CONFIG")
