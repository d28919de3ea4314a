"""Every random generator of a run: of layers, of Python and of NumPy."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import optimizer as optimizer_lib
from dist_amp import strategy as strategy_lib


def variables_of(model: keras.Model) -> list[keras.Variable | tf.Variable]:
    """States of the generators in a model: they differ between replicas.

    Those of Keras' random layers, and of each `tf.random.Generator` that a
    layer has for an attribute.
    """
    return [*_seeds(model), *optimizer_lib.generator_states(model)]


def variables_of_layer(layer: keras.layers.Layer) -> list[Any]:
    """Those of `variables_of` that a layer has itself."""
    states = [
        value.state  # of any name: Keras' augmentation says `generator`
        for value in vars(layer).values()
        if isinstance(value, keras.random.SeedGenerator)
    ]
    return [*states, *optimizer_lib.generator_states_of(layer)]


def spread_seeds(model: keras.Model, first_replica: int = 0) -> None:
    """Gives each replica random layers of its own, derived from replica 0's.

    Keras starts the seed of a random layer with the same value on each
    replica. Replica `r` gets `seed + r * 0x9E3779B9` modulo 2**32 (a Weyl
    sequence: no two replicas meet); the counter beside it is left alone.

    Args:
        model: Its seeds hold replica 0's value on every replica.
        first_replica: Index of this host's first replica.
    """
    for variable in _seeds(model):
        copies = strategy_lib.local_copies(variable)
        seed, counter = (int(number) for number in copies[0].numpy())
        for replica, copy in enumerate(copies, first_replica):
            folded = (seed + replica * 0x9E3779B9) % 2**32
            copy.assign(tf.constant([folded, counter], copy.dtype))


def read_host() -> dict[str, np.ndarray]:
    """The states of `random` and of `numpy.random`, as arrays."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    del name  # always MT19937, unless somebody seeded with another
    return {
        "python": np.array([version, *words], np.int64),
        "python_gauss": np.array([] if gauss is None else [gauss]),
        "numpy": np.array([position, has_gauss, *keys], np.int64),
        "numpy_gauss": np.array([cached]),
    }


def write_host(states: Mapping[str, np.ndarray]) -> None:
    """The reverse of `read_host`."""
    version, *words = (int(word) for word in states["python"])
    gauss: Sequence[float] = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss, *keys = (int(word) for word in states["numpy"])
    np.random.set_state(
        (
            "MT19937",
            np.array(keys, np.uint32),
            position,
            has_gauss,
            float(states["numpy_gauss"][0]),
        )
    )


def _seeds(model: keras.Model) -> list[keras.Variable]:
    return [v for v in model.variables if v.name == "seed_generator_state"]
