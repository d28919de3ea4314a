"""From a config to the objects it describes: devices, data, trainer."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow_datasets.core.registered import DatasetNotFoundError

import dist_amp
from dist_amp import cluster as cluster_lib
from dist_amp import data as data_lib
from dist_amp import lars, losses, memory, mfu, profiler, storage, weights
from dist_amp import schedule as schedule_lib
from dist_amp import strategy as strategy_lib
from dist_amp.callbacks import (
    Histograms,
    JsonLines,
    TensorBoard,
    describe_epoch,
)
from dist_amp.checkpoint import readable_size, whole_manifests
from dist_amp.data_service import DataService
from dist_amp.models import batch_norm
from dist_amp.stream import DatasetLike, length_of, one_pass
from launch.config import ConfigError, TrainConfig
from launch.options import read_options
from launch.run_dir import RunDir

_log = logging.getLogger(__name__)

_GENERIC_OPTIONS = (
    "weight_decay",
    "global_clipnorm",
    "clipnorm",
    "clipvalue",
    "ema_overwrite_frequency",
)

# Of an optimizer's arguments, those that have flags or mean nothing here.
_OPTIMIZER_FLAGS = (
    *_GENERIC_OPTIONS,
    "learning_rate",
    "momentum",
    "exclude",
    "use_ema",
    "ema_momentum",
    "loss_scale_factor",
    "gradient_accumulation_steps",
    "name",
)

_OF_KERAS = "keras.applications"

# Settings that may differ among the workers of a job.
_OWN_OF_A_WORKER = ("task_index", "data_dir", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class Devices:
    """What the replicas run on, and why "auto" chose it."""

    strategy: tf.distribute.Strategy
    strategy_kind: str
    strategy_reason: str
    precision: dist_amp.Precision

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run's folder."""
        return strategy_lib.task_index(self.strategy) == 0


@dataclasses.dataclass(frozen=True)
class Data:
    """Global batches to train on and, unless there are none, to test on."""

    train: DatasetLike
    test: tf.data.Dataset | None
    num_classes: int | None


def make_devices(config: TrainConfig) -> Devices:
    """Seeds, splits the CPU, builds the strategy, resolves the precision."""
    _seed(config)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    devices = list(config.devices) or None
    if config.num_logical_cpus:
        cpus = strategy_lib.use_logical_cpus(config.num_logical_cpus)
        devices = devices or cpus
    cluster = None
    if config.strategy in ("auto", "multi_worker"):
        cluster = cluster_lib.find(config.workers, config.task_index)
    is_tpu = config.strategy == "tpu" or config.tpu
    found = [] if is_tpu or cluster else strategy_lib.find_devices(devices)
    kind, reason = strategy_lib.choose(
        config.strategy, devices=found, cluster=cluster, tpu=config.tpu
    )
    strategy = dist_amp.make_strategy(
        kind,
        devices=devices,
        all_reduce=config.all_reduce,
        cluster=cluster if kind == "multi_worker" else None,
        tpu=config.tpu,
        tpu_zone=config.tpu_zone,
        tpu_project=config.tpu_project,
        timeouts=cluster_lib.Timeouts(
            startup=config.startup_timeout,
            collective=config.collective_timeout,
            heartbeat=config.heartbeat_timeout,
        ),
        facts=_facts(config) if cluster else None,
    )
    # Entered once for its checks, so that they come before any data is read.
    with dist_amp.scope(strategy, config.precision) as precision:
        pass
    _log.info(
        "strategy: %s, %d replicas (%s)",
        kind,
        strategy.num_replicas_in_sync,
        reason,
    )
    _log.info("precision: %s (%s)", precision.name, precision.reason)
    return Devices(strategy, kind, reason, precision)


def _seed(config: TrainConfig) -> None:
    """All generators; TensorFlow's own with no 0.

    A global seed of 0 makes `shuffle(n, seed=number)` in a function of the
    pass fail (TensorFlow 2.21).
    """
    keras.utils.set_random_seed(config.seed)
    tf.random.set_seed(config.seed + 1)


def _facts(config: TrainConfig) -> dict[str, str]:
    """What all workers must be started with alike: flags, the user's code."""
    facts = {
        f"--{name}": str(value)
        for name, value in dataclasses.asdict(config).items()
        if name not in _OWN_OF_A_WORKER
    }
    for name in ("model", "dataset", "loss"):
        module, _, function = getattr(config, name).partition(":")
        if function.isidentifier():
            found = importlib.util.find_spec(module)
            path = pathlib.Path(found.origin or "") if found else None
            if path and path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                facts[f"code of {module}"] = digest[:16]
    return facts


