"""A seal whose record, logs or store are not as they should be, or that is canceled."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.sealing import NEVER, Seal
from support.spooled import INSTALLATION, MTIME_NS, Draft, SpoolDir, log_lines
from zonebundle.errors import FormatError, NotFoundError, SealCanceledError, SealError, StoreError
from zonebundle.host import trace
from zonebundle.model.manifest import Piece
from zonebundle.model.record import Part
from zonebundle.seal import compress
from zonebundle.seal import sealer as sealer_module
from zonebundle.seal.sealer import Sealer
from zonebundle.store import pieces
from zonebundle.store.draft import BundleDraft
from zonebundle.store.objects import SegmentStore
from zonebundle.store.pieces import CHUNK, Run
from zonebundle.store.reader import StoreReader


def test_outputs_that_were_cut_are_a_gap(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    draft.add_output("ptree", b"0123456789")
    draft.write()
    os.truncate(draft.entry / "outputs", 4)
    seal_again(at, draft, seal)
    assert at.entries(draft)[b"ptree"][1] == b"0123"
    gaps = at.gaps(draft)
    assert "has changed on the disk" in gaps.pop("capture record")
    assert gaps == {"ptree": "its last 6 bytes are missing in the spool"}


def seal_again(at: SpoolDir, draft: Draft, seal: Seal) -> None:
    """Seal a draft that was written already."""
    draft.write = lambda: draft.bundle_id  # type: ignore[method-assign]
    seal(draft)


def test_staged_bytes_that_are_missing_are_zeros_and_a_gap(at: SpoolDir, seal: Seal) -> None:
    data = log_lines(3 * CHUNK)
    draft = Draft(at)
    for name in (b"short.log", b"gone.log", b"tiny.log", b"good.log"):
        draft.add_log(name, data[:50] if name == b"tiny.log" else data)
    os.truncate(draft.area() / "files/0", CHUNK + 100)
    (draft.area() / "files/1").unlink()
    os.truncate(draft.area() / "files/2", 20)
    seal(draft)
    logs = at.logs(draft)
    assert logs[b"zone/short.log"] == data[: CHUNK + 100] + bytes(2 * CHUNK - 100)
    assert logs[b"zone/gone.log"] == bytes(3 * CHUNK)
    assert logs[b"zone/tiny.log"] == data[:20] + bytes(30)
    assert logs[b"zone/good.log"] == data
    assert at.gaps(draft) == {
        "logs/zone/short.log": f"is shorter than it was in the hold: {2 * CHUNK - 100} bytes are zeros",
        "logs/zone/gone.log": f"cannot be opened: No such file or directory: {3 * CHUNK} bytes are zeros",
        "logs/zone/tiny.log": "is shorter than it was in the hold: 30 bytes are zeros",
    }


def test_a_hard_link_that_was_written_to_is_a_gap(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    names: dict[bytes, Path] = {}
    for name in (b"same.log.1", b"changed.log.1"):
        log = at.zone_root / os.fsdecode(name)
        log.write_bytes(b"as it was in the hold")
        os.utime(log, ns=(MTIME_NS, MTIME_NS))
        staged = draft.area() / f"files/{len(names)}"
        os.link(log, staged)
        names[name] = log
        part = Part(0, 21, "staged", 0, f"files/{len(names) - 1}", 0)
        draft.add_file(name, 21, (part,), inode=log.stat().st_ino)
    names[b"changed.log.1"].write_bytes(b"something else for it")
    seal(draft)
    assert at.logs(draft) == {
        b"zone/same.log.1": b"as it was in the hold",
        b"zone/changed.log.1": b"something else for it",
    }
    assert at.gaps(draft) == {
        "logs/zone/changed.log.1": "was written to after the hold; the bytes are as they were found"
    }
    assert (at.zone_root / "same.log.1").exists()


def test_a_damaged_record_is_refused_and_kept(at: SpoolDir, sealer: Sealer) -> None:
    draft = Draft(at)
    draft.add_log(b"app.log", b"content")
    draft.write()
    record = draft.entry / "capture.jsonl"
    whole = record.read_bytes()
    lines = whole.splitlines(keepends=True)
    damages = {
        "cut off": whole[:-5],
        "no JSON": whole.replace(b'{"step"', b'{"step'),
        "NULs": lines[0] + bytes(4096) + b"".join(lines[1:]),
        "no header": b"".join(lines[1:]),
        "empty": b"",
        "newer": whole.replace(b'{"record":1', b'{"record":2'),
        "another bundle": whole.replace(draft.bundle_id.encode(), b"6f0ee1a2-4e49-4b0f-8f1c-7a4f3a3f9d11"),
        "time": whole.replace(b'"time_created":"2', b'"time_created":"x'),
        "parts": whole.replace(b'"parts":[[0,7', b'"parts":[[0,5'),
        "escape": whole.replace(b"files/0", b"../../x"),
        "unknown line": whole + b'{"surprise":1}\n',
        "nested": whole + b"[" * 100_000 + b"\n",
    }
    for damage, data in damages.items():
        assert data != whole, damage
        record.write_bytes(data)
        with pytest.raises(FormatError, match=r"capture\.jsonl|record format"):
            sealer.seal(draft.bundle_id, lambda total, done: None, NEVER)
        assert record.read_bytes() == data
        assert draft.area().is_dir()
        assert list(StoreReader.open(at.store).directories()) == []
    record.write_bytes(whole)
    assert sealer.seal(draft.bundle_id, lambda total, done: None, NEVER) is not None
    assert at.logs(draft) == draft.expected


def test_a_missing_entry_is_told(at: SpoolDir, sealer: Sealer) -> None:
    with pytest.raises(NotFoundError, match="no record"):
        sealer.seal("6f0ee1a2-4e49-4b0f-8f1c-7a4f3a3f9d11", lambda total, done: None, NEVER)


def test_a_file_system_that_is_away_is_waited_for(at: SpoolDir, sealer: Sealer) -> None:
    draft = Draft(at)
    draft.add_log(b"app.log", b"content")
    draft.write()
    away = at.base / "unmounted"
    at.staging.rename(away)
    with pytest.raises(SealError, match="mount its file system"):
        sealer.seal(draft.bundle_id, lambda total, done: None, NEVER)
    away.rename(at.staging)
    assert sealer.seal(draft.bundle_id, lambda total, done: None, NEVER) is not None
    assert at.logs(draft) == draft.expected
    assert at.left() == []


def test_an_area_that_is_gone_for_good_costs_its_logs_only(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    draft.add_output("who", b"nobody")
    draft.add_log(b"app.log", b"content")
    for path in [*draft.area().rglob("*")][::-1]:
        path.rmdir() if path.is_dir() else path.unlink()
    draft.area().rmdir()
    seal(draft)
    assert at.entries(draft)[b"who"][1] == b"nobody"
    assert at.logs(draft) == {b"zone/app.log": bytes(7)}
    assert "7 bytes are zeros" in at.gaps(draft)["logs/zone/app.log"]


def test_canceling_leaves_nothing_in_the_store(at: SpoolDir, sealer: Sealer, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft(at)
    draft.add_log(b"big.log", log_lines(20 * CHUNK))
    draft.write()
    canceled = threading.Event()

    def deflate(raw: bytes, digest: str) -> Run:
        canceled.set()
        return pieces.deflate(raw, digest)

    monkeypatch.setattr(compress, "deflate", deflate)
    with pytest.raises(SealCanceledError):
        sealer.seal(draft.bundle_id, lambda total, done: None, canceled)
    assert list(at.store.rglob("*.gz")) == []
    assert list(StoreReader.open(at.store).directories()) == []
    assert sealer.delete("web", draft.bundle_id) == 0
    assert at.left() == []


@pytest.mark.parametrize("point", ["seal.planned", "seal.segments-durable", "seal.manifest-written"])
def test_canceling_at_the_last_moment_commits_nothing(
    at: SpoolDir, sealer: Sealer, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """As an attempt does that a disk has kept: its bundle may be deleted by now."""
    draft = Draft(at)
    draft.add_log(b"a.log", log_lines(5000))
    draft.write()
    canceled = threading.Event()

    def cancel(name: str) -> None:
        if name == point:
            canceled.set()

    monkeypatch.setattr(trace, "point", cancel)
    with pytest.raises(SealCanceledError):
        sealer.seal(draft.bundle_id, lambda total, done: None, canceled)
    assert list(at.store.rglob("*.gz")) == []
    assert list(StoreReader.open(at.store).directories()) == []


def test_an_attempt_that_was_given_up_touches_nothing_of_the_next(
    at: SpoolDir, sealer: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk hung while it made its draft, and answers when the bundle is sealed elsewhere."""
    draft = Draft(at)
    draft.write()
    canceled = threading.Event()
    (draft.entry / "sealing").write_bytes(b"of the next attempt")

    def make_draft(*arguments: Any) -> BundleDraft:
        canceled.set()
        return BundleDraft(*arguments)

    monkeypatch.setattr(sealer_module, "BundleDraft", make_draft)
    with pytest.raises(SealCanceledError):
        sealer.seal(draft.bundle_id, lambda total, done: None, canceled)
    assert (draft.entry / "sealing").read_bytes() == b"of the next attempt"
    assert not (draft.entry / "crashes.json").exists()


