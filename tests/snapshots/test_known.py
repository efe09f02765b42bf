"""What a hold need not do: stage a log that the store has already, list a directory again that has not changed."""

import json
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.staging import INSTALLATION, Kept, keep
from support.wait import until
from zonebundle.model.identity import TRUSTED_AGE_NS
from zonebundle.model.ids import new_bundle_id, snapshot_name
from zonebundle.model.manifest import Piece, decode_line, encode_line
from zonebundle.model.record import Area, KnownLog, LogFile, Part
from zonebundle.model.zone import LogTree
from zonebundle.snapshots.areas import destroy_area, prepare_area
from zonebundle.snapshots.base import Kind, KnownFile
from zonebundle.snapshots.listing import Key, Listing, TreeListing

PIECES = (Piece("ab" * 32, 10, 900, 5, 7, "cd" * 32),)
PIECES_JSON = json.dumps([piece.to_json() for piece in PIECES])


@dataclass(frozen=True)
class State:
    """What the store knows of a file."""

    state: tuple[int, int, int]
    pieces_json: str = PIECES_JSON


@dataclass
class Store:
    """Knows the files that it was told of, as they were then."""

    files: dict[int, State] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def learn(self, path: Path) -> None:
        status = path.stat()
        self.files[status.st_ino] = State((status.st_size, status.st_mtime_ns, status.st_ctime_ns))

    def known(self, filesystem: int, inodes: Sequence[int]) -> Mapping[int, KnownFile]:
        self.asked.extend(inodes)
        return {inode: self.files[inode] for inode in inodes if inode in self.files}


def settle(path: Path) -> None:
    """Wait until a further change of a file or directory would show."""
    until(lambda: time.time_ns() - path.stat().st_ctime_ns > TRUSTED_AGE_NS)


@pytest.fixture
def zone(tmp_path: Path) -> Path:
    root = tmp_path / "zone"
    (root / "sub").mkdir(parents=True)
    for name in ("app.log", "app.log.1", "sub/other.log"):
        (root / name).write_text("line\n")
    settle(root / "sub/other.log")
    return root


def test_a_known_log_is_recorded_by_its_pieces_and_not_staged(zone: Path, tmp_path: Path) -> None:
    store = Store()
    store.learn(zone / "app.log.1")
    kept = keep(zone, tmp_path / "staging", Kind.HARDLINK, known=store)
    log = kept.log("app.log.1")
    assert (log.pieces, log.parts, log.size, log.mode) == (PIECES, (Part(0, 5, "live"),), 5, 0o644)
    assert (log.mtime_ns, log.inode) == ((zone / "app.log.1").stat().st_mtime_ns, (zone / "app.log.1").stat().st_ino)
    assert kept.log("app.log").pieces == ()
    assert kept.origins("app.log") == ["staged"]


def test_a_log_in_another_state_is_staged(zone: Path, tmp_path: Path) -> None:
    store = Store()
    for number, name in enumerate(("app.log", "app.log.1", "sub/other.log")):
        size, mtime, ctime = (5, (zone / name).stat().st_mtime_ns, (zone / name).stat().st_ctime_ns)
        wrong = [(size + 1, mtime, ctime), (size, mtime + 1, ctime), (size, mtime, ctime + 1)][number]
        store.files[(zone / name).stat().st_ino] = State(wrong)
    kept = keep(zone, tmp_path / "staging", Kind.HARDLINK, known=store)
    assert len(store.asked) == 3
    assert [log.pieces for log in kept.logs] == [()] * 3


def test_a_log_that_was_changed_a_moment_ago_is_staged(zone: Path, tmp_path: Path) -> None:
    store = Store()
    # In the future, so that it stays unsettled however long this takes; the ctime is the kernel's.
    os.utime(zone / "app.log", ns=(0, time.time_ns() + 3_600_000_000_000))
    store.learn(zone / "app.log")
    kept = keep(zone, tmp_path / "staging", Kind.HARDLINK, known=store)
    assert kept.log("app.log").pieces == ()


