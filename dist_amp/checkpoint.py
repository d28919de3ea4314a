"""Checkpointer: the state of a training run, on disk and back.

A save copies the variables to host memory, which is all that training waits
for, and a thread writes them (`storage` says how). Every worker takes part;
only the chief writes.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from dist_amp import storage
from dist_amp import strategy as strategy_lib
from dist_amp.storage import Manifest

_log = logging.getLogger(__name__)

Variable: TypeAlias = keras.Variable | tf.Variable

_SUMMED, _PER_REPLICA, _ARRAYS = "metrics", "per_replica", "arrays"
_MAX_SHOWN = 10
_NOTHING, _FAILED = -1, -2
_MAX_OF_A_STEP = 2**20


@dataclasses.dataclass(frozen=True)
class SavePolicy:
    """When a run is saved, and which checkpoints are kept.

    Whatever the policy, the newest checkpoint and the newest one without NaN
    are kept, and a run that is asked to stop is saved.

    Attributes:
        every_epochs: Epochs between saves at their ends; None: never there.
        every_steps: Updates between saves.
        every_minutes: Minutes between saves.
        max_to_keep: The newest so many are kept.
        keep_best: Name in the logs of an epoch, say "val_loss"; the
            checkpoint that was best in it is kept too.
        mode: Whether the "min" or the "max" of `keep_best` is the best;
            "auto" goes by the metric, or takes losses and errors for "min".
        keep_every: Each so many-th save is kept for ever.

    Raises:
        ValueError: A number is not positive, the mode is unknown, or
            `keep_best` would never meet the results of an epoch.

    Example:
    >>> policy = dist_amp.SavePolicy(every_minutes=10, keep_best="val_loss")
    >>> policy.max_to_keep
    3
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    every_minutes: float | None = None
    max_to_keep: int = 3
    keep_best: str | None = None
    mode: str = "auto"
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(
                    f"`{field.name}` must be positive. Received {value!r}."
                )
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(
                f"`mode` must be auto, min or max. Received {self.mode!r}."
            )
        if self.keep_best and not self.every_epochs:
            raise ValueError(
                f"`keep_best={self.keep_best!r}` needs saves at epochs' ends, "
                "where there are results: pass `every_epochs` "
                "(--save_every_epochs)."
            )

    def kept(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Which of these checkpoints, oldest first, are not to be deleted."""
        newest = {m.step: m for m in manifests}  # of each step the last one
        distinct = list(newest.values())
        chosen = {m.number for m in distinct[-self.max_to_keep :]}
        if self.keep_every:
            chosen |= {
                m.number for m in distinct if m.number % self.keep_every == 0
            }
        finite = [m for m in distinct if m.is_finite]
        for one in (self.best(distinct), *finite[-1:]):
            if one is not None:
                chosen.add(one.number)
        return [m for m in distinct if m.number in chosen]

    def best(self, manifests: Iterable[Manifest]) -> Manifest | None:
        """The first one that was best in `keep_best`; None if none has it."""
        name = self.keep_best or ""
        rated = [
            m
            for m in manifests
            if m.is_finite and math.isfinite(m.metrics.get(name, math.nan))
        ]
        if not name or not rated:
            return None
        is_less = self.mode == "min" or (
            self.mode == "auto" and re.search("loss|error", name)
        )
        return (min if is_less else max)(rated, key=lambda m: m.metrics[name])


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held beside the variables.

    Attributes:
        path: The checkpoint.
        step: Its global step.
        state: The plain values that `save` was given.
        arrays: The arrays that `save` was given.
        has_same_replicas: Whether it was saved by as many replicas.
        left_out: What differs and was not restored; empty if `strict`.
    """

    path: str
    step: int
    state: dict[str, Any]
    arrays: dict[str, np.ndarray]
    has_same_replicas: bool
    left_out: Sequence[str] = ()


class Checkpointer:
    """Saves and restores groups of variables with plain values beside them.

    Use it in a `with` block: entering takes the folder's lock, leaving waits
    for the save under way.

    Args:
        directory: Where the checkpoints go; local, or `gs://` and the like.
            On several workers it must be storage that all of them share.
        groups: Variables by group, say `{"model": model.variables}`. They are
            matched by their order; shapes, dtypes and names (but for the
            numbers that Keras adds) must agree.
        summed: Variables that differ between replicas and are added up when
            read: metrics. Each replica gets back what it had; on another
            number of replicas, the first one gets the sum.
        per_replica: Variables that differ between replicas: random states.
            Each replica gets back what it had; on another number of
            replicas, all get the first one's.
        policy: Which checkpoints are kept.
        strategy: The one that the variables were made under; the current one
            by default.

    Raises:
        dist_amp.storage.LockedError: On entering: another run has the folder.
        OSError: On entering: the folder cannot be written.

    Example:
    >>> import tempfile
    >>> weight = keras.Variable([1.0, 2.0])
    >>> directory = tempfile.mkdtemp()
    >>> with dist_amp.Checkpointer(directory, {"model": [weight]}) as saver:
    ...     saver.save(120, {"epoch": 3})
    ...     _ = weight.assign([0.0, 0.0])
    ...     restored = saver.restore()
    >>> restored.state["epoch"], weight.numpy().tolist()
    (3, [1.0, 2.0])
    """

    def __init__(
        self,
        directory: str,
        groups: Mapping[str, Sequence[Variable]],
        *,
        summed: Sequence[Variable] = (),
        per_replica: Sequence[Variable] = (),
        policy: SavePolicy | None = None,
        strategy: tf.distribute.Strategy | None = None,
    ):
        self.directory = str(directory)
        self._policy = policy or SavePolicy()
        self._strategy = strategy or tf.distribute.get_strategy()
        self._is_chief = strategy_lib.task_index(self._strategy) == 0
        reserved = {_SUMMED, _PER_REPLICA, _ARRAYS} & set(groups)
        if reserved:
            raise ValueError(
                f"{sorted(reserved)} are names of this class's own groups; "
                "name yours otherwise."
            )
        self._variables = _keyed(groups)
        self._stacks = _keyed({_SUMMED: summed, _PER_REPLICA: per_replica})
        self._lock = contextlib.ExitStack()
        self._thread: threading.Thread | None = None
        self._is_written = threading.Event()
        self._num_saves = 0
        self._exempt: frozenset[str] = frozenset()
        self.error: Exception | None = None
        self.waited_secs = 0.0

    def __enter__(self) -> "Checkpointer":
        # A mask of -inf is no sign of a broken run.
        self._exempt = frozenset(
            key
            for key, variable in self._variables.items()
            if not storage.is_finite(_host_copy(variable))
        )
        self._on_chief(self._open)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.wait()
        self._lock.close()

    # ---------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        state: Mapping[str, Any] | None = None,
        *,
        arrays: Mapping[str, np.ndarray] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copies everything to host memory and has it written meanwhile.

        A save that is still being written is waited for first. If writing
        fails (a full disk), the log says so, `error` holds the exception, and
        the checkpoints that were there remain.

        Args:
            step: Global step, part of the name.
            state: Values that JSON can hold.
            arrays: Further arrays by name.
            metrics: Results of the epoch that ends here, for `keep_best`.
        """
        begin = time.monotonic()
        self.wait()
        if time.monotonic() - begin > 1.0:
            _log.warning(
                "training waited %.1f s for the save before step %d to end: "
                "save less often, or to a faster disk",
                time.monotonic() - begin,
                step,
            )
        tensors = self._snapshot()
        for name, array in (arrays or {}).items():
            tensors[f"{_ARRAYS}/{name}"] = tf.convert_to_tensor(array)
        content = {
            **(state or {}),
            "num_replicas": self._strategy.num_replicas_in_sync,
            "versions": versions(),
        }
        # As it is now, whatever becomes of it while it is written.
        content = json.loads(json.dumps(content, default=_to_plain))
        self._num_saves += 1
        if self._is_chief:
            self._thread = threading.Thread(
                target=self._write,
                name="checkpoint writer",
                args=(step, tensors, content, dict(metrics or {})),
            )
            self._is_written.clear()
            self._thread.start()
        self.waited_secs = time.monotonic() - begin

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._thread is not None:
            # Not `join` alone: one that Ctrl-C interrupts takes the thread
            # for ended (Python 3.11), and the folder would be given up.
            self._is_written.wait()
            self._thread.join()
            self._thread = None

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: training went back."""
        self.wait()
        self._on_chief(lambda: self._discard_after(step))

    # -------------------------------------------------------------- restoring

    def restore(
        self, *, strict: bool = True, only_finite: bool = False
    ) -> Restored | None:
        """Restores the newest whole checkpoint; None if there is none.

        Checksums are compared first. A checkpoint that is damaged is named in
        the log and renamed to `*.damaged`, and the one before it is used.

        Args:
            strict: Whether every variable must be in the checkpoint and the
                other way round. Else what has the same name and shape is
                restored, and the log names the rest.
            only_finite: Passes over checkpoints that hold NaN or infinity.

        Raises:
            ValueError: It holds other variables; the message lists them.
            dist_amp.storage.DamagedError: There are checkpoints, and all of
                them are damaged.
        """
        self.wait()
        key = self._on_chief(lambda: self._newest_usable(only_finite))
        if key == _NOTHING:
            return None
        path = self._on_every_worker(key)
        tensors = storage.read_tensors(path)
        state = storage.read_state(path)
        pairs, left_out = self._match(path, tensors, strict)
        self._assign(tensors, pairs)
        replicas = self._strategy.num_replicas_in_sync
        _warn_of_other_versions(path, state.pop("versions"))
        return Restored(
            path=path,
            step=storage.step_of(path),
            has_same_replicas=state.pop("num_replicas") == replicas,
            state=state,
            arrays={
                name.removeprefix(f"{_ARRAYS}/"): value
                for name, value in tensors.items()
                if name.startswith(f"{_ARRAYS}/")
            },
            left_out=left_out,
        )

    # ---------------------------------------------------------------- private

    def _open(self) -> int:
        with contextlib.ExitStack() as stack:
            stack.enter_context(storage.lock(self.directory))
            manifests = whole_manifests(self.directory).values()
            self._num_saves = max((m.number for m in manifests), default=0)
            self._lock = stack.pop_all()
        return 0

    def _snapshot(self) -> dict[str, tf.Tensor]:
        """Everything in host memory; a tensor that was read never changes."""
        tensors = {}
        for key, variable in self._variables.items():
            tensors[key] = _host_copy(variable)
        for key, variable in self._stacks.items():
            values = [
                tf.convert_to_tensor(c)
                for c in strategy_lib.local_copies(variable)
            ]
            stack = strategy_lib.gather_replicas(self._strategy, values)
            with tf.device("CPU:0"):
                tensors[key] = tf.constant(stack)
        return tensors

    def _write(
        self,
        step: int,
        tensors: Mapping[str, tf.Tensor],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        try:
            if self._has_written(step, tensors, state, metrics):
                self._prune()
        except Exception as error:  # in a thread of its own: it must be heard
            _log.warning("old checkpoints are not deleted: %s", _brief(error))
        finally:
            self._is_written.set()

    def _has_written(
        self,
        step: int,
        tensors: Mapping[str, tf.Tensor],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> bool:
        path = ""
        try:
            path = storage.new_path(self.directory, step)
            with tf.device("CPU:0"):
                manifest = storage.write(
                    path,
                    tensors,
                    state,
                    step=step,
                    number=self._num_saves,
                    metrics=metrics,
                    judged=set(self._variables) - self._exempt,
                )
        except Exception as error:  # likewise
            self._report(step, path, error)
            return False
        self.error = None
        _log.debug("saved %s: %s", path, readable_size(manifest.num_bytes))
        return True

    def _report(self, step: int, path: str, error: Exception) -> None:
        self.error = error
        _log.error(
            "COULD NOT SAVE step %d in %s: %s. Training goes on, the "
            "checkpoints before it remain, and the next save will be tried.",
            step,
            self.directory,
            _brief(error),
        )
        try:
            storage.remove(path)  # gives its room back to a full disk
        except storage.IO_ERRORS as second:
            _log.error("%s cannot be removed: %s", path, second)

    def _prune(self) -> None:
        """Deletes what the policy does not keep, and what was cut short."""
        found = {p: _examine(p) for p in storage.find(self.directory)}
        whole = [m for m in found.values() if isinstance(m, Manifest)]
        kept = self._policy.kept(whole)
        for path, manifest in found.items():
            is_old = manifest in whole and manifest not in kept
            if isinstance(manifest, storage.DamagedError):
                _set_aside(path, manifest)
            elif manifest is None or is_old:
                storage.remove(path)

    def _discard_after(self, step: int) -> int:
        for path in storage.find(self.directory):
            if storage.step_of(path) > step:
                storage.remove(path)
        return 0

    def _newest_usable(self, only_finite: bool) -> int:
        """Its step and number as one integer; sets damaged ones aside."""
        unreadable: Exception | None = None
        for path in reversed(storage.find(self.directory)):
            try:
                manifest = storage.check(path)
            except storage.DamagedError as error:
                _set_aside(path, error)
                continue
            except storage.IO_ERRORS as error:
                unreadable = error
                _log.warning("%s cannot be read: %s", path, _brief(error))
                continue
            if manifest is not None and (manifest.is_finite or not only_finite):
                step, number = storage.key_of(path)
                return step * _MAX_OF_A_STEP + number
        if unreadable is not None:
            raise unreadable
        damaged = storage.find_damaged(self.directory)
        if damaged:
            raise storage.DamagedError(
                f"{self.directory} holds no usable checkpoint, but damaged "
                f"ones: {', '.join(damaged)}. Nothing is started anew over "
                "them: write to another folder, or pass --resume=never."
            )
        return _NOTHING

    def _on_every_worker(self, key: int) -> str:
        """The checkpoint's path, if all workers see it."""
        step, number = divmod(key, _MAX_OF_A_STEP)
        path = storage.path_of(self.directory, step, number)
        sees = not isinstance(_examine(path), Exception | None)
        all_see = strategy_lib.gather_workers(self._strategy, [sees])[:, 0]
        blind = [index for index, one in enumerate(all_see) if not one]
        if blind:
            raise OSError(
                f"Workers {blind} do not see the checkpoint {path} that "
                "worker 0 sees: it must be on storage that all workers share "
                "(--run_dir)."
            )
        return path

    def _on_chief(self, action: Callable[[], int]) -> int:
        """The chief's result on every worker; its failure is everybody's."""
        result, failure = 0, None
        if self._is_chief:
            try:
                result = action()
            except Exception as error:  # told to the others, raised below
                result, failure = _FAILED, error
        results = strategy_lib.gather_workers(self._strategy, [result])
        if failure is not None:
            raise failure
        if results[0, 0] == _FAILED:
            raise RuntimeError(
                f"Worker 0 failed with the checkpoints in {self.directory}; "
                "its log says why."
            )
        return int(results[0, 0])

    def _match(
        self, path: str, tensors: Mapping[str, np.ndarray], strict: bool
    ) -> tuple[dict[str, str], list[str]]:
        """Keys here and there that belong together, and what has no match."""
        here = dict(sorted({**self._variables, **self._stacks}.items()))
        saved = {
            key: array
            for key, array in sorted(tensors.items())
            if not key.startswith(f"{_ARRAYS}/")
        }
        there = [
            _describe(key, array.shape[_num_stacked(key) :], array.dtype)
            for key, array in saved.items()
        ]
        wanted = [_describe(k, v.shape, v.dtype) for k, v in here.items()]
        places = _pair_up(there, wanted)
        keys, keys_there = list(here), list(saved)
        pairs = {keys[new]: keys_there[old] for old, new in places.items()}
        only_there = [x for i, x in enumerate(there) if i not in places]
        is_paired = set(places.values())
        only_here = [x for i, x in enumerate(wanted) if i not in is_paired]
        differences = [
            *(f"only there: {line}" for line in only_there),
            *(f"only here: {line}" for line in only_here),
        ]
        if not differences:
            return pairs, []
        text = "\n".join(f"  {line}" for line in differences[:_MAX_SHOWN])
        if len(differences) > _MAX_SHOWN:
            text += f"\n  and {len(differences) - _MAX_SHOWN} more"
        if strict:
            raise ValueError(
                f"The checkpoint {path} is of another model or optimizer:\n"
                f"{text}\nStart with the settings that it was made with, or "
                "in a new folder (--run_dir, --resume=never)."
            )
        _log.warning("not restored from %s:\n%s", path, text)
        return pairs, differences

    def _assign(
        self, tensors: Mapping[str, np.ndarray], pairs: Mapping[str, str]
    ) -> None:
        first = _first_local_replica(self._strategy)
        for key, there in pairs.items():
            value = tensors[there]
            if key in self._variables:
                for copy in strategy_lib.local_copies(self._variables[key]):
                    copy.assign(value)
                continue
            values = _for_replicas(
                value,
                self._strategy.num_replicas_in_sync,
                is_summed=key.startswith(_SUMMED),
            )
            for index, copy in enumerate(
                strategy_lib.local_copies(self._stacks[key]), first
            ):
                copy.assign(values[index])


def versions() -> dict[str, str]:
    """What a checkpoint's bits depend on."""
    packages: tuple[Any, ...] = (tf, keras, np)
    return {package.__name__: package.__version__ for package in packages}


def readable_size(num_bytes: float) -> str:
    """Bytes as a person reads them: "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def whole_manifests(directory: str) -> dict[str, Manifest]:
    """The manifest of each checkpoint that has one, by path, oldest first."""
    found = {path: _examine(path) for path in storage.find(directory)}
    return {p: m for p, m in found.items() if isinstance(m, Manifest)}


def _examine(path: str) -> Manifest | Exception | None:
    """The manifest, None for a save that was cut short, or what is wrong."""
    try:
        return storage.read_manifest(path)
    except (storage.DamagedError, *storage.IO_ERRORS) as error:
        return error


def _set_aside(path: str, error: Exception) -> None:
    aside = storage.set_aside(path)
    _log.warning(
        "the checkpoint %s is damaged: %s. It is set aside as %s.",
        path,
        error,
        aside,
    )


def _to_plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"JSON cannot hold {value!r} of {type(value).__name__}.")


def _brief(error: Exception) -> str:
    """The first line of an error, or its kind if it says nothing."""
    return (str(error).splitlines() or [repr(error)])[0]


def _keyed(groups: Mapping[str, Sequence[Variable]]) -> dict[str, Variable]:
    return {
        f"{group}/{index:05d}/{getattr(variable, 'path', variable.name)}": (
            variable
        )
        for group, variables in groups.items()
        for index, variable in enumerate(variables)
    }


def _without_place(key: str) -> str:
    """Group and path, without the place among the group's variables."""
    group, _, path = key.split("/", maxsplit=2)
    return f"{group}/{path}"


def _num_stacked(key: str) -> int:
    """Axes that hold replicas."""
    return int(key.startswith((f"{_SUMMED}/", f"{_PER_REPLICA}/")))


def _describe(key: str, shape: Iterable[int], dtype: Any) -> str:
    shown = f"{list(shape)} {tf.as_dtype(dtype).name}"
    return f"{_without_place(key).replace('/', ': ', 1)} {shown}"


def _pair_up(saved: Sequence[str], here: Sequence[str]) -> dict[int, int]:
    """Places there and here of equal lines, in order where that is possible.

    Numbers that Keras adds to names are left aside.
    """
    a, b = ([re.sub(r"_\d+", "", x) for x in side] for side in (saved, here))
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    places = {
        block.a + offset: block.b + offset
        for block in matcher.get_matching_blocks()
        for offset in range(block.size)
    }
    free = sorted(set(range(len(b))) - set(places.values()))
    for old in sorted(set(range(len(a))) - set(places)):  # moved past others
        new = next((n for n in free if b[n] == a[old]), None)
        if new is not None:
            places[old] = new
            free.remove(new)
    return places


def _host_copy(variable: Variable) -> tf.Tensor:
    """Replica 0's value in host memory; a tensor that was read stays as is."""
    with tf.device("CPU:0"):
        return tf.identity(strategy_lib.local_copies(variable)[0])


def _first_local_replica(strategy: tf.distribute.Strategy) -> int:
    num_workers = strategy_lib.num_workers(strategy)
    num_local = strategy.num_replicas_in_sync // num_workers
    return strategy_lib.task_index(strategy) * num_local


def _for_replicas(
    stack: np.ndarray, num_replicas: int, *, is_summed: bool
) -> np.ndarray:
    """What was saved by some replicas, for another number of them."""
    if len(stack) == num_replicas:
        return stack
    if not is_summed:
        return np.broadcast_to(stack[0], (num_replicas, *stack.shape[1:]))
    values = np.zeros((num_replicas, *stack.shape[1:]), stack.dtype)
    values[0] = stack.sum(axis=0)
    return values


def _warn_of_other_versions(path: str, saved: Mapping[str, str]) -> None:
    changed = [
        f"{name} {saved.get(name)} there, {version} here"
        for name, version in versions().items()
        if saved.get(name) != version
    ]
    if changed:
        _log.warning(
            "%s was saved with other versions (%s): the next steps may differ "
            "in their last bits",
            path,
            ", ".join(changed),
        )
