"""Why a training differs from one device: the usual causes, in users' terms.

Each cause is looked for where it would show: in what differs and by how much,
in what a layer makes of a part of the batch, and in the code of an overridden
step. What is found is a suspicion with its reason, not a proof.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_amp import difference as difference_lib
from dist_amp import random_state
from dist_amp.difference import Difference
from dist_amp.optimizer import layers_of
from dist_amp.steps import Steps
from dist_amp.subject import Record, Subject

_OVERRIDABLE = ("train_step", "compute_loss", "compute_gradients")

# What stands in an overridden step, and what it would explain.
_IN_CODE = (
    (
        r"clip_by_(?:global_)?norm|clip_by_value",
        "gradients are clipped on each replica before they are summed: clip "
        "in the optimizer (global_clipnorm=...), which does it after the sum",
    ),
    (
        r"\.losses\b",
        "the model's own losses (regularization) are added whole on every "
        "replica: multiply them by this replica's share of the global batch, "
        "as `compute_loss` does",
    ),
    (
        r"is_finite|is_nan|is_inf",
        "gradients that are not finite are changed before the optimizer sees "
        "them, on one replica only: leave them, the optimizer skips the "
        "update on all",
    ),
)


def explain(
    subject: Subject,
    reference: Subject,
    *,
    records: tuple[Record, Record],
    found: Sequence[Difference],
    batches: Sequence[Any],
) -> str:
    """The likeliest cause of some differences.

    Args:
        subject: What differs.
        reference: From what: one device.
        records: Of the first update that differs, of both.
        found: What is beyond its tolerance in it, in order.
        batches: Of that update.
    """
    of_any_devices = (lambda: _random(reference, batches[0]),)
    of_replicas = (
        lambda: _setting(found),
        lambda: _replicas(found, reference),
        lambda: _states(found, reference),
        lambda: _optimizer(found),
        lambda: _extras(found),
        lambda: _told_loss(found),
        lambda: _metrics(found),
        *of_any_devices,
        lambda: _mixing(reference, batches[0]),
        lambda: _mixing_loss(reference, batches[0]),
        lambda: _ratio(subject, records),
        lambda: _code(subject),
        lambda: _partial(subject, batches, found),
    )
    is_split = subject.variation.num_replicas > 1
    for rule in of_replicas if is_split else of_any_devices:
        try:
            with tf.device(reference.parts.devices[0]):
                cause = rule()
        except (TypeError, ValueError, RuntimeError, tf.errors.OpError):
            continue  # a model that the rule was not made for
        if cause:
            return cause
    return (
        f"unknown: the first {found[0].what} to differ is that of "
        f"{found[0].name}"
    )


def _setting(found: Sequence[Difference]) -> str | None:
    for one in found:
        if one.what == difference_lib.SETTING and one.name == "learning_rate":
            return (
                "the learning rate depends on the number of replicas: the "
                "gradient here is that of the global batch already, so take "
                "the rate for that batch size"
            )
    return None


def _replicas(found: Sequence[Difference], reference: Subject) -> str | None:
    """Copies of a variable differ among the replicas."""
    names = [d.name for d in found if d.what == difference_lib.REPLICAS]
    if not names:
        return None
    trainable = {v.path for v in reference.trainer.model.trainable_variables}
    if trainable & set(names):
        return (
            "gradients are not summed over the replicas, which drift apart: "
            "call `self.optimizer.apply(gradients, variables)`, not the inner "
            "optimizer"
        )
    return (
        f"{names[0]} is assigned from each replica's own slice: all-reduce "
        "what is assigned, or make it a moving statistic of a layer"
    )


def _states(found: Sequence[Difference], reference: Subject) -> str | None:
    """Only variables that no gradient trains differ."""
    kinds = {one.what for one in found}
    if difference_lib.STATE not in kinds or kinds & {
        difference_lib.LOSS,
        difference_lib.GRADIENT,
    }:
        return None
    name = next(d.name for d in found if d.what == difference_lib.STATE)
    layer = _owner(reference.trainer.model, name)
    if isinstance(layer, keras.layers.BatchNormalization):
        return _of_batch_norm(layer)
    return (
        f"{name} is computed from each replica's own slice: all-reduce what "
        "is assigned to it"
    )


def _told_loss(found: Sequence[Difference]) -> str | None:
    """The loss differs, and nothing that comes of its gradients."""
    if {one.what for one in found} != {difference_lib.LOSS}:
        return None
    return (
        "the loss that is told differs, the gradients do not: give "
        "`self.metrics.update` this replica's part of the loss, as "
        "`compute_loss` returns it"
    )


def _optimizer(found: Sequence[Difference]) -> str | None:
    """The optimizer makes something else of the same gradients."""
    first = found[0]
    if first.what not in (difference_lib.OPTIMIZER, difference_lib.VARIABLE):
        return None
    is_slot = first.what == difference_lib.OPTIMIZER
    whose = "the optimizer's variable" if is_slot else "the optimizer's step of"
    return (
        f"{whose} {first.name} depends on the number of replicas: compute it "
        "from the gradients that `update_step` is given, which are summed "
        "already"
    )


def _extras(found: Sequence[Difference]) -> str | None:
    """Only what `Trainer.state` adds differs."""
    if found[0].what != difference_lib.EXTRA:
        return None
    return (
        f"{found[0].name} (of `Trainer.state`) depends on how a batch is "
        "split: give each replica's part its share of the global batch "
        "(`batch.weight`), and all-reduce the sum before it is assigned"
    )


def _metrics(found: Sequence[Difference]) -> str | None:
    if {one.what for one in found} != {difference_lib.METRIC}:
        return None
    return (
        f"metric {found[0].name} averages what replicas averaged: a smaller "
        "slice counts as much as a larger one; update it with one value for "
        "each example"
    )


def _of_batch_norm(layer: keras.layers.BatchNormalization) -> str:
    return (
        f"BatchNormalization without synchronized=True ({_name_of(layer)}): "
        "statistics are per replica"
    )


def _owner(model: keras.Model, path: str) -> keras.layers.Layer | None:
    """The innermost layer that has a variable."""
    owners = [
        layer
        for layer in layers_of(model)
        if any(v.path == path for v in layer.variables)
    ]
    return min(owners, key=lambda one: len(one.variables), default=None)


# ------------------------------------------------------ what mixes a batch


def _mixing(reference: Subject, batch: Any) -> str | None:
    """A layer whose output for an example depends on the others."""
    layer = mixing_layer(reference, _inputs(batch))
    if layer is None:
        return None
    if isinstance(layer, keras.layers.BatchNormalization):
        return None if layer.synchronized else _of_batch_norm(layer)
    return (
        f"layer {_name_of(layer)} mixes the examples of a batch, of which a "
        "replica has a part: compute over one example, or all-reduce what is "
        "computed over the batch"
    )


def mixing_layer(subject: Subject, x: Any) -> keras.layers.Layer | None:
    """The first layer that makes something else of a part of a batch.

    Args:
        subject: Of one replica; its state is left as it is.
        x: Inputs of a batch of at least two examples.
    """
    size = len(tf.nest.flatten(x)[0])
    half = (size + 1) // 2
    if half == size:
        return None
    part = tf.nest.map_structure(lambda leaf: leaf[:half], x)
    whole, alone = _runs(subject, x, part)
    return _first_that_differs(whole, alone, (size, half))


def _runs(subject: Subject, *inputs: Any) -> list[Any]:
    """What layers return, from one state; which is left as it is."""
    state, found = subject.state(), []
    for x in inputs:
        try:
            found.append(_outputs(subject.trainer.model, x))
        finally:
            subject.load(state)
    return found


def _first_that_differs(
    run: Sequence[Any], other: Sequence[Any], sizes: tuple[int, int]
) -> keras.layers.Layer | None:
    for (layer, outputs), (_, others) in zip(run, other, strict=False):
        for a, b in zip(outputs, others, strict=False):
            is_batched = (a.shape[:1], b.shape[:1]) == (sizes[:1], sizes[1:])
            if is_batched and not _are_close(a[: sizes[1]], b):
                return layer
    return None


def _are_close(a: np.ndarray, b: np.ndarray) -> bool:
    distance = np.abs(a - b).max(initial=0.0)
    return bool(distance <= 1e-2 * np.abs(a).max(initial=0.0) + 1e-6)


def _outputs(
    model: keras.Model, x: Any
) -> list[tuple[keras.layers.Layer, list[np.ndarray]]]:
    """What each layer returns in training, innermost first."""
    found: list[tuple[keras.layers.Layer, list[np.ndarray]]] = []
    calls: list[tuple[keras.layers.Layer, Any]] = []

    def watch(layer: keras.layers.Layer) -> None:
        call = layer.call
        calls.append((layer, vars(layer).get("call")))

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            leaves = [
                np.asarray(tf.cast(leaf, tf.float32))
                for leaf in tf.nest.flatten(output)
                if tf.is_tensor(leaf) and leaf.dtype.is_floating
            ]
            found.append((layer, leaves))
            return output

        layer.call = watched

    for layer in layers_of(model):
        watch(layer)
    try:
        model(tf.nest.map_structure(tf.convert_to_tensor, x), training=True)
    finally:
        for layer, before in calls:
            if before is None:
                del layer.call
            else:
                layer.call = before
    return found


def _mixing_loss(reference: Subject, batch: Any) -> str | None:
    """A loss whose value for an example depends on the others."""
    loss = reference.trainer.loss
    if loss is None or isinstance(loss, dict | list) or len(batch) < 2:
        return None
    x, y = batch[0], tf.convert_to_tensor(batch[1])
    size = len(tf.nest.flatten(x)[0])
    half = (size + 1) // 2
    model = reference.trainer.model
    inputs = tf.nest.map_structure(tf.convert_to_tensor, x)
    predictions = tf.cast(model(inputs, training=False), tf.float32)
    per_example = loss.call if isinstance(loss, keras.losses.Loss) else loss
    whole = np.asarray(per_example(y, predictions))[:half]
    part = np.asarray(per_example(y[:half], predictions[:half]))
    if _are_close(whole, part):
        return None
    return (
        "the loss of an example depends on the other examples of its batch, "
        "of which a replica has a part: gather what it needs from all "
        "replicas, or compute it over one example"
    )


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple) else batch


def _random(reference: Subject, batch: Any) -> str | None:
    """A layer that makes two things of one batch."""
    x = _inputs(batch)
    size = len(tf.nest.flatten(x)[0])
    before = _plain_state(reference.trainer.model)
    run, again = _runs(reference, x, x)
    layer = _first_that_differs(run, again, (size, size))
    if layer is None:
        return None
    after = _plain_state(reference.trainer.model)[id(layer)]
    changed = [k for k, v in after.items() if before[id(layer)].get(k) != v]
    if changed:
        return (
            f"`call` of layer {_name_of(layer)} changes an attribute of "
            f"Python's ({', '.join(changed)}), which a compiled step does only "
            "while it is traced, once for each replica: keep it in a variable "
            "(`add_weight(trainable=False)`)"
        )
    if random_state.variables_of_layer(layer):
        return (
            f"layer {_name_of(layer)} draws random numbers, other ones on each "
            "replica, as it should: verify the model without it"
        )
    return (
        f"layer {_name_of(layer)} makes two things of one input: it draws "
        "random numbers that no seed fixes (give it a "
        "keras.random.SeedGenerator), or depends on what Python keeps outside "
        "it, as a global counter (keep that in a variable)"
    )


def _plain_state(model: keras.Model) -> dict[int, dict[str, str]]:
    """What each layer keeps in attributes that are no variables."""
    return {
        id(layer): {
            name: repr(value)
            for name, value in vars(layer).items()
            if isinstance(value, _PLAIN) and not name.startswith(_OF_KERAS)
        }
        for layer in layers_of(model)
    }


# Of Python; Keras keeps notes of its calls in such, too.
_PLAIN = (bool, int, float, str, tuple)
_OF_KERAS = ("_called", "_call_", "_losses", "_inbound")


def _name_of(layer: keras.layers.Layer) -> str:
    """One that was built when it was made has no path."""
    return layer.path or layer.name


# ------------------------------------------------------------- the gradients


def _ratio(subject: Subject, records: tuple[Record, Record]) -> str | None:
    """Gradients that are a multiple of what they should be."""
    number = subject.variation.num_replicas
    if number < 2:
        return None
    ratios = list(_ratios(*records))
    if not ratios or np.ptp(ratios) > 0.02 * np.max(np.abs(ratios)):
        return None
    ratio = float(np.mean(ratios))
    if abs(ratio / number - 1) < 0.05:
        return (
            f"gradients are {number} times too large on {number} replicas: "
            f"{where(subject)} divides by the local batch (a mean), and they "
            "are summed; take the sum weighted by `batch.weight`"
        )
    if abs(ratio * number - 1) < 0.05:
        return (
            f"gradients are {number} times too small on {number} replicas: "
            f"{where(subject)} divides by the number of replicas a second "
            "time"
        )
    return None


def _ratios(record: Record, reference: Record) -> Iterator[float]:
    """Of gradients that point in one direction; NaN where one does not."""
    sizes = [float(np.linalg.norm(g)) for g in reference.gradients]
    for gradient, other, size in zip(
        record.gradients, reference.gradients, sizes, strict=True
    ):
        if size <= 1e-3 * max(sizes):
            continue
        product = float(np.sum(gradient * other))
        length = float(np.linalg.norm(gradient)) * size
        cosine = product / length if length else 0.0
        yield product / size**2 if cosine > 0.999 else float("nan")


def _code(subject: Subject) -> str | None:
    """What stands in an overridden step."""
    for name in overridden(subject):
        function = getattr(type(subject.trainer), name)
        try:
            lines, first = inspect.getsourcelines(function)
        except (OSError, TypeError):
            continue
        for number, line in enumerate(lines, first):
            for pattern, cause in _IN_CODE:
                if re.search(pattern, line.partition("#")[0]):
                    file = inspect.getsourcefile(function)
                    return f"{cause} (`{name}`, {file}:{number})"
    return None


def _partial(
    subject: Subject, batches: Sequence[Any], found: Sequence[Difference]
) -> str | None:
    """A batch that the replicas cannot share equally."""
    if difference_lib.GRADIENT not in {one.what for one in found}:
        return None
    number = subject.variation.num_replicas
    sizes = [len(tf.nest.flatten(batch)[0]) for batch in batches]
    if all(size % number == 0 for size in sizes):
        return None
    return (
        f"a batch of {sizes[0]} examples on {number} replicas is weighted "
        f"wrongly: {where(subject)} averages over each replica's slice, whose "
        "sizes differ; take the sum weighted by `batch.weight`"
    )


def lacks_loss_scale(
    record: Record, reference: Record, *, loss_scale: float
) -> bool:
    """Whether a step's gradients are of a loss that was not scaled.

    The optimizer divides them by the loss scale all the same.

    Args:
        record: Of an update with that loss scale, or one near it.
        reference: Of one without any, from the same weights.
        loss_scale: Of the first one.
    """
    pairs = list(zip(record.gradients, reference.gradients, strict=True))
    product = sum(float(np.sum(a * b)) for a, b in pairs)
    square = sum(float(np.sum(b * b)) for _, b in pairs)
    if not square or loss_scale < 2 * _NEAR:
        return False
    return 1 / _NEAR < product / square * loss_scale < _NEAR


# A factor for rounding and for a scale that has just grown.
_NEAR = 4.0


def of_missing_scale(subject: Subject) -> str:
    """The cause, where `lacks_loss_scale` says so."""
    if subject.scales_loss:
        return (
            "gradients are smaller, by the loss scale or near it: "
            f"{where(subject)} clips or divides gradients that are multiplied "
            "by the loss scale still: do it in the optimizer "
            "(global_clipnorm=...), which divides them by the scale before"
        )
    return (
        f"{where(subject)} does not scale the loss, and the optimizer divides "
        "gradients by the loss scale: differentiate "
        "`self.optimizer.scale_loss(loss)`"
    )


def overridden(subject: Subject) -> list[str]:
    """Which of the steps of `Trainer` the user's class has of its own."""
    kind = type(subject.trainer)
    return [
        name
        for name in _OVERRIDABLE
        if getattr(kind, name) is not getattr(Steps, name)
    ]


def where(subject: Subject) -> str:
    """What of a training makes the loss."""
    names = overridden(subject)
    return f"your `{names[0]}`" if names else "the loss"