def test_a_log_with_a_second_link_is_not_known(zone: Path, tmp_path: Path) -> None:
    store = Store()
    os.link(zone / "app.log.1", tmp_path / "link")
    settle(zone / "app.log.1")
    store.learn(zone / "app.log.1")
    assert keep(zone, tmp_path / "staging", Kind.HARDLINK, known=store).log("app.log.1").pieces == ()


@pytest.mark.parametrize("name", ["a.log", "\N{SNOWMAN}.log", os.fsdecode(b"\xff\xfe.log"), 'a\n".log'])
@pytest.mark.parametrize("root", ["/srv/web", os.fsdecode(b"/srv/\xff")])
def test_a_known_log_reads_as_a_log_file(root: str, name: str) -> None:
    known = KnownLog("zone", f"logs/{name}", root, name, 5, 0o640, 123, 7, PIECES_JSON)
    line = encode_line({"file": known.to_json()})
    assert line.count(b"\n") == 1
    assert LogFile.from_json(decode_line(line)["file"]) == LogFile(
        source="zone",
        path=os.fsencode(f"logs/{name}"),
        host_root=root,
        host_path=os.fsencode(name),
        size=5,
        mode=0o640,
        mtime_ns=123,
        inode=7,
        parts=(Part(0, 5, "live"),),
        pieces=PIECES,
    )


@pytest.fixture
def listing(zone: Path) -> TreeListing:
    """The zone, listed when nothing had changed for a while."""
    settle(zone)
    settle(zone / "sub")
    descriptor = os.open(zone, os.O_RDONLY | os.O_DIRECTORY)
    listing = TreeListing(0, LogTree("zone", str(zone)), descriptor)
    assert len(listing.look((), _never).files) == 3
    return listing


def _never() -> bool:
    return False


def test_nothing_changed(listing: TreeListing, zone: Path) -> None:
    # What is written to a log is no change of its directory.
    (zone / "app.log").write_text("more\n")
    assert listing.is_unchanged(_never)
    assert not listing.is_unchanged(lambda: True)


@pytest.mark.parametrize(
    "change",
    [
        lambda zone: (zone / "new.log").touch(),
        lambda zone: (zone / "sub/new.log").touch(),
        lambda zone: (zone / "app.log").rename(zone / "app.log.2"),
        lambda zone: (zone / "app.log").rename(zone / "app.log.1"),
        lambda zone: (zone / "sub/other.log").unlink(),
        lambda zone: (zone / "sub").rename(zone / "sup"),
        lambda zone: os.link(zone / "app.log", zone / "sub/link.log"),
    ],
)
def test_each_change_of_an_entry_shows(listing: TreeListing, zone: Path, change: Callable[[Path], object]) -> None:
    change(zone)
    # Whoever changes a directory may set its mtime back.
    for directory in (zone, *(path for path in zone.iterdir() if path.is_dir())):
        os.utime(directory, ns=(0, 0))
    assert not listing.is_unchanged(_never)


