"""A store dir whose disk hangs: it costs some seconds, and nothing else waits for it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import leaks, wait
from support.filesystems import Unavailable
from support.freezing import Disk, freezable
from support.sealing import Sealing, sealing
from support.several import check_equal, draft_of, seal
from support.spooled import INSTALLATION, SpoolDir
from zonebundle.errors import NoSuchBundleError, StoreError
from zonebundle.host import trace
from zonebundle.seal.link import SealerLink
from zonebundle.store import open_stores, watch
from zonebundle.store.reader import StoreReader

# A disk that is well and slow must not be taken for one that hangs; the machine may be busy.
PATIENCE, WRITE_PATIENCE = 0.3, 4.0
# So long nothing may take, however often it meets the dir that hangs.
BOUND = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    try:
        with freezable(tmp_path / "disk") as disk:
            yield disk
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpoolDir:
    monkeypatch.setattr(open_stores, "_PAUSE", 0.0)
    monkeypatch.setattr(watch, "_PATIENCE", PATIENCE)
    monkeypatch.setattr(watch, "_WRITE_PATIENCE", WRITE_PATIENCE)
    (tmp_path / "host").mkdir()
    return SpoolDir(tmp_path / "host").make()


def catch_up(opened: Sealing, disk: Disk) -> None:
    """The disk answers again, and what it missed is made up for."""
    disk.thaw()

    def is_there() -> bool:
        opened.upkeep._not_before = 0.0
        opened.upkeep.catch_up()
        return len(opened.upkeep._up_to_date) == 2

    wait.until(is_there, 60, "the disk is taken up again")


def ids(directory: Path) -> set[str]:
    return {bundle.header.metadata.bundle_id for bundle in StoreReader.open(directory).stored()}


def test_a_disk_that_hangs_while_it_is_in_use(at: SpoolDir, disk: Disk, dirs: list[Path]) -> None:
    before, deleted, during = (draft_of(at, seed) for seed in range(3))
    with leaks.no_leaks(), sealing(at.state, dirs) as opened:
        opened.upkeep.catch_up()
        for draft in (before, deleted):
            seal(opened, draft)
        begin = time.monotonic()
        disk.freeze()
        seal(opened, during)
        opened.sealer.delete("web", deleted.bundle_id)
        assert ids(at.store) == {before.bundle_id, during.bundle_id}
        for store in opened.storage.stores.all():
            assert store.directory == at.store
        opened.upkeep.catch_up()
        assert list(opened.upkeep.utilization()) == [str(at.store)]
        assert list(opened.upkeep.clean_up(100, ["cause", "time"], [])["dirs"]) == [str(at.store)]
        opened.upkeep.prune()
        opened.sealer.settle()
        # Another disk can be drained, and taken up again.
        opened.upkeep.drain(str(at.store))
        assert opened.upkeep.uses(str(at.store)) == []
        with pytest.raises(StoreError, match=r"does not answer.*is being drained"):
            opened.storage.usable()
        opened.upkeep.undrain(str(at.store))
        assert [store.directory for store in opened.storage.usable()] == [at.store]
        assert time.monotonic() - begin < BOUND
        catch_up(opened, disk)
        opened.upkeep.prune()
        check_equal(dirs, [before, during])
    assert at.left() == []


def test_a_disk_that_hangs_before_it_is_opened(at: SpoolDir, disk: Disk, dirs: list[Path]) -> None:
    draft = draft_of(at, 1)
    with leaks.no_leaks(), sealing(at.state, dirs) as opened:
        begin = time.monotonic()
        disk.freeze()
        seal(opened, draft)
        assert ids(at.store) == {draft.bundle_id}
        assert time.monotonic() - begin < BOUND
        catch_up(opened, disk)
        opened.upkeep.prune()
        check_equal(dirs, [draft])
    assert at.left() == []


@pytest.mark.parametrize(
    "point", ["seal.planned", "seal.segment-written", "seal.segments-durable", "seal.manifest-written"]
)
@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_disk_that_hangs_in_the_middle_of_a_seal(
    at: SpoolDir, disk: Disk, monkeypatch: pytest.MonkeyPatch, point: str, is_deleted: bool
) -> None:
    draft, other = draft_of(at, 1), draft_of(at, 2)
    frozen = threading.Event()

    def freeze(name: str) -> None:
        if name == point and not frozen.is_set():
            frozen.set()
            disk.freeze()

    monkeypatch.setattr(trace, "point", freeze)
    with leaks.no_leaks(), sealing(at.state, [disk.store, at.store], workers=1) as opened:
        begin = time.monotonic()
        seal(opened, draft)
        assert frozen.is_set()
        seal(opened, other)
        assert ids(at.store) == {draft.bundle_id, other.bundle_id}
        if is_deleted:
            opened.sealer.delete("web", draft.bundle_id)
        assert time.monotonic() - begin < BOUND
        catch_up(opened, disk)
        opened.upkeep.prune()
        check_equal([disk.store, at.store], [other] if is_deleted else [draft, other])
        if is_deleted:
            with pytest.raises(NoSuchBundleError):
                opened.storage.stores.find("web", draft.bundle_id)
    assert at.left() == []


async def test_the_process_ends_and_its_successor_works(at: SpoolDir, disk: Disk) -> None:
    """Not killed: then its locks stay, as long as the kernel keeps the thread that hangs."""
    first, second = draft_of(at, 1), draft_of(at, 2)
    told: list[str] = []

    def take(event: dict[str, dict[str, str]]) -> None:
        if "sealed" in event:
            told.append(event["sealed"]["id"])

    async def seal_by_process(bundle_id: str) -> SealerLink:
        link = SealerLink(
            state_dir=at.state,
            store_dirs=[disk.store, at.store],
            installation=INSTALLATION,
            workers=1,
            on_event=take,
        )
        await link.start()
        link.seal(bundle_id)
        await wait.until_async(lambda: bundle_id in told, 90, "a bundle is sealed")
        return link

    disk.freeze()
    link = await seal_by_process(first.bundle_id)
    pid = link.pid
    assert pid is not None
    begin = time.monotonic()
    await link.close()
    assert time.monotonic() - begin < 30
    # A thread of it is still there, and keeps what is locked on the disk that hangs.
    assert Path(f"/proc/{pid}").exists()
    link = await seal_by_process(second.bundle_id)
    await link.close()
    assert ids(at.store) == {first.bundle_id, second.bundle_id}
    assert Path(f"/proc/{pid}").exists()
    disk.thaw()
    wait.until(lambda: not Path(f"/proc/{pid}").exists(), 30, "its end")
