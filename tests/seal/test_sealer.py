"""What comes out of a seal, in this process: the entries, their bytes, gaps and reports."""

import itertools
import json
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from support.sealing import NEVER, Seal
from support.spooled import CREATED, MTIME_NS, Draft, SpoolDir, log_lines
from zonebundle.model.record import Limits, Part
from zonebundle.seal.sealer import Sealer
from zonebundle.store.pieces import CHUNK, SMALL
from zonebundle.store.reader import StoreReader
from zonebundle.store.splice import splice


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
    report = at.report(draft)
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
    assert "leads out of the bundle" in at.gaps(draft)[path.decode()]


@pytest.mark.parametrize("name", ["report.json", "../x", "/x", "", "logs/zone/app.log", "metadata.toml"])
def test_an_output_cannot_take_the_name_of_another_entry(at: SpoolDir, seal: Seal, name: str) -> None:
    draft = Draft(at)
    draft.add_output(name, b"evil")
    draft.add_output("who", b"good")
    seal(draft)
    entries = at.entries(draft)
    assert entries[b"who"][1] == b"good"
    assert b"evil" not in {data for _, data in entries.values()}
    assert "cannot have this name" in at.gaps(draft)[repr(name)]


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
    assert at.gaps(draft) == {}


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


def test_limits_of_a_bundle_leave_out_the_oldest(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at, limits=Limits(files=3, bundle=1000))
    for number, size in enumerate([400, 500, 300, 50, 10]):
        draft.add_log(b"%d.log" % number, b"z" * size)
    seal(draft)
    assert sorted(at.logs(draft)) == [b"zone/0.log", b"zone/1.log", b"zone/3.log"]
    (gap,) = at.gaps(draft).items()
    assert gap[0] == "2 logs, 310 B"
    assert "beyond the limits" in gap[1]


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


def test_the_mtime_of_what_we_wrote_is_the_bundles(at: SpoolDir, seal: Seal) -> None:
    draft = Draft(at)
    seal(draft)
    assert at.entries(draft)[b"report.json"][0].mtime == int(CREATED)
