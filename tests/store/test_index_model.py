"""The index against a few dicts, by whatever comes to hypothesis."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from support.indexed import FILESYSTEM, STORES, digest, find_piece, identity, piece, segment
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.store.index import Index, IndexHint, KnownFile

INODES = [1, 2, 3, (1 << 63) + 1, (1 << 64) - 1]
FILESYSTEMS = [1, FILESYSTEM]
KEYS = st.tuples(st.sampled_from(FILESYSTEMS), st.sampled_from(INODES))
ZONES = st.sampled_from(["web", "db", "oci:web"])
PIECES = st.builds(piece, st.integers(0, 5), st.integers(0, 4), times=st.sampled_from([1, 1, 1, 400]))
STATES = st.integers(0, 3)
SEGMENTS = st.sets(st.integers(0, 6).map(segment))


class IndexAgainstDicts(RuleBasedStateMachine):
    """The index does what a few dicts would."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name, "index.sqlite")
        self.index = Index.open(self.path, STORES)
        self.hint = IndexHint(self.path)
        self.files: dict[tuple[int, int], KnownFile] = {}
        self.pieces: set[Piece] = set()
        self.claims: set[tuple[str, tuple[int, int]]] = set()

    def teardown(self) -> None:
        assert not self.index.is_broken
        self.hint.close()
        self.index.close()
        self.directory.cleanup()

    def segments(self, files: set[tuple[int, int]]) -> set[str]:
        return {piece.segment for key in files & self.files.keys() for piece in self.files[key].pieces}

    def claimed(self) -> set[str]:
        return self.segments({key for _, key in self.claims})

    @rule(files=st.lists(st.tuples(KEYS, STATES, st.lists(PIECES, max_size=4)), max_size=6), pieces=st.lists(PIECES))
    def add(self, files: list[tuple[tuple[int, int], int, list[Piece]]], pieces: list[Piece]) -> None:
        self.index.add([(identity(key[1], state, key[0]), parts) for key, state, parts in files], pieces)
        for key, state, parts in files:
            self.files[key] = KnownFile(identity(key[1], state, key[0]), tuple(parts))
            if not parts:
                del self.files[key]
            pieces = pieces + parts
        self.pieces |= {Piece(*part.to_json()[:6]) for part in pieces}

    @rule(changes=st.lists(st.tuples(KEYS, STATES, st.integers(-(1 << 63), (1 << 63) - 1)), max_size=4))
    def renew(self, changes: list[tuple[tuple[int, int], int, int]]) -> None:
        self.index.renew([(identity(key[1], state, key[0]), ctime) for key, state, ctime in changes])
        for key, state, ctime in changes:
            file = self.files.get(key)
            if file is not None and file.identity == identity(key[1], state, key[0]):
                fields = [*file.identity.to_json()[:5], ctime]
                self.files[key] = KnownFile(FileIdentity(*fields), file.pieces)

    @rule(zone=ZONES, keys=st.sets(KEYS))
    def claim(self, zone: str, keys: set[tuple[int, int]]) -> None:
        self.index.claim(zone, keys)
        self.claims |= {(zone, key) for key in keys}

    @rule(zone=ZONES, keep=st.sets(KEYS))
    def end_claims(self, zone: str, keep: set[tuple[int, int]]) -> None:
        before = self.claimed()
        freed = self.index.end_claims(zone, keep)
        self.claims = {(other, key) for other, key in self.claims if other != zone or key in keep}
        assert freed == before - self.claimed()

    @rule(living=st.sets(ZONES))
    def end_zones(self, living: set[str]) -> None:
        before = self.claimed()
        freed = self.index.end_zones(living)
        self.claims = {(zone, key) for zone, key in self.claims if zone in living}
        assert freed == before - self.claimed()

    @rule(digests=SEGMENTS)
    def release_claims(self, digests: set[str]) -> None:
        self.index.release_claims(digests)
        self.claims = {(zone, key) for zone, key in self.claims if not self.segments({key}) & digests}

    @rule(digests=SEGMENTS)
    def forget(self, digests: set[str]) -> None:
        self.index.forget(digests)
        self.files = {key: file for key, file in self.files.items() if not self.segments({key}) & digests}
        self.pieces = {piece for piece in self.pieces if piece.segment not in digests}

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = Index.open(self.path, STORES)

    @invariant()
    def finds_the_same(self) -> None:
        for filesystem in FILESYSTEMS:
            known = {key[1]: file for key, file in self.files.items() if key[0] == filesystem}
            assert {inode: self.index.find_file(filesystem, inode) for inode in INODES} == {
                inode: known.get(inode) for inode in INODES
            }
            assert self.hint.known(filesystem, INODES) == known
        for content in range(5):
            candidates = {piece for piece in self.pieces if piece.blake3 == digest("content", content)}
            found = find_piece(self.index, digest("content", content), 1000 + content)
            assert found in candidates if candidates else found is None

    @invariant()
    def claims_the_same(self) -> None:
        claimed = self.claimed()
        assert self.index.claimed([segment(number) for number in range(7)]) == claimed
        assert set(self.index.claimed_segments()) == claimed


@pytest.mark.slow
@pytest.mark.usefixtures("leak_check")
def test_it_does_what_dicts_would() -> None:
    run_state_machine_as_test(
        IndexAgainstDicts,
        settings=settings(
            max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
