"""A probe, and what it found: the frame that all probes share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from zonebundle.capture.process_view import Gone
from zonebundle.model.report import Outcome

OUTPUT_LIMIT = 1 << 20


class Skipped(Exception):
    """What the probe would tell of is not there on this host, or not for us: no gap."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How a probe went. `name` is the bundle's entry; `text` begins with the line `Probe: […]`; `seconds` it took."""

    name: str
    outcome: Outcome
    text: bytes
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    """A look to be taken. `run` raises nothing, may be called in any thread and cannot be cancelled."""

    name: str
    run: Callable[[], ProbeResult]


def make_probe(argv: tuple[str, ...], look: Callable[[], Iterable[str]]) -> Probe:
    """A probe whose entry is named after `argv`; `look` gives its lines, or raises Skipped, Gone or OSError."""
    name = ".".join(argv)
    return Probe(name, lambda: _run(name, argv, look))


def _run(name: str, argv: tuple[str, ...], look: Callable[[], Iterable[str]]) -> ProbeResult:
    begin = time.perf_counter()
    outcome, detail = Outcome.SUCCESS, ""
    try:
        body = "\n".join(look())
    except (Skipped, Gone) as error:
        outcome, body = Outcome.SKIP, str(error)
        detail = body
    except PermissionError as error:
        outcome, body = Outcome.SKIP, f"not permitted: {error}"
        detail = body
    except Exception as error:
        # The kernel's texts differ between versions: one that cannot be read costs this probe, not the hold.
        outcome, body = Outcome.FAIL, f"{type(error).__name__}: {error}"
        detail = body
    text = f"Probe: {json.dumps(list(argv))}\n{body}\n".encode("utf-8", "backslashreplace")
    if len(text) > OUTPUT_LIMIT:
        note = b"\n(cut: there is more than 1 MiB)\n"
        text = text[: text.rindex(b"\n", 0, OUTPUT_LIMIT - len(note))] + note
        detail = detail[:200] or "cut at 1 MiB"
    return ProbeResult(name, outcome, text, detail, time.perf_counter() - begin)
