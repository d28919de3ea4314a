"""Where XLA keeps what it has compiled, for the next start."""

import hashlib
import os
import pathlib
from importlib import metadata

_FLAGS = "TF_XLA_FLAGS"


def enable(folder: str, root: pathlib.Path = pathlib.Path("/")) -> None:
    """Makes XLA keep compiled code in a folder; before TensorFlow starts.

    Compiled code is for one machine and one TensorFlow: each kind has a
    folder of its own in this one, so that all hosts of a cluster can share it.

    Args:
        folder: Is made if need be.
        root: Of the file system; tests have one of their own.
    """
    path = pathlib.Path(folder).expanduser().absolute() / _kind(root)
    path.mkdir(parents=True, exist_ok=True)
    flag = f"--tf_xla_persistent_cache_directory={path}"
    # TensorFlow 2.21 reports as errors that it reads binary files, and warns of
    # a processor that differs from this one in preferences of the compiler.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ[_FLAGS] = f"{os.environ.get(_FLAGS, '')} {flag}".strip()


def _kind(root: pathlib.Path) -> str:
    """Stands for TensorFlow's version, the processor, driver and GPUs."""
    facts = [
        f"{name} {metadata.version(name)}"
        for name in metadata.packages_distributions()["tensorflow"]
    ]
    names = ("model name", "flags", "Features", "NVRM", "Model")
    nvidia = root / "proc/driver/nvidia"
    for file in (
        root / "proc/cpuinfo",
        nvidia / "version",
        *nvidia.glob("gpus/*/information"),
    ):
        lines = file.read_text().splitlines() if file.exists() else []
        facts += sorted({line for line in lines if line.startswith(names)})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
