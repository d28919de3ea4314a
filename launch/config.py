"""The settings of a training run: a frozen value that checks itself.

Standard library only: a mistake is found before TensorFlow is imported.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker", "tpu")
ALL_REDUCES = ("auto", "nccl", "ring", "hierarchical_copy", "one_device")
PRECISIONS = (
    "auto",
    "float32",
    "mixed_float16",
    "mixed_bfloat16",
    "auto_layers",
    "graph_float16",
    "graph_bfloat16",
)
INPUT_DTYPES = ("float32", "bfloat16")
_WITH_SCALE = ("auto", "mixed_float16", "auto_layers", "graph_float16")
OPTIMIZERS = (
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "ftrl",
    "lamb",
    "lars",
    "lion",
    "muon",
    "nadam",
    "rmsprop",
    "sgd",
)
MODELS = ("mlp", "convnet", "resnet50", "transformer_lm", "encoder")
# Weight decay would pull norms' scales to 0, and rare tokens' embeddings.
NOT_DECAYED = ("bias", "gamma", "beta", "embeddings")
_EXCLUDING = ("adamw", "lamb", "lars")
_WITH_MOMENTUM = ("sgd", "rmsprop", "lars")
_SMOOTHED = (
    "sparse_categorical_crossentropy",
    "categorical_crossentropy",
    "binary_crossentropy",
)
SCHEDULES = ("constant", "cosine", "linear")
RESUMES = ("auto", "never", "must")
ROLLBACK_KINDS = ("nan", "spike")
ROLLBACK_LOWERED = ("nothing", "loss_scale", "learning_rate")
MAX_ROLLBACKS = 3
ROLLBACK_FACTOR = 0.5
DEFAULT_EPOCHS = 5


def flag(
    default: Any,
    text: str,
    choices: tuple[str, ...] = (),
    *,
    is_repeated: bool = False,
) -> Any:
    """A field of settings that becomes a flag."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": text,
            "choices": choices,
            "is_repeated": is_repeated,
        },
    )


