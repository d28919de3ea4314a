"""Trainer: the outer loop over epochs, evaluations, callbacks, checkpoints."""

import contextlib
import itertools
import logging
import math
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_amp import data
from dist_amp import optimizer as optimizer_lib
from dist_amp.callbacks import Progress
from dist_amp.checkpoint import Checkpointer
from dist_amp.metrics import MetricsLike
from dist_amp.steps import Steps, spread_seeds

_log = logging.getLogger(__name__)

# A compiled call this long makes the host's part of it negligible, and still
# lets a signal or the progress line through in time.
_SECONDS_PER_CALL = 0.2
_MAX_STEPS_PER_CALL = 10_000
_UNKNOWN_DIMENSION = 32
_COUNTS = ("examples", "nonfinite_losses", "nonfinite_inputs")


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
    ):
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`optimizer` must be a keras.optimizers.Optimizer, made in "
                f"the scope of the model. Received {optimizer!r}."
            )
        strategy = model.distribute_strategy
        if optimizer_lib.strategy_of(optimizer) is not strategy:
            raise ValueError(
                "The model and the optimizer must be made in one scope. "
                f"Received a model of {type(strategy).__name__} and an "
                "optimizer of another strategy: make both within `with "
                "dist_amp.scope(strategy, ...)`."
            )
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
        self._replica_ids = _local_replica_ids(strategy)
        self._train_loop = self.make_train_loop()
        self._test_loop = self.make_test_loop()
        self._is_built = self._is_in_epoch = False
        self._checkpointer: Checkpointer | None = None
        self._stream: data.Stream
        self._epoch = self._step_in_epoch = self._step = 0
        self._stop_request: str | None = None
        self._stop_reason: str | None = None

    # ------------------------------------------------------------- public

    def fit(
        self,
        dataset: tf.data.Dataset,
        *,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        steps_per_loop: int | str = "auto",
        validation_data: tf.data.Dataset | None = None,
        validation_steps: int | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        checkpoint_dir: str | pathlib.Path | None = None,
        initial_epoch: int = 0,
        class_weight: Mapping[int, float] | None = None,
        verbose: str | int = "auto",
    ) -> keras.callbacks.History:
        """Trains the model.

        A step is one update of the weights. With
        `gradient_accumulation_steps=K` it takes K batches of the dataset (as
        in Keras), and what is left at the end of an epoch makes a last,
        smaller update.

        Args:
            dataset: Global batches of `x`, `(x, y)` or `(x, y,
                sample_weight)`, each leaf `[global_batch, ...]`; a smaller
                last batch is weighted rightly.
            epochs: Epoch to stop at, counted from 0.
            steps_per_epoch: Updates in an epoch; by default one pass over the
                dataset. Needed if the dataset repeats for ever.
            steps_per_loop: Updates in one compiled call. Callbacks hear of
                the last batch of each call. "auto" lengthens the calls until
                the host's share is negligible.
            validation_data: Global batches, evaluated after each epoch.
            validation_steps: Batches of it to use; all by default.
            callbacks: Keras callbacks.
            checkpoint_dir: Where to save after each epoch and on
                `request_stop`. If it holds a checkpoint, training goes on
                from there.
            initial_epoch: Epoch to start from if nothing is restored.
            class_weight: Weight of each class in the loss.
            verbose: 0 silent, 1 or "auto" a progress line, 2 a line an epoch.

        Returns:
            The Keras `History`: `.history` holds a list for each name in the
            logs, one number an epoch; validation results start with `val_`.

        Raises:
            ValueError: An argument is out of range, or the dataset does not
                fit the replicas.
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
        self.build(dataset)
        stream = data.Stream(
            self._split(dataset, class_weight),
            batches_per_step=self.optimizer.gradient_accumulation_steps or 1,
            steps_per_epoch=steps_per_epoch,
        )
        self._stream = stream
        self._start(stream, checkpoint_dir, initial_epoch)
        callback_list = keras.callbacks.CallbackList(
            [*callbacks, *_progress(verbose)],
            add_history=True,
            model=self.model,
            epochs=epochs,
            steps=stream.steps_per_epoch,
            verbose=0,
        )
        pace = _Pace(steps_per_loop)
        validation = self._prepare_test(validation_data, validation_steps)
        self._orient(callbacks)
        callback_list.on_train_begin()
        logs: dict[str, float] = {}
        while self._epoch < epochs and not self._should_stop():
            callback_list.on_epoch_begin(self._epoch)
            self._is_in_epoch = True
            try:
                logs = self._train_epoch(stream, callback_list, pace)
            finally:
                self._is_in_epoch = False
            if self._stop_request:
                break
            if validation is not None:
                callback_list.on_test_begin()
                results = self._test(*validation)
                callback_list.on_test_end(results)
                logs |= {f"val_{name}": v for name, v in results.items()}
            callback_list.on_epoch_end(self._epoch, logs)
            self._epoch, self._step_in_epoch = self._epoch + 1, 0
            self.metrics.reset()
            self._save()
        self._end(is_finished=self._epoch >= epochs)
        callback_list.on_train_end(logs)
        return self.model.history

    def evaluate(
        self, dataset: tf.data.Dataset, *, steps: int | None = None
    ) -> dict[str, float]:
        """Returns the loss and the metrics, exact over every example.

        Args:
            dataset: Global batches as in `fit`.
            steps: Batches to use; all by default.

        Raises:
            ValueError: The dataset repeats for ever and `steps` is None.
            RuntimeError: An epoch of `fit` is under way, whose metrics this
                would reset.
        """
        if self._is_in_epoch:
            raise RuntimeError(
                "`evaluate` resets the metrics of the epoch under way: call it "
                "from `on_epoch_end`, or pass `validation_data` to `fit`."
            )
        self.build(dataset)
        return self._test(*self._prepare_test(dataset, steps))

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Ends `fit` after the compiled call under way, with a checkpoint.

        Safe to call from a signal handler or another thread.

        Args:
            reason: For the log.
        """
        self._stop_request = reason

    @property
    def stop_reason(self) -> str | None:
        """What `request_stop` was given, if it cut the last `fit` short."""
        return self._stop_reason

    @property
    def global_step(self) -> int:
        """Updates attempted since the start, skipped ones included."""
        return self._step

    def build(self, dataset: tf.data.Dataset) -> None:
        """Creates every variable; `fit` and `evaluate` do it by themselves.

        Args:
            dataset: As in `fit`; only its shapes are looked at.
        """
        if self._is_built:
            return
        _check_dataset(dataset)
        spec = dataset.element_spec
        parts = spec if isinstance(spec, tuple) else (spec,)
        x, y = (*tf.nest.map_structure(_zeros, parts), None)[:2]
        with self.strategy.scope():
            predictions = self.model(x, training=False)
            self.optimizer.build(self.model.trainable_variables)
            self.metrics.build(y, predictions)
        self._check_combinations()
        spread_seeds(self.model, self.strategy, self._replica_ids[0])
        self._is_built = True

    def trace(self, dataset: tf.data.Dataset) -> int:
        """Traces the train step without running it.

        Args:
            dataset: As in `fit`; only its shapes are looked at.

        Returns:
            Number of operations in the compiled loop, functions included.
        """
        self.build(dataset)
        iterator = iter(self._split(dataset))
        function = self._train_loop.get_concrete_function(
            iterator, tf.constant(1), tf.constant(1)
        )
        definition = function.graph.as_graph_def()
        return len(definition.node) + sum(
            len(inner.node_def) for inner in definition.library.function
        )

    # ------------------------------------------------------------ private

    def _check_combinations(self) -> None:
        parts = self.optimizer.gradient_accumulation_steps
        if parts and _reduction_of(self.loss) == "sum":
            raise ValueError(
                "`gradient_accumulation_steps` takes means, so the loss must "
                "not have `reduction='sum'`; pass 'sum_over_batch_size'."
            )
        if (
            self.jit_compile
            and self.strategy.num_replicas_in_sync > 1
            and optimizer_lib.is_synchronized(self.model)
        ):
            raise ValueError(
                "`jit_compile` on several replicas cannot compile layers that "
                "talk to other replicas, like BatchNormalization("
                "synchronized=True); turn one of them off (--nojit_compile)."
            )

    def _split(
        self,
        dataset: tf.data.Dataset,
        class_weight: Mapping[int, float] | None = None,
    ) -> tf.data.Dataset:
        return data.split(
            dataset,
            num_replicas=self.strategy.num_replicas_in_sync,
            first_replica=self._replica_ids[0],
            num_local_replicas=len(self._replica_ids),
            reduction=_reduction_of(self.loss),
            class_weight=class_weight,
        )

    def _start(
        self,
        stream: data.Stream,
        checkpoint_dir: str | pathlib.Path | None,
        initial_epoch: int,
    ) -> None:
        """Opens the stream at the beginning, or where a checkpoint says."""
        self.model.stop_training = False
        self._epoch, self._step_in_epoch, self._step = initial_epoch, 0, 0
        self.metrics.reset()
        self._checkpointer = None
        if checkpoint_dir is None:
            stream.open()
            return
        self._checkpointer = self._make_checkpointer(checkpoint_dir)
        saved = self._checkpointer.restore()
        if saved is None:
            stream.open()
            return
        self._epoch = saved["epoch"]
        self._step_in_epoch = saved["step_in_epoch"]
        self._step = saved["step"]
        spread_seeds(self.model, self.strategy, self._replica_ids[0])
        if saved["steps_per_epoch"]:
            stream.learn_length(saved["steps_per_epoch"])
        stream.open(self._epoch, self._step_in_epoch)
        _log.info(
            "resumed from %s: step %d, epoch %d",
            self._checkpointer.latest,
            self._step,
            self._epoch + 1,
        )

    def _end(self, *, is_finished: bool) -> None:
        """Saves a run that was cut short; averages the weights of another."""
        is_cut = bool(self._stop_request) and not is_finished
        self._stop_reason = self._stop_request if is_cut else None
        self._stop_request = None
        if not is_cut:
            self.optimizer.finalize_variable_values(
                self.model.trainable_variables
            )
            return
        if self._step_in_epoch:  # at the start of an epoch it is saved already
            self._save()
        _log.info("stopped at step %d: %s", self._step, self._stop_reason)

    def _orient(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Tells callbacks that monitor a metric whether more is better.

        Keras looks for it in compiled metrics, of which there are none.
        """
        for callback in callbacks:
            if getattr(callback, "mode", None) == "auto":
                name = callback.monitor.removeprefix("val_")
                callback.mode = self.metrics.direction_of(name) or "auto"

    def _make_checkpointer(self, directory: str | pathlib.Path) -> Checkpointer:
        groups = {
            "model": self.model.variables,
            "optimizer": self.optimizer.variables,
        }
        return Checkpointer(
            directory,
            groups,
            per_replica=self.metrics.variables,
            counters=("epoch", "step_in_epoch", "step", "steps_per_epoch"),
        )

    def _save(self) -> None:
        if self._checkpointer is not None:
            counters = {
                "epoch": self._epoch,
                "step_in_epoch": self._step_in_epoch,
                "step": self._step,
                "steps_per_epoch": self._stream.steps_per_epoch or 0,
            }
            self._checkpointer.save(self._step, counters)

    def _train_epoch(
        self,
        stream: data.Stream,
        callbacks: keras.callbacks.CallbackList,
        pace: "_Pace",
    ) -> dict[str, float]:
        """Trains to the end of the epoch, or until asked to stop."""
        logs: dict[str, float] = {}
        rates = _Rates(self._step_in_epoch, self.metrics.num_examples)
        while not self._should_stop():
            num_steps, micro_steps = stream.next_call(
                self._step_in_epoch, pace.steps
            )
            if num_steps == 0:
                break
            callbacks.on_train_batch_begin(self._step_in_epoch)
            is_first_call = not pace.is_traced
            with pace.observe(num_steps):
                read = self._call_train_loop(stream, num_steps, micro_steps)
            if read is None:
                stream.learn_length(self._step_in_epoch)
                stream.open()
                break
            self._step += num_steps
            self._step_in_epoch += num_steps
            logs = rates.add_to(read, self._step_in_epoch)
            if is_first_call:  # it traced the step: no measure of speed
                rates = _Rates(self._step_in_epoch, read["examples"])
            callbacks.on_train_batch_end(self._step_in_epoch - 1, logs)
        if logs or self._stop_request:
            return logs
        # Resumed where an epoch ended: what is left to do is the evaluation.
        read = _to_numbers(self.read_train_logs())
        return rates.add_to(read, self._step_in_epoch)

    def _call_train_loop(
        self, stream: data.Stream, num_steps: int, micro_steps: int
    ) -> dict[str, float] | None:
        """Runs some updates; None if there is no more data."""
        try:
            logs = self._train_loop(
                stream.iterator,
                tf.constant(num_steps),
                tf.constant(micro_steps),
            )
        except tf.errors.OutOfRangeError:
            if stream.steps_per_epoch is None:
                return None
            raise
        except tf.errors.InvalidArgumentError as error:
            raise self._explained(error) from error
        logs = _to_numbers(logs)
        self._check_finite(logs, num_steps)
        return logs

    def _check_finite(self, logs: dict[str, float], num_steps: int) -> None:
        """An optimizer that skips overflows may go on; any other may not."""
        bad_losses = int(logs["nonfinite_losses"])
        bad_inputs = int(logs["nonfinite_inputs"])
        if not bad_losses or self._skips_overflows:
            return
        raise FloatingPointError(
            f"The loss is NaN or infinite within steps {self._step + 1} to "
            f"{self._step + num_steps} (epoch {self._epoch + 1}). "
            + _blame(bad_inputs)
        )

    @property
    def _skips_overflows(self) -> bool:
        return isinstance(self.optimizer, optimizer_lib.LossScaleOptimizer)

    def _explained(self, error: tf.errors.InvalidArgumentError) -> Exception:
        """Adds the state of the input to the optimizer's last word."""
        found = re.search(
            r"(\d+ updates in a row.*\)\.) Numbers .*?\[([\d ]+)\] \[(.*?)\]",
            error.message,
        )
        if not found:
            return error
        paths = found[3].split(", ")
        names = ", ".join(paths[int(number)] for number in found[2].split())
        inputs = int(self.metrics.counts()["nonfinite_inputs"])
        return FloatingPointError(
            f"{found[1]} Gradients that are not finite: {names} (near step "
            f"{self._step + 1}, epoch {self._epoch + 1}). {_blame(inputs)}"
        )

    def _prepare_test(
        self, dataset: tf.data.Dataset | None, steps: int | None
    ) -> Any:
        """What `_test` takes; None for no dataset."""
        if dataset is None:
            return None
        if steps is None and data.is_infinite(dataset):
            raise ValueError(
                "`steps` is needed: the dataset repeats for ever "
                "(`validation_steps` in `fit`, --eval_steps)."
            )
        length = data.length_of(dataset) if steps is None else steps
        return self._split(dataset).prefetch(tf.data.AUTOTUNE), length

    def _test(
        self, batches: tf.data.Dataset, length: int | None
    ) -> dict[str, float]:
        """Evaluates some batches, or all where their number is unknown."""
        self.metrics.reset()
        iterator = iter(batches)
        try:
            for _ in itertools.count() if length is None else range(1):
                self._test_loop(iterator, tf.constant(length or 1))
        except tf.errors.OutOfRangeError:
            if length is not None:
                raise ValueError(
                    f"The dataset has fewer than {length} batches to "
                    "evaluate (`validation_steps` in `fit`, --eval_steps)."
                ) from None
        results = _to_numbers(self.metrics.results())
        if _to_numbers(self.metrics.counts())["nonfinite_losses"]:
            results["loss"] = math.nan
        self.metrics.reset()
        return results

    def _should_stop(self) -> bool:
        return bool(self._stop_request or self.model.stop_training)


class _Pace:
    """How many updates to put in one compiled call, and whether it is traced.

    "auto" starts with one, to hear of errors early, and lengthens the calls
    until one takes about `_SECONDS_PER_CALL`.
    """

    def __init__(self, steps_per_loop: int | str):
        self._is_auto = steps_per_loop == "auto"
        self.is_traced = False
        self.steps = 1 if steps_per_loop == "auto" else int(steps_per_loop)

    @contextlib.contextmanager
    def observe(self, num_steps: int) -> Iterator[None]:
        """Times one call; the first one, which traces, does not count."""
        begin = time.perf_counter()
        yield
        seconds_per_step = (time.perf_counter() - begin) / num_steps
        if self._is_auto and self.is_traced:
            fitting = int(_SECONDS_PER_CALL / seconds_per_step)
            longest = min(8 * self.steps, _MAX_STEPS_PER_CALL)
            self.steps = max(1, min(fitting, longest))
        self.is_traced = True


class _Rates:
    """Steps and examples per second since an epoch began or was resumed."""

    def __init__(self, step: int, num_examples: float):
        self._begin = time.perf_counter()
        self._step = step
        self._num_examples = num_examples

    def add_to(self, logs: dict[str, float], step: int) -> dict[str, float]:
        """Replaces the counts in the logs by the two rates."""
        seconds = time.perf_counter() - self._begin
        num_examples = logs["examples"] - self._num_examples
        return {
            **{name: logs[name] for name in logs if name not in _COUNTS},
            "examples_per_sec": num_examples / seconds,
            "steps_per_sec": (step - self._step) / seconds,
        }


def _wrapped(
    optimizer: keras.optimizers.Optimizer, model: keras.Model
) -> optimizer_lib.DistributedOptimizer:
    needs_scale = optimizer_lib.computes_in_float16(model)
    return optimizer_lib.wrap_optimizer(
        optimizer, loss_scale="dynamic" if needs_scale else "auto"
    )


def _local_replica_ids(strategy: tf.distribute.Strategy) -> list[int]:
    ids = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(context.replica_id_in_sync_group)
    )
    return [int(i) for i in strategy.experimental_local_results(ids)]


