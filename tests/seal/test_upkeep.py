"""The clean-up on real stores: exactly what the plan says goes, from every dir, and what is left is under the limit."""

import os
import random
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from support import leaks
from support.sealing import Sealing, sealing
from support.spooled import Draft, SpoolDir
from support.stored import check_clean, check_whole
from zonebundle.model.identity import FileIdentity
from zonebundle.store import open_stores
from zonebundle.store import store as store_module
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import Store, prepare
from zonebundle.store.usage import bytes_used

QUOTA = 100_000_000
ORDER = ("time", "cause")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpoolDir:
    monkeypatch.setattr(store_module, "_RESERVE_BYTES", 4096)
    monkeypatch.setattr(open_stores, "_PAUSE", 0.0)
    return SpoolDir(tmp_path).make()


@pytest.fixture
def opened(at: SpoolDir) -> Iterator[Sealing]:
    prepare(_dirs(at)[1])
    with leaks.no_leaks(), sealing(at.state, _dirs(at), quota=QUOTA) as opened:
        yield opened


def _dirs(at: SpoolDir) -> list[Path]:
    return [at.store, at.base / "store-2"]


def make(at: SpoolDir, opened: Sealing, *seeds: int, zone: str = "web") -> str:
    """A sealed bundle with a log of 400,000 bytes for each seed; bundles share those of equal seeds."""
    draft = Draft(at, zone)
    for seed in seeds:
        draft.add_log(b"%d.log" % seed, _log(seed))
    draft.write()
    os.utime(draft.entry / "capture.jsonl", (0, 0))
    assert opened.seal_again(draft.bundle_id).left == ""
    return draft.bundle_id


def _log(seed: int) -> bytes:
    # It must not compress well: the clean-up counts what is on the disk.
    return b"log" + random.Random(seed).randbytes(400_000)


def there(at: SpoolDir) -> set[str]:
    """The bundles of the first dir, all whole; the others have the same."""
    found = []
    for directory in _dirs(at):
        bundles = list(StoreReader.open(directory).stored())
        for bundle in bundles:
            check_whole(bundle)
        found.append({bundle.header.metadata.bundle_id for bundle in bundles})
    assert found[0] == found[1]
    return found[0]


def clean_up(at: SpoolDir, opened: Sealing, used: int, *pinned: str) -> set[str]:
    """Clean up to less than `used` bytes; returns the bundles that went."""
    before = there(at)
    # The whole percents of a limit are too coarse for so small a store.
    opened.upkeep._quota = used * 2
    report = opened.upkeep.clean_up(50, ORDER, pinned)
    removed = {bundle_id for _, bundle_id in report["removed"]}
    assert there(at) == before - removed
    return removed


def test_under_the_limit_nothing_happens(at: SpoolDir, opened: Sealing) -> None:
    make(at, opened, 1)
    before = {path: path.stat().st_mtime_ns for path in at.store.rglob("*")}
    report = opened.upkeep.clean_up(50, ORDER, ())
    assert report["removed"] == []
    assert {path: path.stat().st_mtime_ns for path in at.store.rglob("*")} == before


def test_over_the_limit_the_oldest_go_from_every_dir(at: SpoolDir, opened: Sealing) -> None:
    bundles = [make(at, opened, number) for number in range(4)]
    used = bytes_used(at.store)
    removed = clean_up(at, opened, used - 1)
    # All have the same time, and about the same size: one is enough.
    assert len(removed) == 1
    assert removed < set(bundles)
    for directory in _dirs(at):
        assert bytes_used(directory) <= used - 1
        check_clean(directory)
        assert list((directory / "tombstones").iterdir()) == []
    assert clean_up(at, opened, bytes_used(at.store)) == set()


