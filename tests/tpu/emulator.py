"""Runs what a TPU's cores would run, on the CPU: all of them, with collectives.

The step is traced under the real `TPUStrategy`, a core's part of it cut out and
lowered by `dist_amp.ahead_of_time`, and run by JAX's CPU client, which has as
many devices as there are cores. Variables live in TensorFlow, a copy a core.
"""

import jax
import numpy as np
import tensorflow as tf

from dist_amp import ahead_of_time
from tests import support

MAX_CORES = 8

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", MAX_CORES)
jax.config.update("jax_enable_x64", True)


class EmulatedStep:
    """A step of a trainer that was made in `ahead_of_time.make_strategy`.

    Args:
        trainer: Built.
        step: `trainer.train_replica` or `trainer.test_replica`.
        batch: A distributed batch, for its shapes.
    """

    def __init__(self, trainer, step, batch):
        self._num_cores = trainer.strategy.num_replicas_in_sync

        @tf.function(autograph=False)
        def run(batch):
            trainer.strategy.run(step, args=(batch,))

        one = tf.nest.map_structure(lambda leaf: leaf.values[0], batch)
        concrete = run.get_concrete_function(
            tf.nest.map_structure(tf.TensorSpec.from_tensor, one)
        )
        self.program = ahead_of_time.program_of(concrete, reads_back=True)
        self._devices = jax.devices("cpu")[: self._num_cores]
        self.module = ahead_of_time.lower(self.program)
        self._executable = ahead_of_time.compile_module(
            self.module, self._devices
        )

    def __call__(self, batch):
        """Runs the step on all cores at once; changes the variables."""
        variables = self.program.variables
        leaves = [leaf.values for leaf in tf.nest.flatten(batch)]
        states = [map(v.read, range(self._num_cores)) for v in variables]
        outputs = self._executable.execute_sharded(
            [self._on_devices(copies) for copies in (*leaves, *states)]
        )
        shards = outputs.disassemble_into_single_device_arrays()
        for variable, values in zip(variables, shards, strict=False):
            for handle, value in zip(variable.handles, values, strict=True):
                tf.raw_ops.AssignVariableOp(
                    resource=handle,
                    value=tf.constant(np.asarray(value), variable.dtype),
                )

    def _on_devices(self, values):
        """One array, of which each device holds its own value."""
        mesh = jax.sharding.Mesh(np.array(self._devices), ("cores",))
        sharding = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec()
        )
        parts = [
            jax.device_put(value.numpy(), device)
            for value, device in zip(values, self._devices, strict=True)
        ]
        return jax.make_array_from_single_device_arrays(
            parts[0].shape, sharding, parts
        )


class EmulatedTrainer:
    """Trains and evaluates as `Trainer.fit` and `evaluate` do on a TPU.

    Args:
        trainer: Made in `ahead_of_time.make_strategy`.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.steps = {}

    def fit(self, dataset, *, epochs=2, class_weight=None):
        """Trains; returns the logs of each epoch."""
        parts = self.trainer.optimizer.gradient_accumulation_steps or 1
        logs = []
        for _ in range(epochs):
            batches = self._open(dataset, class_weight=class_weight)
            for number, batch in enumerate(batches, 1):
                is_last = number % parts == 0
                with self.trainer.optimizer.accumulation(is_last=is_last):
                    self._run(self.trainer.train_replica, batch, is_last)
            logs.append(_floats(self.trainer.read_train_logs()))
        self.trainer.optimizer.finalize_variable_values(
            self.trainer.model.trainable_variables
        )
        return logs

    def evaluate(self, dataset):
        for batch in self._open(dataset):
            self._run(self.trainer.test_replica, batch)
        return _floats(self.trainer.metrics.results())

    def _open(self, dataset, **options):
        self.trainer.build(dataset)
        self.trainer.metrics.reset()
        return self.trainer.feed(dataset, **options).open(lambda: dataset)

    def _run(self, step, batch, *key):
        """Compiled once, as on a TPU: all batches have one shape."""
        key = (step.__name__, *key)
        if key not in self.steps:
            self.steps[key] = EmulatedStep(self.trainer, step, batch)
        self.steps[key](batch)


def fit_emulated(dataset, *args, num_cores, fit=None, **options):
    """As `support.fit_trainer`, on emulated cores."""
    strategy = ahead_of_time.make_strategy(num_cores)
    trainer = support.make_trainer(*args, strategy=strategy, **options)
    logs = EmulatedTrainer(trainer).fit(dataset, **(fit or {}))
    history = {name: [log[name] for log in logs] for name in logs[0]}
    return support.Trained(trainer.model, trainer.optimizer, history, trainer)


def _floats(logs):
    return {name: float(tf.convert_to_tensor(v)) for name, v in logs.items()}
