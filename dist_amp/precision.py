"""Precision: which dtypes a model computes and keeps its variables in."""

import contextlib
import contextvars
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

PRECISIONS = (
    "auto",
    "float32",
    "mixed_float16",
    "mixed_bfloat16",
    "auto_layers",
    "graph_float16",
    "graph_bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Precision:
    """A resolved choice: never "auto".

    Attributes:
        name: One of `PRECISIONS`.
        reason: Why this one, in words a log line can carry.

    Example:
    >>> precision = dist_amp.Precision("mixed_float16")
    >>> precision.compute_dtype, precision.variable_dtype
    ('float16', 'float32')
    """

    name: str
    reason: str = "asked for"

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS or self.name == "auto":
            raise ValueError(
                "`precision` must be one of "
                f"{', '.join(PRECISIONS)}. Received {self.name!r}."
            )

    @property
    def policy(self) -> str:
        """Name of the Keras dtype policy for layers made in the scope."""
        if self.adapts_layers:
            return "mixed_float16"
        return "float32" if self.rewrites_graph else self.name

    @property
    def compute_dtype(self) -> str:
        """What matrix products are computed in."""
        return "float16" if self.adapts_layers else self.name.split("_")[-1]

    @property
    def variable_dtype(self) -> str:
        """What weights and optimizer slots are kept in: always float32."""
        return "float32"

    @property
    def adapts_layers(self) -> bool:
        """Whether layers that float16 fails are to be put in float32.

        `dist_amp.AutoLayers` does it.
        """
        return self.name == "auto_layers"

    @property
    def rewrites_graph(self) -> bool:
        """Whether Grappler inserts the casts instead of Keras layers."""
        return self.name.startswith("graph_")

    @property
    def needs_loss_scale(self) -> bool:
        """Only float16's exponent is too short for small gradients."""
        return self.compute_dtype == "float16"


_current: contextvars.ContextVar[Precision | None] = contextvars.ContextVar(
    "dist_amp_precision", default=None
)


def current() -> Precision:
    """The precision of the surrounding `scope`, else of the Keras policy."""
    return _current.get() or of_policy(keras.config.dtype_policy())


def of_policy(policy: keras.DTypePolicy) -> Precision:
    """The precision that a Keras dtype policy stands for."""
    mixed = f"mixed_{policy.compute_dtype}"
    name = mixed if mixed in PRECISIONS else "float32"
    return Precision(name, f"the Keras dtype policy is {policy.name}")


def resolve(
    precision: str | Precision, strategy: tf.distribute.Strategy
) -> Precision:
    """Turns "auto" into the fastest safe precision of the devices.

    | devices of the strategy                  | "auto"          |
    |------------------------------------------|-----------------|
    | TPU                                      | mixed_bfloat16  |
    | GPUs of compute capability 8.0 or more   | mixed_bfloat16  |
    | GPUs of compute capability 7.x           | mixed_float16   |
    | CPUs with AVX512_BF16 or AMX_BF16        | mixed_bfloat16  |
    | anything else                            | float32         |

    Args:
        precision: A name out of `PRECISIONS`, or what this returned before.
        strategy: Its devices decide; the weakest GPU decides for all.

    Returns:
        A `Precision` whose `reason` says why.

    Raises:
        ValueError: The name is not known.
    """
    if isinstance(precision, Precision):
        return precision
    if precision != "auto":
        return Precision(precision)
    kind = device_type(strategy)
    if kind == "TPU":
        return Precision("mixed_bfloat16", "TPUs multiply in bfloat16")
    if kind == "GPU":
        return _for_gpus(_compute_capabilities(strategy))
    return _for_cpu(_cpu_flags())


def device_type(strategy: tf.distribute.Strategy) -> str:
    """Where the replicas of a strategy run: "CPU", "GPU" or "TPU"."""
    device = strategy.extended.worker_devices[0]
    return tf.DeviceSpec.from_string(device).device_type or "CPU"


def _for_gpus(capabilities: Sequence[tuple[int, int] | None]) -> Precision:
    known = [capability for capability in capabilities if capability]
    if not known:
        return Precision("float32", "the GPU's compute capability is unknown")
    major, minor = min(known)
    words = f"GPU of compute capability {major}.{minor}"
    if major >= 8:
        return Precision("mixed_bfloat16", f"{words}: bfloat16 tensor cores")
    if major == 7:
        return Precision("mixed_float16", f"{words}: float16 tensor cores")
    return Precision("float32", f"{words}: no tensor cores")


def _compute_capabilities(
    strategy: tf.distribute.Strategy,
) -> list[tuple[int, int] | None]:
    indices = {
        tf.DeviceSpec.from_string(device).device_index
        for device in strategy.extended.worker_devices
    }
    gpus = tf.config.list_physical_devices("GPU")
    # With logical GPUs the indices exceed the list: then all cards count.
    used = [gpus[i] for i in indices if i is not None and i < len(gpus)]
    return [
        tf.config.experimental.get_device_details(gpu).get("compute_capability")
        for gpu in used or gpus
    ]


def _for_cpu(flags: frozenset[str]) -> Precision:
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return Precision(
                "mixed_bfloat16", f"the CPU multiplies bfloat16 ({flag})"
            )
    return Precision("float32", "the CPU has no bfloat16 arithmetic")


def _cpu_flags(path: str = "/proc/cpuinfo") -> frozenset[str]:
    """Instruction-set flags of this CPU; empty where Linux does not tell."""
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@contextlib.contextmanager
def scope(
    strategy: tf.distribute.Strategy, precision: str | Precision = "auto"
) -> Iterator[Precision]:
    """Where the model, the optimizer and the metrics are made.

    Enters `strategy.scope()` and sets the Keras dtype policy (and Grappler's
    rewrite for the graph precisions); both are restored on exit, except that
    Grappler's option stays on for as long as the process lives, because
    functions traced in the scope are optimized when they first run.

    Args:
        strategy: From `make_strategy`, or any `tf.distribute.Strategy`.
        precision: "auto", "float32", "mixed_float16", "mixed_bfloat16",
            "auto_layers" (mixed_float16, for a fit with `AutoLayers`),
            "graph_float16" or "graph_bfloat16".

    Yields:
        The resolved `Precision`.

    Raises:
        ValueError: The precision is not known, or cannot run on the devices.

    Example:
    >>> strategy = dist_amp.make_strategy("one_device")
    >>> with dist_amp.scope(strategy, "mixed_bfloat16") as precision:
    ...     layer = keras.layers.Dense(2)
    >>> layer.compute_dtype, precision.needs_loss_scale
    ('bfloat16', False)
    """
    resolved = resolve(precision, strategy)
    if resolved.rewrites_graph:
        _enable_rewrite(resolved, device_type(strategy))
    policy_before = keras.config.dtype_policy()
    token = _current.set(resolved)
    keras.config.set_dtype_policy(resolved.policy)
    try:
        with strategy.scope():
            yield resolved
    finally:
        keras.config.set_dtype_policy(policy_before)
        _current.reset(token)


_REWRITES = {
    ("graph_float16", "GPU"): "auto_mixed_precision",
    ("graph_bfloat16", "CPU"): "auto_mixed_precision_onednn_bfloat16",
}


@contextlib.contextmanager
def keep_rewrites(*, turned_off: bool = False) -> Iterator[None]:
    """Leaves Grappler's rewrites, on exit, as they were.

    A function that was optimized with another choice is so anew when it is
    next called.

    Args:
        turned_off: Whether there are none within.
    """
    before = _rewrites()
    try:
        if turned_off:
            _set_rewrites(dict.fromkeys(before, False))
        yield
    finally:
        _set_rewrites(before)


def _rewrites() -> dict[str, bool]:
    options = tf.config.optimizer.get_experimental_options()
    return {name: options.get(name, False) for name in _REWRITES.values()}


def _set_rewrites(options: dict[str, bool]) -> None:
    if options != _rewrites():  # else all functions would be optimized anew
        tf.config.optimizer.set_experimental_options(options)


def _enable_rewrite(precision: Precision, device: str) -> None:
    """Turns on the Grappler pass for these devices, or says there is none."""
    option = _REWRITES.get((precision.name, device))
    if option is None:
        raise ValueError(
            f"`precision={precision.name}` cannot run here: Grappler rewrites "
            "to float16 on GPUs and to bfloat16 on CPUs only. Received a "
            f"strategy on {device}; pass "
            f"{precision.name.replace('graph', 'mixed')} with a model built "
            "from Keras layers (--precision)."
        )
    tf.config.optimizer.set_experimental_options({option: True})
