"""Stores that are full, or fail: nothing half done is visible, the newest logs are kept, and what waits is sealed."""

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import leaks
from support.failing import Failing
from support.filesystems import Unavailable, fill, mounted
from support.sealing import Sealing, sealing
from support.spooled import Draft, SpoolDir, log_lines
from support.stored import check_clean, check_whole, download
from zonebundle.errors import ConflictError, FullError, NoSuchBundleError, StoreError
from zonebundle.model.quantities import format_size
from zonebundle.store import open_stores
from zonebundle.store import store as store_module
from zonebundle.store.check import check_store
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import prepare

MEGABYTE = 1 << 20
# The least that each can be made with.
SIZES = {"ext4": 64 * MEGABYTE, "xfs": 300 * MEGABYTE, "btrfs": 128 * MEGABYTE, "tmpfs": 64 * MEGABYTE}


@pytest.fixture(params=SIZES)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system of each kind."""
    (tmp_path / "small").mkdir()
    try:
        with mounted(request.param, tmp_path / "small", SIZES[request.param]) as point:
            yield point
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_stores, "_PAUSE", 0.0)


@pytest.fixture
def at(tmp_path: Path) -> SpoolDir:
    (tmp_path / "host").mkdir()
    return SpoolDir(tmp_path / "host").make()


def leave(space: int, point: Path) -> Path:
    """Take all space but about `space` bytes."""
    ballast = point / "ballast"
    with ballast.open("wb") as file:
        free = os.fstatvfs(file.fileno())
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - space)
    return ballast


def noise(seed: int, size: int) -> bytes:
    """Bytes that take as much space as they are many."""
    return b"log" + random.Random(seed).randbytes(size - 3)


def visible(directory: Path) -> list[str]:
    """The bundles that readers see, each of which has to be whole."""
    found = []
    for bundle in StoreReader.open(directory).stored():
        check_whole(bundle)
        found.append(bundle.header.metadata.bundle_id)
    return found


@pytest.mark.slow
def test_a_bundle_that_does_not_fit_is_cut(small: Path, at: SpoolDir) -> None:
    store = small / "store"
    prepare(store)
    with leaks.no_leaks(), sealing(at.state, [store]) as opened:
        kept = Draft(at)
        kept.add_log(b"old.log", log_lines(100_000))
        assert opened.seal(kept).left == ""
        before = download(StoreReader.open(store).find("web", kept.bundle_id))
        leave(20 * MEGABYTE, small)
        draft = Draft(at)
        for number in range(50):
            draft.add_log(b"app.log.%02d" % number, noise(number, MEGABYTE + 7))
        draft.write()
        for _ in range(3):
            # A deletion, or a clean-up, may be on its way.
            with pytest.raises(FullError, match="no space left"):
                opened.seal_again(draft.bundle_id)
            assert visible(store) == [kept.bundle_id]
            assert draft.entry.is_dir()
        sealed = opened.seal_again(draft.bundle_id)
        assert sealed.left == ""
        bundle = StoreReader.open(store).find("web", draft.bundle_id)
        files = check_whole(bundle)
        logs = {path.removeprefix(b"logs/"): data for path, data in files.items() if path.startswith(b"logs/")}
        # The newest, which come first, without a hole.
        assert logs == dict(list(draft.expected.items())[: len(logs)])
        assert 5 <= len(logs) < 50
        missing = list(draft.expected.values())[len(logs) :]
        gaps = [gap for gap in _gaps(files) if "did not fit" in gap["reason"]]
        assert [gap["what"] for gap in gaps] == [f"{len(missing)} logs, {format_size(sum(map(len, missing)))}"]
        assert sealed.header.gaps == 2
        assert download(StoreReader.open(store).find("web", kept.bundle_id)) == before
        assert list(check_store(StoreReader.open(store), deep=True)) == []
        # Both can be deleted on a full disk, and everything is freed.
        for one in (draft, kept):
            assert opened.sealer.delete("web", one.bundle_id) > 0
        check_clean(store)
    assert at.left() == []


def _gaps(files: dict[bytes, bytes]) -> list[dict[str, str]]:
    import json

    found: list[dict[str, str]] = json.loads(files[b"report.json"])["gaps"]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("no_pause")
def test_without_any_space_it_waits_in_the_spool(small: Path, at: SpoolDir) -> None:
    store = small / "store"
    prepare(store)
    # Before the store has its reserve.
    filler = fill(small)
    with leaks.no_leaks(), sealing(at.state, [store]) as opened:
        draft = Draft(at)
        for number in range(4):
            draft.add_log(b"%d.log" % number, noise(number, MEGABYTE))
        draft.write()
        for _ in range(5):
            with pytest.raises(StoreError, match="no space left"):
                opened.seal_again(draft.bundle_id)
            assert visible(store) == []
        # Captures go on.
        another = Draft(at)
        another.add_log(b"a.log", b"x")
        another.write()
        filler.unlink()
        os.sync()
        for one in (draft, another):
            sealed = opened.seal_again(one.bundle_id)
            assert (sealed.left, sealed.header.gaps) == ("", 1)
        opened.sealer.sweep()
        assert sorted(visible(store)) == sorted([draft.bundle_id, another.bundle_id])
        opened.upkeep.prune()
        check_clean(store)
    assert at.left() == []


@pytest.mark.slow
def test_without_inodes_a_bundle_is_cut_too(tmp_path: Path, at: SpoolDir) -> None:
    (tmp_path / "small").mkdir()
    with contextlib.ExitStack() as stack:
        try:
            small = stack.enter_context(mounted("tmpfs", tmp_path / "small", 64 * MEGABYTE))
        except Unavailable as error:
            pytest.skip(str(error))
        store = small / "store"
        prepare(store)
        opened = stack.enter_context(sealing(at.state, [store]))
        opened.storage.usable()
        space = os.statvfs(small)
        os.system(f"mount -o remount,nr_inodes={space.f_files - space.f_ffree + 20} {small}")
        draft = Draft(at)
        for number in range(50):
            draft.add_log(b"app.log.%02d" % number, noise(number, 300_000))
        draft.write()
        for _ in range(3):
            with pytest.raises(FullError):
                opened.seal_again(draft.bundle_id)
        assert opened.seal_again(draft.bundle_id).header.gaps == 2
        assert visible(store) == [draft.bundle_id]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, no_pause: None) -> None:
    monkeypatch.setattr(store_module, "_RESERVE_BYTES", 4096)


def _warm_up(opened: Sealing, at: SpoolDir) -> None:
    """Everything is open, and all threads run, before anything is counted."""
    draft = _draft(at)
    opened.seal_again(draft.bundle_id)
    opened.sealer.delete("web", draft.bundle_id)


def _draft(at: SpoolDir) -> Draft:
    draft = Draft(at)
    draft.add_output("who", b"nobody")
    draft.add_log(b"a.log", log_lines(300_000, len(list(at.base.glob("store*/bundles/web/*"))) + 1))
    draft.add_log(b"b.log", draft.bundle_id.encode() * 20)
    draft.write()
    # A seal waits for the stamps of a young record to settle.
    os.utime(draft.entry / "capture.jsonl", (0, 0))
    return draft


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_any_call_of_a_seal_may_fail(at: SpoolDir, number: int, for_good: bool) -> None:
    """The bundle is visible and whole, or not there; and the same sealer makes it when the disk is well again."""
    nth = reached = 0
    with leaks.no_leaks(), sealing(at.state, [at.store]) as opened:
        _warm_up(opened, at)
        while reached >= nth:
            nth += 1
            draft = _draft(at)
            calls = Failing(at.store, nth, number, for_good)
            with calls.failing(), leaks.no_leaks(), contextlib.suppress(StoreError):
                opened.seal_again(draft.bundle_id)
            seen = set(visible(at.store))
            reached = calls.count
            assert draft.entry.is_dir() or draft.bundle_id in seen
            if draft.entry.is_dir():
                assert opened.seal_again(draft.bundle_id).left == ""
            assert draft.bundle_id in visible(at.store)
            opened.sealer.delete("web", draft.bundle_id)
            opened.upkeep.prune()
            check_clean(at.store)
            assert at.left() == []
    assert nth > 20


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("place", ["store", "store-2"])
def test_one_of_two_dirs_may_die_at_any_call(at: SpoolDir, number: int, place: str) -> None:
    """The other one has the bundle then; when it is back, both have the same bytes."""
    directories = [at.base / "store", at.base / "store-2"]
    prepare(directories[1])
    (other,) = [directory for directory in directories if directory.name != place]
    nth = reached = 0
    with leaks.no_leaks(), sealing(at.state, directories) as opened:
        for directory in directories:
            # Each has threads of its own.
            opened.upkeep.drain(str(directory))
            _warm_up(opened, at)
            opened.upkeep.undrain(str(directory))
        opened.upkeep.repair()
        while reached >= nth:
            nth += 1
            draft = _draft(at)
            calls = Failing(at.base / place, nth, number, for_good=True)
            with calls.failing(), leaks.no_leaks():
                left = _seal_for_sure(opened, draft)
            reached = calls.count
            assert draft.bundle_id in visible(other) or left
            visible(at.base / place)
            _bring_up_to_date(opened, draft)
            copies = [StoreReader.open(directory).find("web", draft.bundle_id) for directory in directories]
            assert download(copies[0]) == download(copies[1])
            for copy in copies:
                check_whole(copy)
            opened.sealer.delete("web", draft.bundle_id)
            opened.upkeep.prune()
            for directory in directories:
                check_clean(directory)
                assert list((directory / "tombstones").iterdir()) == []
            assert at.left() == []
    assert nth > 20


def _seal_for_sure(opened: Sealing, draft: Draft) -> str:
    """As the service does: once more, after an error."""
    with contextlib.suppress(StoreError, ConflictError):
        return opened.seal_again(draft.bundle_id).left
    return opened.seal_again(draft.bundle_id).left


def _bring_up_to_date(opened: Sealing, draft: Draft) -> None:
    opened.upkeep.repair()
    if draft.entry.is_dir():
        assert opened.seal_again(draft.bundle_id).left == ""
    assert opened.upkeep.repair()["problems"] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_any_call_of_a_deletion_may_fail(at: SpoolDir, number: int) -> None:
    """It is told, or it has happened; it can be done again, and nothing comes back."""
    nth = reached = 0
    kept = _draft(at)
    with leaks.no_leaks(), sealing(at.state, [at.store]) as opened:
        opened.seal_again(kept.bundle_id)
        while reached >= nth:
            nth += 1
            draft = _draft(at)
            opened.seal_again(draft.bundle_id)
            calls = Failing(at.store, nth, number)
            told = False
            with calls.failing(), leaks.no_leaks():
                try:
                    opened.sealer.delete("web", draft.bundle_id)
                except StoreError:
                    told = True
            reached = calls.count
            assert told or visible(at.store) == [kept.bundle_id]
            # It may have been the very end of it that failed.
            with contextlib.suppress(NoSuchBundleError):
                opened.sealer.delete("web", draft.bundle_id)
            assert visible(at.store) == [kept.bundle_id]
            opened.upkeep.prune()
            check_clean(at.store)
    assert nth > 4
