"""What comes out of a seal, in this process: the entries, their bytes, gaps and reports."""

import itertools
import json
import os
import random
import subprocess
import tarfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.spooled import CREATED, INSTALLATION, MTIME_NS, Draft, SpoolDir, log_lines
from zonebundle.errors import FormatError, NotFoundError, SealCanceledError, SealError, StoreError
from zonebundle.model.manifest import Piece
from zonebundle.model.record import Limits, Part
from zonebundle.seal import compress
from zonebundle.seal.sealer import Sealed, Sealer
from zonebundle.store import pieces
from zonebundle.store.objects import SegmentStore
from zonebundle.store.pieces import CHUNK, SMALL, Run
from zonebundle.store.reader import StoreReader
from zonebundle.store.splice import splice

Seal = Callable[[Draft], Sealed]
NEVER = threading.Event()


def report_of(at: SpoolDir, draft: Draft) -> dict[str, list[dict[str, str]]]:
    data: dict[str, list[dict[str, str]]] = json.loads(at.entries(draft)[b"report.json"][1])
    return data


def gaps_of(at: SpoolDir, draft: Draft) -> dict[str, str]:
    """The gaps but for the one that every draft has."""
    gaps = {gap["what"]: gap["reason"] for gap in report_of(at, draft)["gaps"]}
    assert gaps.pop("pstack.7") == "the process was gone"
    return gaps


