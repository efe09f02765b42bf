"""What the demo tells: how each stop went, and how it would have gone the old way."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from zonebundle.cli.demo_baseline import Baseline
from zonebundle.cli.output import count_of
from zonebundle.model.quantities import format_seconds, format_size


@dataclass(frozen=True, slots=True)
class ZoneResult:
    """One zone's stop. Seconds: `hold` and `stop` as the agent measured them, `sealed_after` since all were told."""

    zone: str
    bundle_id: str
    hold: float
    stop: float
    sealed_after: float
    log_files: int
    log_bytes: int
    bundle_bytes: int
    gaps: int


def results_table(results: Sequence[ZoneResult]) -> RenderableType:
    """A row a zone, then the medians and the totals."""
    table = _table()
    table.add_column("Zone")
    table.add_column("Held", justify="right", style="green")
    for header in ("Stopped in", "Files", "Logs", "Bundle", "Sealed after", "Gaps"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            Text(result.zone),
            format_seconds(result.hold),
            format_seconds(result.stop),
            str(result.log_files),
            format_size(result.log_bytes),
            format_size(result.bundle_bytes),
            format_seconds(result.sealed_after),
            _gaps(result.gaps),
        )
    table.add_section()
    table.add_row(
        "median",
        _median(result.hold for result in results),
        _median(result.stop for result in results),
        f"{statistics.median(result.log_files for result in results):.0f}",
        format_size(statistics.median(result.log_bytes for result in results)),
        format_size(statistics.median(result.bundle_bytes for result in results)),
        _median(result.sealed_after for result in results),
        style="bold",
    )
    table.add_row(
        "total",
        "",
        "",
        f"{sum(result.log_files for result in results):,}",
        format_size(sum(result.log_bytes for result in results)),
        format_size(sum(result.bundle_bytes for result in results)),
        "",
        _gaps(sum(result.gaps for result in results)),
        style="bold",
    )
    return table


def comparison_table(results: Sequence[ZoneResult], baseline: Baseline) -> RenderableType:
    """This stop and the old way's, side by side."""
    stops = sorted(result.stop for result in results)
    sealed = max(result.sealed_after for result in results)
    old = sorted(baseline.release_seconds)
    table = _table()
    table.add_column("Zones are free again")
    for header in ("the first", "the median", "the last", "all sealed"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_row(
        "zonebundle (measured)",
        *(Text(format_seconds(value), style="green") for value in (stops[0], statistics.median(stops), stops[-1])),
        format_seconds(sealed),
    )
    table.add_row(
        "old way (extrapolated)",
        *(Text(format_seconds(value), style="red") for value in (old[0], statistics.median(old), old[-1])),
        format_seconds(old[-1]),
    )
    return table


def baseline_note(results: Sequence[ZoneResult], baseline: Baseline) -> str:
    """What the old way is, and what of its row was measured."""
    factor = statistics.median(baseline.release_seconds) / statistics.median(result.stop for result in results)
    return (
        f"The old way: the bundle is made inside the stop, under one lock, by one thread, with tarfile and gzip -9. "
        f"Done for real with {count_of(baseline.measured, 'zone')} ({format_seconds(baseline.measured_seconds)}); "
        f"the other {len(baseline.release_seconds) - baseline.measured} are extrapolated by their bytes. "
        f"The median zone is free {factor:,.0f} times sooner."
    )


def _table() -> Table:
    # As wide as a small terminal, 80 columns, at most.
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")


def _median(values: Iterable[float]) -> str:
    return format_seconds(statistics.median(values))


def _gaps(number: int) -> str:
    return str(number) if number else "none"