def test_shared_segments_are_counted_once(at: SpoolDir, opened: Sealing) -> None:
    """A bundle whose removal frees next to nothing stays, while others free something."""
    shared = [make(at, opened, 1, 2, 3) for _ in range(3)]
    alone = make(at, opened, 4, zone="zz")
    size = bytes_used(at.store)
    assert clean_up(at, opened, size - 100_000) == {alone}
    # And those that share go together, when nothing else is left.
    assert clean_up(at, opened, 200_000) == set(shared)
    assert bytes_used(at.store) <= 200_000


def test_what_is_pinned_or_in_the_spool_stays(at: SpoolDir, opened: Sealing) -> None:
    pinned, spooled, other = (make(at, opened, number) for number in range(3))
    (at.spool / spooled).mkdir()
    (at.spool / spooled / "capture.jsonl").write_bytes(b"")
    assert clean_up(at, opened, 10_000, pinned) == {other}
    shutil.rmtree(at.spool / spooled)
    assert clean_up(at, opened, 10_000, pinned) == {spooled}
    assert clean_up(at, opened, 10_000) == {pinned}


def test_what_is_sealed_during_a_clean_up_stays(at: SpoolDir, opened: Sealing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry came after the clean-up had begun, and is still there: nobody knows of it yet."""
    old = make(at, opened, 1)
    made: list[str] = []
    sweep = Store.sweep

    def seal_first(store: Store) -> int:
        if not made:
            made.append(make(at, opened, 2))
            (at.spool / made[0]).mkdir()
        return sweep(store)

    monkeypatch.setattr(Store, "sweep", seal_first)
    opened.upkeep._quota = 20_000
    assert opened.upkeep.clean_up(50, ORDER, ())["removed"] == [["web", old]]
    assert there(at) == set(made)


def test_debris_is_counted_and_goes_first(at: SpoolDir, opened: Sealing) -> None:
    kept, damaged = make(at, opened, 1), make(at, opened, 2)
    for directory in _dirs(at):
        manifest = directory / "bundles/web" / damaged / "manifest.jsonl"
        first, *rest = manifest.read_bytes().splitlines(keepends=True)
        manifest.write_bytes(b"#" + first + b"".join(rest))
    opened.upkeep._quota = (bytes_used(at.store) - 1) * 2
    # Its cause is unknown.
    assert opened.upkeep.clean_up(50, ("cause", "time"), ())["removed"] == [["web", damaged]]
    assert there(at) == {kept}
    for directory in _dirs(at):
        check_clean(directory)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "link", "manifest", "frame", "empty"])
def test_what_is_no_bundle_at_all_stops_nothing(at: SpoolDir, opened: Sealing, kind: str) -> None:
    """Whoever has put it there: the store opens, bundles are sealed and deleted, and clean-ups run."""
    kept = make(at, opened, 1)
    foreign = at.store / "bundles/web" / "6f0ee1a2-4e49-4b0f-8f1c-7a4f3a3f9d11"
    if kind == "file":
        foreign.write_bytes(b"x")
    elif kind == "link":
        foreign.symlink_to(at.base)
    else:
        foreign.mkdir()
        if kind != "empty":
            (foreign / ("manifest.jsonl" if kind == "manifest" else kind)).mkdir()
    gone = make(at, opened, 2)
    assert opened.sealer.delete("web", gone) > 0
    opened.upkeep._quota = 20_000_000
    opened.upkeep.clean_up(1, ORDER, [kept])
    opened.upkeep.prune()
    opened.storage.stores.close()
    assert opened.upkeep.prune() == 0
    reader = StoreReader.open(at.store)
    assert [bundle.header.metadata.bundle_id for bundle in reader.stored()] == [kept]
    if kind == "manifest":
        # It looks like a bundle, and can be deleted like one.
        if foreign.exists():
            opened.sealer.delete("web", foreign.name)
        assert not foreign.exists()
    # Nothing outside of the store is touched.
    assert at.base.is_dir()


def test_claims_of_seal_ahead_go_before_any_bundle(at: SpoolDir, opened: Sealing) -> None:
    kept, ahead = make(at, opened, 1), make(at, opened, 2)
    index = opened.storage.index
    assert index is not None
    bundle = StoreReader.open(at.store).find("web", ahead)
    pieces = [piece for entry in bundle.entries() for piece in entry.pieces]
    index.add([(FileIdentity(1, 2, 3, sum(piece.raw for piece in pieces), 5, 6), pieces)])
    index.claim("web", [(1, 2)])
    opened.sealer.delete("web", ahead)
    claimed = {piece.segment for piece in pieces}
    # A rotated log that was sealed ahead: no bundle uses it, and it stays.
    opened.upkeep.prune()
    assert all((at.store / f"segments/{digest[:2]}/{digest}.gz").exists() for digest in claimed)
    used = bytes_used(at.store)
    assert clean_up(at, opened, used - 1) == set()
    assert bytes_used(at.store) < used
    assert there(at) == {kept}
    assert index.claimed(claimed) == set()
    check_clean(at.store)
    # Claims on what a doomed bundle uses do not keep it either.
    bundle = StoreReader.open(at.store).find("web", kept)
    pieces = [piece for entry in bundle.entries() for piece in entry.pieces]
    index.add([(FileIdentity(1, 9, 3, sum(piece.raw for piece in pieces), 5, 6), pieces)])
    index.claim("web", [(1, 9)])
    assert clean_up(at, opened, 10_000) == {kept}
    check_clean(at.store)


def test_the_clean_up_works_where_one_dir_is_away(at: SpoolDir, opened: Sealing) -> None:
    bundles = {make(at, opened, number) for number in range(3)}
    away = at.base / "away"
    _dirs(at)[1].rename(away)
    opened.upkeep._quota = (bytes_used(at.store) - 1) * 2
    (gone,) = opened.upkeep.clean_up(50, ORDER, ())["removed"]
    away.rename(_dirs(at)[1])
    opened.upkeep.catch_up()
    assert there(at) == bundles - {gone[1]}
    for directory in _dirs(at):
        check_clean(directory)
        assert list(directory.glob("tombstones/*")) == []


def test_a_clean_up_that_was_given_up_goes_no_further(
    at: SpoolDir, opened: Sealing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dir hung: the agent was told that nothing is removed, and has the bundles read again."""
    bundles = {make(at, opened, number) for number in range(3)}
    opened.upkeep._quota = (bytes_used(at.store) - 1) * 2
    given_up = threading.Event()
    remove_all = Store.remove_all

    def hang(store: Store, directories: Iterable[Path]) -> int:
        freed = remove_all(store, directories)
        given_up.set()
        return freed

    with opened.storage.stores.working():
        store = opened.storage.usable()[0]
        monkeypatch.setattr(Store, "remove_all", hang)
        removed, _, _ = opened.upkeep._clean_up(store, 50, ORDER, set(), None, given_up)
    assert given_up.is_set()
    assert removed == []
    assert {bundle.header.metadata.bundle_id for bundle in StoreReader.open(_dirs(at)[1]).stored()} == bundles
    opened.upkeep.repair()
    assert there(at) == bundles


def test_a_dir_that_is_behind_is_caught_up_when_it_can_be(at: SpoolDir, opened: Sealing) -> None:
    """What could not be done at once is tried again, though nothing has come or gone."""
    opened.upkeep.catch_up()
    second = opened.storage.stores.all()[1]
    (second.directory / "bundles").rename(second.directory / "aside")
    (second.directory / "bundles").write_bytes(b"")
    draft = Draft(at)
    draft.add_log(b"a.log", b"a")
    draft.write()
    assert "not copied to" in opened.seal_again(draft.bundle_id).left
    opened.upkeep.catch_up()
    (second.directory / "bundles").unlink()
    (second.directory / "aside").rename(second.directory / "bundles")
    opened.upkeep._not_before = 0.0
    opened.upkeep.catch_up()
    assert there(at) == {draft.bundle_id}
