"""Which dtype a layer computes in, changed while the model is there."""

import contextlib
from collections.abc import Iterable, Iterator

import keras

from dist_amp import optimizer as optimizer_lib

_SWITCHABLE = ("float32", "float16", "bfloat16")


def is_switchable(layer: keras.layers.Layer) -> bool:
    """Whether a layer may compute in another dtype: no integers, not int8."""
    policy = _policy_of(layer)
    is_float = policy.compute_dtype in _SWITCHABLE
    return is_float and policy.quantization_mode is None


def switch(layers: Iterable[keras.layers.Layer], compute_dtype: str) -> None:
    """Has layers compute in another dtype from their next call on.

    What is traced or compiled already does not heed it. Variables stay as
    they are, and so do layers that are not `is_switchable`.

    Args:
        layers: Built or not.
        compute_dtype: "float32", "float16" or "bfloat16".
    """
    for layer in layers:
        if is_switchable(layer) and layer.compute_dtype != compute_dtype:
            layer.dtype_policy = optimizer_lib.make_policy(
                compute_dtype, layer.variable_dtype
            )


@contextlib.contextmanager
def switched(
    layers: Iterable[keras.layers.Layer], compute_dtype: str
) -> Iterator[None]:
    """The same, for as long as the context lasts."""
    before = [(layer, _policy_of(layer)) for layer in layers]
    try:
        switch((layer for layer, _ in before), compute_dtype)
        yield
    finally:
        for layer, policy in before:
            if _policy_of(layer) is not policy:
                layer.dtype_policy = policy


def _policy_of(layer: keras.layers.Layer) -> keras.DTypePolicy:
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[layer.path]
    return policy
