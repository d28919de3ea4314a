"""Whose errors they are: ours speak for themselves."""

import pathlib
import re
import traceback

from absl import flags

_FOLDERS = [
    pathlib.Path(__file__).resolve().parent.parent / name
    for name in ("launch", "dist_amp")
]


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised here, and so speaks for itself.

    One from within a model or data of the user's needs its traceback.
    """
    if isinstance(error, flags.Error):
        return True
    # TensorFlow puts the places of an error in traced code into its text.
    files = re.findall(r'^ +File "(.+?)", line', str(error), re.MULTILINE)
    if not files:
        frames = traceback.extract_tb(error.__traceback__)
        files = [frame.filename for frame in frames]
    innermost = pathlib.Path(files[-1]).resolve()
    return any(innermost.is_relative_to(folder) for folder in _FOLDERS)
