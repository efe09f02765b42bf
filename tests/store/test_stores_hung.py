"""Several store dirs, of which one does not answer: the others are used, and nothing is done twice or lost."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import leaks, wait
from support.stored import File, check_clean, check_whole, content, seal
from zonebundle.errors import NoSuchBundleError, SilentError, StoreError
from zonebundle.store import open_stores, replicate, tombstones, watch
from zonebundle.store import store as store_module
from zonebundle.store import stores as stores_module
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.store import Store, prepare
from zonebundle.store.stores import Stores

FILES = [File(b"ptree", b"1", own=True), File(b"logs/a", content(1, 5000))]
TIMEOUT = 30.0

pytestmark = pytest.mark.slow


class Dirs:
    """Three store dirs; system calls in the second one, which are told by `hangs`, wait until `answer`."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = base / "state"
        self.state.mkdir()
        self.directories = [base / f"store-{number}" for number in range(3)]
        for directory in self.directories:
            prepare(directory)
        self.hung = self.directories[1]
        self._patch = monkeypatch
        self._answers = threading.Event()
        self._answers.set()
        self.stores = Stores(self.directories, self.state)

    def hangs(self, where: Any, name: str, place: Callable[..., Path]) -> None:
        """From now on, calls of `where.name` hang if `place`, given their arguments, is in the second dir."""
        real = getattr(where, name)

        def hang(*arguments: Any, **options: Any) -> Any:
            if place(*arguments).is_relative_to(self.hung):
                assert self._answers.wait(TIMEOUT)
            return real(*arguments, **options)

        self._answers.clear()
        self._patch.setattr(where, name, hang)
        # As all of the disk does.
        write = watch.Watch._write

        def hang_write(watched: watch.Watch) -> None:
            if watched.directory == self.hung:
                assert self._answers.wait(TIMEOUT)
            write(watched)

        self._patch.setattr(watch.Watch, "_write", hang_write)

    def answer(self) -> None:
        self._answers.set()
        wait.until(lambda: len(self.stores.all()) == 3, TIMEOUT, "the dir is taken up again")

    def seal(self) -> StoredBundle:
        store = self.stores.all()[0]
        made = seal(store, FILES).metadata
        return store.find(made.zone, made.bundle_id)

    def there(self) -> list[Path]:
        return [store.directory for store in self.stores.all()]

    def places(self, bundle: StoredBundle) -> list[int]:
        made = bundle.header.metadata
        manifests = [one / "bundles" / made.zone / made.bundle_id / "manifest.jsonl" for one in self.directories]
        return [number for number, manifest in enumerate(manifests) if manifest.exists()]

    def check(self) -> None:
        assert self.stores.tombstones is not None
        assert self.stores.tombstones.all() == set()
        for store in self.stores.all():
            store.sweep()
            for bundle in store.stored():
                check_whole(bundle)
            check_clean(store.directory)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_stores, "_PAUSE", 0.0)
    monkeypatch.setattr(watch, "_PATIENCE", 0.2)
    # Real writes to the other dirs are to be in time on a machine that is busy.
    monkeypatch.setattr(watch, "_WRITE_PATIENCE", 3.0)
    monkeypatch.setattr(store_module, "_RESERVE_BYTES", 4096)


@pytest.fixture
def dirs(unopened: Dirs) -> Dirs:
    # On a busy disk an opening may last, and those beside the first are not waited for.
    wait.until(lambda: len(unopened.stores.all()) == 3, TIMEOUT, "all are opened")
    return unopened


@pytest.fixture
def unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dirs]:
    with leaks.no_leaks():
        dirs = Dirs(tmp_path, monkeypatch)
        try:
            yield dirs
        finally:
            dirs._answers.set()
            dirs.stores.close()


def of_store(store: Store, *_: Any) -> Path:
    return store.directory


def test_a_look_that_hangs_is_made_once(dirs: Dirs) -> None:
    bundle = dirs.seal()
    assert dirs.there() == dirs.directories
    there = dirs.stores.attendance()
    dirs.hangs(Store, "is_in_place", of_store)
    assert dirs.there() == [dirs.directories[0], dirs.directories[2]]
    threads = threading.active_count()
    for _ in range(10):
        assert len(dirs.stores.attendance()) == 2
    assert threading.active_count() <= threads
    assert list(dirs.stores.failures) == [dirs.hung]
    assert dirs.stores.copy(bundle) == ""
    assert dirs.places(bundle) == [0, 2]
    dirs.answer()
    # It has missed something.
    assert not dirs.stores.attendance() <= there
    assert dirs.stores.catch_up() == (1, 0, [])
    assert dirs.places(bundle) == [0, 1, 2]
    dirs.check()