def load_data(config: TrainConfig) -> Data:
    """Loads a TFDS dataset, or calls the user's function for each split."""
    data = _load(config)
    if config.input_dtype == "float32":
        return data
    cast = functools.partial(data_lib.cast_inputs, dtype=config.input_dtype)
    return dataclasses.replace(
        data, train=cast(data.train), test=data.test and cast(data.test)
    )


def _load(config: TrainConfig) -> Data:
    if config.has_own_data:
        return _data_of(_imported("dataset", config.dataset), config)
    builder = _prepared(config)
    train = data_lib.read_tfds(
        builder,
        "train",
        global_batch_size=config.batch_size,
        shuffle_seed=config.seed,
    )
    test = None
    test_split = data_lib.test_split_of(builder)
    if test_split is not None:
        test = one_pass(
            data_lib.read_tfds(
                builder, test_split, global_batch_size=config.batch_size
            )
        )
    return Data(train, test, data_lib.num_classes_of(builder))


def _prepared(config: TrainConfig) -> Any:
    """The builder of a TFDS dataset."""
    try:
        return data_lib.prepare_tfds(config.dataset, config.data_dir)
    except DatasetNotFoundError as error:
        raise ConfigError(
            f"--dataset={config.dataset} is no dataset of TFDS, nor "
            "module:function."
        ) from error


def load_split(config: TrainConfig, split: str) -> Data:
    """One split, once, in its own order, for whatever it is wanted.

    Args:
        config: The settings.
        split: "train", "test" (or what is there for it), any split of TFDS,
            or what the user's function takes.

    Raises:
        ConfigError: There is no such split.
    """
    num_classes = None
    if config.has_own_data:
        function = _imported("dataset", config.dataset)
        takes_split = "split" in inspect.signature(function).parameters
        if split != "train" and not takes_split:
            raise ConfigError(
                f"--split={split}: {config.dataset} takes no `split`; pass "
                "--split=train."
            )
        dataset = _user_dataset(function, split, config)
    else:
        builder = _prepared(config)
        if split == "test":
            split = data_lib.test_split_of(builder) or split
        try:
            builder.info.splits[split]
        except (KeyError, ValueError) as error:
            found = ", ".join(builder.info.splits)
            raise ConfigError(
                f"--split={split}: {config.dataset} has {found}."
            ) from error
        num_classes = data_lib.num_classes_of(builder)
        dataset = data_lib.read_tfds(
            builder, split, global_batch_size=config.batch_size
        )
    if config.input_dtype != "float32":
        dataset = data_lib.cast_inputs(dataset, dtype=config.input_dtype)
    dataset = one_pass(dataset)
    return Data(dataset, dataset, num_classes)


def make_trainer(
    config: TrainConfig,
    devices: Devices,
    data: Data,
    *,
    trains: bool = True,
) -> dist_amp.Trainer:
    """Makes model and optimizer in the scope, and the trainer around them.

    Args:
        config: The settings.
        devices: From `make_devices`.
        data: From `load_data` or `load_split`.
        trains: Else the optimizer is one that keeps no state.
    """
    # Again: what reading data took of the generators must change no weight.
    _seed(config)
    with dist_amp.scope(devices.strategy, devices.precision):
        model = make_model(config, data)
        if trains:
            optimizer = make_optimizer(config, data)
        else:
            optimizer = dist_amp.wrap_optimizer(keras.optimizers.SGD())
    for name in config.metrics:
        _check_metric(name)
    return dist_amp.Trainer(
        model,
        optimizer,
        loss=make_loss(config, model),
        metrics=config.metrics,
        jit_compile=config.jit_compile,
        data_service=_data_service(config),
    )


def _data_service(config: TrainConfig) -> DataService | None:
    if config.data_service is None:
        return None
    return DataService(
        config.data_service,
        startup_timeout=config.startup_timeout,
        timeout=config.collective_timeout,
    )


