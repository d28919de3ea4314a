"""One call of `Trainer.fit`: epochs, saves, stops and ways back."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras

from dist_amp import optimizer as optimizer_lib
from dist_amp import random_state
from dist_amp import strategy as strategy_lib
from dist_amp.agreement import StopRequest
from dist_amp.beacon import Beacon
from dist_amp.callback_state import CallbackStates
from dist_amp.checkpoint import Checkpointer, Restored, SavePolicy
from dist_amp.meter import Meter
from dist_amp.metrics import to_numbers
from dist_amp.overflow import Place, SkipReporter, advise
from dist_amp.pace import Pace, Rates
from dist_amp.profiler import Profiler
from dist_amp.rollback import (
    NUM_RECENT,
    BlowUpError,
    RollbackPolicy,
    call_loss,
)
from dist_amp.steps import Steps
from dist_amp.stragglers import Stragglers
from dist_amp.stream import Stream

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Position:
    """Where training is, beside the stream's own place.

    Attributes:
        step: Updates attempted since the start, skipped ones included.
        step_in_epoch: Those of the epoch under way.
        examples: Examples of the epochs before it.
        rollbacks: How often training went back.
        recent_losses: Mean losses of recent calls.
    """

    step: int = 0
    step_in_epoch: int = 0
    examples: float = 0.0
    rollbacks: int = 0
    recent_losses: list[float] = dataclasses.field(default_factory=list)


class Fit:
    """Trains to the end, or until it is asked to stop.

    Args:
        steps: Model, optimizer, metrics and the compiled loops.
        stream: Batches to train on.
        callbacks: Keras callbacks.
        epochs: Epoch to stop at.
        pace: Length of the compiled calls.
        stop: Who asks to stop.
        train_call: Runs `(stream, num_steps, batches_per_step)`; returns the
            logs, or None if the data ended.
        validate: Evaluates; returns None if it was asked to stop meanwhile.
        checkpointer: Entered; None to save nothing.
        save_policy: When to save.
        rollback: What to do when training blows up; None: raise.
        info: Plain values that go into each checkpoint.
        beacon: Told where training is.
        meter: Measures what the time goes to.
        profiler: Cuts the compiled calls at its borders.
    """

    def __init__(
        self,
        steps: Steps,
        stream: Stream,
        callbacks: keras.callbacks.CallbackList,
        *,
        epochs: int,
        pace: Pace,
        stop: StopRequest,
        train_call: Callable[[Stream, int, int], dict[str, Any] | None],
        validate: Callable[[], dict[str, Any] | None] | None,
        checkpointer: Checkpointer | None,
        save_policy: SavePolicy,
        rollback: RollbackPolicy | None,
        info: Mapping[str, Any],
        beacon: Beacon,
        meter: Meter,
        profiler: Profiler | None,
    ):
        self.position = Position()
        self.resumed_step = 0
        self._steps = steps
        self._model = steps.model
        self._stream = stream
        self._callbacks = callbacks
        self._epochs = epochs
        self._pace = pace
        self._stop = stop
        self._train_call = train_call
        self._validate = validate
        self._checkpointer = checkpointer
        self._save_policy = save_policy
        self._rollback = rollback
        self._info = info
        self._beacon = beacon
        self._meter = meter
        self._profiler = profiler
        self._is_chief = strategy_lib.task_index(steps.strategy) == 0
        self._stragglers: Stragglers | None = None
        if steps.optimizer.stopwatch is not None:
            self._stragglers = Stragglers(
                strategy_lib.worker_names(steps.strategy),
                steps.optimizer.stopwatch,
                beacon,
            )
        self._callback_states: CallbackStates
        self._architecture = _architecture(steps.model)
        self._saved_place: tuple[int, int, int] | None = None
        self._saved_at = time.monotonic()
        self._is_save_due = False
        self._is_wire_exact = False
        self._skips: SkipReporter | None = None
        self._search_end: tuple[int, int] | None = None
        self._has_searched = False

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, or a callback ended them."""
        is_complete = self._stream.epoch >= self._epochs
        return is_complete or self._model.stop_training

    @property
    def place_in_data(self) -> tuple[int, int]:
        """Epoch, and batch of it, from 0."""
        return self._stream.epoch, self._stream.batch

    def peek(self) -> list[Any]:
        """The batches of the next update, as they are fed; see `Stream`."""
        _, per_step = self._stream.next_call(1)
        return self._stream.peek(per_step)

    def take_rollbacks(self, state: Mapping[str, Any]) -> None:
        """Does as the run that saved this later on; see `Trainer`."""
        self._stream.bad = [tuple(entry) for entry in state["bad_batches"]]
        later = state["position"]["rollbacks"]
        if self._rollback:
            self._lower(self._rollback, later - self.position.rollbacks)
        self.position.rollbacks = later

    def expect_trace(self) -> None:
        """The next call will trace the loop anew: it takes its time."""
        self._pace.is_traced = False

    def run(self, initial_epoch: int) -> None:
        """Goes on from the newest checkpoint, or starts at an epoch."""
        try:
            self._start(initial_epoch)
            with self._beacon.phase("callbacks"):
                logs = self._train()
                self._finish(logs)
        finally:
            self._stream.close()
            if self._profiler:
                self._profiler.close()

    def _start(self, initial_epoch: int) -> None:
        self._steps.metrics.reset()
        restored = self._checkpointer.restore() if self._checkpointer else None
        if restored:
            self._take_place(restored)
            self.resumed_step = restored.step
            if self._model.stop_training:
                _log.warning(
                    "a callback ended this run at epoch %d: nothing is left "
                    "to train; start in a new folder to go on",
                    self._stream.epoch,
                )
            _log.info(
                "resumed from %s: step %d, epoch %d",
                restored.path,
                self.position.step,
                self._stream.epoch + 1,
            )
        else:
            self._stream.open(initial_epoch)
        self._skips = _skip_reporter(self._steps)
        self._callbacks.on_train_begin()
        self._callback_states = CallbackStates(self._callbacks.callbacks)
        if restored:
            self._take_callbacks(restored)
        elif self._rollback:
            self._save()  # something to go back to

    # ----------------------------------------------------------- outer loop

    def _train(self) -> dict[str, Any]:
        logs: dict[str, Any] = {}
        while not self._should_stop():
            self._callbacks.on_epoch_begin(self._stream.epoch)
            try:
                logs = self._train_epoch()
            except BlowUpError as error:
                self._go_back(error)
                continue
            if self._stop.reason:
                break
            if self._validate is not None and not self._add_results(logs):
                break
            self._callbacks.on_epoch_end(self._stream.epoch, logs)
            self._end_epoch(logs)
        return logs

    def _should_stop(self) -> bool:
        _, is_finished = self._stop.agree(is_due=self.is_finished)
        if is_finished and not self.is_finished:  # another worker's callback
            self._model.stop_training = True
        return bool(self._stop.reason) or is_finished

    def _add_results(self, logs: dict[str, Any]) -> bool:
        """Validates; False if it was cut short."""
        assert self._validate is not None
        self._callbacks.on_test_begin()
        results = self._validate()
        if results is None:
            return False
        self._callbacks.on_test_end(results)
        logs |= {f"val_{name}": value for name, value in results.items()}
        return True

    def _end_epoch(self, logs: dict[str, Any]) -> None:
        self.position.examples += self._steps.metrics.num_examples
        self.position.step_in_epoch = 0
        self._stream.end_epoch()
        self._steps.metrics.reset()
        every = self._save_policy.every_epochs
        if self._is_save_due or (every and self._stream.epoch % every == 0):
            self._save(logs)
        best = self._save_policy.keep_best
        if best and best not in logs:
            raise ValueError(
                f"`keep_best` must be one of {', '.join(logs)}. Received "
                f"{best!r} (--keep_best)."
            )

    def _finish(self, logs: dict[str, Any]) -> None:
        """Saves where training ended; averages the weights of a whole run."""
        has_failed = False
        if self._checkpointer:
            self._checkpointer.wait()
            has_failed = self._checkpointer.error is not None
        is_behind = self._place() != self._saved_place
        _, is_due = self._stop.agree(is_due=is_behind or has_failed)
        if is_due:
            self._save(logs if self.is_finished else None)
        if self.is_finished:
            self._steps.optimizer.finalize_variable_values(
                self._model.trainable_variables
            )
        self._callbacks.on_train_end(logs)

    def _train_epoch(self) -> dict[str, Any]:
        """Trains to the end of the epoch, or until asked to stop."""
        position, metrics = self.position, self._steps.metrics
        logs: dict[str, Any] = {}
        rates = Rates(position.step_in_epoch, metrics.num_examples)
        self._meter.restart(self._stream.iterator)
        before: dict[str, Any] = {"loss": 0.0, "examples": 0.0}
        if position.step_in_epoch:
            before = to_numbers(self._steps.read_train_logs())
        while (length := self._next_length()) and not self._stop.reason:
            num_steps, per_step = self._stream.next_call(length)
            if num_steps == 0:
                break
            self._callbacks.on_train_batch_begin(position.step_in_epoch)
            is_first_call = not self._pace.is_traced
            with self._pace.observe(num_steps):
                read = self._call(num_steps, per_step)
            if read is None:
                break
            self._measure(num_steps, counts=not is_first_call)
            self._judge(read, before, num_steps, per_step)
            bad_inputs = _new_bad_inputs(read, before)
            before = read
            here = (self._stream.epoch, self._stream.batch)
            self._stream.advance(num_steps * per_step)
            position.step += num_steps
            if self._skips:
                place = Place(*here, num_steps, per_step, bad_inputs)
                self._skips.tell(read, position.step, place)
            self._heed_wire(read)
            self._beacon.at_step(position.step)
            position.step_in_epoch += num_steps
            logs = rates.add_to(read, position.step_in_epoch)
            if is_first_call:  # it traced the step: no measure of speed
                rates = Rates(position.step_in_epoch, read["examples"])
            self._callbacks.on_train_batch_end(position.step_in_epoch - 1, logs)
            self._save_if_due()
        self._check_weights()
        if not logs and position.step_in_epoch:
            # Resumed where an epoch ended: what is left to do is to validate.
            logs = rates.add_to(before, position.step_in_epoch)
        if self._rollback:
            logs["rollbacks"] = position.rollbacks
        logs |= self._meter.read(logs.get("examples_per_sec", 0.0))
        self._meter.warn(self._stream.epoch + 1)
        return logs

    def _measure(self, num_steps: int, *, counts: bool) -> None:
        """Takes what the last call took; one that traced does not count."""
        seconds = self._pace.seconds
        if self._stragglers:
            self._stragglers.add(num_steps, seconds, counts=counts)
        if counts:
            self._meter.add(self._stream.iterator, num_steps, seconds)
        else:
            self._meter.restart(self._stream.iterator)

    def _next_length(self) -> int:
        """Updates of the next call, agreed on; 0 if a callback said stop."""
        length = self._pace.steps
        if self._search_end and not self._is_searching:  # it did not happen
            self._search_end, self._has_searched = None, False
        every = self._save_policy.every_steps
        if self._checkpointer and every:
            length = min(length, every - self.position.step % every)
        if self._profiler:
            length = self._profiler.cut(length, self.position.step)
        if self._is_searching:
            length = 1
        if self._model.stop_training:
            length = 0
        length, self._is_save_due = self._stop.agree(
            length,
            is_due=self._is_time_to_save(),
            numbers=self._stragglers.numbers() if self._stragglers else (),
        )
        if self._stragglers and self._is_chief:
            self._stragglers.compare(self._stop.shared, self.position.step)
        return length

    @property
    def _is_searching(self) -> bool:
        """Whether the batch of a blow-up is ahead: one update a call."""
        here = (self._stream.epoch, self._stream.batch)
        return self._search_end is not None and here < self._search_end

    def _call(self, num_steps: int, per_step: int) -> dict[str, Any] | None:
        phase = self._beacon.phase(
            "step" if self._pace.is_traced else "compile",
            self._stream.counter(),
            batches_per_step=per_step,
        )
        try:
            with phase:
                return self._train_call(self._stream, num_steps, per_step)
        except FloatingPointError as error:  # the loss scale is at its floor
            batch = self._stream.batch
            skipped = (optimizer_lib.MAX_SKIPS_AT_FLOOR - 1) * per_step
            raise BlowUpError(
                str(error),
                kind="nan",
                first=max(0, batch - skipped),
                end=batch + num_steps * per_step,
                is_exact=self._is_searching,
            ) from error

    # --------------------------------------------------------------- saving

    def _place(self) -> tuple[int, int, int]:
        return self._stream.epoch, self._stream.batch, self.position.step

    def _is_time_to_save(self) -> bool:
        minutes = self._save_policy.every_minutes
        elapsed = time.monotonic() - self._saved_at
        return minutes is not None and elapsed >= 60 * minutes

    def _save_if_due(self) -> None:
        """Within an epoch; its end saves by itself."""
        if self._stream.batch == self._stream.batches_per_epoch:
            every = self._save_policy.every_epochs
            if every and (self._stream.epoch + 1) % every == 0:
                return
        steps = self._save_policy.every_steps
        is_step_due = bool(steps) and self.position.step % (steps or 1) == 0
        if is_step_due or self._is_save_due:
            self._check_weights()
            self._save()

    def _save(self, logs: Mapping[str, Any] | None = None) -> None:
        if self._checkpointer is None:
            return
        callbacks, arrays = self._callback_states.read()
        for name, array in random_state.read_host().items():
            arrays[f"random/{name}"] = array
        state = {
            "epoch": self._stream.epoch,
            "batch": self._stream.batch,
            "batches_per_epoch": self._stream.batches_per_epoch,
            "bad_batches": self._stream.bad,
            "examples_consumed": int(
                self.position.examples + self._steps.metrics.num_examples
            ),
            "position": dataclasses.asdict(self.position),
            "callbacks": callbacks,
            "stop_training": bool(self._model.stop_training),
            "model": self._architecture,
            "info": self._info,
        }
        metrics = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, int | float)
        }
        with self._beacon.phase("checkpoint"):
            self._checkpointer.save(
                self.position.step, state, arrays=arrays, metrics=metrics
            )
        self._saved_place, self._saved_at = self._place(), time.monotonic()
        self._is_save_due = False

    def _take_place(self, restored: Restored) -> None:
        """Puts the stream and the generators where the checkpoint was."""
        state = restored.state
        if not restored.has_same_replicas:
            self._steps.spread_seeds()
        self.position = Position(**state["position"])
        self._beacon.at_step(self.position.step)
        length = state["batches_per_epoch"]
        if length:
            self._stream.learn_length(length)
        if length != self._stream.batches_per_epoch:
            _log.warning(
                "an epoch has %s batches, and had %s when %s was saved: the "
                "data or the batch size is another",
                self._stream.batches_per_epoch,
                length,
                restored.path,
            )
        self._stream.bad = [tuple(entry) for entry in state["bad_batches"]]
        self._stream.open(state["epoch"], state["batch"])
        self._model.stop_training = state["stop_training"]
        self._saved_place = self._place()

    def _take_callbacks(self, restored: Restored) -> None:
        left_out = self._callback_states.write(
            restored.state["callbacks"], restored.arrays
        )
        if left_out and self._is_chief:
            _log.warning(
                "not restored from %s: callbacks that are not here (%s)",
                restored.path,
                ", ".join(left_out),
            )
        random_state.write_host(
            {
                name.removeprefix("random/"): array
                for name, array in restored.arrays.items()
                if name.startswith("random/")
            }
        )

    # ------------------------------------------------------------- blow-ups

    def _judge(
        self,
        read: Mapping[str, Any],
        before: Mapping[str, Any],
        num_steps: int,
        per_step: int,
    ) -> None:
        """Raises `BlowUpError` if training must not go on after this call."""
        first = self._stream.batch
        place = {"first": first, "end": first + num_steps * per_step}
        step = self.position.step
        steps = numbered("step", step, step + num_steps)
        where = f"in {steps} (epoch {self._stream.epoch + 1})"
        is_exact = self._is_searching
        skips = isinstance(
            self._steps.optimizer, optimizer_lib.LossScaleOptimizer
        )
        if read["nonfinite_losses"] and not skips:
            message = f"The loss is NaN or infinite {where}. "
            message += blame(int(read["nonfinite_inputs"]))
            raise BlowUpError(message, kind="nan", is_exact=is_exact, **place)
        if self._is_searching and self._steps.broken_weights():
            message = f"The weights became NaN or infinite {where}."
            raise BlowUpError(message, kind="nan", is_exact=is_exact, **place)
        if self._rollback is None:
            return
        loss = call_loss(
            read["loss"], read["examples"], before["loss"], before["examples"]
        )
        recent = self.position.recent_losses
        if self._rollback.is_spike(loss, recent):
            message = f"The loss jumped to {loss:.4g} {where}."
            raise BlowUpError(message, kind="spike", is_exact=True, **place)
        self.position.recent_losses = [*recent, loss][-NUM_RECENT:]

    def _heed_wire(self, read: Mapping[str, Any]) -> None:
        """Says so when a check of the gradients' sums went back to exact."""
        wire = self._steps.optimizer.wire
        is_exact = read.get("wire_error", 0.0) > wire.error_bound
        if is_exact and not self._is_wire_exact and self._is_chief:
            _log.warning(
                "gradients travel exactly for the rest of the run: in %s a "
                "checked sum was off by %.3g of its norm, more than %g "
                "(--wire_error_bound); by step %d",
                wire.dtype,
                read["wire_error"],
                wire.error_bound,
                self.position.step,
            )
        self._is_wire_exact = is_exact

    def _check_weights(self) -> None:
        """A layer like ReLU can hide NaN from the loss: look at them too."""
        broken = self._steps.broken_weights()
        if not broken:
            return
        raise BlowUpError(
            f"The weights are NaN or infinite after step {self.position.step} "
            f"(epoch {self._stream.epoch + 1}), though the loss is not: "
            f"{', '.join(broken)}. Look for NaN in the data, or try a lower "
            "learning rate, `global_clipnorm`, or float32.",
            kind="nan",
            first=0,
            end=self._stream.batch,
            is_exact=False,
        )

    def _go_back(self, error: BlowUpError) -> None:
        """To the last good checkpoint, past the batches that did it."""
        policy, checkpointer = self._rollback, self._checkpointer
        if (
            policy is None
            or checkpointer is None
            or error.kind not in policy.on
        ):
            raise error
        epoch, rollbacks = self._stream.epoch, self.position.rollbacks
        bad = list(self._stream.bad)
        # What did not happen again when it was searched for has no one batch.
        is_known = error.is_exact or self._has_searched
        self._has_searched = not is_known
        if is_known:
            rollbacks += 1
            bad.append((epoch, error.first, error.end))
        else:
            self._search_end = (epoch, error.end)
        if rollbacks > policy.max_rollbacks:
            raise FloatingPointError(
                f"{error} Training went back {policy.max_rollbacks} "
                f"time{'' if policy.max_rollbacks == 1 else 's'} already "
                f"(--max_rollbacks).{_recurrence(bad)}"
            ) from error
        restored = checkpointer.restore(only_finite=True)
        if restored is None:
            raise error
        checkpointer.discard_after(restored.step)
        self._take_place(restored)
        self._take_callbacks(restored)
        self._lower(policy, rollbacks - self.position.rollbacks)
        self._stream.bad, self.position.rollbacks = bad, rollbacks
        what = "the batch that did it is searched for"
        if is_known:
            what = (
                f"{numbered('batch', error.first, error.end)} of epoch "
                f"{epoch + 1} {'is' if error.end - error.first == 1 else 'are'}"
                f" passed over (rollback {rollbacks} of {policy.max_rollbacks})"
            )
        _log.warning("%s Back to step %d: %s.", error, restored.step, what)

    def _lower(self, policy: RollbackPolicy, times: int) -> None:
        """Lowers what the policy says, once for each rollback since."""
        optimizer, factor = self._steps.optimizer, policy.factor**times
        if policy.lower == "learning_rate":
            optimizer.lower_learning_rate(factor)
        elif policy.lower == "loss_scale":
            optimizer.lower_loss_scale(factor)