def test_a_bundle_has_every_entry_in_its_place(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    draft.add_output("ptree", b'Command: ["ptree"]\n\n1 init\n')
    draft.add_output("pfiles.7", b"")
    draft.add_log(b"app.log", log_lines(2000), mode=0o640)
    draft.add_log(b"deep/down/app.log", log_lines(3 * CHUNK + 17, 1), mode=0o600)
    draft.add_log(b"app.log.1", log_lines(500, 2))
    sealed = seal(draft)
    entries = at.entries(draft)
    assert list(entries) == [
        b"metadata.toml",
        b"ptree",
        b"pfiles.7",
        b"logs/zone/app.log",
        b"logs/zone/deep/down/app.log",
        b"logs/zone/app.log.1",
        b"report.json",
        b"trace.json",
        b"manifest.jsonl",
    ]
    assert at.logs(draft) == draft.expected
    assert entries[b"ptree"][1] == b'Command: ["ptree"]\n\n1 init\n'
    assert f'bundle_id = "{draft.bundle_id}"'.encode() in entries[b"metadata.toml"][1]
    info = entries[b"logs/zone/app.log"][0]
    assert (info.mode, info.mtime, info.type) == (0o640, MTIME_NS // 10**9, tarfile.REGTYPE)
    assert (sealed.header.gaps, sealed.header.hold_seconds, sealed.header.graceful_seconds) == (1, 0.004, 0.5)
    assert sealed.size == sum(len(part) for part in splice(StoreReader.open(at.store).find("web", draft.bundle_id)))
    assert at.left() == []


def test_the_report_tells_of_hold_and_seal(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    draft.add_log(b"app.log", log_lines(2000))
    seal(draft)
    report = json.loads(at.entries(draft)[b"report.json"][1])
    assert {key: report[key] for key in ("zone", "bundle_id", "hold_seconds", "graceful_seconds")} == {
        "zone": "web",
        "bundle_id": draft.bundle_id,
        "hold_seconds": 0.004,
        "graceful_seconds": 0.5,
    }
    assert [(step["name"], step.get("lane", "hold")) for step in report["steps"]] == [
        ("ptree", "hold"),
        ("plan", "seal"),
        ("logs", "seal"),
    ]
    trace = json.loads(at.entries(draft)[b"trace.json"][1])
    lanes = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert lanes == {"hold", "seal"}


@pytest.mark.parametrize(
    "size", [0, 1, SMALL - 1, SMALL, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 4711], ids=str
)
def test_every_size_comes_out_as_it_went_in(at: SpoolDir, seal: Seal, size: int) -> None:
    draft = Draft(at)
    draft.add_log(b"before.log", b"x" * 100)
    draft.add_log(b"app.log", log_lines(size))
    draft.add_log(b"after.log", b"y" * 100)
    seal(draft)
    assert at.logs(draft) == draft.expected


def test_many_sizes_in_any_order(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    dice = random.Random(7)
    for number in range(300):
        size = dice.choice([0, 1, 100, 5_000, 40_000, SMALL, SMALL + 1, CHUNK, CHUNK + 99])
        draft.add_log(b"d%d/%d.log" % (number % 7, number), log_lines(size, number))
    seal(draft)
    assert at.logs(draft) == draft.expected
    assert list(at.logs(draft)) == list(draft.expected)


def test_gnu_tar_and_gzip_read_it(at: SpoolDir, seal: Seal, tmp_path: Path) -> None:
    draft = Draft(at)
    for number in range(20):
        draft.add_log(b"%d.log" % number, log_lines(number * 30_000, number))
    seal(draft)
    file = tmp_path / "bundle.tar.gz"
    file.write_bytes(b"".join(splice(StoreReader.open(at.store).find("web", draft.bundle_id))))
    subprocess.run(["gzip", "-t", file], check=True)
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(["tar", "-C", out, "-xzf", file], check=True, capture_output=True)
    assert done.stderr == b""
    for path, data in draft.expected.items():
        assert (out / "logs" / os.fsdecode(path)).read_bytes() == data


@pytest.mark.parametrize(
    "name",
    [b"new\nline.log", b"\xff\xfe.log", b"-rf", b"a b;c|d.log", b"\x1b[31m.log", "naïve-日本.log".encode(), b"x" * 255],
    ids=repr,
)
def test_names_of_any_bytes(at: SpoolDir, seal: Seal, name: bytes) -> None:
    draft = Draft(at)
    draft.add_log(b"dir/" + name, b"content")
    seal(draft)
    assert at.logs(draft) == {b"zone/dir/" + name: b"content"}


@pytest.mark.parametrize("path", [b"../escape", b"/etc/passwd", b"a/../../b", b"a//b", b".", b""], ids=repr)
def test_a_path_that_leads_out_is_a_gap(at: SpoolDir, seal: Seal, path: bytes) -> None:
    draft = Draft(at)
    draft.add_log(path, b"content")
    draft.add_log(b"good.log", b"good")
    seal(draft)
    assert at.logs(draft) == {b"zone/good.log": b"good"}
    assert "leads out of the bundle" in gaps_of(at, draft)[path.decode()]


@pytest.mark.parametrize("name", ["report.json", "../x", "/x", "", "logs/zone/app.log", "metadata.toml"])
def test_an_output_cannot_take_the_name_of_another_entry(at: SpoolDir, seal: Seal, name: str) -> None:
    draft = Draft(at)
    draft.add_output(name, b"evil")
    draft.add_output("who", b"good")
    seal(draft)
    entries = at.entries(draft)
    assert entries[b"who"][1] == b"good"
    assert b"evil" not in {data for _, data in entries.values()}
    assert "cannot have this name" in gaps_of(at, draft)[repr(name)]


def test_outputs_that_were_cut_are_a_gap(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    draft.add_output("ptree", b"0123456789")
    draft.write()
    os.truncate(draft.entry / "outputs", 4)
    seal_again(at, draft, seal)
    assert at.entries(draft)[b"ptree"][1] == b"0123"
    gaps = gaps_of(at, draft)
    assert "has changed on the disk" in gaps.pop("capture record")
    assert gaps == {"ptree": "its last 6 bytes are missing in the spool"}


def seal_again(at: SpoolDir, draft: Draft, seal: Seal) -> None:
    """Seal a draft that was written already."""
    draft.write = lambda: draft.bundle_id  # type: ignore[method-assign]
    seal(draft)


def test_a_repeated_name_gets_a_number(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    draft.add_log(b"app.log", b"first")
    draft.add_log(b"app.log", b"second")
    seal(draft)
    assert at.logs(draft) == {b"zone/app.log": b"first", b"zone/app.log.2": b"second"}


def test_a_log_kept_from_an_offset_says_so(at: SpoolDir, seal: Seal) -> None:
    data = log_lines(3 * CHUNK)
    first = CHUNK + 1000
    draft = Draft(at)
    name = draft.stage_bytes(data[first:])
    draft.add_file(b"app.log", len(data), (Part(first, len(data) - first, "staged", 0, name, 0),))
    seal(draft)
    assert at.logs(draft) == {b"zone/app.log.from-%d" % first: data[first:]}


def test_chunks_are_cut_at_the_same_places_in_a_log_that_has_grown(at: SpoolDir, seal: Seal) -> None:
    data = log_lines(4 * CHUNK + 100)
    whole, tail = Draft(at), Draft(at)
    whole.add_log(b"app.log", data)
    seal(whole)
    first = CHUNK + 7
    name = tail.stage_bytes(data[first:])
    tail.add_file(b"app.log", len(data), (Part(first, len(data) - first, "staged", 0, name, 0),))
    before = len(list(at.store.rglob("*.gz")))
    seal(tail)
    # Only the piece before the first whole chunk is new.
    assert len(list(at.store.rglob("*.gz"))) == before + 1


def test_parts_of_several_files_make_one_log(at: SpoolDir, seal: Seal) -> None:
    data = log_lines(2 * CHUNK + 5000)
    cuts = [0, 10, 4096, CHUNK + 3, 2 * CHUNK, len(data)]
    draft = Draft(at)
    parts = []
    for start, end in itertools.pairwise(cuts):
        # Files of the area may hold more than the part, as a pack of copies does.
        name = draft.stage_bytes(b"#" * 33 + data[start:end] + b"#" * 9)
        parts.append(Part(start, end - start, "staged", 0, name, 33))
    draft.add_file(b"app.log", len(data), tuple(parts))
    seal(draft)
    assert at.logs(draft) == {b"zone/app.log": data}


@pytest.mark.slow
def test_holes_are_not_read_and_cost_nothing(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    head, tail = log_lines(100_000), log_lines(50_000, 1)
    name = draft.stage_bytes(head)
    size = 300 * CHUNK + 12345
    with (draft.area() / name).open("r+b") as file:
        file.truncate(size)
        file.seek(200 * CHUNK + 77)
        file.write(tail)
    expected = bytearray(size)
    expected[: len(head)] = head
    expected[200 * CHUNK + 77 :][: len(tail)] = tail
    expected[200 * CHUNK + 77 : 200 * CHUNK + 77 + len(tail)] = tail
    draft.add_file(b"sparse.log", size, (Part(0, size, "staged", 0, name, 0),))
    seal(draft)
    assert at.logs(draft)[b"zone/sparse.log"] == bytes(expected)
    # The first chunk, the one with data in the middle, the rest at the end, and the zeros.
    assert len(list(at.store.rglob("*.gz"))) == 4
    assert gaps_of(at, draft) == {}


def test_what_is_compressed_is_stored_as_it_is(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    noise = random.Random(3).randbytes(2 * CHUNK + 999)
    magics = {b"gz": b"\x1f\x8b\x08", b"zst": b"\x28\xb5\x2f\xfd", b"xz": b"\xfd7zXZ\0"}
    for suffix, magic in magics.items():
        draft.add_log(b"small." + suffix, magic + noise[:5000])
        draft.add_log(b"large." + suffix, magic + noise)
    seal(draft)
    assert at.logs(draft) == draft.expected
    packed = sum(path.stat().st_size for path in at.store.rglob("*.gz"))
    raw = sum(len(data) for data in draft.expected.values())
    # ISA-L inflates random bytes by more than this.
    assert packed < raw * 1.001 + 20_000


def test_a_second_bundle_of_the_same_logs_adds_no_segment(at: SpoolDir, seal: Seal) -> None:
    first, second = Draft(at), Draft(at)
    for draft in (first, second):
        for number in range(30):
            draft.add_log(b"%d.log" % number, log_lines(number * 40_000, number))
    seal(first)
    before = sorted(at.store.rglob("*.gz"))
    seal(second)
    assert sorted(at.store.rglob("*.gz")) == before
    assert at.logs(second) == second.expected


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
    assert gaps_of(at, draft) == {
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
    assert gaps_of(at, draft) == {
        "logs/zone/changed.log.1": "was written to after the hold; the bytes are as they were found"
    }
    assert (at.zone_root / "same.log.1").exists()


def test_limits_of_a_bundle_leave_out_the_oldest(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at, limits=Limits(files=3, bundle=1000))
    for number, size in enumerate([400, 500, 300, 50, 10]):
        draft.add_log(b"%d.log" % number, b"z" * size)
    seal(draft)
    assert sorted(at.logs(draft)) == [b"zone/0.log", b"zone/1.log", b"zone/3.log"]
    (gap,) = gaps_of(at, draft).items()
    assert gap[0] == "2 logs, 310 B"
    assert "beyond the limits" in gap[1]


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
    assert "7 bytes are zeros" in gaps_of(at, draft)["logs/zone/app.log"]


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


def test_progress_reaches_the_total(at: SpoolDir, sealer: Sealer) -> None:
    draft = Draft(at)
    draft.add_log(b"big.log", log_lines(5 * CHUNK))
    draft.add_log(b"small.log", log_lines(1000))
    told: list[tuple[int, int]] = []
    sealer.seal(draft.write(), lambda total, done: told.append((total, done)), NEVER)
    total = 5 * CHUNK + 1000
    assert told[0] == (total, 0)
    assert told[-1] == (total, total)
    assert told == sorted(told)


def test_the_total_counts_only_what_is_kept(at: SpoolDir, sealer: Sealer) -> None:
    draft = Draft(at)
    name = draft.stage_bytes(b"tail")
    draft.add_file(b'q"size":99.log', 10_000, (Part(9_996, 4, "staged", 0, name, 0),))
    told: list[tuple[int, int]] = []
    sealer.seal(draft.write(), lambda total, done: told.append((total, done)), NEVER)
    assert told == [(4, 0), (4, 4)]


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


def test_the_mtime_of_what_we_wrote_is_the_bundles(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    seal(draft)
    assert at.entries(draft)[b"report.json"][0].mtime == int(CREATED)
