"""How contenders take turns, each in its own process.

The runner starts them all, then asks one after the other for a pass of so
many steps. A pass is timed in the contender, from the request until the loss
is a number on the host.
"""

import dataclasses
import json
import os
import resource
import sys
import time

from benchmarks.workloads import WORKLOADS, Workload


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one contender trains, and how.

    Attributes:
        workload: Name of the workload.
        replicas: Replicas; logical CPUs where there is no GPU.
        precision: A Keras policy: float32, mixed_float16, mixed_bfloat16.
        steps: Steps in a pass.
        batch_size: Global batch; the workload's own if 0.
        steps_per_call: Steps in one compiled call, for those that can choose.
        compiles: Whether the model is compiled: by XLA, in PyTorch by its
            own compiler.
        loss_scale: "auto", "dynamic" or "none".
        wire_dtype: Of gradients between workers; none if empty.
        save_every: Updates from one checkpoint to the next; none if 0.
        allows_tf32: Whether GPUs may round float32 factors to TF32.
        records: Folder of TFRecord files to read images from; examples are in
            memory if empty.
        core: The only processor core to use; all if -1.
    """

    workload: str
    replicas: int = 1
    precision: str = "float32"
    steps: int = 1
    batch_size: int = 0
    steps_per_call: int = 1
    compiles: bool = False
    loss_scale: str = "auto"
    wire_dtype: str = ""
    save_every: int = 0
    allows_tf32: bool = True
    records: str = ""
    core: int = -1

    @property
    def work(self) -> Workload:
        """The workload itself."""
        work = WORKLOADS[self.workload]
        size = self.batch_size or work.batch_size
        return dataclasses.replace(work, batch_size=size)

    def to_json(self) -> str:
        """What `read_setting` reads."""
        return json.dumps(dataclasses.asdict(self))


def read_setting() -> Setting:
    """The setting that is this process's argument; pins it to its core."""
    setting = Setting(**json.loads(sys.argv[1]))
    if setting.core >= 0:
        os.sched_setaffinity(0, {setting.core})
    return setting


class Passes:
    """Requests on stdin, answers on stdout, all else on stderr."""

    def __init__(self) -> None:
        self._answers = sys.stdout
        sys.stdout = sys.stderr
        self._begin = 0.0

    def wait(self) -> bool:
        """Waits for the request of a pass; False if no more will come."""
        request = sys.stdin.readline()
        self._begin = time.perf_counter()
        return bool(request)

    def done(self, loss: float, device_bytes: int = 0) -> None:
        """Reports a pass.

        Args:
            loss: Mean of its steps.
            device_bytes: Peak of the memory in use on a GPU.
        """
        seconds = time.perf_counter() - self._begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = {
            "seconds": seconds,
            "loss": loss,
            "peak_mib": peak / 1024,
            "device_mib": device_bytes / 2**20,
        }
        print(json.dumps(answer), file=self._answers, flush=True)
