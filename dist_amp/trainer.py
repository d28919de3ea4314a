"""Trainer: the outer loop over epochs, evaluations, callbacks, checkpoints."""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_amp import optimizer as optimizer_lib
from dist_amp import random_state
from dist_amp import strategy as strategy_lib
from dist_amp.agreement import StopRequest
from dist_amp.beacon import Beacon
from dist_amp.callbacks import Progress
from dist_amp.checkpoint import Checkpointer, SavePolicy
from dist_amp.data import Batch
from dist_amp.data_service import DataService
from dist_amp.feed import Feed
from dist_amp.fit import Fit, blame
from dist_amp.gradient_log import GradientLog
from dist_amp.layer_dtypes import switch
from dist_amp.loading import LoadedBatches, first_pass
from dist_amp.meter import Meter
from dist_amp.metrics import MetricsLike, to_numbers
from dist_amp.pace import Pace
from dist_amp.predictions import gathered, joined
from dist_amp.profiler import Profiler
from dist_amp.rollback import RollbackPolicy
from dist_amp.steps import Steps, reduction_of
from dist_amp.stream import (
    UNKNOWN_DIMENSION,
    DatasetLike,
    Stream,
    agree_on_length,
    counts_of,
    is_infinite,
    length_of,
    one_pass,
    padded,
)
from dist_amp.watchdog import Watchdog

_log = logging.getLogger(__name__)


