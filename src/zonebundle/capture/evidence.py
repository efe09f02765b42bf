"""What a hold has gathered so far: steps, gaps and outputs, in memory until the record is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from zonebundle.capture.record_writer import RecordWriter
from zonebundle.model.record import Output
from zonebundle.model.report import Gap, Outcome, Step

# The order of the entries in a bundle; what is not named here comes after, in the order of the commands.
_ZONE_WIDE = ("ptree", "uptime", "last", "who", "svcs", "netstat")
_PER_PROCESS = ("pfiles", "pstack", "pargs")
# All outputs of one hold together: a zone with thousands of processes must not fill memory or spool.
_OUTPUT_LIMIT = 64 << 20


@dataclass(slots=True)
class Evidence:
    """Gathered by the worker's main thread, and by its staging thread (appending to a list is atomic).

    `began` is the monotonic time of the hold's begin; steps are told relative to it.
    """

    began: float
    steps: list[Step] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    outputs: list[tuple[str, bytes]] = field(default_factory=list)
    output_bytes: int = 0
    files: int = 0
    log_bytes: int = 0

    def step(
        self, name: str, outcome: Outcome, begin: float, detail: str = "", *, entry: str = "", lane: str = "hold"
    ) -> None:
        """Note a step that has just ended; `begin` is monotonic."""
        now = time.monotonic()
        self.steps.append(Step(name, outcome, begin - self.began, now - begin, detail, entry, lane))

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def gap(self, what: str, reason: str) -> None:
        self.gaps.append(Gap(what, reason))

    def output(self, name: str, text: bytes) -> None:
        """Keep an output that becomes the entry `name`."""
        if self.output_bytes + len(text) > _OUTPUT_LIMIT:
            self.gap(name, f"all outputs of this bundle together are more than {_OUTPUT_LIMIT >> 20} MiB")
            return
        self.output_bytes += len(text)
        self.outputs.append((name, text))

    def count(self, size: int) -> None:
        self.files += 1
        self.log_bytes += size

    def write(self, writer: RecordWriter) -> None:
        """Write all of it to the record, outputs in the order of the bundle's entries."""
        for name, text in sorted(self.outputs, key=lambda output: _rank(output[0])):
            offset, length = writer.add_output(text)
            writer.add("output", Output(name, offset, length).to_json())
        for step in sorted(self.steps, key=lambda step: step.start):
            writer.add("step", step.to_json())
        for gap in self.gaps:
            writer.add("gap", gap.to_json())


def _rank(name: str) -> tuple[int, int, int]:
    if name in _ZONE_WIDE:
        return 0, _ZONE_WIDE.index(name), 0
    kind, _, pid = name.partition(".")
    if kind in _PER_PROCESS and pid.isdigit():
        return 1, _PER_PROCESS.index(kind), int(pid)
    return 2, 0, 0