def describe(
    config: TrainConfig,
    devices: Devices,
    data: Data,
    trainer: dist_amp.Trainer,
) -> dict[str, Any]:
    """What the settings became on this machine, for `config.json`."""
    trainer.build(data.train)
    optimizer = trainer.optimizer
    has_scale = isinstance(optimizer, dist_amp.LossScaleOptimizer)
    rule = optimizer.get_config()
    inner = rule.pop("inner")
    del rule["name"]
    return {
        "dist_amp": dist_amp.__version__,
        "strategy": devices.strategy_kind,
        "strategy_reason": devices.strategy_reason,
        "num_replicas": devices.strategy.num_replicas_in_sync,
        "devices": list(devices.strategy.extended.worker_devices),
        "precision": devices.precision.name,
        "precision_reason": devices.precision.reason,
        "loss_scale": rule if has_scale else None,
        "epochs": config.num_epochs,
        "steps_per_epoch": config.num_steps_per_epoch
        or _ceil_div(
            length_of(one_pass(data.train)), config.gradient_accumulation_steps
        ),
        "per_replica_batch_size": config.batch_size
        / devices.strategy.num_replicas_in_sync,
        "num_parameters": trainer.model.count_params(),
        "optimizer": inner["config"],
    }


def describe_plan(
    config: TrainConfig,
    devices: Devices,
    data: Data,
    trainer: dist_amp.Trainer,
) -> str:
    """Traces the train step and tells what a run would do."""
    resolved = describe(config, devices, data, trainer)
    num_ops = trainer.trace(data.train)
    variables = [*trainer.model.variables, *trainer.optimizer.variables]
    num_bytes = sum(
        int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables
    )
    lines = {
        "strategy": f"{resolved['strategy']} ({resolved['strategy_reason']})",
        "replicas": resolved["num_replicas"],
        "devices": ", ".join(resolved["devices"]),
        "precision": f"{resolved['precision']} "
        f"({resolved['precision_reason']})",
        "loss scale": resolved["loss_scale"] or "none",
        "model": f"{config.model}, {resolved['num_parameters']:,} parameters",
        "model and optimizer": f"{num_bytes / 2**20:.2f} MiB on each replica",
        "batch": f"{config.global_batch_size} examples an update, in "
        f"{config.gradient_accumulation_steps} part(s), "
        f"{resolved['per_replica_batch_size']:g} a replica and part",
        "length": f"{resolved['epochs']} epochs of "
        f"{resolved['steps_per_epoch'] or 'unknown'} steps",
        "train step": f"traced, {num_ops} operations in the compiled loop",
        "results": config.directory,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {v}" for name, v in lines.items())


@contextlib.contextmanager
def open_run_dir(config: TrainConfig, run_dir: RunDir) -> Iterator[None]:
    """Makes the folder, keeps other runs from it, writes to nothing yet.

    Raises:
        ConfigError: Another run has the folder, or it cannot be written.
    """
    path = str(run_dir.path)
    with contextlib.ExitStack() as stack:
        with _as_config_error("run_dir", path):
            if _is_to_be_moved(config, run_dir):
                with storage.lock(path):
                    moved = run_dir.move_aside()
                _log.info("moved earlier results to %s", moved)
            stack.enter_context(storage.lock(path))
        with _as_config_error("checkpoint_dir", run_dir.checkpoints):
            with storage.lock(run_dir.checkpoints):
                pass  # it can be made, and nobody else has it
            _check_checkpoints(config, run_dir)
        yield


@contextlib.contextmanager
def _as_config_error(flag: str, path: str) -> Iterator[None]:
    try:
        yield
    except storage.IO_ERRORS as error:
        raise ConfigError(f"--{flag}={path}: {error}") from error


def _is_to_be_moved(config: TrainConfig, run_dir: RunDir) -> bool:
    """Whether an earlier run's results are in the way of this one's."""
    if not run_dir.path.exists():
        return False
    if config.resume == "never":
        return True
    has_results = (
        run_dir.metrics.exists() and run_dir.metrics.stat().st_size > 0
    )
    if not has_results or storage.find(run_dir.checkpoints):
        return False
    _log.warning(
        "%s holds results but no checkpoint in %s: training starts anew",
        run_dir.path,
        run_dir.checkpoints,
    )
    return not storage.find_damaged(run_dir.checkpoints)


def _check_checkpoints(config: TrainConfig, run_dir: RunDir) -> None:
    """What only TensorFlow can look for, and what was not moved aside."""
    found = storage.find(run_dir.checkpoints)
    if config.resume == "never" and found:
        raise ConfigError(
            f"--resume=never: --checkpoint_dir={run_dir.checkpoints} holds "
            "checkpoints; name an empty folder."
        )
    run_dir.check_resume(
        config, has_checkpoint=bool(whole_manifests(run_dir.checkpoints))
    )


def save_policy(config: TrainConfig) -> dist_amp.SavePolicy:
    """When to save, and what to keep."""
    return dist_amp.SavePolicy(
        every_epochs=config.save_every_epochs or None,
        every_steps=config.save_every_steps,
        every_minutes=config.save_every_minutes,
        max_to_keep=config.keep_checkpoints,
        keep_best=config.keep_best,
        keep_every=config.keep_every,
    )


def rollback_policy(config: TrainConfig) -> dist_amp.RollbackPolicy | None:
    """What to do when training blows up; None: an error."""
    if not config.rollback_on:
        return None
    return dist_amp.RollbackPolicy(
        on=config.rollback_on,
        max_rollbacks=config.max_rollbacks,
        lower=config.rollback_lower,
        factor=config.rollback_factor,
    )


def load_initial_weights(
    config: TrainConfig,
    run_dir: RunDir,
    data: Data,
    trainer: dist_amp.Trainer,
) -> None:
    """Reads `--initial_weights` into the model of a run that is new."""
    trainer.build(data.train)
    is_new = config.resume == "never" or not storage.find(run_dir.checkpoints)
    if config.initial_weights is None or not is_new:
        return
    try:
        weights.load(trainer.model, config.initial_weights)
    except (*storage.IO_ERRORS, ValueError) as error:
        raise ConfigError(
            f"--initial_weights={config.initial_weights}: {error}"
        ) from error
    trainer.spread_seeds()


def describe_checkpoints(directory: str) -> str:
    """How many there are and what they weigh, for the last line of a run."""
    manifests = whole_manifests(directory).values()
    size = readable_size(sum(m.num_bytes for m in manifests))
    return f"{len(manifests)} checkpoints, {size}"


def save_model(trainer: dist_amp.Trainer, path: pathlib.Path) -> None:
    """Writes `model.keras`, which is whole whenever it is there."""
    part = path.with_name(f"part-{path.name}")
    try:
        trainer.model.save(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} cannot be written: {error}. Make room and start the same "
            "command again, or export the last checkpoint "
            "(launch.checkpoints export)."
        ) from error


