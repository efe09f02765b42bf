"""A bundle for people: its state, what was done when, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zonebundle.cli.output import count_of, format_span, format_table
from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_size

_BAR_WIDTH = 24


def describe_bundle(zone: str, bundle_id: str, status: dict[str, Any]) -> Iterator[str]:
    """The lines of `zone-bundle show`; `status` is the agent's."""
    yield f"{zone}/{bundle_id}"
    yield from _facts(status)
    steps = status.get("steps", ())
    if steps:
        yield ""
        yield "Timeline (since the hold began)"
        end = max(_end(step) for step in steps)
        rows = [_row(step, end) for step in sorted(steps, key=lambda step: (step.get("start", 0), _end(step)))]
        yield from (f"  {line}" for line in format_table(("Step", "Outcome", "Start", "Took", "", "Detail"), rows))
    gaps = status.get("gaps", ())
    yield ""
    yield f"{count_of(len(gaps), 'gap')}:" if gaps else "No gaps: everything that was wanted is in the bundle."
    for gap in gaps:
        yield f"  {printable(gap['what'])}: {printable(gap['reason'])}"


def _facts(status: dict[str, Any]) -> Iterator[str]:
    reason = status.get("reason")
    facts = {"State": str(status["state"]) + (f": {reason}" if reason else "")}
    metadata = status.get("metadata")
    if metadata:
        facts["Cause"] = str(metadata["cause"])
        facts["Created"] = str(metadata["time_created"])
    if status.get("hold_seconds") is not None:
        graceful = status.get("graceful_seconds")
        aside = f", and {format_span(graceful)} for the graceful stop" if graceful else ""
        facts["Held"] = format_span(status["hold_seconds"]) + aside
    total, sealed = status.get("bytes_total"), status.get("bytes_sealed")
    if status["state"] == "sealed":
        # An agent that has been restarted since does not know.
        if status.get("seal_seconds") is not None:
            facts["Sealed"] = f"in {format_span(status['seal_seconds'])}"
        if status.get("size") is not None:
            facts["Size"] = format_size(status["size"])
            if total:
                facts["Size"] += f" ({format_size(total)} of logs)"
    elif total:
        facts["Sealed"] = f"{format_size(sealed or 0)} of {format_size(total)} so far"
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        yield f"  {name.ljust(width)}  {printable(value)}"


def _end(step: dict[str, Any]) -> float:
    return float(step.get("start", 0) + step.get("seconds", 0))


def _row(step: dict[str, Any], end: float) -> tuple[str, ...]:
    start, seconds = step.get("start", 0), step.get("seconds", 0)
    return (
        step["name"],
        step["outcome"],
        format_span(start),
        format_span(seconds),
        _bar(start, seconds, end),
        step.get("detail", ""),
    )


def _bar(start: float, seconds: float, end: float) -> str:
    """Where in the whole a step lies; however short, it is seen."""
    if end <= 0:
        return ""
    first = min(int(start / end * _BAR_WIDTH), _BAR_WIDTH - 1)
    length = max(1, round(seconds / end * _BAR_WIDTH))
    return (" " * first + "━" * length)[:_BAR_WIDTH]
