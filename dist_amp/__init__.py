"""Distributed mixed-precision training on TensorFlow and Keras 3.

The same model on one device, N replicas, many hosts or a TPU.
"""

from dist_amp import numerics
from dist_amp.auto_layers import AutoLayers
from dist_amp.checkpoint import Checkpointer, SavePolicy
from dist_amp.loading import LoadedBatches
from dist_amp.optimizer import (
    DistributedOptimizer,
    LossScaleOptimizer,
    wrap_optimizer,
)
from dist_amp.precision import Precision, scope
from dist_amp.rollback import RollbackPolicy
from dist_amp.strategy import make_strategy
from dist_amp.trainer import Trainer
from dist_amp.verify import verify

__version__ = "0.1.0"

__all__ = [
    "AutoLayers",
    "Checkpointer",
    "DistributedOptimizer",
    "LoadedBatches",
    "LossScaleOptimizer",
    "Precision",
    "RollbackPolicy",
    "SavePolicy",
    "Trainer",
    "make_strategy",
    "numerics",
    "scope",
    "verify",
    "wrap_optimizer",
]