def test_a_store_that_fails_leaves_the_entry_as_it_was(
    at: SpoolDir, sealer: Sealer, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Draft(at)
    for number in range(40):
        draft.add_log(b"%d.log" % number, log_lines(300_000, number))
    draft.write()
    before = sorted(str(path) for path in draft.entry.rglob("*"))
    original = SegmentStore.put
    calls = iter(range(1000))

    def fail(segments: SegmentStore, runs: Sequence[Run], owner: str) -> list[Piece]:
        if next(calls) == 10:
            raise StoreError("writing a segment failed: no space left on device")
        return original(segments, runs, owner)

    monkeypatch.setattr(SegmentStore, "put", fail)
    with pytest.raises(StoreError, match="no space"):
        sealer.seal(draft.bundle_id, lambda total, done: None, NEVER)
    assert list(at.store.rglob("*.gz")) == []
    # The crash marks are there, and empty.
    left = {str(path) for path in draft.entry.rglob("*")}
    assert left - {str(draft.entry / "sealing")} == set(before)
    monkeypatch.undo()
    assert sealer.seal(draft.bundle_id, lambda total, done: None, NEVER) is not None
    assert at.logs(draft) == draft.expected


def test_a_committed_bundle_is_only_cleaned_up(at: SpoolDir, sealer: Sealer, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft(at)
    draft.add_log(b"app.log", b"content")
    draft.write()
    # The clean-up fails the first time.
    area = draft.area()
    (area / "owner.json").write_text('{"installation": "ffffffffffff"}')
    sealed = sealer.seal(draft.bundle_id, lambda total, done: None, NEVER)
    assert sealed is not None
    assert "not ours" in sealed.left
    assert draft.entry.is_dir()
    (area / "owner.json").write_text(f'{{"installation": "{INSTALLATION}"}}')
    again = sealer.seal(draft.bundle_id, lambda total, done: pytest.fail("it was sealed twice"), NEVER)
    assert again is not None
    assert (again.header, again.left) == (sealed.header, "")
    assert at.left() == []


def test_deleting_a_sealed_bundle_does_not_bring_it_back(at: SpoolDir, sealer: Sealer) -> None:
    draft = Draft(at)
    draft.add_log(b"app.log", b"content")
    draft.write()
    area = draft.area()
    (area / "owner.json").write_text('{"installation": "ffffffffffff"}')
    assert sealer.seal(draft.bundle_id, lambda total, done: None, NEVER) is not None
    assert sealer.delete("web", draft.bundle_id) > 0
    # What cannot be cleaned up yet is tried again by the next seal of the entry, which makes no bundle.
    (area / "owner.json").write_text(f'{{"installation": "{INSTALLATION}"}}')
    assert sealer.seal(draft.bundle_id, lambda total, done: None, NEVER) is None
    assert at.left() == []
    assert list(StoreReader.open(at.store).directories()) == []