def blame(bad_inputs: int, skipped_step: int | None = None) -> str:
    """Whether the data or the model made a loss that is not finite.

    Args:
        bad_inputs: Slices of batches with such numbers.
        skipped_step: A step that a loss scale skipped for it, if there is one.
    """
    if bad_inputs:
        slices, hold = "1 slice of a batch", "holds"
        if bad_inputs > 1:
            slices, hold = f"{bad_inputs} slices of batches", "hold"
        return (
            f"The data is the cause: {slices} since the epoch began {hold} NaN "
            "or infinite numbers; clean the input."
        )
    if skipped_step is None:
        return (
            "The input is finite, so the model or the learning rate is the "
            "cause: try a lower learning rate, `global_clipnorm`, or float32."
        )
    return (
        "The input is finite, so a layer beyond float16, or the learning rate, "
        f"is the cause. {advise(skipped_step)} Else try a lower learning rate, "
        "`global_clipnorm`, or float32."
    )


def numbered(noun: str, first: int, end: int) -> str:
    """As "batch 3" or "batches 3 to 5", from 1.

    Args:
        noun: "step" or "batch".
        first: From 0.
        end: The one after the last, from 0.
    """
    if end - first == 1:
        return f"{noun} {end}"
    plural = "batches" if noun == "batch" else f"{noun}s"
    return f"{plural} {first + 1} to {end}"


