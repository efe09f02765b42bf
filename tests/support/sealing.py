"""A sealer in this process, with everything that belongs to it."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.spooled import INSTALLATION, Draft
from zonebundle.seal.ahead import Ahead
from zonebundle.seal.sealer import Sealed, Sealer
from zonebundle.seal.storage import SPOOL, Storage
from zonebundle.seal.upkeep import Upkeep
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import destroy_area

Seal = Callable[[Draft], Sealed]
# Set by nobody: for a seal that is not canceled.
NEVER = threading.Event()


@dataclass(frozen=True)
class Sealing:
    """What a sealer's process is made of."""

    storage: Storage
    sealer: Sealer
    upkeep: Upkeep

    def seal(self, draft: Draft) -> Sealed:
        """Commit the record of a draft and seal it."""
        return self.seal_again(draft.write())

    def seal_again(self, bundle_id: str) -> Sealed:
        """Seal what is in the spool."""
        sealed = self.sealer.seal(bundle_id, lambda total, done: None, NEVER)
        assert sealed is not None
        return sealed


@contextlib.contextmanager
def sealing(
    state: Path, directories: Sequence[Path], *, quota: int | None = None, workers: int = 2
) -> Iterator[Sealing]:
    """A sealer on a state directory and stores, which is given back at the end."""
    threads = Workers(workers)
    storage = Storage(state, directories)
    spool = state / SPOOL
    sealer = Sealer(spool, storage, lambda area, told: destroy_area(area, INSTALLATION, told), threads)
    upkeep = Upkeep(spool, storage, Ahead(storage, threads), quota)
    try:
        yield Sealing(storage, sealer, upkeep)
    finally:
        threads.close()
        sealer.close()