def test_many_who_look_at_the_same_time(dirs: Dirs) -> None:
    dirs.stores.all()
    dirs.hangs(Store, "is_in_place", of_store)
    with ThreadPoolExecutor(8) as threads:
        for found in [threads.submit(dirs.there) for _ in range(8)]:
            assert found.result(TIMEOUT) == [dirs.directories[0], dirs.directories[2]]
    dirs.answer()
    dirs.check()


def test_an_opening_that_hangs(unopened: Dirs) -> None:
    # The first dir that is opened is waited for longer than another.
    unopened.hangs(Store, "open", lambda directory, *_: directory)
    assert unopened.there() == [unopened.directories[0], unopened.directories[2]]
    bundle = unopened.seal()
    unopened.answer()
    assert unopened.stores.catch_up() == (1, 0, [])
    assert unopened.places(bundle) == [0, 1, 2]
    unopened.check()


def test_an_opening_that_a_drain_overtakes(unopened: Dirs) -> None:
    unopened.hangs(Store, "open", lambda directory, *_: directory)
    unopened.stores.all()
    unopened.stores.drain(str(unopened.hung))
    assert unopened.stores.is_in_use(str(unopened.hung))
    assert not unopened.stores.is_in_use(str(unopened.directories[0]))
    unopened._answers.set()
    wait.until(lambda: not unopened.stores.is_in_use(str(unopened.hung)), TIMEOUT, "the opening has ended")
    # It is closed again: another may write to it.
    Store.open(unopened.hung, make=False).close()
    assert len(unopened.there()) == 2
    unopened.stores.undrain(str(unopened.hung))
    assert len(unopened.there()) == 3


def test_another_dir_is_drained_meanwhile(dirs: Dirs) -> None:
    dirs.stores.all()
    dirs.hangs(Store, "find", of_store)
    with dirs.stores.working(), pytest.raises(SilentError):
        dirs.stores.on(dirs.stores.all()[1], lambda: dirs._answers.wait(TIMEOUT))
    dirs.stores.drain(str(dirs.directories[2]))
    assert not dirs.stores.is_in_use(str(dirs.directories[2]))
    dirs.stores.drain(str(dirs.hung))
    assert dirs.stores.is_in_use(str(dirs.hung))
    dirs._answers.set()
    wait.until(lambda: not dirs.stores.is_in_use(str(dirs.hung)), TIMEOUT, "the work has ended")
    dirs.stores.undrain(str(dirs.hung))
    dirs.stores.undrain(str(dirs.directories[2]))
    wait.until(lambda: dirs.there() == dirs.directories, TIMEOUT, "all are taken up again")


def test_a_find_that_hangs(dirs: Dirs) -> None:
    bundle = dirs.seal()
    made = bundle.header.metadata
    dirs.stores.copy(bundle)
    shutil.rmtree(bundle.directory)
    dirs.hangs(Store, "find", of_store)
    assert dirs.stores.find(made.zone, made.bundle_id).directory.is_relative_to(dirs.directories[2])
    dirs.answer()
    assert dirs.stores.catch_up() == (1, 0, [])
    dirs.check()


def test_a_deletion_that_hangs_is_finished_later(dirs: Dirs) -> None:
    bundle = dirs.seal()
    made = bundle.header.metadata
    dirs.stores.copy(bundle)
    dirs.hangs(Store, "remove_all", of_store)
    assert dirs.stores.delete(made.zone, made.bundle_id) > 0
    assert dirs.places(bundle) == [1]
    # The dir that does not answer may have it.
    assert dirs.stores.delete(made.zone, made.bundle_id) == 0
    dirs.answer()
    dirs.stores.catch_up()
    assert dirs.places(bundle) == []
    with pytest.raises(NoSuchBundleError):
        dirs.stores.delete(made.zone, made.bundle_id)
    dirs.check()


def test_a_tombstone_that_hangs(dirs: Dirs) -> None:
    bundle = dirs.seal()
    made = bundle.header.metadata
    dirs.stores.copy(bundle)
    dirs.hangs(tombstones, "_write", lambda root, *_: root)
    assert dirs.stores.delete(made.zone, made.bundle_id) > 0
    assert dirs.places(bundle) == [1]
    dirs.answer()
    assert dirs.stores.catch_up() == (0, 1, [])
    assert dirs.places(bundle) == []
    dirs.check()


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_copy_that_hangs(dirs: Dirs, is_deleted: bool) -> None:
    bundle = dirs.seal()
    made = bundle.header.metadata
    dirs.hangs(stores_module, "copy_bundle", lambda bundle, target: target.directory)
    assert "does not answer" in dirs.stores.copy(bundle)
    # The next one gets it all the same, and another attempt is not stuck behind the first.
    assert dirs.places(bundle) == [0, 2]
    assert dirs.stores.copy(bundle) == ""
    assert dirs.stores.catch_up() == (0, 0, [])
    if is_deleted:
        dirs.stores.delete(made.zone, made.bundle_id)
    dirs.answer()
    dirs.stores.catch_up()
    assert dirs.places(bundle) == ([] if is_deleted else [0, 1, 2])
    dirs.check()


