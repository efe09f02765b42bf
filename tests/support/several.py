"""Bundles in several store dirs, and what has to be equal in the end."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from support.sealing import Sealing
from support.spooled import Draft, SpoolDir, log_lines
from support.stored import check_clean, check_whole, download
from zonebundle.errors import StoreError
from zonebundle.seal.sealer import Sealed
from zonebundle.store.check import check_store
from zonebundle.store.reader import StoreReader


@dataclass
class StoreDisk:
    """A small file system with a store on it."""

    point: Path

    @property
    def store(self) -> Path:
        return self.point / "store"


def draft_of(at: SpoolDir, seed: int) -> Draft:
    draft = Draft(at)
    draft.add_log(b"a.log", log_lines(300_000, seed))
    draft.add_log(b"b.log", draft.bundle_id.encode() * 20)
    draft.write()
    os.utime(draft.entry / "capture.jsonl", (0, 0))
    return draft


def seal(opened: Sealing, draft: Draft, *, tries: int = 5) -> Sealed:
    """As the service does: again, until nothing is left of it."""
    for _ in range(tries):
        with contextlib.suppress(StoreError):
            sealed = opened.seal_again(draft.bundle_id)
            if not sealed.left:
                return sealed
    raise AssertionError(f"{draft.bundle_id} could not be sealed")


def check_equal(dirs: list[Path], drafts: list[Draft]) -> None:
    """Every dir has these bundles and nothing else, byte for byte the same."""
    found = []
    for directory in dirs:
        assert list(check_store(StoreReader.open(directory), deep=True)) == []
        check_clean(directory)
        assert list(directory.glob("tombstones/*")) == []
        bundles = {bundle.header.metadata.bundle_id: bundle for bundle in StoreReader.open(directory).stored()}
        for draft in drafts:
            files = check_whole(bundles[draft.bundle_id])
            assert {path: data for path, data in files.items() if path.startswith(b"logs/")} == {
                b"logs/" + path: data for path, data in draft.expected.items()
            }
        found.append({bundle_id: download(bundle) for bundle_id, bundle in bundles.items()})
    assert len(found[0]) == len(drafts)
    assert all(other == found[0] for other in found)
