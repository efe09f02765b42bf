"""What the command line prints: results on stdout, everything else on stderr as `zone-bundle: …` lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_seconds

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GAPS = 3
EXIT_INTERRUPTED = 130


def prepare_streams() -> None:
    """Make any text printable: what the terminal's encoding lacks becomes an escape instead of an exception."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: str = "") -> None:
    """One line of the result, out at once: a reader of the pipe sees a zone when it is stopped."""
    print(text, flush=True)


def print_json(data: Any) -> None:
    """The result for programs."""
    # ASCII: escapes are left to the reader, nothing in it drives a terminal.
    print(json.dumps(data, indent=2), flush=True)


def print_note(text: str) -> None:
    """A remark beside the result."""
    print(f"zone-bundle: {text}", file=sys.stderr, flush=True)


def print_error(text: str) -> None:
    """What failed, on what, what to do: one line."""
    print_note(f"error: {text}")


def is_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def format_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two blanks apart; nothing at all when there are no rows."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[column]) for row in [list(headers), *cells]) for column in range(len(headers))]
    return [format_row(row, widths) for row in [headers, *cells]]


def format_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table whose columns have these widths."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def format_span(seconds: Any) -> str:
    """A time span for people, `-` where it is not known."""
    return format_seconds(float(seconds)) if isinstance(seconds, int | float) else "-"


def count_of(number: int, singular: str) -> str:
    """`1 gap`, `2 gaps`."""
    return f"{number} {singular}" if number == 1 else f"{number} {singular}s"
