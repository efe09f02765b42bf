from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support import leaks
from support.ahead import Compressed, Host
from support.linked import Linked, started
from support.sealing import NEVER, Seal
from support.several import StoreDisk
from support.spooled import INSTALLATION, Draft, SpoolDir
from zonebundle.seal.sealer import Sealed, Sealer
from zonebundle.seal.storage import Storage
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import destroy_area


@pytest.fixture
def at(tmp_path: Path) -> SpoolDir:
    return SpoolDir(tmp_path).make()


@pytest.fixture
def sealer(at: SpoolDir) -> Iterator[Sealer]:
    """A sealer in this process, that leaks nothing."""
    with leaks.no_leaks():
        workers = Workers(2)
        storage = Storage(at.state, [at.store])
        sealer = Sealer(at.spool, storage, lambda area, unlinked: destroy_area(area, INSTALLATION, unlinked), workers)
        yield sealer
        workers.close()
        sealer.close()


@pytest.fixture
def seal(sealer: Sealer) -> Seal:
    """Commits the record of a draft, and seals it."""

    def seal(draft: Draft) -> Sealed:
        sealed = sealer.seal(draft.write(), lambda total, done: None, NEVER)
        assert sealed is not None
        assert sealed.left == ""
        return sealed

    return seal


@pytest.fixture(params=["first", "second"])
def dirs(request: pytest.FixtureRequest, at: SpoolDir, disk: StoreDisk) -> list[Path]:
    """The store on the module's `disk`, and one that is always well."""
    return [disk.store, at.store] if request.param == "first" else [at.store, disk.store]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host on which logs are sealed ahead, that leaks nothing."""
    with leaks.no_leaks():
        host = Host(tmp_path)
        yield host
        host.close()


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> Compressed:
    """What is compressed in this process from now on."""
    return Compressed(monkeypatch)


@pytest.fixture
async def linked(at: SpoolDir) -> AsyncIterator[Linked]:
    """A link to a sealer process, that leaks nothing."""
    async with started(at) as linked:
        yield linked
    assert linked.link.pid is None
