import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import leaks
from support.spooled import INSTALLATION, Draft, SpoolDir
from zonebundle.seal.sealer import Sealed, Sealer
from zonebundle.seal.storage import Storage
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import destroy_area

Seal = Callable[[Draft], Sealed]


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
        sealed = sealer.seal(draft.write(), lambda total, done: None, threading.Event())
        assert sealed is not None
        assert sealed.left == ""
        return sealed

    return seal
