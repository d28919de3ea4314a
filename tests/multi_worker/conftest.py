"""Workers meet on a loopback of their own: TensorFlow's server has no lock."""

import pytest

from launch.isolation import isolate


@pytest.fixture(scope="session", autouse=True)
def isolated_network():
    """A network namespace for this process's thread and its children."""
    refusal = isolate()
    if refusal is not None:
        pytest.skip(f"needs a network namespace of its own: {refusal}")
