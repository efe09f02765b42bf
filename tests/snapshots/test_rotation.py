"""Logs that are rotated all the time: what was staged holds every line up to the youngest one in it."""

import contextlib
import gzip
import itertools
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import rotating, wait
from support.rotating import REMOVED, ROTATED, WRITTEN, Shared
from support.staging import Kept, keep
from zonebundle.snapshots.base import Kind

_KINDS = {"ext4": Kind.HARDLINK, "xfs": Kind.REFLINK, "plain": Kind.COPY}
# Many more find what is rarer: ROTATION_STAGINGS=5000.
_TIMES = int(os.environ.get("ROTATION_STAGINGS", "200"))
_MODES = ["rename", "dated", "compress", "unknown", "copytruncate", "reuse", "unknown-copy"]


@dataclass
class Zone:
    """A directory in which a log is written and rotated, and a staging directory beside it."""

    logs: Path
    staging: Path
    shared: Shared


@contextlib.contextmanager
def _running(below: Path, mode: str, *, seconds: float, width: int = 20) -> Iterator[Zone]:
    logs = below / "zone" / "log"
    logs.mkdir(parents=True)
    numbers = below / "numbers"
    zone = Zone(logs, below / "staging", Shared(numbers))

    def start(role: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, rotating.__file__, role, str(logs), str(numbers), mode, *arguments]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)

    with contextlib.ExitStack() as stack:
        stack.callback(zone.shared.close)
        writer = stack.enter_context(start("writer", str(width)))
        stack.callback(writer.kill)
        wait.until(lambda: zone.shared.get(WRITTEN) > 10, what="the writer writes")
        rotator = stack.enter_context(start("rotator", str(seconds), str(writer.pid)))
        stack.callback(rotator.kill)
        wait.until(lambda: zone.shared.get(ROTATED) > rotating.KEPT, timeout=60, what="the rotator rotates")
        yield zone
        assert writer.poll() is None, "the writer died"
        assert rotator.poll() is None, "the rotator died"


def _lines(kept: Kept) -> set[int]:
    found: set[int] = set()
    for path, content in zip(kept.paths, map(kept.content, kept.logs), strict=True):
        found.update(rotating.numbers(_inflate(content) if path.endswith(".gz") else content))
    return found


def _inflate(content: bytes) -> bytes:
    # A file that is being compressed may be there cut off, beside the one it is made of.
    with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):
        return gzip.decompress(content)
    return zlib.decompressobj(31).decompress(content)


@dataclass
class Tally:
    stagings: int = 0
    disturbed: int = 0
    told: int = 0


def _stage_repeatedly(zone: Zone, kind: Kind, times: int, disturbed: int = 0) -> Tally:
    """Stage so often, and until so many stagings were disturbed by a rotation, and look for lines that are missing."""
    tally = Tally()
    # Where the machine is busy, most stagings fall between two rotations: as many as it takes, but not for ever.
    end = time.monotonic() + 60
    while tally.stagings < times or (tally.disturbed < disturbed and time.monotonic() < end):
        before, rotations = zone.shared.get(WRITTEN), zone.shared.get(ROTATED)
        kept = keep(zone.logs.parent, zone.staging, kind)
        tally.stagings += 1
        tally.disturbed += zone.shared.get(ROTATED) != rotations
        # Read last: what rotation removes meanwhile may be missing.
        removed = zone.shared.get(REMOVED)
        if kept.gaps:
            tally.told += 1
        else:
            assert all(part.origin == "staged" for log in kept.logs for part in log.parts)
            lines = _lines(kept)
            # A writer that got no time may have had all its lines rotated away.
            youngest = max(lines, default=removed)
            assert youngest >= before, "the last line before the snapshot is missing"
            missing = set(range(removed + 1, youngest + 1)) - lines
            assert not missing, _explain(kept, missing)
        kept.destroy()
    return tally


def _explain(kept: Kept, missing: set[int]) -> str:
    ranges = [f"{path}: {min(found)}-{max(found)}" for path, found in _ranges(kept) if found]
    runs = itertools.groupby(enumerate(sorted(missing)), lambda pair: pair[1] - pair[0])
    lost = ["-".join(str(run[i][1]) for i in (0, -1)) for run in (list(group) for _, group in runs)]
    return f"missing in silence: {', '.join(lost)}; staged: {'; '.join(ranges)}"


def _ranges(kept: Kept) -> Iterator[tuple[str, list[int]]]:
    for path, content in zip(kept.paths, map(kept.content, kept.logs), strict=True):
        yield path, sorted(rotating.numbers(_inflate(content) if path.endswith(".gz") else content))


@pytest.fixture
def below(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue("tmp_path" if request.param == "plain" else f"{request.param}_dir")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("mode", _MODES)
@pytest.mark.parametrize(("below", "kind"), _KINDS.items(), indirect=["below"], ids=_KINDS)
def test_no_line_is_missing_in_silence(below: Path, kind: Kind, mode: str, leak_check: None) -> None:
    with _running(below, mode, seconds=0.015) as zone:
        tally = _stage_repeatedly(zone, kind, _TIMES, disturbed=30)
    assert tally.disturbed >= 30, f"the test tested nothing: {tally}"
    assert tally.told <= tally.stagings / 4, f"too many gave up: {tally}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rename", "copytruncate"])
@pytest.mark.parametrize(("below", "kind"), _KINDS.items(), indirect=["below"], ids=_KINDS)
def test_no_line_of_big_logs_is_missing_in_silence(below: Path, kind: Kind, mode: str) -> None:
    # Several megabytes a file: copies take many chunks, and are hit by truncation in their midst.
    with _running(below, mode, seconds=0.15, width=2000) as zone:
        # A staging by hard links is over in a moment: of a hundred, one meets a rotation.
        tally = _stage_repeatedly(zone, kind, 20, disturbed=2)
    assert tally.disturbed >= 2, f"the test tested nothing: {tally}"
    assert tally.told <= tally.stagings / 4, f"too many gave up: {tally}"


@pytest.mark.parametrize("mode", ["rename", "copytruncate"])
def test_a_rotated_log_is_whole(tmp_path: Path, mode: str, leak_check: None) -> None:
    with _running(tmp_path, mode, seconds=0.01) as zone:
        tally = _stage_repeatedly(zone, Kind.COPY, 30)
    assert tally.told <= 10


def test_the_test_would_notice(tmp_path: Path) -> None:
    log = tmp_path / "zone" / rotating.LOG
    log.parent.mkdir()
    log.write_bytes(b"".join(b"L%09d  \n" % number for number in (1, 2, 4, 5)) + b"L00000")
    kept = keep(log.parent, tmp_path / "staging", Kind.COPY)
    assert _lines(kept) == {1, 2, 4, 5}
    assert os.fspath(tmp_path) in kept.area.path