def _recurrence(bad: list[tuple[int, int, int]]) -> str:
    """A sentence, if the same batches of each epoch were bad."""
    if len({(first, end) for _, first, end in bad}) > 1 or len(bad) < 2:
        return ""
    _, first, end = bad[-1]
    return (
        f" It was {numbered('batch', first, end)} each epoch: data of a fixed "
        "order keep what is bad in them; clean them, or raise --max_rollbacks."
    )


def _new_bad_inputs(read: Mapping[str, Any], before: Mapping[str, Any]) -> int:
    """Slices of one call that hold NaN or infinite numbers."""
    return int(read["nonfinite_inputs"] - before.get("nonfinite_inputs", 0.0))


def _skip_reporter(steps: Steps) -> SkipReporter | None:
    optimizer = steps.optimizer
    if not isinstance(optimizer, optimizer_lib.LossScaleOptimizer):
        return None
    return SkipReporter(
        optimizer.overflows,
        lambda: int(keras.ops.convert_to_numpy(optimizer.iterations)),
        int(keras.ops.convert_to_numpy(optimizer.skipped_updates)),
        replica_ids=steps.replica_ids,
        num_replicas=steps.strategy.num_replicas_in_sync,
    )


def _architecture(model: keras.Model) -> str | None:
    """The model as Keras makes it again; None if it cannot."""
    try:
        return model.to_json()
    except (NotImplementedError, TypeError, ValueError):
        return None
