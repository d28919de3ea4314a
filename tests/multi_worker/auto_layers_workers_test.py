"""On several workers, worker 0 decides which layers are in float32."""

import json
import sys

import pytest

from tests.multi_worker.processes import end, start

# The second worker is shown inputs of which float16 would hold everything.
SCRIPT = """
import json, os
import keras, numpy as np, tensorflow as tf
import dist_amp
from dist_amp import strategy as strategy_lib
from tests import support

keras.utils.set_random_seed(0)
strategy = dist_amp.make_strategy("multi_worker")
with dist_amp.scope(strategy, "auto_layers"):
    model = keras.Sequential([
        keras.Input((6,)),
        keras.layers.Dense(8, name="first"),
        keras.layers.Rescaling(1e6, name="large"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(3, dtype="float32"),
    ])
    optimizer = dist_amp.wrap_optimizer(keras.optimizers.Adam(0.01))
trainer = dist_amp.Trainer(model, optimizer, loss=support.make_loss())
dataset = support.make_dataset()
index = strategy_lib.task_index(strategy)
shown = dataset.map(lambda x, y: (x * 10.0 ** (-9 * index), y))
auto_layers = dist_amp.AutoLayers(trainer, shown)
history = trainer.fit(dataset, epochs=2, verbose=0, callbacks=[auto_layers])
print(json.dumps({
    "pinned": auto_layers.pinned,
    "scale": float(tf.convert_to_tensor(optimizer.loss_scale)),
    "skipped": history.history["skipped_updates"],
    "weights": [v.numpy().tolist() for v in model.trainable_variables],
}), flush=True)
os._exit(0)
"""


def test_all_workers_pin_what_worker_0_says():
    results = []
    for status, output, errors in end(start([sys.executable, "-c", SCRIPT])):
        assert status == 0, errors
        results.append(json.loads(output.splitlines()[-1]))
    one, other = results
    assert one["pinned"] == ["large", "norm"]
    assert one["skipped"][-1] == 0
    assert one == other


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