class Trainer(Steps):
    """Trains and evaluates a Keras model on any strategy, in any precision.

    `train_step` and `test_step` run in each replica and may be overridden.

    Args:
        model: Any `keras.Model`, made in `dist_amp.scope(strategy, ...)`. A
            model without variables yet is built from the first dataset.
        optimizer: From `dist_amp.wrap_optimizer`; a plain Keras optimizer is
            wrapped here.
        loss: A `keras.losses.Loss`, its name, or a function of `(y, y_pred)`
            that returns one value for each example; a list or a dict of them
            for several outputs; None if the model adds its own (`add_loss`).
            Its `reduction` decides what the sum over the global batch is
            divided by.
        metrics: Names or `keras.metrics.Metric`s; see `MetricSet`.
        jit_compile: Whether XLA compiles the forward and backward pass.
        data_service: Cuts and loads the batches of `fit`, `evaluate` and
            `predict` in this worker's place; they are the same ones.

    Attributes:
        run_info: Values that JSON can hold, say the settings of the run; they
            go into each checkpoint.
        beacon: Tells where training is, for those who watch it.
        report_dir: On several workers, the folder in which a standstill is
            written down; None: it is only logged.

    Raises:
        ValueError: Model and optimizer were not made in one scope.

    Example:
    >>> strategy = dist_amp.make_strategy("auto")
    >>> with dist_amp.scope(strategy, "auto"):
    ...     model = keras.Sequential([keras.Input((4,)),
    ...                               keras.layers.Dense(3, dtype="float32")])
    ...     optimizer = dist_amp.wrap_optimizer(keras.optimizers.Adam(1e-3))
    >>> trainer = dist_amp.Trainer(
    ...     model, optimizer,
    ...     loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ...     metrics=["accuracy"])
    >>> dataset = tf.data.Dataset.from_tensor_slices(
    ...     (tf.random.normal([10, 4]), tf.range(10) % 3)).batch(4)
    >>> history = trainer.fit(dataset, epochs=2, verbose=0)
    >>> sorted(trainer.evaluate(dataset))
    ['accuracy', 'loss']
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        *,
        loss: Any = None,
        metrics: MetricsLike = (),
        jit_compile: bool = False,
        data_service: DataService | None = None,
    ):
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`optimizer` must be a keras.optimizers.Optimizer, made in "
                f"the scope of the model. Received {optimizer!r}."
            )
        strategy = model.distribute_strategy
        _check_has_scope(strategy)
        if optimizer_lib.strategy_of(optimizer) is not strategy:
            raise ValueError(
                "The model and the optimizer must be made in one scope. "
                f"Received a model of {type(strategy).__name__} and an "
                "optimizer of another strategy: make both within `with "
                "dist_amp.scope(strategy, ...)`. Each call of `make_strategy` "
                "makes another strategy: keep one."
            )
        _check_own_steps(type(self), model)
        with strategy.scope():
            optimizer = _wrapped(optimizer, model)
        super().__init__(
            model,
            optimizer,
            loss=loss,
            metrics=metrics,
            strategy=strategy,
            jit_compile=jit_compile,
        )
        model.optimizer = optimizer
        model.stop_training = False
        self.data_service = data_service
        self._test_pace = Pace("auto")
        self._make_loops()
        self._gather = None
        if strategy_lib.num_workers(strategy) > 1:
            self._gather = functools.partial(
                strategy_lib.gather_workers, strategy
            )
        self._is_built = False
        self._doubts: list[str] = []
        self.beacon = Beacon()
        self.report_dir: str | pathlib.Path | None = None
        self._stop = StopRequest(strategy, self.beacon)
        self._stop_reason: str | None = None
        self._checkpointer: Checkpointer | None = None
        self._fit: Fit | None = None
        self.run_info: dict[str, Any] = {}

    # ------------------------------------------------------------- public

    def fit(
        self,
        dataset: DatasetLike,
        *,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        steps_per_loop: int | str = "auto",
        validation_data: DatasetLike | None = None,
        validation_steps: int | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        checkpoint_dir: str | pathlib.Path | None = None,
        save_policy: SavePolicy | None = None,
        rollback: RollbackPolicy | None = None,
        initial_epoch: int = 0,
        class_weight: Mapping[int, float] | None = None,
        verbose: str | int = "auto",
        profiler: Profiler | None = None,
    ) -> keras.callbacks.History:
        """Trains the model.

        A step is one update of the weights. With
        `gradient_accumulation_steps=K` it takes K batches of the dataset (as
        in Keras), and what is left at the end of an epoch makes a last,
        smaller update.

        Args:
            dataset: Global batches of `x`, `(x, y)` or `(x, y,
                sample_weight)`, each leaf `[global_batch, ...]`; a smaller
                last batch is weighted rightly. Or a function of the pass over
                the data (0, 1, ...; a scalar int64 tensor) that returns them:
                to go on in pass 90 from a checkpoint, a dataset is read from
                its start, a function from the start of pass 90. In
                `LoadedBatches` each worker loads only what it trains on.
            epochs: Epoch to stop at, counted from 0.
            steps_per_epoch: Updates in an epoch; by default one pass over the
                dataset. Needed if the dataset repeats for ever.
            steps_per_loop: Updates in one compiled call. Callbacks hear of
                the last batch of each call. "auto" lengthens the calls until
                the host's share is negligible.
            validation_data: Global batches, evaluated after each epoch.
            validation_steps: Batches of it to use; all by default.
            callbacks: Keras callbacks.
            checkpoint_dir: Where to save: everything, so that a run that is
                interrupted anywhere and started again ends with the same
                bits. If it holds a checkpoint, training goes on from there.
            save_policy: When to save and what to keep; after each epoch and
                the newest three by default.
            rollback: Goes back to the last good checkpoint where training
                blows up, past the batches that did it; an error by default.
                Needs a function for `dataset`.
            initial_epoch: Epoch to start from if nothing is restored.
            class_weight: Weight of each class in the loss.
            verbose: 0 silent, 1 or "auto" a progress line, 2 a line an epoch.
            profiler: Profiles some updates.

        Returns:
            The Keras `History`: `.history` holds a list for each name in the
            logs, one number an epoch; validation results start with `val_`.

        Raises:
            ValueError: An argument is out of range, or the dataset does not
                fit the replicas.
            PeerError: Another worker failed or was lost; it says which. A
                standstill ends the process; see `watchdog`.
            FloatingPointError: The loss is no finite number, or the loss
                scale is at its floor and updates are still skipped.
        """
        _check_counts(
            epochs=epochs,
            initial_epoch=initial_epoch + 1,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            steps_per_loop=None if steps_per_loop == "auto" else steps_per_loop,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._watched())
            self.build(dataset)
            self._tell_doubts()
            policy = self._directed(save_policy or SavePolicy())
            self._check_best(policy, validation_data)
            self._check_recovery(dataset, checkpoint_dir, save_policy, rollback)
            stream = self._make_stream(dataset, steps_per_epoch, class_weight)
            validation = self._prepare_test(validation_data, validation_steps)
            self.model.stop_training = False
            checkpointer = None
            if checkpoint_dir is not None:
                checkpointer = self._make_checkpointer(
                    dataset, checkpoint_dir, policy
                )
                stack.enter_context(checkpointer)
            self._fit = Fit(
                self,
                stream,
                self._callback_list(callbacks, verbose, epochs, stream),
                epochs=epochs,
                pace=Pace(steps_per_loop),
                stop=self._stop,
                train_call=self._call_train_loop,
                validate=validation
                and functools.partial(self._test, *validation, may_stop=True),
                checkpointer=checkpointer,
                save_policy=policy,
                rollback=rollback,
                info=self.run_info,
                beacon=self.beacon,
                meter=Meter(dataset, self.optimizer.stopwatch),
                profiler=profiler,
            )
            try:
                self._fit.run(initial_epoch)
            finally:
                self._end(self._fit)
        return self.model.history

    def train_on(
        self, dataset: DatasetLike, *, num_steps: int = 1
    ) -> dict[str, Any]:
        """Runs some updates and nothing else, for loops of your own.

        No epochs, callbacks or checkpoints; metrics add up until
        `metrics.reset()`.

        Args:
            dataset: Global batches as in `fit`, at least `num_steps` of them
                (times `gradient_accumulation_steps`).
            num_steps: Updates.

        Returns:
            The logs as in `fit`: loss, metrics, loss scale and so on.
        """
        self.build(dataset)
        parts = self.optimizer.gradient_accumulation_steps or 1
        feed = self.feed(dataset)
        iterator = iter(feed.open(lambda: one_pass(feed.batches)))
        logs = self._train_loop(
            iterator, tf.constant(num_steps), tf.constant(parts)
        )
        return to_numbers(logs)

    def evaluate(
        self, dataset: DatasetLike, *, steps: int | None = None
    ) -> dict[str, float]:
        """Returns the loss and the metrics, exact over every example.

        Args:
            dataset: Global batches as in `fit`; of a function of the pass,
                the first.
            steps: Batches to use; all by default.

        Raises:
            ValueError: The dataset repeats for ever and `steps` is None.
        """
        with self._watched():
            self.build(dataset)
            results = self._test(*self._prepare_test(dataset, steps))
        assert results is not None  # it may not be stopped
        return results

    def predict(self, dataset: DatasetLike, *, steps: int | None = None) -> Any:
        """What the model returns for every example, in the dataset's order.

        On any number of replicas and workers, whatever the size of the last
        batch. Override `predict_step` to return something else.

        Args:
            dataset: Global batches as in `fit`, or of `x` alone; the same on
                every worker.
            steps: Batches to use; all by default.

        Returns:
            Arrays `[num_examples, ...]` in host memory, in the structure that
            the model returns, the same on every worker.

        Raises:
            ValueError: The dataset is empty, repeats for ever and `steps` is
                None, or the workers' differ in length.
        """
        dataset = first_pass(dataset)
        _check_has_end(dataset, steps)
        if steps is not None:
            dataset = dataset.take(steps)
        with self._watched():
            if not self._is_built:  # metrics may wait for targets
                with self.strategy.scope():
                    self._build_model(dataset)
            feed = self.feed(dataset)
            iterator = iter(feed.open(lambda: one_pass(feed.batches)))
            count = functools.partial(counts_of, iterator)
            with self.beacon.phase("evaluation", count):
                return joined(
                    gathered(
                        self.strategy,
                        iterator,
                        self._predict_call,
                        self._gather,
                    )
                )

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Ends `fit` after the compiled call under way, with a checkpoint.

        On several workers one of them may be asked; all end at the same step.
        Safe to call from a signal handler or another thread.

        Args:
            reason: For the log; up to 48 bytes reach the other workers.
        """
        self._stop.ask(reason)

    @property
    def stop_reason(self) -> str | None:
        """What `request_stop` was given, if it cut the last `fit` short."""
        return self._stop_reason

    @property
    def global_step(self) -> int:
        """Updates attempted since the start, skipped ones included."""
        return self._fit.position.step if self._fit else 0

    @property
    def data_position(self) -> tuple[int, int]:
        """Epoch, and batch of it, from 0, at which the last `fit` ended."""
        return self._fit.place_in_data if self._fit else (0, 0)

    def peek(self) -> list[tuple[Batch, ...]]:
        """The next update's batches, a slice for each replica of each.

        For a callback within `fit`, between updates. They are used up by it.
        """
        return self._fit.peek() if self._fit else []

    def take_rollbacks(self, state: Mapping[str, Any]) -> None:
        """Passes over the batches that a run went back for, as it did.

        For a callback's `on_train_begin`, to make a part of a run again.

        Args:
            state: Of the run's first checkpoint after that part; see
                `storage.read_state`.
        """
        if self._fit:
            self._fit.take_rollbacks(state)

    @property
    def resumed_step(self) -> int:
        """The step that the last `fit` went on from; 0 if it was new."""
        return self._fit.resumed_step if self._fit else 0

    @property
    def save_error(self) -> Exception | None:
        """Why the last checkpoint could not be written; None if it was."""
        return self._checkpointer.error if self._checkpointer else None

    def state(self) -> dict[str, Sequence[keras.Variable | tf.Variable]]:
        """Variables that a checkpoint holds, by group, equal on all replicas.

        Override it to add what your `train_step` uses beside the model and
        the optimizer: `{**super().state(), "critic": self.critic.variables}`.
        """
        return {
            "model": self.model.variables,
            "optimizer": self.optimizer.variables,
        }

    def build(self, dataset: DatasetLike) -> None:
        """Creates every variable; `fit` and `evaluate` do it by themselves.

        Args:
            dataset: As in `fit`; only its shapes are looked at.
        """
        if self._is_built:
            return
        with self.strategy.scope():
            y, predictions = self._build_model(dataset)
            self.optimizer.build(self.model.trainable_variables)
            self.metrics.build(y, predictions)
        self._check_combinations(predictions)
        self._warn_of_odd_sizes()
        self._doubts = list(self._doubts_of(predictions))
        self.prepare_layers()
        self.spread_seeds()
        self._is_built = True

    def trace(self, dataset: DatasetLike) -> int:
        """Traces the train step without running it.

        Args:
            dataset: As in `fit`; only its shapes are looked at.

        Returns:
            Number of operations in the compiled loop, functions included.
        """
        definition = self.step_graph(dataset).as_graph_def()
        return len(definition.node) + sum(
            len(inner.node_def) for inner in definition.library.function
        )

    def step_graph(self, dataset: DatasetLike) -> tf.Graph:
        """The compiled loop around train steps that `fit` runs.

        Traced if it was not; on several workers by all of them.

        Args:
            dataset: As in `fit`; only its shapes are looked at.
        """
        self.build(dataset)
        return self._traced_loop(dataset).graph

    def feed(
        self,
        dataset: DatasetLike,
        *,
        class_weight: Mapping[int, float] | None = None,
    ) -> Feed:
        """What takes global batches to the replicas.

        Args:
            dataset: As in `fit`.
            class_weight: As in `fit`.
        """
        return Feed(
            self.strategy,
            self.replica_ids,
            dataset,
            reduction=reduction_of(self.loss),
            class_weight=class_weight,
            service=self.data_service,
        )

    def slice_spec(self, dataset: DatasetLike) -> Batch:
        """Shapes and dtypes of what one replica's step takes.

        Args:
            dataset: As in `fit`; only its shapes are looked at.

        Returns:
            `tf.TensorSpec`s; the size of a slice is None where it varies.
        """
        feed = self.feed(dataset)
        return feed.split(one_pass(feed.batches)).element_spec[0]

    def untracked(self, dataset: DatasetLike) -> list[tf.Variable]:
        """Variables that the train step uses and `state` leaves out.

        Keras' global generator of random numbers, for one, which a layer
        without a seed of its own draws from.

        Args:
            dataset: As in `fit`; only its shapes are looked at.
        """
        tracked = [
            *(v for group in self.state().values() for v in group),
            *self.metrics.variables,
            *random_state.variables_of(self.model),
            *self.optimizer.feedback,
        ]
        if self.optimizer.stopwatch is not None:
            tracked += self.optimizer.stopwatch.variables
        if isinstance(self.optimizer, optimizer_lib.LossScaleOptimizer):
            tracked += self.optimizer.overflows.variables
        if self.optimizer.gradient_log is not None:
            tracked += self.optimizer.gradient_log.variables
        inner = [getattr(v, "value", v) for v in tracked]
        copies = [c for v in tracked for c in strategy_lib.local_copies(v)]
        known = {id(v) for v in (*tracked, *inner, *copies)}
        return [
            variable
            for variable in self._traced_loop(dataset).variables
            if id(variable) not in known
        ]

    def keep_gradients(self) -> GradientLog:
        """Has each update keep its gradient; see `GradientLog`.

        Call it before `fit`, with the trainer built: `fit` takes the memory of
        one more gradient then, and a copy of it an update.
        """
        with self.strategy.scope():
            log = self.optimizer.keep_gradients()
        self._make_loops()
        return log

    def pin(self, layers: Iterable[keras.layers.Layer]) -> None:
        """Has layers compute in float32 from now on.

        In a fit under way, call it at an epoch's end: the loops are traced
        again. All workers must pin the same layers.

        Args:
            layers: Of the model, each with all that it is made of.
        """
        switch(layers, "float32")
        self._gradients = self._make_gradients()
        self._make_loops()
        if self._fit:
            self._fit.expect_trace()

    # ------------------------------------------------------------ private

    def _build_model(self, dataset: DatasetLike) -> tuple[Any, Any]:
        """Targets of zeros, and what the model returns for such inputs."""
        whole = one_pass(dataset)
        _check_dataset(whole)
        spec = whole.element_spec
        parts = spec if isinstance(spec, tuple) else (spec,)
        zeros = functools.partial(
            _zeros, has_fixed_size=_has_fixed_size(self.model)
        )
        x, y = (*tf.nest.map_structure(zeros, parts), None)[:2]
        return y, self.model(x, training=False)

    def _make_loops(self) -> None:
        """Compiled loops, to be traced when they are called."""
        self._test_pace.is_traced = False
        self._train_loop = self.make_train_loop()
        self._stacked_loop: Any = None
        self._stacked_spec: Any = None
        self._test_loop = self.make_test_loop()
        self._predict_call = self.make_predict_call()
        self._train_lockstep = self.make_lockstep(self.run_update)
        self._test_lockstep = self.make_lockstep(
            functools.partial(self._run, self.test_replica)
        )

    def _traced_loop(self, dataset: DatasetLike) -> Any:
        """The graph that `fit` will run; it makes no iterator."""
        parts = self.optimizer.gradient_accumulation_steps or 1
        feed = self.feed(dataset)
        if stacks := feed.stacks(parts):
            first = stacks.stacks(tf.constant(0, tf.int64))
            spec = feed.split(first, is_stacked=True).element_spec
            return self._loop_over_stacks(spec).get_concrete_function()
        numbers = tf.constant(1), tf.constant(1)
        if self.is_on("TPU"):  # whose iterators are another type each
            iterator = iter(feed.open(lambda: one_pass(feed.batches)))
            return self._train_loop.get_concrete_function(iterator, *numbers)
        spec = feed.split(one_pass(feed.batches)).element_spec
        return self._train_loop.get_concrete_function(
            tf.data.IteratorSpec(spec), *numbers
        )

    def _loop_over_stacks(self, spec: Any) -> Any:
        """Traced for another dataset only if its shapes are others."""
        if self._stacked_loop is None or self._stacked_spec != spec:
            self._stacked_spec = spec
            self._stacked_loop = self.make_stacked_loop(spec)
        return self._stacked_loop

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Other workers that fail or stand still end this one too."""
        watchdog = Watchdog(
            self.strategy, self.beacon, report_dir=self.report_dir
        )
        with watchdog.watching(), contextlib.ExitStack() as stack:
            if self.data_service:
                stack.enter_context(self.data_service.explaining())
            yield

    def _check_combinations(self, predictions: Any) -> None:
        parts = self.optimizer.gradient_accumulation_steps
        if parts and reduction_of(self.loss) == "sum":
            raise ValueError(
                "`gradient_accumulation_steps` takes means, so the loss must "
                "not have `reduction='sum'`; pass 'sum_over_batch_size'."
            )
        if self.jit_compile and self.is_on("TPU"):
            raise ValueError(
                "`jit_compile` would be ignored on a TPU, which compiles "
                "every step; leave it off (--nojit_compile)."
            )
        if not self.jit_compile or self.strategy.num_replicas_in_sync == 1:
            return
        if optimizer_lib.is_synchronized(self.model):
            raise ValueError(
                "`jit_compile` on several replicas cannot compile layers that "
                "talk to other replicas, like BatchNormalization("
                "synchronized=True); turn one of them off (--nojit_compile, or "
                "--model_option=synchronized=false for convnet and resnet50; "
                "models of keras.applications are always synchronized)."
            )
        if self._counts_masks(predictions):
            raise ValueError(
                "`jit_compile` on several replicas cannot compile a loss that "
                "a Keras mask makes shorter, since all replicas must count "
                "what is left of it; mask by sample weights instead, or turn "
                "XLA off (--nojit_compile)."
            )

    def _counts_masks(self, predictions: Any) -> bool:
        """Whether our own loss divides by what masks leave of all replicas."""
        is_masked = any(
            getattr(leaf, "_keras_mask", None) is not None
            for leaf in tf.nest.flatten(predictions)
        )
        is_ours = type(self).compute_loss is Steps.compute_loss
        has_mean = self.loss is not None and reduction_of(self.loss) != "sum"
        return is_masked and is_ours and has_mean

    def _warn_of_odd_sizes(self) -> None:
        """Tensor cores want sizes that are multiples of 8."""
        odd = optimizer_lib.odd_sizes(self.model)
        if odd and self.is_on("GPU"):
            _log.warning(
                "tensor cores are slow, or idle, where the units or filters "
                "of a layer in half precision are no multiple of 8: %s",
                ", ".join(f"{name} ({size})" for name, size in odd),
            )

    def _doubts_of(self, predictions: Any) -> Iterator[str]:
        """What it trains with, and would better not."""
        leaves = tf.nest.flatten(predictions)
        dtypes = {one.dtype.name for one in leaves if hasattr(one, "dtype")}
        for dtype in sorted(dtypes & {"float16", "bfloat16"}):
            yield (
                f"the model's output is {dtype}: give the last layer "
                'dtype="float32"; softmax and loss want it'
            )
        apart = optimizer_lib.unsynchronized(self.model)
        if apart and self.strategy.num_replicas_in_sync > 1:
            yield (
                f"batch norm {apart[0]}: statistics are per replica: pass "
                "synchronized=True for the same model on any number of replicas"
            )

    def _tell_doubts(self) -> None:
        """Once, and only where it is trained: other programs look on."""
        doubts, self._doubts = self._doubts, []
        if strategy_lib.task_index(self.strategy) == 0:
            for doubt in doubts:
                _log.warning(doubt)

    def _end(self, fit: Fit) -> None:
        is_cut = bool(self._stop.reason) and not fit.is_finished
        self._stop_reason = self._stop.reason if is_cut else None
        self._stop.clear()
        if is_cut:
            _log.info(
                "stopped at step %d: %s", self.global_step, self._stop_reason
            )

    def _make_stream(
        self,
        dataset: DatasetLike,
        steps_per_epoch: int | None,
        class_weight: Mapping[int, float] | None,
    ) -> Stream:
        feed = self.feed(dataset, class_weight=class_weight)
        return Stream(
            feed.batches,
            feed,
            batches_per_step=self.optimizer.gradient_accumulation_steps or 1,
            steps_per_epoch=steps_per_epoch,
            gather=self._gather,
        )

    def _check_recovery(
        self,
        dataset: DatasetLike,
        checkpoint_dir: str | pathlib.Path | None,
        save_policy: SavePolicy | None,
        rollback: RollbackPolicy | None,
    ) -> None:
        """Refuses what would be ignored, or fail when it is needed."""
        if checkpoint_dir is None and (save_policy or rollback):
            name = "save_policy" if save_policy else "rollback"
            raise ValueError(f"`{name}` needs a `checkpoint_dir`.")
        if rollback is None:
            return
        if isinstance(dataset, LoadedBatches):
            dataset = dataset.batches
        if isinstance(dataset, tf.data.Dataset):
            raise ValueError(
                "`rollback` reads batches a second time, and a dataset that "
                "shuffles gives others then: pass a function of the pass, "
                "`lambda number: examples.shuffle(n, seed=number).batch(k)`, "
                "or `lambda number: dataset` for one in a fixed order "
                "(--rollback_on)."
            )
        has_scale = isinstance(self.optimizer, optimizer_lib.LossScaleOptimizer)
        if rollback.lower == "loss_scale" and not has_scale:
            raise ValueError(
                "There is no loss scale to lower in this precision: pass "
                "`lower='learning_rate'` or 'nothing' (--rollback_lower)."
            )

    def _callback_list(
        self,
        callbacks: Sequence[keras.callbacks.Callback],
        verbose: str | int,
        epochs: int,
        stream: Stream,
    ) -> keras.callbacks.CallbackList:
        """The user's, a progress line, and Keras' History."""
        made = keras.callbacks.CallbackList(
            [*callbacks, *self._progress(verbose)],
            add_history=True,
            model=self.model,
            epochs=epochs,
            steps=stream.steps_per_epoch,
            verbose=0,
        )
        self._orient(callbacks)
        return made

    def _orient(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Tells callbacks that monitor a metric whether more is better.

        Keras looks for it in compiled metrics, of which there are none.
        """
        for callback in callbacks:
            if getattr(callback, "mode", None) == "auto":
                name = callback.monitor.removeprefix("val_")
                callback.mode = self.metrics.direction_of(name) or "auto"

    def _check_best(
        self, policy: SavePolicy, validation_data: DatasetLike | None
    ) -> None:
        """Whether `keep_best` will be in the logs, where that is known now.

        What callbacks add to them is seen by callbacks only.
        """
        known = self.metrics.names
        if known is None:
            return
        names = [*known]
        if validation_data is not None:
            names += [f"val_{name}" for name in known]
        if policy.keep_best is not None and policy.keep_best not in names:
            raise ValueError(
                f"`keep_best` must be one of {', '.join(names)}. Received "
                f"{policy.keep_best!r} (--keep_best)."
            )

    def _directed(self, policy: SavePolicy) -> SavePolicy:
        """Knows which way the metric of `keep_best` is better."""
        if policy.keep_best is None or policy.mode != "auto":
            return policy
        name = policy.keep_best.removeprefix("val_")
        mode = self.metrics.direction_of(name) or "auto"
        return dataclasses.replace(policy, mode=mode)

    def _make_checkpointer(
        self,
        dataset: DatasetLike,
        directory: str | pathlib.Path,
        policy: SavePolicy,
    ) -> Checkpointer:
        untracked = self.untracked(dataset)
        if untracked and self.strategy.num_replicas_in_sync > 1:
            _log.warning(
                "checkpoints do not hold %s, which the train step uses: add "
                "it to `Trainer.state`",
                ", ".join(variable.name for variable in untracked),
            )
            untracked = []
        self._checkpointer = Checkpointer(
            str(directory),
            {**self.state(), **({"others": untracked} if untracked else {})},
            summed=[*self.metrics.variables, *self.optimizer.feedback],
            per_replica=random_state.variables_of(self.model),
            policy=policy,
            strategy=self.strategy,
        )
        return self._checkpointer

    def _progress(self, verbose: str | int) -> list[keras.callbacks.Callback]:
        """One worker's is enough to see."""
        if verbose == 0 or strategy_lib.task_index(self.strategy) != 0:
            return []
        seconds = math.inf if verbose == 2 else 30.0
        return [Progress(seconds_between_lines=seconds)]

    def _call_train_loop(
        self, stream: Stream, num_steps: int, micro_steps: int
    ) -> dict[str, float] | None:
        """Runs some updates; None if there is no more data."""
        if stream.batches_per_epoch is None:
            return self._call_lockstep(stream)
        try:
            if stream.is_stacked:
                return self._call_stacked_loop(stream, num_steps)
            logs = self._train_loop(
                stream.iterator,
                tf.constant(num_steps),
                tf.constant(micro_steps),
            )
        except tf.errors.InvalidArgumentError as error:
            raise self._explained(error) from error
        return to_numbers(logs)

    def _call_stacked_loop(
        self, stream: Stream, num_steps: int
    ) -> dict[str, float]:
        loop = self._loop_over_stacks(stream.iterator.element_spec)
        logs, stack, place, num_stacks = loop(
            stream.iterator,
            stream.stack,
            tf.constant(stream.place),
            tf.constant(num_steps),
        )
        stream.go_to(stack, int(place), int(num_stacks))
        return to_numbers(logs)

    def _call_lockstep(self, stream: Stream) -> dict[str, float] | None:
        """One update, if any worker has a batch for it."""
        has_run, had_batch = self._train_lockstep(stream.iterator)
        if not has_run:
            return None
        if not had_batch:
            _log.warning(
                "the data of this worker ended before that of others: it "
                "takes part without examples"
            )
        return to_numbers(self.read_train_logs())

    def _explained(self, error: tf.errors.InvalidArgumentError) -> Exception:
        """In words: what a label was; why updates are skipped without end."""
        label = re.search(
            r"label value of (-?\d+) .* valid range of \[0, (\d+)\)",
            error.message,
        )
        if label:
            return ValueError(
                f"A label is {label[1]}, and the model has {label[2]} outputs: "
                "the loss (--loss) wants labels from 0, and one output for "
                "each class. Give the last layer as many units as there are "
                "classes, or predict numbers by 'mean_squared_error'."
            )
        found = re.search(
            r"(\d+ updates in a row.*\)\.) Numbers .*?\[([\d ]+)\] \[(.*?)\]",
            error.message,
        )
        if not found:
            return error
        paths = found[3].split(", ")
        names = ", ".join(paths[int(number)] for number in found[2].split())
        inputs = int(self.metrics.counts()["nonfinite_inputs"])
        last = self.optimizer.overflows.read()
        described = last.describe(
            self.replica_ids, self.strategy.num_replicas_in_sync
        )
        return FloatingPointError(
            f"{found[1]} Gradients that are not finite: {names} (after step "
            f"{self.global_step}). The one before it was {described}. "
            f"{blame(inputs, last.attempt + 1)}"
        )

    def _prepare_test(
        self, dataset: DatasetLike | None, steps: int | None
    ) -> Any:
        """What `_test` takes; None for no dataset."""
        if dataset is None:
            return None
        dataset = first_pass(dataset)
        _check_has_end(dataset, steps)
        length = steps
        if steps is None:
            length, is_padded = agree_on_length(
                dataset, length_of(dataset), self._gather
            )
            if is_padded and length is not None:
                dataset = dataset.apply(lambda some: padded(some, length))
        feed = self.feed(dataset)
        return feed.open(lambda: one_pass(feed.batches)), length

    def _test(
        self,
        batches: Iterable[Any],
        length: int | None,
        *,
        may_stop: bool = False,
    ) -> dict[str, float] | None:
        """Evaluates some batches, or all where their number is unknown.

        Returns None if it may be stopped and was asked to.
        """
        with self.metrics.set_aside():
            iterator, done = iter(batches), 0
            count = functools.partial(counts_of, iterator)
            while length is None or done < length:
                wanted, _ = self._stop.agree(self._test_pace.steps)
                if may_stop and self._stop.reason:
                    return None
                phase = self.beacon.phase("evaluation", count, taken=done)
                if length is None:
                    with phase:
                        has_run, _ = self._test_lockstep(iterator)
                    if not has_run:
                        break
                    done += 1
                    continue
                num = min(wanted, length - done)
                try:
                    with self._test_pace.observe(num), phase:
                        self._test_loop(iterator, tf.constant(num))
                except tf.errors.OutOfRangeError:
                    raise ValueError(
                        f"The dataset has fewer than {length} batches to "
                        "evaluate (`validation_steps` in `fit`, --eval_steps)."
                    ) from None
                done += num
            results = to_numbers(self.metrics.results())
            if to_numbers(self.metrics.counts())["nonfinite_losses"]:
                results["loss"] = math.nan
        return results