def make_callbacks(
    run_dir: RunDir, trainer: dist_amp.Trainer
) -> list[keras.callbacks.Callback]:
    """TensorBoard, and a line of `metrics.jsonl` for each epoch and split."""
    return [
        TensorBoard(str(run_dir.tensorboard), write_graph=False),
        JsonLines(
            run_dir.metrics,
            lambda: trainer.global_step,
            lambda: {"peak_memory_bytes": memory.peak_bytes(trainer.strategy)},
        ),
    ]


def make_histograms(
    config: TrainConfig,
    devices: Devices,
    run_dir: RunDir,
    trainer: dist_amp.Trainer,
) -> list[keras.callbacks.Callback]:
    """What `--histogram_every_epochs` asks for; the trainer must be built.

    Every worker runs the same step; the chief writes.
    """
    if config.histogram_every_epochs is None:
        return []
    log = trainer.keep_gradients()
    if not devices.is_chief:
        return []
    made = Histograms(
        run_dir.tensorboard / "histograms",
        gradients=log.read,
        global_step=lambda: trainer.global_step,
        every_epochs=config.histogram_every_epochs,
    )
    return [made]


def make_profiler(
    config: TrainConfig, run_dir: RunDir
) -> profiler.Profiler | None:
    """What `--profile_steps` asks for; TensorBoard finds it."""
    if config.profile_steps is None:
        return None
    first, end = map(int, config.profile_steps.split(":"))
    return profiler.Profiler(first, end, run_dir.tensorboard)


