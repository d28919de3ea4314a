"""Splits the CPU into logical devices before any test touches TensorFlow."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dist_amp import strategy
from tests import support

strategy.use_logical_cpus(support.NUM_LOGICAL_CPUS)
