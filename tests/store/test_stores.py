"""Several store dirs: what one misses, and that nothing deleted comes back, whoever comes in between."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import leaks
from support.stored import File, check_clean, check_whole, content, download, metadata, seal
from zonebundle.errors import NoSuchBundleError, StoreError
from zonebundle.host import trace
from zonebundle.store import open_stores, replicate
from zonebundle.store import store as store_module
from zonebundle.store import stores as stores_module
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.readers import StoreReaders
from zonebundle.store.store import Store, prepare
from zonebundle.store.stores import Stores

FILES = [File(b"ptree", b"1", own=True), File(b"logs/a", content(1, 5000)), File(b"logs/b", content(2, 300_000))]
TIMEOUT = 30.0


class Dirs:
    """Some store dirs and the state directory of one host."""

    def __init__(self, base: Path, count: int = 2) -> None:
        self.state = base / "state"
        self.state.mkdir()
        self.directories = [base / f"store-{number}" for number in range(count)]
        for directory in self.directories:
            prepare(directory)
        self.stores = Stores(self.directories, self.state)

    def seal(self, number: int = 0) -> StoredBundle:
        """A bundle in one dir alone."""
        store = next(store for store in self.stores.all() if store.directory == self.directories[number])
        made = seal(store, FILES).metadata
        return store.find(made.zone, made.bundle_id)

    def places(self, bundle: StoredBundle) -> list[int]:
        """The dirs that have the bundle, whole."""
        made = bundle.header.metadata
        found = []
        for number, directory in enumerate(self.directories):
            if (directory / "bundles" / made.zone / made.bundle_id / "manifest.jsonl").exists():
                found.append(number)
        return found

    def delete(self, bundle: StoredBundle) -> int:
        made = bundle.header.metadata
        return self.stores.delete(made.zone, made.bundle_id)

    def buried(self) -> set[str]:
        assert self.stores.tombstones is not None
        return self.stores.tombstones.all()

    def move_away(self, number: int) -> Path:
        away = self.directories[number].with_name("away")
        self.directories[number].rename(away)
        return away

    def check(self) -> None:
        """Everything is equal, and nothing is left over."""
        assert self.buried() == set()
        for store in self.stores.all():
            store.sweep()
            for bundle in store.stored():
                check_whole(bundle)
            check_clean(store.directory)
        first, *others = map(_bytes, self.directories)
        assert all(other == first for other in others)


def _bytes(directory: Path) -> dict[str, bytes]:
    below = [path for name in ("bundles", "segments") for path in (directory / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in below}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_stores, "_PAUSE", 0.0)
    monkeypatch.setattr(store_module, "_RESERVE_BYTES", 4096)


@pytest.fixture
def dirs(tmp_path: Path) -> Iterator[Dirs]:
    with leaks.no_leaks():
        dirs = Dirs(tmp_path)
        yield dirs
        dirs.stores.close()


def test_copies_have_the_same_bytes(dirs: Dirs) -> None:
    bundle = dirs.seal()
    assert dirs.stores.copy(bundle) == ""
    assert dirs.places(bundle) == [0, 1]
    dirs.check()
    assert dirs.delete(bundle) > 0
    assert dirs.places(bundle) == []
    dirs.check()


def test_two_copies_of_one_bundle_at_the_same_time(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seal and a catch-up: neither may write into the other's draft, or take what the other has committed."""
    bundle = dirs.seal()
    gate = threading.Barrier(2)
    copy = replicate.copy_bundle

    def slow(bundle: StoredBundle, target: Store) -> int:
        written = copy(bundle, target)
        # What was copied stays.
        target.find("web", bundle.header.metadata.bundle_id)
        return written

    monkeypatch.setattr(stores_module, "copy_bundle", slow)

    def begin(work: Callable[[], object]) -> object:
        gate.wait(TIMEOUT)
        return work()

    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            one = threads.submit(begin, lambda: dirs.stores.copy(bundle))
            other = threads.submit(begin, dirs.stores.catch_up)
            assert one.result(TIMEOUT) == ""
            assert other.result(TIMEOUT) in ((1, 0, []), (0, 0, []))
            assert dirs.places(bundle) == [0, 1]
            dirs.check()
            made = bundle.header.metadata
            dirs.stores.all()[1].delete(made.zone, made.bundle_id)


def test_a_store_has_one_draft_of_a_bundle(dirs: Dirs) -> None:
    store = dirs.stores.all()[0]
    made = metadata()
    directory = store.make_draft(made.zone, made.bundle_id)
    (directory / "frame").write_bytes(b"half")
    with pytest.raises(Exception, match="is being written to store"):
        store.make_draft(made.zone, made.bundle_id)
    assert (directory / "frame").read_bytes() == b"half"
    store.remove_draft(directory)
    store.remove_draft(store.make_draft(made.zone, made.bundle_id))


