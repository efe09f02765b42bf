"""What was compressed once is not compressed again, and what only looks the same is never taken for it."""

import gzip
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.spooled import INSTALLATION, Draft, SpoolDir, log_lines
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, KnownLog, LogFile
from zonebundle.model.zone import LogTree
from zonebundle.seal import compress, reading
from zonebundle.seal.sealer import Sealer
from zonebundle.seal.storage import INDEX, Storage
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import destroy_area, prepare_area
from zonebundle.snapshots.base import Choice, Kind, OpenTree
from zonebundle.snapshots.staged import stage
from zonebundle.store import pieces
from zonebundle.store.index import IndexHint
from zonebundle.store.pieces import CHUNK, Run

OLD = 1_767_225_600
KINDS = {"ext4": Kind.HARDLINK, "xfs": Kind.REFLINK, "btrfs": Kind.REFLINK, "tmpfs": Kind.COPY}
ZONES = [*KINDS, *(f"{kind}-hinted" for kind in KINDS)]
# Of each way to stage one.
QUICK = ["ext4", "btrfs", "tmpfs-hinted"]


class Zone:
    """A zone's logs on one file system, and a sealer for its bundles."""

    def __init__(self, base: Path, kind: Kind, *, hinted: bool) -> None:
        self.at = SpoolDir(base).make()
        self.kind = kind
        self.hint = IndexHint(self.at.state / INDEX) if hinted else None
        self.staged = 0
        self.logs = base / "root" / "logs"
        self.logs.mkdir()
        self.workers = Workers(2)
        self.open()

    def open(self) -> None:
        self.storage = Storage(self.at.state, [self.at.store])
        self.sealer = Sealer(
            self.at.spool,
            self.storage,
            lambda area, unlinked: destroy_area(area, INSTALLATION, unlinked),
            self.workers,
        )

    def close(self) -> None:
        self.sealer.close()
        if self.hint is not None:
            self.hint.close()

    def write(self, name: str, data: bytes, mtime: float = OLD) -> Path:
        path = self.logs / name
        path.write_bytes(data)
        os.utime(path, (mtime, mtime))
        return path

    def age(self) -> None:
        """Let the stamps of the logs become old enough to be trusted: what is waited for is the clock."""
        youngest = max((path.stat().st_ctime_ns for path in self.logs.iterdir()), default=0)
        while time.time_ns() < youngest + 25_000_000:
            time.sleep(0.005)

    def bundle(self) -> Draft:
        """Stage and seal as a stop does; the bundle has to hold what the logs hold."""
        draft = Draft(self.at)
        area = self.at.staging / snapshot_name(INSTALLATION, draft.bundle_id)
        prepare_area(area, INSTALLATION)
        draft.add_area(Area("staged", str(area), draft.bundle_id))
        descriptor = os.open(self.logs, os.O_RDONLY | os.O_DIRECTORY)
        try:
            tree = OpenTree(LogTree("zone", str(self.logs)), descriptor)
            for item in stage(
                [(tree, Choice(self.kind, str(self.at.staging)))],
                area,
                0,
                deadline=time.monotonic() + 60,
                copy_limit=1 << 30,
                limits=draft.limits,
                living=False,
                durable=False,
                known=self.hint,
            ):
                if isinstance(item, LogFile | KnownLog):
                    draft.writer.add("file", item.to_json())
                if isinstance(item, LogFile):
                    self.staged += sum(part.origin == "staged" for part in item.parts)
        finally:
            os.close(descriptor)
        expected = {b"zone/" + os.fsencode(path.name): path.read_bytes() for path in self.logs.iterdir()}
        sealed = self.sealer.seal(draft.write(), lambda total, done: None, threading.Event())
        assert sealed is not None
        assert (sealed.left, sealed.header.gaps) == ("", 1)
        assert self.at.logs(draft) == expected
        return draft

    @property
    def segments(self) -> set[str]:
        return {path.name for path in self.at.store.glob("segments/??/*.gz")}


