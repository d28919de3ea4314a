"""Splits the CPU into logical devices before any test touches TensorFlow."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dist_amp import strategy
from tests import support

strategy.use_logical_cpus(support.NUM_LOGICAL_CPUS)

# Files that take long come first, so that no process is left with one at the
# end while the other has none.
_LONG = (
    "multi_worker/",
    "launch/prove_resume",
    "faults",
    "launch/",
    "verify",
    "tpu/",
)


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.nodeid.removeprefix("tests/")
        ranks = [i for i, name in enumerate(_LONG) if path.startswith(name)]
        return min(ranks, default=len(_LONG))

    items.sort(key=place)