def test_a_copy_whose_source_hangs(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dirs.stores.all()[1]
    made = seal(store, FILES).metadata
    bundle = store.find(made.zone, made.bundle_id)
    dirs.hangs(replicate, "read_segment", lambda digest, sources: Path(sources[0]._root))
    assert "does not answer" in dirs.stores.copy(bundle)
    # Nobody else is blamed for it.
    assert dirs.there() == [dirs.directories[0], dirs.directories[2]]
    dirs.answer()
    wait.until(lambda: not dirs.stores.catch_up()[2], TIMEOUT, "it is everywhere")
    assert dirs.places(bundle) == [0, 1, 2]
    dirs.check()


def test_a_source_that_is_not_there_is_not_read(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hang unnoticed: nobody watches it."""
    store = dirs.stores.all()[1]
    made = seal(store, FILES).metadata
    bundle = store.find(made.zone, made.bundle_id)
    assert dirs.stores.copy(bundle) == ""
    assert dirs.stores.is_everywhere(bundle)
    dirs.hangs(Store, "is_in_place", of_store)
    assert len(dirs.there()) == 2
    with monkeypatch.context() as patch:
        for name in ("copy_bundle", "has_same_bytes"):
            patch.setattr(stores_module, name, lambda *_: pytest.fail("it is read"))
        assert "cannot be had" in dirs.stores.copy(bundle)
        assert not dirs.stores.is_everywhere(bundle)
    dirs.answer()


def test_a_copy_is_not_waited_for_whose_source_hangs(dirs: Dirs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores_module, "_TURN_PATIENCE", 0.1)
    store = dirs.stores.all()[1]
    made = seal(store, FILES).metadata
    bundle = store.find(made.zone, made.bundle_id)
    replicate.copy_bundle(bundle, dirs.stores.all()[2])
    dirs.hangs(replicate, "read_segment", lambda digest, sources: Path(sources[0]._root))
    assert "does not answer" in dirs.stores.copy(bundle)
    other = dirs.stores.find(made.zone, made.bundle_id)
    assert other.directory.is_relative_to(dirs.directories[2])
    assert "already" in dirs.stores.copy(other)
    dirs.answer()
    wait.until(lambda: not dirs.stores.catch_up()[2], TIMEOUT, "it is everywhere")
    assert dirs.places(bundle) == [0, 1, 2]
    dirs.check()


def test_the_locks_of_what_is_drained_are_given_up_too(dirs: Dirs) -> None:
    with dirs.stores.working():
        dirs.stores.all()
        dirs.stores.drain(str(dirs.directories[0]))
        with pytest.raises(StoreError, match="has a writer already"):
            Store.open(dirs.directories[0], make=False)
        dirs.stores.unlock()
        Store.open(dirs.directories[0], make=False).close()


def test_a_catch_up_that_meets_one_that_hangs(dirs: Dirs) -> None:
    bundles = [dirs.seal() for _ in range(3)]
    dirs.hangs(Store, "directories", of_store)
    copied, _, problems = dirs.stores.catch_up()
    assert copied == 0 or len(problems) > 0
    for bundle in bundles:
        assert dirs.places(bundle) == [0, 2]
    dirs.answer()
    wait.until(lambda: dirs.stores.catch_up() == (0, 0, []), TIMEOUT, "all is caught up")
    for bundle in bundles:
        assert dirs.places(bundle) == [0, 1, 2]
    dirs.check()


def test_all_hang(unopened: Dirs) -> None:
    with contextlib.ExitStack() as stack:
        stores = Stores([unopened.hung, unopened.hung / "none"], unopened.state)
        stack.callback(stores.close)
        stores.all()
        unopened.hangs(Store, "is_in_place", of_store)
        with pytest.raises(StoreError, match=r"there is no store.*does not answer"):
            stores.usable()
        unopened._answers.set()
        wait.until(lambda: len(stores.all()) == 1, TIMEOUT, "it is taken up again")


def test_the_only_dir_is_waited_for(unopened: Dirs) -> None:
    """There is nothing else to be done."""
    with contextlib.closing(Stores([unopened.hung], unopened.state)) as stores, ThreadPoolExecutor(1) as threads:
        unopened.hangs(Store, "is_in_place", of_store)
        assert len(stores.all()) == 1
        looking = threads.submit(stores.usable)
        assert not stores.is_in_use("/elsewhere")
        assert not looking.done()
        stores.drain("/elsewhere")
        unopened._answers.set()
        assert len(looking.result(TIMEOUT)) == 1