class Counts:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compressed = self.read = 0
        deflate, whole, chunk = pieces.deflate, reading.read_whole, reading.LogReader.read

        def count_deflate(raw: bytes, digest: str = "") -> Run:
            self.compressed += len(raw)
            return deflate(raw, digest)

        def count_whole(*arguments: object) -> object:
            raw, identity = whole(*arguments)  # type: ignore[arg-type]
            self.read += len(raw)
            return raw, identity

        def count_chunk(reader: reading.LogReader, start: int, length: int) -> bytes:
            self.read += length
            return chunk(reader, start, length)

        monkeypatch.setattr(compress, "deflate", count_deflate)
        monkeypatch.setattr(compress, "read_whole", count_whole)
        monkeypatch.setattr(reading.LogReader, "read", count_chunk)

    def since(self, work: Callable[[], object]) -> tuple[int, int]:
        """(bytes compressed, bytes read) by `work`."""
        before = self.compressed, self.read
        work()
        return self.compressed - before[0], self.read - before[1]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.fixture(params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ZONES])
def zone(request: pytest.FixtureRequest) -> Zone:
    kind, _, hinted = request.param.partition("-")
    zone = Zone(request.getfixturevalue(f"{kind}_dir"), KINDS[kind], hinted=bool(hinted))
    request.addfinalizer(zone.workers.close)
    request.addfinalizer(lambda: zone.close())
    return zone


def fill(zone: Zone) -> int:
    zone.write("app.log", log_lines(300_000, 1))
    zone.write("app.log.1", log_lines(3 * CHUNK + 5, 2), OLD - 10)
    zone.write("app.log.2", log_lines(5000, 3), OLD - 20)
    zone.write("app.log.3", b"", OLD - 30)
    for number in range(4, 12):
        zone.write(f"app.log.{number}", log_lines(20_000 + number, number), OLD - 10 * number)
    zone.age()
    return sum(path.stat().st_size for path in zone.logs.iterdir())


@pytest.mark.slow
def test_an_unchanged_zone_is_neither_read_nor_compressed(zone: Zone, counts: Counts) -> None:
    total = fill(zone)
    assert counts.since(zone.bundle) == (total, total)
    before = zone.segments
    for _ in range(3):
        zone.age()
        zone.staged = 0
        assert counts.since(zone.bundle) == (0, 0)
        # What the hold is told of is not even staged.
        assert (zone.staged == 0) == (zone.hint is not None)
    assert zone.segments == before


@pytest.mark.slow
def test_what_was_rotated_is_read_and_not_compressed(zone: Zone, counts: Counts) -> None:
    total = fill(zone)
    zone.bundle()
    for number in range(11, 0, -1):
        (zone.logs / f"app.log.{number}").rename(zone.logs / f"app.log.{number + 1}")
    (zone.logs / "app.log").rename(zone.logs / "app.log.1")
    zone.write("app.log", log_lines(1000, 99), OLD + 5)
    zone.age()
    compressed, read = counts.since(zone.bundle)
    assert compressed == 1000
    assert 0 < read <= total + 1000


def test_a_log_that_has_grown_costs_its_last_chunk(zone: Zone, counts: Counts) -> None:
    path = zone.write("app.log", log_lines(3 * CHUNK + 1000, 1))
    zone.age()
    zone.bundle()
    with path.open("ab") as file:
        file.write(log_lines(CHUNK, 2))
    zone.age()
    compressed, _ = counts.since(zone.bundle)
    assert compressed == CHUNK + 1000


@pytest.mark.slow
def test_a_log_in_an_archive_on_another_file_system_is_recognised(zone: Zone, counts: Counts, tmp_path: Path) -> None:
    fill(zone)
    zone.bundle()
    # Gone from one file system and back as another file: inode, birth and ctime are new.
    for path in list(zone.logs.iterdir()):
        shutil.copy2(path, tmp_path / path.name)
        path.unlink()
        shutil.copy2(tmp_path / path.name, zone.logs / f"{path.name}.1767225600")
    zone.age()
    assert counts.since(zone.bundle)[0] == 0


