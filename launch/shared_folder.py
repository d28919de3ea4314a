"""Whether all workers share a folder, as they must that of checkpoints."""

import contextlib
import functools
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from dist_amp import preflight, rendezvous
from dist_amp.cluster import ClusterSpec
from launch.findings import ERROR, Finding

_SECONDS_TO_SHOW_UP = 5.0  # a file of another worker

_cluster = functools.partial(Finding, "cluster")

_News = list[dict[str, Any]]


class SharedFolder:
    """A folder of tokens: worker 0's, and one of each worker that sees it.

    Args:
        cluster: The workers.
        where: The folder of a run, in which this one is made.
        flag: The flag that named it.
    """

    def __init__(self, cluster: ClusterSpec, where: str, flag: str):
        self._cluster = cluster
        self._where = where.rstrip("/")
        self._flag = flag
        self._made: list[str] = []
        self._name = ""

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[str, str]]:
        """Worker 0 makes it, for the block; yields the news for the others."""
        if not self._cluster.is_chief:
            yield {}
            return
        self._name = f"doctor-{uuid.uuid4().hex}"
        self._made = [] if "://" in self._where else _missing(self._where)
        try:
            error = preflight.write_token(self._path, _token(0))
            yield {"name": self._name, "error": error, "where": self._shown}
        finally:
            preflight.remove_tokens(self._path)
            with contextlib.suppress(OSError):
                for folder in self._made:  # only if nobody else put a file in
                    os.rmdir(folder)

    def try_out(self, timeout: float, chief: Mapping[str, str]) -> _News:
        """Every worker reads and writes, worker 0 looks; all hear of it.

        Returns:
            For each worker what went wrong on it ("error"), or at worker 0
            with what it wrote ("unseen").
        """
        mine = {"error": chief["error"] or self._read_and_write(chief["name"])}
        news = rendezvous.meet(self._cluster, news=mine, timeout=timeout)
        unseen: dict[str, str] = {}
        if self._cluster.is_chief:
            unseen = self._look(news)
        answers = rendezvous.meet(
            self._cluster, news={"unseen": unseen}, timeout=timeout
        )
        return [
            {**one, "unseen": answers[0]["unseen"].get(str(i), "")}
            for i, one in enumerate(news)
        ]

    def findings(
        self, chief: Mapping[str, str], news: _News
    ) -> Iterator[Finding]:
        """Who cannot use it."""
        where, flag = chief["where"], self._flag
        if chief["error"]:
            yield _cluster(
                "storage",
                f"worker 0 cannot write {where}: {chief['error']}",
                ERROR,
                f"Pass a --{flag} that worker 0 may write; it saves the "
                "checkpoints.",
            )
            return
        for index, one in enumerate(news):
            name = self._cluster.name_of(index)
            told = f"{name} does not see what worker 0 wrote in {where}"
            why = one["error"]
            if not why and one["unseen"]:
                told = f"worker 0 does not see what {name} wrote in {where}"
                why = one["unseen"]
            if why:
                yield _cluster(
                    "storage",
                    f"{told}: {why}",
                    ERROR,
                    "Worker 0 writes the checkpoints and all workers read "
                    f"them: pass a --{flag} on storage that all share, by the "
                    "same path.",
                )
        if not any(one["error"] or one["unseen"] for one in news):
            yield _cluster("storage", f"all workers share {where}")

    @property
    def _shown(self) -> str:
        """The folder of a run, as it is found from anywhere on this host."""
        is_remote = "://" in self._where
        return self._where if is_remote else os.path.abspath(self._where)

    @property
    def _path(self) -> str:
        return f"{self._where}/{self._name}"

    def _read_and_write(self, name: str) -> str:
        if self._cluster.is_chief:
            return ""
        self._name = name
        error = preflight.read_token(
            self._path, _token(0), patience=_SECONDS_TO_SHOW_UP
        )
        error = error or preflight.write_token(
            self._path, _token(self._cluster.task_index)
        )
        return f"{error} (its own is {self._shown})" if error else ""

    def _look(self, news: _News) -> dict[str, str]:
        """Workers whose files do not show up, and why."""
        deadline = time.monotonic() + _SECONDS_TO_SHOW_UP
        unseen = {}
        for index, one in enumerate(news):
            if index and not one["error"]:
                unseen[str(index)] = preflight.read_token(
                    self._path,
                    _token(index),
                    patience=deadline - time.monotonic(),
                )
        return unseen


def _token(index: int) -> str:
    return f"worker-{index}"


def _missing(path: str) -> list[str]:
    """The folder and those around it that do not exist, innermost first."""
    missing = []
    while path and not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing
