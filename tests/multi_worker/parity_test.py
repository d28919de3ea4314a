"""Several workers train as one device does, and end with the same bits."""

import json
import sys

import numpy as np
import pytest

from tests import support
from tests.multi_worker.parity_cases import CASES, train
from tests.multi_worker.processes import end, start

FEW = ["float32", "float16", "embedding", "overflow last"]
CLUSTERS = {
    (2, 1): list(CASES),
    (2, 2): FEW,
    (4, 1): FEW,
    (4, 2): ["float16"],
}
ALL = [
    (num_workers, num_devices, name)
    for (num_workers, num_devices), names in CLUSTERS.items()
    for name in names
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of results by cluster; each trains all its cases at once."""
    folders = {}

    def run(num_workers, num_devices):
        key = (num_workers, num_devices)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("parity")
            program = "tests.multi_worker.parity_cases"
            words = (str(folders[key]), str(num_devices), *CLUSTERS[key])
            workers = start(
                [sys.executable, "-m", program, *words], num_workers
            )
            for status, _, errors in end(workers):
                assert status == 0, errors
        return folders[key]

    return run


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.mark.parametrize(("num_workers", "num_devices", "name"), ALL)
def test_workers_equal_one_device(
    trained, references, num_workers, num_devices, name
):
    folder, case = trained(num_workers, num_devices), CASES[name]
    if name not in references:
        references[name] = train(case)
    expected, expected_history = references[name]
    results = [np.load(folder / f"{name}-{i}.npz") for i in range(num_workers)]
    chief = dict(results[0])
    assert list(chief) == list(expected)
    for other in results[1:]:
        for path, array in chief.items():
            np.testing.assert_array_equal(other[path], array, path)
    tolerance = case.tolerance or case.precision
    support.assert_close(
        list(chief.values()), list(expected.values()), tolerance
    )
    if name.startswith(("overflow", "uneven")):
        return  # the mean loss leaves out what is not finite, or not there
    history = json.loads((folder / f"{name}-0.json").read_text())
    assert list(history) == list(expected_history)
    support.assert_close(
        list(history.values()), list(expected_history.values()), tolerance
    )


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