@pytest.mark.slow
def test_without_the_index_contents_are_recognised(zone: Zone, counts: Counts) -> None:
    fill(zone)
    zone.bundle()
    before = zone.segments
    zone.close()
    for path in zone.at.state.glob(f"{INDEX}*"):
        path.unlink()
    zone.open()
    zone.storage.usable()
    zone.storage.refresh()
    zone.age()
    compressed, read = counts.since(zone.bundle)
    assert compressed == 0
    assert read > 0
    assert zone.segments == before
    zone.age()
    assert counts.since(zone.bundle) == (0, 0)


@pytest.mark.slow
def test_a_segment_that_is_gone_is_made_again(zone: Zone, counts: Counts) -> None:
    total = fill(zone)
    zone.bundle()
    for path in zone.at.store.glob("segments/??/*.gz"):
        path.unlink()
    zone.age()
    # What the hold was told of is read at its place.
    assert counts.since(zone.bundle)[0] == total


def test_small_logs_of_one_content_are_compressed_once(zone: Zone, counts: Counts) -> None:
    for number in range(20):
        zone.write(f"app.log.{number}", log_lines(7000, number % 2))
    # The same chunk twice in one log, as well.
    zone.write("big.log", log_lines(CHUNK, 3) * 2)
    zone.age()
    compressed, _ = counts.since(zone.bundle)
    assert compressed == 2 * 7000 + CHUNK
    assert len(zone.segments) == 2


@pytest.mark.slow
def test_compressed_logs_are_stored(zone: Zone, counts: Counts) -> None:
    zone.write("app.log.1.gz", gzip.compress(os.urandom(3 * CHUNK)))
    zone.write("app.log.2.gz", gzip.compress(os.urandom(5000)))
    zone.age()
    assert counts.since(zone.bundle)[0] == 0
    zone.age()
    assert counts.since(zone.bundle) == (0, 0)


def forge(path: Path, data: bytes, mtime_ns: int) -> None:
    """Other bytes in the same file, of the same size and mtime."""
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_other_bytes_of_the_same_size_and_mtime_are_noticed(zone: Zone) -> None:
    small = zone.write("app.log.1", log_lines(5000, 1))
    large = zone.write("big.log.1", log_lines(2 * CHUNK, 2))
    zone.age()
    zone.bundle()
    for path, seed in ((small, 3), (large, 4)):
        forge(path, log_lines(path.stat().st_size, seed), path.stat().st_mtime_ns)
    zone.bundle()


@pytest.mark.slow
def test_changes_in_the_same_instant_are_noticed(zone: Zone) -> None:
    # At once, without waiting for the clock: the stamps of several states are the same.
    path = zone.write("app.log.1", log_lines(5000, 0))
    for seed in range(1, 40):
        if seed % 3 == 0:
            zone.age()
        zone.bundle()
        forge(path, log_lines(5000, seed), OLD * 10**9)


@pytest.mark.slow
def test_an_inode_that_is_used_again_is_another_file(zone: Zone) -> None:
    for seed in range(8):
        path = zone.write("app.log.1", log_lines(5000, seed))
        zone.age()
        zone.bundle()
        path.unlink()


@pytest.mark.parametrize("mtime", [0, -1, 4_294_967_295, 4_291_747_200])
def test_odd_times(zone: Zone, counts: Counts, mtime: int) -> None:
    path = zone.write("app.log.1", log_lines(5000, 1), mtime)
    zone.age()
    zone.bundle()
    zone.age()
    # A time in the future proves nothing; the others do as well as any.
    assert counts.since(zone.bundle) == ((0, 0) if mtime < time.time() else (0, 5000))
    forge(path, log_lines(5000, 2), path.stat().st_mtime_ns)
    zone.bundle()
