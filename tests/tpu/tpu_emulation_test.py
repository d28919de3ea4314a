"""What a TPU's cores run is what one device runs: losses, weights, metrics.

The program of each core is that of the real `TPUStrategy`, run by XLA on the
CPU with its collectives: see `emulator`.
"""

import functools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_amp import ahead_of_time, random_state
from dist_amp.strategy import local_copies
from tests import support
from tests.tpu import emulator
from tests.tpu.emulator import EmulatedTrainer, fit_emulated

CORES = (4, 8)
# Two full batches and one of three examples, fewer than there are cores.
PARTIAL = 2 * support.GLOBAL_BATCH + 3


def make_adam():
    return keras.optimizers.Adam(0.01, global_clipnorm=0.5)


def make_adamw():
    return keras.optimizers.AdamW(
        0.01, weight_decay=0.1, use_ema=True, ema_momentum=0.9, clipvalue=0.01
    )


def make_convnet(*, synchronized=True):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(synchronized=synchronized),
            layers.GlobalAveragePooling2D(),
            layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def make_images(num_examples=PARTIAL):
    x, y = support.make_arrays(num_examples)
    pixels = np.random.default_rng(2).normal(size=(num_examples, 6, 6, 2))
    del x
    return support.batched((pixels.astype("float32"), y))


@pytest.mark.parametrize("num_cores", CORES)
@pytest.mark.parametrize("make_optimizer", [make_adam, make_adamw])
def test_a_padded_last_batch_changes_nothing(num_cores, make_optimizer):
    dataset = support.make_dataset(PARTIAL)
    options = {"metrics": ["accuracy"]}
    actual = fit_emulated(
        dataset,
        support.make_mlp,
        make_optimizer,
        num_cores=num_cores,
        **options,
    )
    expected = support.fit_trainer(
        dataset, support.make_mlp, make_optimizer, **options
    )
    support.assert_parity(actual, expected)
    support.assert_close(
        [actual.history["accuracy"]], [expected.history["accuracy"]]
    )
    assert actual.history["examples"] == [PARTIAL, PARTIAL]


def test_plain_keras_trains_alike():
    dataset = support.make_dataset(PARTIAL)
    actual = fit_emulated(dataset, num_cores=4)
    support.assert_parity(actual, support.fit_reference(dataset))


@pytest.mark.parametrize("num_cores", CORES)
def test_synchronized_batch_norm_leaves_out_copies(num_cores):
    dataset = make_images()
    actual = fit_emulated(dataset, make_convnet, num_cores=num_cores)
    support.assert_parity(actual, support.fit_trainer(dataset, make_convnet))


def test_statistics_of_a_core_are_those_of_a_replica():
    dataset = make_images(2 * support.GLOBAL_BATCH + 6)
    make_model = functools.partial(make_convnet, synchronized=False)
    actual = fit_emulated(dataset, make_model, num_cores=4)
    mirrored = support.fit_trainer(dataset, make_model, num_replicas=4)
    support.assert_parity(actual, mirrored)


def test_bfloat16():
    dataset = support.make_dataset()
    options = {"precision": "mixed_bfloat16"}
    actual = fit_emulated(dataset, num_cores=4, **options)
    expected = support.fit_trainer(dataset, **options)
    support.assert_parity(actual, expected, "mixed_bfloat16")


def test_accumulated_gradients():
    dataset = support.make_dataset(4 * support.GLOBAL_BATCH)
    make_optimizer = functools.partial(
        support.make_sgd, gradient_accumulation_steps=2
    )
    actual = fit_emulated(
        dataset, support.make_mlp, make_optimizer, num_cores=4
    )
    expected = support.fit_trainer(dataset, support.make_mlp, make_optimizer)
    support.assert_parity(actual, expected)


def test_sample_and_class_weights():
    x, y = support.make_arrays(PARTIAL)
    weights = np.linspace(0.0, 2.0, PARTIAL, dtype="float32")
    dataset = support.batched((x, y, weights))
    loss = support.make_loss(reduction="mean_with_sample_weight")
    fit = {"class_weight": {0: 3.0, 1: 0.5}}
    actual = fit_emulated(dataset, num_cores=4, loss=loss, fit=fit)
    expected = support.fit_trainer(dataset, loss=loss, fit=fit)
    support.assert_parity(actual, expected)


def test_masked_tokens():
    def make_tagger():
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((5,)),
                layers.Embedding(7, 4, mask_zero=True),
                layers.Dense(support.NUM_CLASSES, dtype="float32"),
            ]
        )

    random = np.random.default_rng(3)
    tokens = random.integers(0, 7, size=(PARTIAL, 5))
    classes = random.integers(0, support.NUM_CLASSES, size=(PARTIAL, 5))
    dataset = support.batched((tokens, classes))
    actual = fit_emulated(dataset, make_tagger, num_cores=4)
    support.assert_parity(actual, support.fit_trainer(dataset, make_tagger))


def test_evaluation_is_exact():
    dataset = support.make_dataset(PARTIAL)
    options = {
        "metrics": [
            "accuracy",
            keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2"),
        ]
    }
    strategy = ahead_of_time.make_strategy(8)
    emulated = EmulatedTrainer(
        support.make_trainer(strategy=strategy, **options)
    )
    expected = support.make_trainer(**options).evaluate(dataset)
    actual = emulated.evaluate(dataset)
    assert actual.keys() == expected.keys()
    support.assert_close(list(actual.values()), list(expected.values()))


def test_each_core_drops_out_by_itself():
    def make_model():
        return keras.Sequential(
            [
                keras.Input((support.NUM_FEATURES,)),
                keras.layers.Dropout(0.5, seed=4),
                keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
            ]
        )

    trained = fit_emulated(support.make_dataset(), make_model, num_cores=4)
    support.assert_same_on_replicas(trained.model.trainable_variables)
    (variable,) = random_state.variables_of(trained.model)
    states = [copy.numpy().tolist() for copy in local_copies(variable)]
    assert len({seed for seed, _ in states}) == 4
    assert {counter for _, counter in states} == {6}  # once a step


def test_one_program_serves_all_batches():
    strategy = ahead_of_time.make_strategy(4)
    emulated = EmulatedTrainer(support.make_trainer(strategy=strategy))
    emulated.fit(support.make_dataset(PARTIAL))
    assert len(emulated.steps) == 1


def test_the_emulator_tells_a_wrong_step():
    """Without the all-reduce nothing of the above would hold."""
    dataset = support.make_dataset(PARTIAL)
    strategy = ahead_of_time.make_strategy(4)
    trainer = support.make_trainer(strategy=strategy)
    pack = trainer.optimizer._pack
    trainer.optimizer._all_reduce = lambda gradients, _: pack(gradients)
    EmulatedTrainer(trainer).fit(dataset)
    first, *others = support.local_copies(trainer.model.variables[0])
    assert not all(np.array_equal(first, other) for other in others)


def test_cores_at_hand():
    assert max(CORES) <= emulator.MAX_CORES
    assert tf.config.list_physical_devices("TPU") == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