def test_another_directory_under_the_name_shows(listing: TreeListing, zone: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    before = zone.stat().st_ctime_ns
    (zone / "sub").rename(tmp_path / "old")
    (tmp_path / "sub").rename(zone / "sub")
    assert zone.stat().st_ctime_ns != before
    assert not listing.is_unchanged(_never)


def test_a_directory_that_changed_a_moment_before_is_listed_again(listing: TreeListing, zone: Path) -> None:
    (zone / "new.log").touch()
    listing.look((), _never)
    # A change in the same tick of the clock would have left no mark, or the test was slow.
    assert not listing.is_unchanged(_never) or time.time_ns() - zone.stat().st_ctime_ns > TRUSTED_AGE_NS


def test_what_could_not_be_looked_into_is_looked_at_again(listing: TreeListing, zone: Path) -> None:
    (zone / "linked").symlink_to("sub")
    settle(zone)
    listing.look((), _never)
    assert listing.is_unchanged(_never), "a link is no directory"
    listing.look((), lambda: True)
    assert not listing.is_unchanged(_never), "it was not listed to the end"


@pytest.mark.parametrize(("kind", "expected"), [(Kind.HARDLINK, 1), (Kind.COPY, 2)])
def test_quiet_directories_are_listed_once(
    zone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, expected: int
) -> None:
    settle(zone)
    settle(zone / "sub")
    looks = 0
    look = TreeListing.look

    def counted(listing: TreeListing, known: Container[Key], is_over: Callable[[], bool]) -> Listing:
        nonlocal looks
        looks += 1
        return look(listing, known, is_over)

    monkeypatch.setattr(TreeListing, "look", counted)
    kept = keep(zone, tmp_path / "staging", kind)
    assert sorted(kept.paths) == ["app.log", "app.log.1", "sub/other.log"]
    assert looks == expected


@pytest.mark.parametrize("kind", [Kind.HARDLINK, Kind.COPY])
def test_a_few_small_current_logs_need_no_area(zone: Path, tmp_path: Path, kind: Kind) -> None:
    store = Store()
    store.learn(zone / "app.log.1")
    kept, entry = keep_near(zone, tmp_path, kind, known=store)
    assert {name: part_areas(kept, name) for name in kept.paths} == {
        "app.log": [1],
        "sub/other.log": [1],
        "app.log.1": [],
    }
    assert not Path(kept.area.path).exists()
    assert (entry / "files/0").read_bytes() == b"line\n" * 2


def test_with_a_log_to_be_linked_all_are_in_the_area(zone: Path, tmp_path: Path) -> None:
    kept, entry = keep_near(zone, tmp_path, Kind.HARDLINK)
    assert {area for name in kept.paths for area in part_areas(kept, name)} == {0}
    assert not (entry / "files").exists()


def test_large_logs_are_in_the_area(zone: Path, tmp_path: Path) -> None:
    (zone / "app.log.1").unlink()
    (zone / "app.log").write_bytes(bytes(range(256)) * 1025)
    kept, entry = keep_near(zone, tmp_path, Kind.HARDLINK)
    assert {area for name in kept.paths for area in part_areas(kept, name)} == {0}
    assert not (entry / "files").exists()


def test_what_must_be_durable_is_in_the_area(zone: Path, tmp_path: Path) -> None:
    (zone / "app.log.1").unlink()
    kept, entry = keep_near(zone, tmp_path, Kind.COPY, durable=True)
    assert {area for name in kept.paths for area in part_areas(kept, name)} == {0}
    assert not (entry / "files").exists()


def test_without_room_in_the_entry_the_area_is_used(zone: Path, tmp_path: Path) -> None:
    (zone / "app.log.1").unlink()
    # A file in the way: no directory can be made there.
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry/files").write_text("")
    kept, _ = keep_near(zone, tmp_path, Kind.HARDLINK)
    assert {area for name in kept.paths for area in part_areas(kept, name)} == {0}
    assert kept.contents == {"app.log": b"line\n", "sub/other.log": b"line\n"}


def test_a_spool_entry_is_not_destroyed_as_an_area(tmp_path: Path) -> None:
    entry = tmp_path / new_bundle_id()
    entry.mkdir()
    destroy_area(Area("entry", str(entry), entry.name), INSTALLATION)
    assert entry.is_dir()


def keep_near(zone: Path, tmp_path: Path, kind: Kind, **options: Any) -> tuple[Kept, Path]:
    """Stage as a hold does: area 0 is made when it is needed, number 1 is the spool entry."""
    entry, staging = tmp_path / "entry", tmp_path / "staging"
    for directory in (entry, staging):
        directory.mkdir(exist_ok=True)
    bundle = new_bundle_id()
    area = Area("staged", str(staging / snapshot_name(INSTALLATION, bundle)), bundle)
    prepare = partial(prepare_area, Path(area.path), INSTALLATION)
    return keep(zone, staging, kind, area=area, prepare=prepare, near=(entry, 1), living=False, **options), entry


def part_areas(kept: Kept, name: str) -> list[int]:
    return [part.area for part in kept.log(name).parts if part.origin == "staged"]
