"""What a program found out, line by line: for people, and as JSON."""

import collections
import dataclasses
import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

OK, WARNING, ERROR = "ok", "warning", "error"

_WIDTH = 80
_STATUS_WIDTH, _NAME_WIDTH = 9, 22


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        section: Which part of the report it belongs to.
        name: What was looked at.
        value: What was found.
        status: "ok", "warning" or "error".
        mend: How to mend it, a sentence; empty if all is well.
    """

    section: str
    name: str
    value: str
    status: str = OK
    mend: str = ""


class Report:
    """All findings of a process.

    Attributes:
        measured: Numbers, for JSON.
        stage: What is being done, for the case that it does not end.
        worker: Index of this process among the workers.
        num_workers: Processes of the job.
    """

    def __init__(self) -> None:
        self._findings: list[Finding] = []
        self._shared: list[Finding] = []  # those that all workers know
        self.measured: dict[str, Any] = {}
        self.stage = ""
        self.worker = 0
        self.num_workers = 1

    def add(self, findings: Iterable[Finding]) -> None:
        """Takes what this process found."""
        for one in findings:  # keeps those before an exception
            self._findings.append(one)

    def share(self, findings: Iterable[Finding]) -> None:
        """Takes what all workers of the job know alike."""
        for one in findings:
            self._findings.append(one)
            self._shared.append(one)

    @property
    def findings(self) -> list[Finding]:
        """All of them, sections in the order in which they began."""
        every = self._findings
        sections = list(dict.fromkeys(one.section for one in every))
        return sorted(every, key=lambda one: sections.index(one.section))

    @property
    def own_errors(self) -> list[Finding]:
        """What this process itself found to be wrong."""
        return [
            one
            for one in self._findings
            if one.status == ERROR and one not in self._shared
        ]

    @property
    def shared_errors(self) -> list[Finding]:
        """What all workers know to be wrong."""
        return [one for one in self._shared if one.status == ERROR]

    @property
    def status(self) -> str:
        """The worst of all findings."""
        every = {one.status for one in self.findings}
        return next((s for s in (ERROR, WARNING) if s in every), OK)

    def as_json(self) -> str:
        """One object in one line."""
        content = {
            "status": self.status,
            "worker": self.worker,
            "num_workers": self.num_workers,
            "findings": [dataclasses.asdict(one) for one in self.findings],
            "measured": self.measured,
        }
        return json.dumps(content)

    def as_table(self) -> str:
        """A line for each finding, in sections."""
        lines, section = [], ""
        for one in self.findings:
            if one.section != section:
                section = one.section
                lines.append(section)
            lines += _lines_of(one)
        counts = collections.Counter(one.status for one in self.findings)
        told = [
            f"{counts[status]} {status}{'s' if counts[status] > 1 else ''}"
            for status in (ERROR, WARNING)
            if counts[status]
        ]
        return "\n".join([*lines, ", ".join(told) or "all well"])


def describe_errors(errors: Sequence[Finding]) -> str:
    """A line for each, for the log of one of many workers."""
    return "\n".join(
        f"error: {one.name}: {one.value} {one.mend}".rstrip() for one in errors
    )


def _lines_of(finding: Finding) -> list[str]:
    indent = " " * (2 + _STATUS_WIDTH + _NAME_WIDTH)
    head = f"  {finding.status:{_STATUS_WIDTH}}{finding.name:{_NAME_WIDTH}}"
    if len(head) > len(indent):  # a long name has a line for itself
        lines, head = [head.rstrip()], indent
    else:
        lines = []
    width = _WIDTH - len(indent)
    for text in (finding.value, finding.mend):
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=head,
            subsequent_indent=indent,
            break_on_hyphens=False,
            break_long_words=width < len(text) and " " not in text,
        )
        head = indent
    return lines
