"""The layers of a model with their paths, and which change dtype together."""

from typing import TypeAlias

import keras

from dist_amp import optimizer as optimizer_lib

_Layer: TypeAlias = keras.layers.Layer


class LayerTree:
    """All layers of a model, at any depth, in its order.

    Layers change their dtype by units. A unit is the outermost layer that is
    no model, with all that it is made of: what computes between the parts of
    a block or a recurrent layer expects them to agree. A model is a unit of
    itself alone, for it casts its inputs.

    Args:
        model: Built.

    Attributes:
        model: The same.
        layers: The model, then each layer before those it is made of.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.layers: list[_Layer] = [model]
        self._paths: dict[int, str] = {id(model): model.name}
        self._units: dict[int, _Layer] = {id(model): model}
        self._walk(model, "", None)
        self._index = {id(layer): i for i, layer in enumerate(self.layers)}

    def path_of(self, layer: _Layer) -> str:
        """Its name, behind those of the layers it is part of."""
        return self._paths[id(layer)]

    def index_of(self, layer: _Layer) -> int:
        """Its place in `layers`."""
        return self._index[id(layer)]

    def unit_of(self, layer: _Layer) -> _Layer:
        """The layer with which it changes its dtype."""
        return self._units[id(layer)]

    def members_of(self, unit: _Layer) -> list[_Layer]:
        """The layers that change their dtype with a unit, itself among them."""
        return [x for x in self.layers if self._units[id(x)] is unit]

    def owners(self) -> list[_Layer]:
        """The innermost layer of each trainable variable of the model."""
        owner: dict[int, _Layer] = {}
        for layer in self.layers:  # parts come behind the whole
            for variable in layer.trainable_variables:
                owner[id(variable)] = layer
        return [owner[id(v)] for v in self.model.trainable_variables]

    def _walk(self, parent: _Layer, prefix: str, unit: _Layer | None) -> None:
        for layer in optimizer_lib.children_of(parent):
            if id(layer) in self._paths:  # shared
                continue
            path, number = prefix + layer.name, 1
            while path in self._paths.values():
                number += 1
                path = f"{prefix}{layer.name}#{number}"
            self.layers.append(layer)
            self._paths[id(layer)] = path
            self._units[id(layer)] = unit or layer
            inner = unit if unit or is_model(layer) else layer
            self._walk(layer, f"{path}/", inner)


def with_parts(layer: _Layer) -> list[_Layer]:
    """The layer and what it is made of, at any depth."""
    found = [layer]
    for part in optimizer_lib.children_of(layer):
        found += with_parts(part)
    return found


def is_model(layer: _Layer) -> bool:
    """Whether it is a model, maybe within another."""
    return isinstance(layer, keras.Model)


def only_passes_on(layer: _Layer) -> bool:
    """Whether it neither computes nor casts: its layers do."""
    is_graph = hasattr(layer, "operations")  # of the functional API
    return isinstance(layer, keras.Sequential) or (is_model(layer) and is_graph)
