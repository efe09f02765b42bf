"""What a capture record names is not removed: its bundle is still to be sealed from it."""

import contextlib
import json
from pathlib import Path

import pytest

from support.spooled import Draft, SpoolDir
from zonebundle.model.manifest import Piece
from zonebundle.model.record import KnownLog, LogFile, Part
from zonebundle.seal.guard import SpoolGuard
from zonebundle.store.index import Index

PIECES = [Piece(f"{number:02x}" * 32, 10, 900, 5, 7, "cd" * 32, 1 + number % 2) for number in range(4)]


@pytest.mark.parametrize("path", ["app.log", "caf\u00e9.log"])
def test_what_a_record_names_is_in_use(tmp_path: Path, path: str) -> None:
    at = SpoolDir(tmp_path).make()
    draft = Draft(at)
    log = LogFile("zone", b"a.log", "/srv", b"a.log", 5, 0o644, 1, 2, (Part(0, 5, "live"),), pieces=tuple(PIECES[:2]))
    draft.writer.add("file", log.to_json())
    told = json.dumps([piece.to_json() for piece in PIECES[2:]], separators=(",", ":"))
    draft.writer.add("file", KnownLog("zone", path, "/srv", path, 5, 0o644, 1, 3, told).to_json())
    asked = frozenset({*(piece.segment for piece in PIECES), "ee" * 32})
    with contextlib.closing(Index.open(tmp_path / "index.sqlite", ["store"])) as index:
        guard = SpoolGuard(at.spool, lambda: index)
        assert guard.used(asked) == set()
        assert guard.open_holds() == {draft.bundle_id}
        draft.write()
        assert guard.used(asked) == {piece.segment for piece in PIECES}
        assert guard.open_holds() == set()