def make_mfu(
    config: TrainConfig, data: Data, trainer: dist_amp.Trainer
) -> mfu.Mfu:
    """Each worker needs it, before what writes the logs."""
    replicas = trainer.strategy.num_replicas_in_sync
    return mfu.Mfu(
        trainer,
        data.train,
        per_replica_batch_size=-(-config.global_batch_size // replicas),
    )


def make_auto_layers(
    devices: Devices, data: Data, trainer: dist_amp.Trainer
) -> list[keras.callbacks.Callback]:
    """What `--precision=auto_layers` needs on each worker."""
    if not devices.precision.adapts_layers:
        return []
    return [dist_amp.AutoLayers(trainer, data.train)]


def describe_average(results: dict[str, Any]) -> str:
    """The line on the moving average of the weights, which is what is saved."""
    named = {f"val_{name}": value for name, value in results.items()}
    return describe_epoch(0, named).replace("Epoch 1", "Averaged weights")


def _ceil_div(length: int | None, parts: int) -> int | None:
    return None if length is None else -(-length // parts)


def _imported(flag: str, path: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--{flag} must be module:function of an importable module. "
            f"Received {path}: {error}."
        ) from error


def _call_with(function: Callable[..., Any], **offered: Any) -> Any:
    """Calls a user's function with those arguments that it takes."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    taken = {n: v for n, v in offered.items() if takes_all or n in parameters}
    try:
        return function(**taken)
    except ValueError as error:  # not ours: the user needs the traceback
        raise RuntimeError(f"{function.__name__} raised {error!r}") from error


def _data_of(function: Callable[..., Any], config: TrainConfig) -> Data:
    takes_split = "split" in inspect.signature(function).parameters
    train = _user_dataset(function, "train", config)
    test = None
    if takes_split:
        test = one_pass(_user_dataset(function, "test", config))
    return Data(train, test, num_classes=None)


def _user_dataset(
    function: Callable[..., Any], split: str, config: TrainConfig
) -> DatasetLike:
    offered = {
        "split": split,
        "global_batch_size": config.batch_size,
        "seed": config.seed,
        "data_dir": config.data_dir,
    }
    options = read_options(
        "dataset_option",
        config.dataset_option,
        function,
        reserved=tuple(offered),
    )
    dataset = _call_with(function, **offered, **options)
    first_pass = one_pass(dataset)
    if not isinstance(first_pass, tf.data.Dataset):
        raise ConfigError(
            f"--dataset={config.dataset} must return a tf.data.Dataset, or a "
            "function of the pass over the data that returns one. Received "
            f"{type(first_pass).__name__}."
        )
    takes_size = "global_batch_size" in inspect.signature(function).parameters
    if takes_size or data_lib.is_batched(first_pass):
        return dataset
    if isinstance(dataset, tf.data.Dataset):
        return dataset.batch(config.batch_size)
    return lambda number: dataset(number).batch(config.batch_size)


def make_model(
    config: TrainConfig, data: Data, *, synchronized: bool | None = None
) -> keras.Model:
    """The model of the flags; call it in a scope.

    Args:
        config: The settings.
        data: Tells the input's shape and the number of classes.
        synchronized: Batch norm over all replicas; None: if there are
            several.
    """
    path = config.model
    if ":" not in path:
        path = f"dist_amp.models.{path}:build"
    function = _imported("model", path)
    is_keras = path.startswith(_OF_KERAS)
    offered = _offered_to_model(data, is_keras=is_keras)
    if synchronized is not None:
        offered["synchronized"] = synchronized
    offered |= read_options("model_option", config.model_option, function)
    model = _call_with(function, **offered)
    if is_keras:
        batch_norm.synchronize(model, synchronized)
    if not isinstance(model, keras.Model):
        raise ConfigError(
            f"--model={config.model} must return a keras.Model. Received "
            f"{type(model).__name__}."
        )
    return model


def _offered_to_model(data: Data, *, is_keras: bool) -> dict[str, Any]:
    """What a model's function may take of what the data tells."""
    offered: dict[str, Any] = {}
    spec = data_lib.input_spec(one_pass(data.train))
    if isinstance(spec, tf.TensorSpec) and spec.shape.rank:
        offered["input_shape"] = tuple(spec.shape[1:])
    if data.num_classes is not None:
        offered["num_classes"] = data.num_classes
    if not is_keras:
        return offered
    if data.num_classes is not None:
        offered["classes"] = data.num_classes
    return offered | {
        "weights": None,  # would be downloaded
        "classifier_activation": None,
        "include_preprocessing": False,  # images are in [0, 1] already
    }


def _check_metric(name: str) -> None:
    try:
        keras.metrics.get(name)
    except ValueError as error:
        raise ConfigError(
            f"--metrics must be names of Keras metrics. Received {name}."
        ) from error


def make_loss(config: TrainConfig, model: keras.Model) -> Any:
    """The loss of the flags, from logits or not as the model ends."""
    if ":" in config.loss:
        return _imported("loss", config.loss)
    loss_class = getattr(keras.losses, config.loss_class, None)
    if isinstance(loss_class, type):
        if "from_logits" not in inspect.signature(loss_class).parameters:
            return loss_class()
        from_logits = not _ends_in_probabilities(model)
        if not config.label_smoothing:
            return loss_class(from_logits=from_logits)
        if loss_class is keras.losses.SparseCategoricalCrossentropy:
            return losses.SmoothedCrossentropy(
                config.label_smoothing, from_logits=from_logits
            )
        return loss_class(
            from_logits=from_logits, label_smoothing=config.label_smoothing
        )
    try:
        return keras.losses.get(config.loss)
    except ValueError as error:
        raise ConfigError(
            "--loss must be a Keras loss or module:function. Received "
            f"{config.loss}."
        ) from error


def _ends_in_probabilities(model: keras.Model) -> bool:
    """Whether the last activation is a softmax or a sigmoid."""
    for layer in reversed(model.layers):
        if isinstance(layer, keras.Model):
            return _ends_in_probabilities(layer)
        if isinstance(layer, keras.layers.Softmax):
            return True
        activation = getattr(layer, "activation", None)
        if activation is not None:
            name = getattr(activation, "__name__", "")
            return name in ("softmax", "sigmoid")
    return False


def make_optimizer(
    config: TrainConfig, data: Data
) -> dist_amp.DistributedOptimizer:
    """The optimizer of the flags, wrapped; call it in a scope."""
    total_steps = _total_steps(config, data)
    optimizer_class = _optimizer_class(config)
    options = {
        name: getattr(config, name)
        for name in (*_GENERIC_OPTIONS, "momentum")
        if getattr(config, name) is not None
    }
    if config.ema is not None:
        options |= {"use_ema": True, "ema_momentum": config.ema}
    if config.gradient_accumulation_steps > 1:
        options["gradient_accumulation_steps"] = (
            config.gradient_accumulation_steps
        )
    options |= read_options(
        "optimizer_option",
        config.optimizer_option,
        optimizer_class,
        reserved=_OPTIMIZER_FLAGS,
    )
    if optimizer_class is lars.LARS:
        options["exclude"] = config.not_decayed
    inner = optimizer_class(_learning_rate(config, total_steps), **options)
    if config.not_decayed and optimizer_class is not lars.LARS:
        # By the variable's own name; a layer's is not looked at.
        inner.exclude_from_weight_decay(var_names=list(config.not_decayed))
    return dist_amp.wrap_optimizer(
        inner,
        loss_scale=_loss_scale(config.loss_scale),
        **_wire_options(config),
        **_loss_scale_options(config),
    )


def _optimizer_class(config: TrainConfig) -> Any:
    if config.optimizer == "lars":
        return lars.LARS
    # Not keras.optimizers.get, which knows no lamb (Keras 3.15).
    names = {name.lower(): name for name in dir(keras.optimizers)}
    return getattr(keras.optimizers, names[config.optimizer])


def _wire_options(config: TrainConfig) -> dict[str, Any]:
    options = {
        "wire_dtype": config.wire_dtype,
        "wire_check_interval": config.wire_check_interval,
        "wire_error_bound": config.wire_error_bound,
    }
    is_float32 = config.wire_dtype == "float32"
    return {
        name: value
        for name, value in options.items()
        if value is not None and not is_float32
    }


def _loss_scale(text: str) -> str | float | None:
    if text in ("auto", "dynamic"):
        return text
    return None if text == "none" else float(text)


def _loss_scale_options(config: TrainConfig) -> dict[str, Any]:
    options = {
        "initial_scale": config.loss_scale_initial,
        "growth_interval": config.loss_scale_growth_interval,
        "min_scale": config.loss_scale_min,
        "max_scale": config.loss_scale_max,
    }
    return {name: v for name, v in options.items() if v is not None}


def _learning_rate(config: TrainConfig, total_steps: int | None) -> Any:
    if config.schedule == "constant" and not config.warmup_steps:
        return config.peak_learning_rate
    if config.schedule != "constant" and total_steps is None:
        raise ConfigError(
            f"--schedule={config.schedule} needs to know how long training "
            "is: pass --steps or --steps_per_epoch."
        )
    return schedule_lib.WarmupSchedule(
        config.peak_learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps or 0,
        decay=config.schedule,
    )


def _total_steps(config: TrainConfig, data: Data) -> int | None:
    steps = config.num_steps_per_epoch or _ceil_div(
        length_of(one_pass(data.train)), config.gradient_accumulation_steps
    )
    return None if steps is None else steps * config.num_epochs
