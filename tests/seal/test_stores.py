"""A sealer with several store dirs on real file systems, of which one dies, is read-only, full, slow or cut off."""

import contextlib
import errno
import fcntl
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import leaks
from support.filesystems import Unavailable, fill, mounted
from support.sealing import NEVER, Sealing, sealing
from support.several import StoreDisk, check_equal, draft_of, seal
from support.spooled import INSTALLATION, Draft, SpoolDir
from support.stored import check_whole
from zonebundle.errors import NoSuchBundleError, StoreError
from zonebundle.seal.entry import SpoolEntry
from zonebundle.seal.link import SealerLink
from zonebundle.seal.sealer import Sealed
from zonebundle.store import open_stores, replicate
from zonebundle.store import stores as stores_module
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.reader import StoreReader
from zonebundle.store.readers import StoreReaders
from zonebundle.store.store import Store, prepare

MEGABYTE = 1 << 20
SIZES = {"ext4": 64 * MEGABYTE, "xfs": 300 * MEGABYTE}
TIMEOUT = 30.0
_GOING_DOWN = 0x8004587D
_WITHOUT_LOG = 2
_NOTES_OPENING = """
from zonebundle.store.store import Store
log = open({!r}, "a", buffering=1)
real = Store.open
def noted(directory, *arguments, **options):
    print(directory, file=log)
    return real(directory, *arguments, **options)
Store.open = noted
from zonebundle.seal.__main__ import main
main()
"""


@dataclass
class Disk(StoreDisk):
    """One that can die."""

    kind: str

    def die(self) -> None:
        """From now on every access is an I/O error, and what was not durable is gone."""
        descriptor = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _GOING_DOWN, struct.pack("=I", _WITHOUT_LOG))
        finally:
            os.close(descriptor)

    def mount_again(self) -> None:
        subprocess.run(["umount", self.point], check=True)
        image = self.point.parent / f"{self.kind}.img"
        subprocess.run(["mount", "-t", self.kind, "-o", "loop", image, self.point], check=True)

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", self.point], check=True)


@pytest.fixture(params=SIZES)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    try:
        with mounted(request.param, tmp_path / "disk", SIZES[request.param]) as point:
            disk = Disk(point, request.param)
            prepare(disk.store)
            yield disk
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpoolDir:
    # A dir that failed is left alone until `come_back`: nothing here depends on the clock.
    monkeypatch.setattr(open_stores, "_PAUSE", 1e6)
    (tmp_path / "host").mkdir()
    return SpoolDir(tmp_path / "host").make()


def come_back(opened: Sealing, point: Path) -> None:
    """The pause is over."""
    opened.upkeep.undrain(str(point))
    opened.upkeep._not_before = 0.0
    opened.upkeep.catch_up()


@pytest.mark.slow
def test_a_disk_that_dies(at: SpoolDir, disk: Disk, dirs: list[Path]) -> None:
    before, deleted, during = (draft_of(at, seed) for seed in range(3))
    with leaks.no_leaks(), sealing(at.state, dirs) as opened:
        opened.upkeep.catch_up()
        for draft in (before, deleted):
            assert seal(opened, draft).left == ""
        disk.die()
        seal(opened, during)
        opened.sealer.delete("web", deleted.bundle_id)
        alive = StoreReader.open(at.store)
        for draft in (before, during):
            check_whole(alive.find("web", draft.bundle_id))
        opened.upkeep.drain(str(disk.point))
        disk.mount_again()
        come_back(opened, disk.point)
        opened.upkeep.prune()
        check_equal(dirs, [before, during])
    assert at.left() == []