@pytest.mark.parametrize(
    "point", ["replicate.segments-durable", "replicate.frame-written", "before publish", "replicate.committed"]
)
def test_a_deletion_during_a_copy(dirs: Dirs, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    bundle = dirs.seal()

    def at(name: str) -> None:
        if name == point:
            monkeypatch.setattr(trace, "point", lambda name: None)
            dirs.delete(bundle)

    monkeypatch.setattr(trace, "point", at)
    publish = Store.publish

    def publish_late(store: Store, directory: Path, draft: str) -> None:
        # The copy has looked whether the bundle is still there.
        at("before publish")
        publish(store, directory, draft)

    monkeypatch.setattr(Store, "publish", publish_late)
    assert dirs.stores.copy(bundle) == ""
    assert dirs.places(bundle) == []
    assert dirs.stores.catch_up() == (0, 0, [])
    dirs.check()


def test_a_copy_that_dies_after_a_deletion_leaves_the_tombstone(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = dirs.seal()

    class Killed(BaseException):
        pass

    def at(name: str) -> None:
        if name == "replicate.committed":
            raise Killed

    publish = Store.publish

    def publish_late(store: Store, directory: Path, draft: str) -> None:
        monkeypatch.setattr(trace, "point", lambda name: None)
        dirs.delete(bundle)
        monkeypatch.setattr(trace, "point", at)
        publish(store, directory, draft)

    monkeypatch.setattr(Store, "publish", publish_late)
    # A kill runs no clean-up.
    monkeypatch.setattr("zonebundle.store.replicate._abandon", lambda *arguments: None)
    with pytest.raises(Killed):
        dirs.stores.copy(bundle)
    assert dirs.places(bundle) == [1]
    monkeypatch.undo()
    dirs.stores.close()
    dirs.stores = Stores(dirs.directories, dirs.state)
    assert dirs.stores.catch_up() == (0, 1, [])
    dirs.check()


def test_a_dir_that_comes_back_during_a_deletion_keeps_the_tombstone(
    dirs: Dirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = dirs.seal()
    dirs.stores.copy(bundle)
    away = dirs.move_away(1)
    remove_all = Store.remove_all

    def and_back(store: Store, directories: Iterator[Path]) -> int:
        freed = remove_all(store, directories)
        away.rename(dirs.directories[1])
        return freed

    monkeypatch.setattr(Store, "remove_all", and_back)
    dirs.delete(bundle)
    assert dirs.places(bundle) == [1]
    assert dirs.buried() == {bundle.header.metadata.bundle_id}
    assert dirs.stores.catch_up() == (0, 1, [])
    assert dirs.places(bundle) == []
    dirs.check()


def test_an_empty_mount_point_is_not_a_dir_that_is_free_of_a_bundle(dirs: Dirs) -> None:
    """Unmounted without a word: what was opened is still open, and its path leads to nothing."""
    bundle = dirs.seal()
    dirs.stores.copy(bundle)
    away = dirs.move_away(1)
    dirs.directories[1].mkdir()
    dirs.delete(bundle)
    dirs.directories[1].rmdir()
    away.rename(dirs.directories[1])
    assert dirs.stores.catch_up() == (0, 1, [])
    assert dirs.places(bundle) == []
    dirs.check()


def test_a_deletion_that_fails_in_one_dir_is_made_up_for(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = dirs.seal()
    dirs.stores.copy(bundle)
    fail = _failing(dirs.directories[0], errno.EROFS)
    monkeypatch.setattr(os, "rename", fail(os.rename))
    before = dirs.stores.attendance()
    # It is deleted where that could be, and nowhere to be read.
    assert dirs.delete(bundle) > 0
    assert dirs.places(bundle) == [0]
    assert not dirs.stores.attendance() <= before
    readers = StoreReaders(dirs.directories)
    assert list(readers.stored()) == []
    with pytest.raises(NoSuchBundleError):
        readers.find("web", bundle.header.metadata.bundle_id)
    copied, deleted, problems = dirs.stores.catch_up()
    assert (copied, deleted, len(problems)) == (0, 0, 1)
    # What could not be done must not be forgotten.
    assert dirs.buried() == {bundle.header.metadata.bundle_id}
    monkeypatch.undo()
    assert dirs.stores.catch_up() == (0, 1, [])
    dirs.check()


def test_a_deletion_that_fails_everywhere_is_told(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = dirs.seal()
    dirs.stores.copy(bundle)
    monkeypatch.setattr(os, "rename", _failing(dirs.state.parent, errno.EIO)(os.rename))
    with pytest.raises(StoreError, match="input/output error"):
        dirs.delete(bundle)
    monkeypatch.undo()
    dirs.stores.catch_up()
    dirs.check()


def _failing(below: Path, number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def wrap(real: Callable[..., None]) -> Callable[..., None]:
        def call(*paths: object, **options: object) -> None:
            # Tombstones go elsewhere than bundles.
            if any(f"{below}/" in str(path) and "tombstones" not in str(path) for path in paths):
                raise OSError(number, os.strerror(number), str(paths[0]))
            real(*paths, **options)

        return call

    return wrap


def test_what_a_dir_missed_is_seen_from_its_attendance(dirs: Dirs) -> None:
    there = dirs.stores.attendance()
    assert len(there) == 2
    assert dirs.stores.attendance() == there
    # A short failure, between two looks: it is there again, and has missed what was sealed meanwhile.
    dirs.stores.give_up(dirs.stores.all()[1], StoreError("a disk error"))
    assert len(dirs.stores.attendance()) == 2
    assert not dirs.stores.attendance() <= there
    there = dirs.stores.attendance()
    # Away and back, or another disk.
    away = dirs.move_away(1)
    assert dirs.stores.attendance() < there
    prepare(dirs.directories[1])
    assert len(dirs.stores.attendance()) == 2
    assert not dirs.stores.attendance() <= there
    shutil.rmtree(away)


def test_a_replaced_dir_is_filled_again(dirs: Dirs) -> None:
    bundles = [dirs.seal() for _ in range(3)]
    for bundle in bundles:
        dirs.stores.copy(bundle)
    shutil.rmtree(dirs.directories[0])
    prepare(dirs.directories[0])
    assert dirs.stores.catch_up() == (3, 0, [])
    assert [dirs.places(bundle) for bundle in bundles] == [[0, 1]] * 3
    dirs.check()


def test_two_bundles_of_one_seal_become_one(dirs: Dirs) -> None:
    """Sealed into the second dir while the first, which had it already, was away."""
    made = metadata()
    first, second = dirs.stores.all()
    seal(first, FILES, made)
    seal(second, [*FILES, File(b"report.json", b"other times", own=True)], made)
    bundle = first.find(made.zone, made.bundle_id)
    expected = download(bundle)
    assert dirs.stores.catch_up() == (1, 0, [])
    assert download(second.find(made.zone, made.bundle_id)) == expected
    dirs.check()


def test_a_damaged_copy_is_left_to_the_repair(dirs: Dirs) -> None:
    bundle = dirs.seal()
    dirs.stores.copy(bundle)
    frame = dirs.stores.all()[1].bundle_directory("web", bundle.header.metadata.bundle_id) / "frame"
    whole = frame.read_bytes()
    frame.write_bytes(whole[:-1])
    assert "verify --repair" in dirs.stores.copy(bundle)
    assert frame.read_bytes() == whole[:-1]
    frame.write_bytes(whole)
    dirs.check()


def test_a_slow_dir_keeps_nobody_from_the_others(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, other = dirs.seal(), dirs.seal()
    begun, go_on = threading.Event(), threading.Event()
    copy = replicate.copy_bundle

    def wait(bundle: StoredBundle, target: Store) -> int:
        if bundle.directory == slow.directory:
            begun.set()
            assert go_on.wait(TIMEOUT)
        return copy(bundle, target)

    monkeypatch.setattr(stores_module, "copy_bundle", wait)
    with ThreadPoolExecutor(1) as threads:
        copying = threads.submit(dirs.stores.copy, slow)
        assert begun.wait(TIMEOUT)
        assert dirs.stores.copy(other) == ""
        dirs.stores.find("web", slow.header.metadata.bundle_id)
        dirs.delete(slow)
        assert dirs.places(slow) == []
        go_on.set()
        assert copying.result(TIMEOUT) == ""
    assert dirs.places(slow) == []
    dirs.check()


def test_work_on_a_dir_that_goes_away_is_ended_before_it_is_given_back(dirs: Dirs) -> None:
    path = str(dirs.directories[1])
    with dirs.stores.working():
        store = dirs.stores.all()[1]
        dirs.stores.drain(path)
        with dirs.stores.working():
            # Began after the drain: no reason to wait.
            assert [one.directory for one in dirs.stores.all()] == dirs.directories[:1]
        assert dirs.stores.is_in_use(path)
        seal(store, FILES)
    assert not dirs.stores.is_in_use(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        store.segments.flush()
        os.fstat(store.segments._descriptor)
    dirs.stores.undrain(path)
    assert dirs.stores.catch_up() == (1, 0, [])
    dirs.check()


def test_tombstones_of_killed_writes_are_tidied_up(dirs: Dirs) -> None:
    made = metadata()
    own = threading.get_native_id()
    for root in (dirs.state, *dirs.directories):
        (root / "tombstones").mkdir(exist_ok=True)
        (root / "tombstones" / f".{made.bundle_id}.4194305.tmp").write_bytes(b"")
        (root / "tombstones" / f".{made.bundle_id}.{own}.tmp").write_bytes(b"")
    dirs.stores.catch_up()
    # The other one may be on its way.
    for root in (dirs.state, *dirs.directories):
        assert [path.name for path in (root / "tombstones").iterdir()] == [f".{made.bundle_id}.{own}.tmp"]