def _check_dataset(dataset: tf.data.Dataset) -> None:
    if not isinstance(dataset, tf.data.Dataset):
        raise TypeError(
            "`dataset` must be a tf.data.Dataset of global batches. Received "
            f"{type(dataset).__name__}; arrays become one by "
            "`tf.data.Dataset.from_tensor_slices((x, y)).batch(size)`."
        )
    ranks = [leaf.shape.rank for leaf in tf.nest.flatten(dataset.element_spec)]
    if 0 in ranks:
        raise ValueError(
            "`dataset` must yield global batches. Received single examples: "
            f"{dataset.element_spec}; call `dataset.batch(size)`."
        )


def _zeros(spec: tf.TensorSpec) -> tf.Tensor:
    """Zeros for building: one example, unless the batch size is known."""
    batch_size, *shape = spec.shape
    sizes = [_UNKNOWN_DIMENSION if n is None else n for n in shape]
    return tf.zeros([batch_size or 1, *sizes], spec.dtype)


def _reduction_of(loss: Any) -> str:
    """What the losses divide by; they must agree."""
    losses = tf.nest.flatten(loss)
    found = {
        getattr(one, "reduction", "sum_over_batch_size") for one in losses
    } or {"sum_over_batch_size"}
    if found == {"mean"}:
        return "sum_over_batch_size"
    if len(found) > 1 or not found <= set(data.REDUCTIONS):
        raise ValueError(
            "All losses must have one `reduction`, out of "
            f"{', '.join(data.REDUCTIONS)}. Received {sorted(map(str, found))}."
        )
    return found.pop()


def _progress(verbose: str | int) -> list[keras.callbacks.Callback]:
    if verbose == 0:
        return []
    seconds = math.inf if verbose == 2 else 30.0
    return [Progress(seconds_between_lines=seconds)]


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(
                f"`{name}` must be a positive integer. Received {value!r} "
                f"(--{name})."
            )


def _to_numbers(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Python numbers (lists, for metrics of several numbers); loss first."""
    names = sorted(logs, key=lambda name: name != "loss")
    return {
        name: tf.convert_to_tensor(logs[name]).numpy().tolist()
        for name in names
    }


def _blame(bad_inputs: int) -> str:
    if bad_inputs:
        return (
            f"The data is the cause: {bad_inputs} slices of batches since the "
            "epoch began hold NaN or infinite numbers; clean the input."
        )
    return (
        "The input is finite, so the model or the learning rate is the "
        "cause: try a lower learning rate, `global_clipnorm`, or float32."
    )
