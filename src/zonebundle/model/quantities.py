"""Sizes and durations as people write them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]i?)?B?\s*", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes of `64MiB`, `1GB`, `512`; KiB are 1024 bytes and KB are 1000. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"'{text}' is not a size: write it like 512, 64MiB or 1.5GB")
    unit = (match[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    power = " KMGTP".index(unit[0]) if unit else 0
    # Exact: a float would round sizes from 9 PB on, and overflow.
    return int(Fraction(match[1]) * base**power)


def parse_duration(text: str) -> float:
    """Seconds of `2s`, `500ms`, `1h30m`, `10` (seconds). Raises ValueError."""
    stripped = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", stripped, re.ASCII):
        seconds = float(stripped)
    else:
        parts = _DURATION.findall(stripped)
        if not parts or "".join(number + unit for number, unit in parts) != stripped.replace(" ", ""):
            raise ValueError(f"'{text}' is not a duration: write it like 500ms, 2s, 10m or 1h30m")
        seconds = float(sum(float(number) * _SECONDS[unit] for number, unit in parts))
    if not math.isfinite(seconds):
        raise ValueError(f"'{text[:40]}…' is no duration: it is longer than can be counted")
    return seconds


def format_size(count: float) -> str:
    """A byte count for people: `1.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """A time span for people: `4.1 ms`, `2.3 s`, `12 min`."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
