"""A worker's program: trains, and a callback of worker 1 raises or hangs.

`python -m tests.multi_worker.faulty_worker FOLDER FAULT`
"""

import os
import sys
import threading

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import dist_amp
from dist_amp import strategy as strategy_lib
from dist_amp.cluster import Timeouts
from dist_amp.watchdog import PeerError
from tests import support

FAULTY_BATCH = 50
PEER_STATUS, OWN_STATUS = 129, 1


def main(folder: str, fault: str) -> None:
    strategy = dist_amp.make_strategy(
        "multi_worker", timeouts=Timeouts(collective=6.0)
    )
    index = strategy_lib.task_index(strategy)

    class Fault(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if index == 0 or batch < FAULTY_BATCH:
                return
            if fault == "raises":
                raise ValueError("a mistake")
            threading.Event().wait()

    trainer = support.make_trainer(strategy=strategy)
    trainer.report_dir = folder
    arrays = support.make_arrays(support.GLOBAL_BATCH)
    dataset = tf.data.Dataset.from_tensors(arrays).repeat()
    try:
        trainer.fit(
            dataset, steps_per_epoch=50_000, callbacks=[Fault()], verbose=0
        )
    except PeerError as error:
        print(error, flush=True)
        os._exit(PEER_STATUS)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(OWN_STATUS)


if __name__ == "__main__":
    main(*sys.argv[1:])
