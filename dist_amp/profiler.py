"""TensorFlow's profiler around some updates, on their borders."""

import logging
import pathlib

import tensorflow as tf

_log = logging.getLogger(__name__)


class Profiler:
    """Profiles the updates from one to another.

    Compiled calls are cut so that both borders fall between two of them; what
    is computed stays the same. TensorBoard shows what it writes (with the
    package tensorboard-plugin-profile). A disk that is full or another
    profiler that runs is logged, and training goes on.

    Args:
        first: Updates attempted before the first one to profile. At 0 the
            call that traces the step is profiled, too.
        end: Updates attempted with the last one.
        directory: Of TensorBoard's files.

    Raises:
        ValueError: There is no update between them.
    """

    def __init__(self, first: int, end: int, directory: str | pathlib.Path):
        if not 0 <= first < end:
            raise ValueError(
                "`first` must not be negative, and less than `end`. Received "
                f"{first} and {end} (--profile_steps)."
            )
        self._first, self._end = first, end
        self._directory = str(directory)
        self._is_running = self._has_run = False

    def cut(self, length: int, step: int) -> int:
        """Starts or stops at this place; call it before each compiled call.

        Args:
            length: Updates that the next call would have.
            step: Updates attempted so far.

        Returns:
            Updates that the next call may have.
        """
        is_within = self._first <= step < self._end
        if is_within and not self._has_run:
            self._start()
        elif not is_within:
            self.close()
        border = self._first if step < self._first else self._end
        return min(length, border - step) if step < self._end else length

    def close(self) -> None:
        """Stops and writes, if it runs."""
        if not self._is_running:
            return
        self._is_running = False
        try:
            tf.profiler.experimental.stop()
        except (OSError, tf.errors.OpError) as error:
            _log.error("the profile cannot be written: %s", error)
        else:
            _log.info("profile: %s", self._directory)

    def _start(self) -> None:
        self._has_run = True
        try:
            tf.profiler.experimental.start(self._directory)
        except (OSError, tf.errors.OpError) as error:
            _log.error("there will be no profile: %s", error)
        else:
            self._is_running = True