def _wrapped(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> optimizer_lib.DistributedOptimizer:
    needs_scale = optimizer_lib.computes_in_float16(model)
    return optimizer_lib.wrap_optimizer(
        optimizer, loss_scale="dynamic" if needs_scale else "auto"
    )


def _check_has_scope(strategy: tf.distribute.Strategy) -> None:
    with strategy.scope():
        is_given = tf.distribute.has_strategy()
    if not is_given:
        raise ValueError(
            "The model and the optimizer must be made in `with dist_amp.scope("
            "strategy, ...)`. Received a model that was made in no scope; for "
            "one device the strategy is dist_amp.make_strategy('one_device')."
        )


def _check_own_steps(kind: type[Trainer], model: keras.Model) -> None:
    """Whether the model says how it is trained, which no trainer asks it."""
    for name in ("train_step", "compute_loss"):
        is_models = _is_overridden(type(model), name, "keras")
        if is_models and getattr(kind, name) is getattr(Trainer, name):
            raise ValueError(
                f"{type(model).__name__}.{name} would be ignored: a "
                f"`dist_amp.Trainer` calls its own. Write it as `{name}` of a "
                "Trainer (docs/moving.md), or call `model.fit` with "
                "`dist_amp.LossScaleOptimizer`."
            )
    if getattr(model, "compiled", False):
        _log.warning(
            "the model is compiled: what `compile` was given does not count "
            "in a Trainer, which takes optimizer, loss and metrics itself"
        )


def _is_overridden(kind: type, name: str, package: str) -> bool:
    """Whether a class outside of a package defines a method."""
    definer = next((one for one in kind.__mro__ if name in vars(one)), kind)
    return definer.__module__.partition(".")[0] != package


def _check_has_end(
    dataset: tf.data.Dataset | LoadedBatches, steps: int | None
) -> None:
    if steps is None and is_infinite(dataset):
        raise ValueError(
            "`steps` is needed: the dataset repeats for ever "
            "(`validation_steps` in `fit`, --eval_steps)."
        )


def _check_dataset(dataset: tf.data.Dataset) -> None:
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            "`dataset` must be a tf.data.Dataset of global batches. Received "
            f"{type(dataset).__name__}; arrays become one by "
            "`tf.data.Dataset.from_tensor_slices((x, y)).batch(size)`."
        )
    leaves = tf.nest.flatten(dataset.element_spec)
    if any(isinstance(leaf, tf.SparseTensorSpec) for leaf in leaves):
        raise ValueError(
            "`dataset` must yield dense or ragged tensors, whose rows can be "
            f"shared by replicas. Received {dataset.element_spec}; call "
            "`tf.sparse.to_dense` in `dataset.map`."
        )
    shapes = [leaf.shape for leaf in leaves if hasattr(leaf, "shape")]
    if any(shape.rank == 0 for shape in shapes):  # None has no shape
        raise ValueError(
            "`dataset` must yield global batches. Received single examples: "
            f"{dataset.element_spec}; call `dataset.batch(size)`."
        )


def _zeros(spec: tf.TensorSpec, *, has_fixed_size: bool) -> tf.Tensor:
    """Zeros for building: one example, unless the model wants them all."""
    batch_size, *shape = spec.shape
    rows = batch_size if has_fixed_size and batch_size else 1
    sizes = [UNKNOWN_DIMENSION if n is None else n for n in shape]
    return tf.zeros([rows, *sizes], spec.dtype)


def _has_fixed_size(model: keras.Model) -> bool:
    """Whether the model was made for batches of one size."""
    inputs = tf.nest.flatten(getattr(model, "inputs", None) or [])
    return any(one.shape[0] is not None for one in inputs)


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(
                f"`{name}` must be a positive integer. Received {value!r} "
                f"(--{name})."
            )