def test_ended_before_the_entry_had_gone_and_its_store_is_away(at: SpoolDir, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed_in, other = dirs = [at.store, at.base / "store-2"]
    prepare(other)
    draft, away = draft_of(at, 1), at.base / "away"
    other.rename(away)

    def failing(entry: SpoolEntry) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with leaks.no_leaks(), sealing(at.state, dirs) as opened, monkeypatch.context() as patched:
        patched.setattr(SpoolEntry, "remove", failing)
        assert opened.seal_again(draft.bundle_id).left == "input/output error"
        # Its logs have gone: what is in the one directory is all there is.
        assert list(at.staging.iterdir()) == []
    away.rename(other)
    sealed_in.rename(away)
    with leaks.no_leaks(), sealing(at.state, dirs) as opened:
        assert opened.sealer.seal(draft.bundle_id, lambda total, done: None, NEVER) is None
        assert list(StoreReader.open(other).stored()) == []
        away.rename(sealed_in)
        come_back(opened, sealed_in)
        check_equal(dirs, [draft])
    assert at.left() == []


@pytest.mark.slow
def test_a_disk_that_is_mounted_read_only(at: SpoolDir, disk: Disk, dirs: list[Path]) -> None:
    before, deleted, during = (draft_of(at, seed) for seed in range(3))
    with leaks.no_leaks(), sealing(at.state, dirs) as opened:
        opened.upkeep.catch_up()
        for draft in (before, deleted):
            seal(opened, draft)
        disk.remount("ro")
        seal(opened, during)
        opened.sealer.delete("web", deleted.bundle_id)
        readers = StoreReaders(dirs)
        # It can be read, but what was deleted is not there for anybody.
        assert {bundle.header.metadata.bundle_id for bundle in readers.stored()} == {
            before.bundle_id,
            during.bundle_id,
        }
        with pytest.raises(NoSuchBundleError):
            readers.find("web", deleted.bundle_id)
        # The directory that is away may have it for all we know: that is no error.
        assert opened.sealer.delete("web", deleted.bundle_id) == 0
        come_back(opened, disk.point)
        disk.remount("rw")
        come_back(opened, disk.point)
        opened.upkeep.prune()
        check_equal(dirs, [before, during])
    assert at.left() == []


@pytest.mark.slow
def test_a_full_disk_keeps_the_spool_entry(at: SpoolDir, disk: Disk, dirs: list[Path]) -> None:
    with leaks.no_leaks(), sealing(at.state, dirs) as opened:
        opened.upkeep.catch_up()
        filler = fill(disk.point)
        draft = draft_of(at, 1)
        told: list[Sealed] = []
        for _ in range(5):
            sealed = opened.sealer.seal(draft.bundle_id, lambda total, done: None, threading.Event(), told.append)
            assert sealed is not None
            # It is in one, and told; the other has no space for it yet, so that its entry stays.
            assert "no space left" in sealed.left
            assert told[-1].header.metadata.bundle_id == draft.bundle_id
            assert draft.entry.is_dir()
            check_whole(StoreReader.open(at.store).find("web", draft.bundle_id))
            assert list(StoreReader.open(disk.store).stored()) == []
        filler.unlink()
        assert seal(opened, draft).header.gaps == 1
        opened.upkeep.prune()
        check_equal(dirs, [draft])
    assert at.left() == []


@pytest.mark.slow
def test_a_lost_disk_and_an_empty_one_in_its_place(at: SpoolDir, disk: Disk, dirs: list[Path]) -> None:
    first, second = draft_of(at, 1), draft_of(at, 2)
    with leaks.no_leaks(), sealing(at.state, dirs) as opened:
        opened.upkeep.catch_up()
        seal(opened, first)
        # Without a word to anybody.
        lost = disk.point / "lost"
        disk.store.rename(lost)
        seal(opened, second)
        opened.upkeep.catch_up()
        assert not disk.store.exists()
        prepare(disk.store)
        come_back(opened, disk.point)
        opened.upkeep.prune()
        check_equal(dirs, [first, second])
    assert at.left() == []


async def test_a_new_sealer_opens_nothing_that_is_drained(
    at: SpoolDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, drained = tmp_path / "log", at.base / "store-2"
    prepare(drained)
    popen: Callable[..., Any] = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        module = command.index("-m")
        return popen([*command[:module], "-c", _NOTES_OPENING.format(str(log)), *command[module + 2 :]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    link = SealerLink(
        state_dir=at.state,
        store_dirs=[drained, at.store],
        installation=INSTALLATION,
        workers=1,
        on_event=lambda event: None,
    )
    with leaks.no_leaks():
        await link.start()
        try:
            assert len(await link.ask("utilization")) == 2
            await link.drain(str(drained))
            log.write_text("")
            assert link.pid is not None
            os.kill(link.pid, signal.SIGKILL)
            assert list(await link.ask("utilization")) == [str(at.store)]
            assert log.read_text().splitlines() == [str(at.store)]
            await link.undrain(str(drained))
            assert len(await link.ask("utilization")) == 2
        finally:
            await link.close()


def test_a_slow_disk_holds_nobody_up(at: SpoolDir, monkeypatch: pytest.MonkeyPatch) -> None:
    dirs = [at.store, at.base / "store-2"]
    prepare(dirs[1])
    slow, other = draft_of(at, 1), draft_of(at, 2)
    begun, go_on, told = threading.Event(), threading.Event(), threading.Event()

    def wait(bundle: StoredBundle, target: Store) -> int:
        if bundle.directory.name == slow.bundle_id:
            begun.set()
            assert go_on.wait(TIMEOUT)
        return replicate.copy_bundle(bundle, target)

    monkeypatch.setattr(stores_module, "copy_bundle", wait)
    with leaks.no_leaks(), sealing(at.state, dirs) as opened, ThreadPoolExecutor(1) as threads:
        sealed = threads.submit(
            opened.sealer.seal, slow.bundle_id, lambda total, done: None, threading.Event(), lambda _: told.set()
        )
        assert begun.wait(TIMEOUT)
        assert told.wait(TIMEOUT)
        assert seal(opened, other).left == ""
        assert slow.entry.is_dir()
        check_whole(StoreReader.open(dirs[0]).find("web", slow.bundle_id))
        go_on.set()
        assert sealed.result(TIMEOUT).left == ""  # type: ignore[union-attr]
        opened.upkeep.prune()
        check_equal(dirs, [slow, other])
    assert at.left() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_power_cuts_of_a_real_file_system(at: SpoolDir, disk: Disk) -> None:
    """Whatever moment it is: what was told to be sealed is there, and the rest is sealed when the disk is back."""
    drafts: list[Draft] = []
    told: set[str] = set()
    with leaks.no_leaks():
        for delay in range(12):
            with sealing(at.state, [disk.store]) as opened, ThreadPoolExecutor(2) as threads:
                # One disk that fails when it is opened: there is nothing else.
                opened.storage.usable()
                young = [draft_of(at, len(drafts) + number) for number in range(6)]
                drafts += young
                begun = threading.Event()

                def seal_all(
                    young: list[Draft] = young, opened: Sealing = opened, begun: threading.Event = begun
                ) -> None:
                    for draft in young:
                        with contextlib.suppress(StoreError):
                            if not opened.seal_again(draft.bundle_id).left:
                                told.add(draft.bundle_id)
                        begun.set()

                done = threads.submit(seal_all)
                assert begun.wait(TIMEOUT)
                # Anywhere in the seals that follow.
                threading.Event().wait(delay / 200)
                disk.die()
                done.result(TIMEOUT)
                # As the service does: nobody knows that the disk is dead.
                for draft in young:
                    if draft.entry.is_dir():
                        with contextlib.suppress(StoreError):
                            if not opened.seal_again(draft.bundle_id).left:
                                told.add(draft.bundle_id)
            disk.mount_again()
            there = {bundle.header.metadata.bundle_id for bundle in StoreReader.open(disk.store).stored()}
            assert told <= there
            with sealing(at.state, [disk.store]) as opened:
                for draft in drafts:
                    if draft.entry.is_dir():
                        seal(opened, draft)
                        told.add(draft.bundle_id)
                opened.upkeep.prune()
            check_equal([disk.store], drafts)
    assert at.left() == []