class ConfigError(ValueError):
    """Settings that are wrong or contradict each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of `python -m launch.train`; one flag each."""

    model: str = flag(
        "mlp",
        f"One of {', '.join(MODELS)}, or module:function that returns a "
        "keras.Model, as keras.applications:ResNet50V2. The function may take "
        "input_shape (of an example) and num_classes.",
    )
    model_option: tuple[str, ...] = flag(
        (),
        "An argument of the model's function, as num_layers=4; may come "
        "several times.",
        is_repeated=True,
    )
    dataset: str = flag(
        "digits",
        "A TFDS name; a folder that TFDS has prepared (with "
        "dataset_info.json); files of records, as /data/{split}-*.tfrecord, "
        "with --parse; or module:function that returns a tf.data.Dataset. The "
        "function may take split, global_batch_size (then it batches by "
        "itself), seed and data_dir; None for a seed annotated as int | None "
        "asks for the data's own order.",
    )
    dataset_option: tuple[str, ...] = flag(
        (),
        "A further argument of the data's function, as length=256; may come "
        "several times.",
        is_repeated=True,
    )
    data_dir: str | None = flag(
        None,
        "Where TFDS keeps data [~/tensorflow_datasets]; the folder of files "
        "of records.",
    )
    parse: str | None = flag(
        None,
        "module:function that makes (x, y) of a record, a scalar string "
        "tensor: of TFRecord files, or of .array_record ones.",
    )
    train_split: str | None = flag(
        None, "What TFDS has to train on, as train[:90%] [train]."
    )
    test_split: str | None = flag(
        None,
        "What TFDS has to test on, as train[90%:] [test, else validation].",
    )
    loss: str = flag(
        "sparse_categorical_crossentropy",
        "A Keras loss, or module:function. Whether a cross-entropy takes "
        "logits is read off what the model's output comes from; config.json "
        "tells, as from_logits.",
    )
    label_smoothing: float = flag(
        0.0, "Part of a label that is spread over all classes."
    )
    metrics: tuple[str, ...] = flag(
        ("accuracy",),
        "Keras metrics: of probabilities, where a cross-entropy of Keras "
        "takes logits.",
    )

    input_dtype: str = flag(
        "float32",
        "What real-valued inputs travel to the devices in; bfloat16 is half "
        "the bytes, and loses nothing where the model computes in it.",
        INPUT_DTYPES,
    )

    data_service: str | None = flag(
        None,
        "grpc://host:port of a tf.data service that cuts and loads the "
        "batches in place of each worker; see launch.data_service.",
    )

    strategy: str = flag("auto", "How replicas are made.", STRATEGIES)
    devices: tuple[str, ...] = flag(
        (), "Devices to use, as GPU:0,GPU:1. Default: all GPUs, else CPU:0."
    )
    num_logical_cpus: int = flag(
        0, "Splits the CPU into this many devices, a replica on each."
    )
    all_reduce: str = flag("auto", "How gradients travel.", ALL_REDUCES)
    tpu: str | None = flag(None, 'Name or address of a TPU, or "local".')
    tpu_zone: str | None = flag(
        None,
        "Of a TPU with a name, as us-west4-a. Default: this machine's, if it "
        "is one of Google Cloud.",
    )
    tpu_project: str | None = flag(
        None, "Of a TPU with a name: the project's id. Default: likewise."
    )
    workers: tuple[str, ...] = flag(
        (),
        "host:port of every process of the job, the same list everywhere. "
        "Default: from TF_CONFIG, srun or mpirun.",
    )
    task_index: int | None = flag(
        None,
        "Which of --workers this process is. Default: as Slurm, MPI or a "
        "Kubernetes Indexed Job tell.",
    )
    startup_timeout: float = flag(
        300.0,
        "Seconds to wait for a worker that has not come, or a TPU that is "
        "initialized.",
    )
    collective_timeout: float = flag(
        300.0,
        "Seconds without progress until all workers report where each one "
        "is, and end.",
    )
    heartbeat_timeout: float = flag(
        20.0, "Seconds without a sign of life until a worker counts as lost."
    )
    precision: str = flag(
        "auto",
        "Dtypes; auto is the fastest safe one here, auto_layers is "
        "mixed_float16 with those layers in float32 that float16 fails.",
        PRECISIONS,
    )
    loss_scale: str = flag(
        "auto",
        "auto (dynamic where the precision needs it), dynamic, none, or a "
        "number: a fixed scale.",
    )
    loss_scale_initial: float | None = flag(None, "First scale [32768].")
    loss_scale_growth_interval: int | None = flag(
        None, "Finite updates until the scale doubles [2000]."
    )
    loss_scale_min: float | None = flag(None, "Floor [2**-14].")
    loss_scale_max: float | None = flag(None, "Ceiling [2**24].")
    wire_dtype: str = flag(
        "float32",
        "Dtype of gradients on their way between replicas. float16 and "
        "bfloat16 halve the bytes, float16 needs a loss scale; int8 quarters "
        "them, and each replica makes up for what its gradients lose.",
        ("float32", "float16", "bfloat16", "int8"),
    )
    wire_check_interval: int | None = flag(
        None,
        "Updates between checks of what gradients lose on their way; 0: "
        "never [100].",
    )
    wire_error_bound: float | None = flag(
        None,
        "The loss's norm by the sum's norm; beyond it gradients travel in "
        "float32 for the rest of the run [0.5].",
    )
    jit_compile: bool = flag(
        False, "Compiles the forward and backward pass with XLA."
    )
    compilation_cache: str | None = flag(
        None,
        "Folder where XLA keeps what it compiled; the next start takes it "
        "from there. Needs --jit_compile; hides the lines that TensorFlow's "
        "C++ side logs.",
    )

    global_batch_size: int = flag(
        32, "Examples of one update, over all replicas."
    )
    gradient_accumulation_steps: int = flag(
        1,
        "Computes each update's gradient in so many parts, to save memory; "
        "the result is the same.",
    )
    epochs: int | None = flag(None, f"Passes over the data [{DEFAULT_EPOCHS}].")
    steps: int | None = flag(
        None,
        "Updates in all, instead of epochs; one epoch of that length, "
        "or epochs of steps_per_epoch.",
    )
    steps_per_epoch: int | None = flag(
        None, "Updates in an epoch. Default: one pass over the data."
    )
    steps_per_loop: str = flag("auto", "Updates in one compiled call, or auto.")
    eval_steps: int | None = flag(
        None, "Batches of the test split to evaluate. Default: all."
    )

    optimizer: str = flag("adam", "A Keras optimizer, or lars.", OPTIMIZERS)
    optimizer_option: tuple[str, ...] = flag(
        (),
        "An argument of the optimizer that has no flag, as beta_2=0.95; may "
        "come several times.",
        is_repeated=True,
    )
    learning_rate: float | None = flag(
        None, "Peak learning rate [0.01 for --model=mlp, else 0.001]."
    )
    momentum: float | None = flag(None, "For sgd, rmsprop and lars.")
    warmup_steps: int = flag(0, "Updates until the peak is reached.")
    schedule: str = flag(
        "constant", "Learning rate after the warm-up.", SCHEDULES
    )
    weight_decay: float | None = flag(
        None, "Decoupled weight decay; with lars, part of the gradient."
    )
    weight_decay_exclude: tuple[str, ...] | None = flag(
        None,
        "Variables with one of these in their name do not decay; lars adapts "
        "them not. Any part of the name counts, as beta of my_beta_kernel. "
        f"Default: {','.join(NOT_DECAYED)} with adamw, lamb and lars, else "
        "none.",
    )
    global_clipnorm: float | None = flag(
        None, "Clips the norm of the whole gradient."
    )
    clipnorm: float | None = flag(
        None, "Clips the norm of each variable's gradient."
    )
    clipvalue: float | None = flag(None, "Clips each gradient entry.")
    ema: float | None = flag(
        None, "Momentum of the weights' moving average, say 0.999."
    )
    ema_overwrite_frequency: int | None = flag(
        None, "Updates between overwriting the weights by their average."
    )

    seed: int = flag(0, "Seed of weights, data order and random layers.")
    deterministic: bool = flag(
        False, "Same bits every run, at some cost in speed."
    )
    run_dir: str | None = flag(
        None, "Where results go. Default: runs/MODEL-DATASET."
    )
    resume: str = flag(
        "auto",
        "auto goes on from run_dir's checkpoint if there is one, must fails "
        "if there is none, never starts anew and moves run_dir aside.",
        RESUMES,
    )
    checkpoint_dir: str | None = flag(
        None,
        "Where checkpoints go; gs:// and the like too. Default: "
        "run_dir/checkpoints.",
    )
    save_every_epochs: int = flag(
        1, "Epochs between checkpoints; 0: only as the next two flags say."
    )
    save_every_steps: int | None = flag(None, "Updates between checkpoints.")
    save_every_minutes: float | None = flag(
        None, "Minutes between checkpoints."
    )
    keep_checkpoints: int = flag(3, "The newest so many are kept.")
    keep_best: str | None = flag(
        None,
        "The checkpoint that is best in this is kept too, say val_accuracy.",
    )
    keep_every: int | None = flag(
        None, "Each so many-th checkpoint is kept for ever."
    )
    initial_weights: str | None = flag(
        None,
        "A new run starts from the weights in a .keras, .h5 or "
        ".safetensors file.",
    )
    max_minutes: float | None = flag(
        None, "Saves and stops after so long; start again to go on."
    )
    rollback_on: tuple[str, ...] = flag(
        (),
        "Goes back to the last good checkpoint, past the batches that did "
        "it, where the loss is not finite (nan) or jumps (spike).",
    )
    max_rollbacks: int | None = flag(
        None, f"After so many, the next one is an error [{MAX_ROLLBACKS}]."
    )
    rollback_lower: str = flag(
        "nothing", "What is lowered at each rollback.", ROLLBACK_LOWERED
    )
    rollback_factor: float | None = flag(
        None, f"What it is multiplied by [{ROLLBACK_FACTOR}]."
    )
    profile_steps: str | None = flag(
        None,
        "FIRST:END, as 100:110: TensorFlow's profiler around the updates "
        "after FIRST and up to END, for TensorBoard.",
    )
    tensorboard_graph: bool = flag(
        False, "Writes the compiled step's graph, for TensorBoard."
    )
    histogram_every_epochs: int | None = flag(
        None,
        "Epochs between TensorBoard histograms of each variable and of its "
        "newest gradient. Takes the memory of a gradient on each replica, and "
        "a copy of it an update. Default: none.",
    )
    dry_run: bool = flag(
        False, "Builds, traces one step, prints the plan, and exits."
    )

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_functions()
        self._check_data()
        self._check_numbers()
        self._check_devices()
        self._check_loss_scale()
        self._check_batch()
        self._check_options()
        self._check_optimizer()
        self._check_decay()
        self._check_recovery()
        self._check_profile()

    # ------------------------------------------------------------ resolved

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or what suits the model."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.01 if self.model == "mlp" else 0.001

    @property
    def not_decayed(self) -> tuple[str, ...]:
        """`weight_decay_exclude`, or what suits the optimizer."""
        if self.weight_decay_exclude is not None:
            return self.weight_decay_exclude
        return NOT_DECAYED if self.optimizer in _EXCLUDING else ()

    @property
    def loss_class(self) -> str:
        """`loss` as Keras names the class."""
        return _as_class_name(self.loss)

    @property
    def num_epochs(self) -> int:
        """Epochs to train for."""
        if self.steps is not None:
            return self.steps // (self.steps_per_epoch or self.steps)
        return DEFAULT_EPOCHS if self.epochs is None else self.epochs

    @property
    def num_steps_per_epoch(self) -> int | None:
        """Updates in an epoch; None is one pass over the data."""
        return self.steps_per_epoch or self.steps

    @property
    def loop_length(self) -> int | str:
        """`steps_per_loop` as `Trainer.fit` takes it."""
        if self.steps_per_loop == "auto":
            return "auto"
        return int(self.steps_per_loop)

    @property
    def batch_size(self) -> int:
        """Examples in one part of an update's gradient."""
        return self.global_batch_size // self.gradient_accumulation_steps

    @property
    def data_kind(self) -> str:
        """What `dataset` names: a "function", "records", or "tfds"."""
        if self.dataset.partition(":")[2].isidentifier():
            return "function"
        is_pattern = any(sign in self.dataset for sign in "*?[{")
        is_file = self.dataset.endswith((".tfrecord", ".array_record"))
        is_path = self.parse is not None and "/" in self.dataset
        return "records" if is_pattern or is_file or is_path else "tfds"

    def pattern_of(self, split: str) -> str:
        """The files of records of a split."""
        pattern = self.dataset.replace("{split}", split)
        if self.data_dir is None or "://" in pattern:
            return pattern
        return os.path.join(self.data_dir, pattern)

    @property
    def directory(self) -> str:
        """`run_dir`, or its default."""
        if self.run_dir:
            return self.run_dir
        names = (self.model, self.dataset)
        plain = (re.sub(r"[^\w+-]+", ".", name).strip(".") for name in names)
        return "runs/" + "-".join(plain)

    # -------------------------------------------------------------- checks

    def _check_choices(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            value = getattr(self, field.name)
            if choices and value not in choices:
                _fail(
                    field.name,
                    f"must be one of {', '.join(choices)}",
                    value,
                )

    def _check_functions(self) -> None:
        if ":" not in self.model and self.model not in MODELS:
            _fail(
                "model",
                f"must be one of {', '.join(MODELS)}, or module:function",
                self.model,
            )
        self._check_modules()

    def _check_modules(self) -> None:
        for name in ("model", "dataset", "parse", "loss"):
            module, _, function = (getattr(self, name) or "").partition(":")
            if function.isidentifier() and not _can_be_found(module):
                _fail(
                    name,
                    f"must be module:function; there is no module {module!r} "
                    "here or in PYTHONPATH",
                    getattr(self, name),
                )

    def _check_data(self) -> None:
        kind, told = self.data_kind, f"--dataset={self.dataset}"
        if self.parse and not self.parse.partition(":")[2].isidentifier():
            _fail("parse", "must be module:function", self.parse)
        if self.parse and kind != "records":
            _contradict(
                "parse",
                told,
                "it is for files of records, as /data/{split}-*.tfrecord",
            )
        if kind == "records" and not self.parse:
            _fail(
                "parse",
                f"must be given for the files of {told}: module:function that "
                "makes (x, y) of a record",
                self.parse,
            )
        for name in ("train_split", "test_split"):
            if getattr(self, name) is not None and kind != "tfds":
                _contradict(name, told, "only TFDS has such splits; drop it")
        is_path = self.dataset.startswith(("/", "./", "../", "~"))
        if self.data_dir and kind != "function" and is_path:
            _contradict("data_dir", told, "which is a path; drop it")

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                _fail(field.name, "must be finite", value)
        if not 0 <= self.seed < 2**32:
            _fail("seed", "must be from 0 to 2**32 - 1", self.seed)
        check_positive(self, *_POSITIVE)
        for name in (
            "num_logical_cpus",
            "warmup_steps",
            "weight_decay",
            "save_every_epochs",
            "wire_check_interval",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                _fail(name, "must not be negative", value)
        for name in ("ema", "momentum", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                _fail(name, "must be in [0, 1)", value)
        if self.steps_per_loop != "auto" and not (
            self.steps_per_loop.isdigit() and int(self.steps_per_loop)
        ):
            _fail(
                "steps_per_loop",
                "must be auto or a positive integer",
                self.steps_per_loop,
            )

    def _check_devices(self) -> None:
        if self.tpu and self.strategy not in ("auto", "tpu"):
            _contradict(
                "tpu", f"--strategy={self.strategy}", "drop one of them"
            )
        self._check_place_of_tpu()
        self._check_data_service()
        self._check_workers()
        is_tpu = self.strategy == "tpu" or bool(self.tpu)
        if is_tpu and (self.devices or self.num_logical_cpus):
            name = "devices" if self.devices else "num_logical_cpus"
            _contradict(name, "a TPU", "all its cores are used; drop the flag")
        if self.strategy != "one_device":
            return
        if len(self.devices) > 1:
            _contradict(
                "devices", "--strategy=one_device", "pass --strategy=mirrored"
            )
        if self.num_logical_cpus > 1 and not self.devices:
            _contradict(
                "num_logical_cpus",
                "--strategy=one_device",
                "pass --strategy=mirrored",
            )
        if self.all_reduce != "auto":
            _contradict(
                "all_reduce",
                "--strategy=one_device",
                "there is nothing to reduce",
            )

    def _check_place_of_tpu(self) -> None:
        for name in ("tpu_zone", "tpu_project"):
            if getattr(self, name) is None:
                continue
            if not self.tpu:
                _contradict(name, "no --tpu", "pass the TPU's name as --tpu")
            elif self.tpu == "local" or self.tpu.startswith("grpc://"):
                _contradict(
                    name,
                    f"--tpu={self.tpu}",
                    "only a TPU with a name is looked for; drop it",
                )

    def _check_data_service(self) -> None:
        if self.data_service is None:
            return
        if not re.fullmatch(r"grpc://\S+:\d+", self.data_service):
            _fail("data_service", "must be grpc://host:port", self.data_service)
        if self.strategy == "tpu" or self.tpu:
            _contradict(
                "data_service", "a TPU", "its hosts read their own input"
            )
        name = os.path.basename(self.dataset)
        if self.data_kind == "records" and ".array_record" in name:
            _contradict(
                "data_service",
                f"--dataset={self.dataset}",
                "each worker reads at random the rows of ArrayRecord files "
                "that it needs; drop the flag, or use TFRecord files",
            )

    def _check_workers(self) -> None:
        if self.workers and self.strategy not in ("auto", "multi_worker"):
            _contradict(
                "workers",
                f"--strategy={self.strategy}",
                "pass --strategy=multi_worker",
            )
        if self.task_index is not None and not self.workers:
            _contradict("task_index", "no --workers", "pass --workers")

    def _check_loss_scale(self) -> None:
        if self.loss_scale not in ("auto", "dynamic", "none"):
            _check_positive_number("loss_scale", self.loss_scale)
        options = [name for name in _SCALE_OPTIONS if getattr(self, name)]
        has_none = self.loss_scale == "none" or (
            self.loss_scale == "auto" and self.precision not in _WITH_SCALE
        )
        is_fixed = self.loss_scale not in ("auto", "dynamic", "none")
        if options and (has_none or is_fixed):
            _contradict(
                options[0],
                f"--loss_scale={self.loss_scale} --precision={self.precision}",
                "it would be ignored; pass --loss_scale=dynamic",
            )
        if self.wire_dtype == "float16" and has_none:
            _contradict(
                "wire_dtype",
                f"--loss_scale={self.loss_scale} --precision={self.precision}",
                "what overflows on the way must be skipped; pass "
                "--loss_scale=dynamic, or --wire_dtype=bfloat16",
            )
        self._check_wire()
        low = self.loss_scale_min or 2.0**-14
        high = self.loss_scale_max or 2.0**24
        first = self.loss_scale_initial or 2.0**15
        if not is_fixed and not low <= first <= high:
            _fail(
                "loss_scale_initial",
                f"must be between the floor {low:g} and the ceiling {high:g}",
                first,
            )
        if self.jit_compile and (self.tpu or self.strategy == "tpu"):
            _contradict(
                "jit_compile", "a TPU", "it compiles every step; drop the flag"
            )
        if self.compilation_cache and not self.jit_compile:
            _contradict(
                "compilation_cache",
                "--nojit_compile",
                "there is next to nothing to keep then; pass --jit_compile",
            )
        if self.jit_compile and self.precision.startswith("graph_"):
            _contradict(
                "jit_compile",
                f"--precision={self.precision}",
                "Grappler cannot rewrite what XLA compiles; pass a mixed_ "
                "precision",
            )

    def _check_wire(self) -> None:
        is_float32 = self.wire_dtype == "float32"
        if self.strategy == "one_device" and not is_float32:
            _contradict(
                "wire_dtype",
                "--strategy=one_device",
                "gradients travel nowhere; drop the flag",
            )
        for name in ("wire_check_interval", "wire_error_bound"):
            if is_float32 and getattr(self, name) is not None:
                _contradict(name, "--wire_dtype=float32", "which loses nothing")
        if self.wire_check_interval == 0 and self.wire_error_bound:
            _contradict(
                "wire_error_bound",
                "--wire_check_interval=0",
                "nothing is checked; drop one of them",
            )

    def _check_batch(self) -> None:
        if self.epochs is not None and self.steps is not None:
            _contradict("steps", "--epochs", "drop one of them")
        if (self.steps or 0) % (self.steps_per_epoch or 1):
            _fail(
                "steps",
                f"must be a multiple of --steps_per_epoch "
                f"({self.steps_per_epoch})",
                self.steps,
            )
        parts = self.gradient_accumulation_steps
        replicas = len(self.devices) or self.num_logical_cpus or 1
        unit = parts * replicas
        if self.global_batch_size % unit:
            lower = self.global_batch_size // unit * unit
            fitting = [size for size in (lower, lower + unit) if size]
            _fail(
                "global_batch_size",
                f"must be a multiple of the number of replicas ({replicas}) "
                f"times --gradient_accumulation_steps ({parts}); pass "
                f"{' or '.join(map(str, fitting))}",
                self.global_batch_size,
            )

    def _check_optimizer(self) -> None:
        clips = [
            name
            for name in ("global_clipnorm", "clipnorm", "clipvalue")
            if getattr(self, name) is not None
        ]
        if len(clips) > 1:
            _contradict(clips[1], f"--{clips[0]}", "clip in one way only")
        if self.momentum is not None and self.optimizer not in _WITH_MOMENTUM:
            _contradict(
                "momentum",
                f"--optimizer={self.optimizer}",
                f"only {', '.join(_WITH_MOMENTUM)} take it",
            )
        if self.ema_overwrite_frequency and self.ema is None:
            _contradict(
                "ema_overwrite_frequency", "no --ema", "pass --ema=0.999"
            )

    def _check_decay(self) -> None:
        decays = self.weight_decay or self.optimizer in ("adamw", "lars")
        if self.weight_decay_exclude and not decays:
            _contradict(
                "weight_decay_exclude",
                "no --weight_decay",
                "pass --weight_decay=1e-4",
            )

    def _check_options(self) -> None:
        for flag_name in ("model_option", "dataset_option", "optimizer_option"):
            texts = getattr(self, flag_name)
            names = [text.partition("=")[0] for text in texts]
            for text, name in zip(texts, names, strict=True):
                if "=" not in text or not name.isidentifier():
                    _fail(flag_name, "must be name=value", text)
                if names.count(name) > 1:
                    _fail(flag_name, f"sets {name} twice", ", ".join(texts))
        if self.dataset_option and self.data_kind != "function":
            _contradict(
                "dataset_option",
                f"--dataset={self.dataset}",
                "only module:function takes options",
            )
        is_class = self.loss in map(_as_class_name, _SMOOTHED)
        if self.label_smoothing and not (is_class or self.loss in _SMOOTHED):
            _contradict(
                "label_smoothing",
                f"--loss={self.loss}",
                f"only {', '.join(_SMOOTHED)} take it",
            )

    def _check_recovery(self) -> None:
        for kind in self.rollback_on:
            if kind not in ROLLBACK_KINDS:
                _fail(
                    "rollback_on",
                    f"must be of {', '.join(ROLLBACK_KINDS)}",
                    kind,
                )
        factor = self.rollback_factor
        if factor is not None and not factor < 1:
            _fail("rollback_factor", "must be in (0, 1)", factor)
        if factor is not None and self.rollback_lower == "nothing":
            _contradict(
                "rollback_factor",
                "no --rollback_lower",
                "pass --rollback_lower=learning_rate",
            )
        lowers = self.rollback_lower != "nothing"
        given = {"rollback_lower": lowers, "max_rollbacks": self.max_rollbacks}
        for name, value in given.items():
            if value and not self.rollback_on:
                _contradict(name, "no --rollback_on", "pass --rollback_on=nan")
        weights = self.initial_weights
        if weights and not weights.endswith((".keras", ".h5", ".safetensors")):
            _fail(
                "initial_weights",
                "must end in .keras, .h5 or .safetensors",
                weights,
            )

    def _check_profile(self) -> None:
        first, _, end = (self.profile_steps or "0:1").partition(":")
        is_range = first.isdecimal() and end.isdecimal()
        if not (is_range and int(first) < int(end)):
            _fail(
                "profile_steps",
                "must be FIRST:END with FIRST less than END, as 100:110",
                self.profile_steps,
            )
        if self.steps is not None:
            self.check_length(self.steps, f"--steps={self.steps}")

    def check_length(self, num_updates: int, told: str) -> None:
        """Whether a training is long enough for what is to happen in it.

        Args:
            num_updates: In all.
            told: Where that comes from.

        Raises:
            ConfigError: It is not.
        """
        first = int((self.profile_steps or "0:1").partition(":")[0])
        if first >= num_updates:
            _contradict(
                "profile_steps",
                told,
                "training ends before; name earlier updates",
            )
        if self.warmup_steps > num_updates:
            _contradict(
                "warmup_steps",
                told,
                "training ends before the peak learning rate is reached; pass "
                "fewer",
            )


def same_flag(name: str) -> Any:
    """A field like that of `TrainConfig`, for a program that takes a few."""
    field = TrainConfig.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


_SCALE_OPTIONS = (
    "loss_scale_initial",
    "loss_scale_growth_interval",
    "loss_scale_min",
    "loss_scale_max",
)
_POSITIVE = (
    *_SCALE_OPTIONS,
    "global_batch_size",
    "gradient_accumulation_steps",
    "epochs",
    "steps",
    "steps_per_epoch",
    "eval_steps",
    "learning_rate",
    "global_clipnorm",
    "clipnorm",
    "clipvalue",
    "ema_overwrite_frequency",
    "save_every_steps",
    "save_every_minutes",
    "keep_checkpoints",
    "keep_every",
    "histogram_every_epochs",
    "max_minutes",
    "max_rollbacks",
    "rollback_factor",
    "startup_timeout",
    "collective_timeout",
    "heartbeat_timeout",
    "wire_error_bound",
)


def check_positive(settings: Any, *names: str) -> None:
    """Whether these settings are positive, or None.

    Raises:
        ConfigError: One is not.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            _fail(name, "must be positive", value)


def _as_class_name(name: str) -> str:
    """`MeanSquaredError` for mean_squared_error."""
    if not name.islower():
        return name
    return "".join(word.title() for word in name.split("_"))


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _check_positive_number(name: str, text: str) -> None:
    try:
        is_positive = 0 < float(text) < float("inf")
    except ValueError:
        is_positive = False
    if not is_positive:
        _fail(name, "must be auto, dynamic, none or a positive number", text)


def _fail(name: str, rule: str, value: Any) -> None:
    raise ConfigError(f"--{name} {rule}. Received {value}.")


def _contradict(name: str, other: str, mend: str) -> None:
    raise ConfigError(f"--{name} contradicts {other}: {mend}.")
