import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from support.indexed import (
    FILESYSTEM,
    STORES,
    check_nothing_wrong,
    digest,
    find_piece,
    identity,
    piece,
    segment,
    small_files,
)
from zonebundle.errors import StoreError
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.store import index as index_module
from zonebundle.store import index_database
from zonebundle.store.index import Index, KnownFile

pytestmark = pytest.mark.usefixtures("leak_check")


def found(index: Index, inode: int) -> KnownFile | None:
    return index.find_file(FILESYSTEM, inode)


def test_a_file_and_its_pieces_are_found(index: Index) -> None:
    pieces = [piece(1, 1), piece(2, 2, times=3)]
    index.add([(identity(7), pieces)])
    assert found(index, 7) == KnownFile(identity(7), tuple(pieces))
    assert index.find_file(FILESYSTEM - 1, 7) is None
    assert found(index, 8) is None
    assert find_piece(index, digest("content", 1), 1001) == piece(1, 1)
    assert find_piece(index, digest("content", 1), 1002) is None
    assert find_piece(index, digest("content", 3), 1003) is None


def test_many_files_and_contents_are_found_at_once(index: Index) -> None:
    numbers = range(2000)
    index.add(small_files(number for number in numbers if number % 3))
    files = index.find_files((FILESYSTEM, number) for number in numbers)
    assert files == {
        (FILESYSTEM, known_as.inode): KnownFile(known_as, tuple(pieces))
        for known_as, pieces in small_files(numbers)
        if known_as.inode % 3
    }
    wanted = {digest("content", number): 1000 + number + (number % 5 == 0) for number in numbers}
    assert index.find_pieces(wanted) == {
        digest("content", number): piece(number // 10, number) for number in numbers if number % 3 and number % 5
    }
    assert index.find_files([]) == {}
    assert index.find_pieces({}) == {}


def test_a_repeated_piece_is_found_once_by_its_content(index: Index) -> None:
    index.add([(identity(7), [piece(2, 2, times=3)])], [piece(4, 4, times=9)])
    assert find_piece(index, digest("content", 2), 1002) == piece(2, 2)
    assert find_piece(index, digest("content", 4), 1004) == piece(4, 4)


def test_the_files_are_private(index_path: Path, index: Index) -> None:
    index.add([(identity(7), [piece(1)])])
    for file in index_path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(list(index_path.parent.iterdir())) == 3


def test_a_new_state_replaces_the_old_one(index: Index) -> None:
    index.add([(identity(7, 1), [piece(1, 1), piece(2, 2)])])
    index.claim("web", [(FILESYSTEM, 7)])
    index.add([(identity(7, 2), [piece(1, 1), piece(3, 3)])])
    assert found(index, 7) == KnownFile(identity(7, 2), (piece(1, 1), piece(3, 3)))
    assert index.claimed([segment(1), segment(2), segment(3)]) == {segment(1), segment(3)}
    index.forget([segment(2)])
    assert found(index, 7) is not None


def test_an_empty_file_is_worth_no_row(index: Index) -> None:
    index.add([(identity(7, 1), [piece(1)])])
    index.claim("web", [(FILESYSTEM, 7)])
    index.add([(identity(7, 2), [])])
    assert found(index, 7) is None
    assert index.claimed([segment(1)]) == set()


@pytest.mark.parametrize("stamp", [1 << 63, -(1 << 63) - 1, 1 << 90])
def test_stamps_beyond_the_rows_cost_only_that_file(index: Index, stamp: int) -> None:
    """`touch -d` takes any year on btrfs: a hostile zone chooses its own stamps."""
    index.add([(identity(7), [piece(1, 1)]), (identity(8), [piece(1, 2)])])
    odd = FileIdentity(FILESYSTEM, 7, 0, 5, stamp, 0)
    index.add([(odd, [piece(2, 2)]), (identity(9), [piece(3, 3)])])
    index.renew([(odd, 5), (identity(8), stamp)])
    assert [found(index, inode) is not None for inode in (7, 8, 9)] == [False, True, True]
    assert not index.is_broken


def test_pieces_of_a_damaged_manifest_are_left_out(index: Index) -> None:
    good = piece(1, 1)
    bad = [
        Piece("xyz", 1, 1, 1, 1, good.blake3),
        Piece(good.segment, 1, 1, -1, 1, good.blake3),
        Piece(good.segment, 1, 1, 1, 1, good.blake3[2:]),
        Piece(good.segment, 1 << 64, 1, 1, 1, good.blake3),
    ]
    index.rebuild([*bad, good])
    assert find_piece(index, good.blake3, good.raw) == good
    assert find_piece(index, good.blake3, 1) is None
    assert not index.is_broken


def test_renew_follows_our_own_change_only(index: Index) -> None:
    index.add([(identity(7, 1), [piece(1, 1)]), (identity(8, 1), [piece(1, 2)])])
    index.renew([(identity(7, 1), 77), (identity(8, 2), 88), (identity(9), 99)])
    seven, eight = found(index, 7), found(index, 8)
    assert seven is not None and seven.identity.ctime_ns == 77
    assert seven.pieces == (piece(1, 1),)
    assert eight is not None and eight.identity == identity(8, 1)


def test_claims(index: Index) -> None:
    index.claim("web", [(FILESYSTEM, 1), (FILESYSTEM, 2)])
    index.claim("db", [(FILESYSTEM, 2), (FILESYSTEM, 3)])
    index.add((identity(inode), [piece(inode, inode), piece(9, inode)]) for inode in range(1, 5))
    assert index.claimed([segment(n) for n in range(10)]) == {segment(n) for n in (1, 2, 3, 9)}
    assert set(index.claimed_segments()) == {segment(n) for n in (1, 2, 3, 9)}
    assert index.end_claims("web", [(FILESYSTEM, 1)]) == set()
    assert index.end_claims("web", ()) == {segment(1)}
    assert index.end_zones(["db", "other"]) == set()
    index.release_claims([segment(2)])
    assert index.claimed([segment(2), segment(3), segment(9)]) == {segment(3), segment(9)}
    assert index.end_zones([]) == {segment(3), segment(9)}
    assert list(index.claimed_segments()) == []


def test_a_segment_that_two_ended_zones_claimed_is_free(index: Index) -> None:
    index.add([(identity(1), [piece(1)])])
    index.claim("a\udcff", [(FILESYSTEM, 1)])
    index.claim("b", [(FILESYSTEM, 1)])
    assert index.end_zones([]) == {segment(1)}


def test_more_claims_than_a_page(index: Index) -> None:
    index.add(small_files(range(1000)))
    index.claim("web", [(FILESYSTEM, inode) for inode in range(1000)])
    assert set(index.claimed_segments()) == {segment(number) for number in range(100)}
    assert index.claimed([segment(number) for number in range(1000)]) == {segment(number) for number in range(100)}


def test_forget_takes_everything_that_leads_there(index: Index) -> None:
    index.add([(identity(1), [piece(1, 1), piece(2, 2)]), (identity(2), [piece(2, 3)])], [piece(1, 9)])
    index.add([], [piece(3, 1)])
    index.forget([segment(1), segment(77)])
    assert found(index, 1) is None
    assert found(index, 2) is not None
    assert find_piece(index, digest("content", 9), 1009) is None
    assert find_piece(index, digest("content", 2), 1002) == piece(2, 2)
    # The same content in another segment stays findable.
    assert find_piece(index, digest("content", 1), 1001) == piece(3, 1)


def test_forgetting_leaves_no_rows_behind(index: Index) -> None:
    index.add(small_files(range(3000)), [piece(number, number) for number in range(1000)])
    index.add([(identity(7, 5), [piece(2000, 7)]), (identity(8), [])])
    index.forget([segment(number) for number in range(3000)])
    assert index._connection is not None
    for table in ("files", "uses", "pieces", "contents"):
        assert index._connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_a_log_of_many_pieces_that_grows(index: Index) -> None:
    pieces = [piece(number, number) for number in range(3000)]
    for length in (2999, 3000):
        index.add([(identity(7, length), pieces[:length])])
        index.add([(identity(7, length), pieces[:length])])
    assert found(index, 7) == KnownFile(identity(7, 3000), tuple(pieces))
    index.forget([segment(2000)])
    assert found(index, 7) is None
    assert find_piece(index, pieces[1999].blake3, pieces[1999].raw) == pieces[1999]


def test_files_are_taken_as_they_come(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all of them in memory, nor the index locked while the caller makes them."""
    monkeypatch.setattr(index_module, "_BATCH", 10)
    known = []

    def files() -> Iterator[tuple[FileIdentity, list[Piece]]]:
        for number, file in enumerate(small_files(range(50))):
            known.append(found(index, 0) is not None)
            assert found(index, number) is None
            yield file

    index.add(files())
    assert known[0] is False and known[-1] is True
    assert check_nothing_wrong(index, range(50)) == 50


def test_it_is_there_after_a_restart(index_path: Path) -> None:
    index = Index.open(index_path, STORES)
    assert index.is_fresh
    index.add(small_files(range(100)))
    index.close()
    index = Index.open(index_path, STORES)
    assert check_nothing_wrong(index, range(100)) == 100
    index.close()


def test_it_is_fresh_until_it_was_rebuilt(index_path: Path) -> None:
    """A sealer that is killed while it rebuilds leaves an index that knows a part: the next one does it again."""

    def cut_short() -> Iterator[Piece]:
        yield piece(1, 1)
        raise KeyboardInterrupt

    index = Index.open(index_path, STORES)
    with pytest.raises(KeyboardInterrupt):
        index.rebuild(cut_short())
    index.close()
    index = Index.open(index_path, STORES)
    was_fresh = index.is_fresh
    index.rebuild([piece(1, 1), piece(1, 2)])
    assert (was_fresh, index.is_fresh) == (True, False)
    index.close()
    index = Index.open(index_path, STORES)
    assert not index.is_fresh
    assert find_piece(index, digest("content", 2), 1002) == piece(1, 2)
    index.close()


@pytest.mark.parametrize(
    ("stores", "is_kept"),
    [(["b", "a"], True), (["b", "x"], True), (["x"], False), ([], False)],
)
def test_the_stores_it_was_made_for(index_path: Path, stores: list[str], is_kept: bool) -> None:
    index = Index.open(index_path, ["a", "b"])
    index.rebuild([piece(1)])
    index.close()
    index = Index.open(index_path, stores)
    assert index.is_fresh is not is_kept
    assert (find_piece(index, digest("content", 0), 1000) is not None) is is_kept
    assert not index.is_broken
    index.close()


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 99", "CREATE TABLE more (x)", "DROP TABLE uses"])
def test_another_version_is_made_anew(index_path: Path, statement: str) -> None:
    index = Index.open(index_path, STORES)
    index.rebuild([piece(1)])
    index.close()
    connection = sqlite3.connect(index_path)
    connection.execute(statement)
    connection.close()
    with capture_logs() as logs:
        index = Index.open(index_path, STORES)
    assert [log["event"] for log in logs] == ["the index is made anew"]
    assert index.is_fresh
    index.add(small_files(range(10)))
    assert check_nothing_wrong(index, range(10)) == 10
    index.close()


def test_a_closed_index_knows_nothing(index_path: Path) -> None:
    index = Index.open(index_path, STORES)
    index.add(small_files(range(10)))
    index.close()
    index.close()
    assert found(index, 1) is None
    with pytest.raises(StoreError, match="is closed"):
        index.forget([segment(0)])
    index = Index.open(index_path, STORES)
    assert found(index, 1) is not None
    index.close()


def test_what_cannot_be_forgotten_is_an_error(index: Index, index_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(30, "Read-only file system")

    index.add(small_files(range(10)))
    with monkeypatch.context() as patch:
        patch.setattr(index_database, "remove", refuse)
        assert index._connection is not None
        index._connection.close()
        with capture_logs() as logs, pytest.raises(StoreError, match="removing the broken index"):
            index.forget([segment(0)])
        assert {log["event"] for log in logs} == {
            "the broken index stays until it can be removed",
            "the index failed; the next start makes it anew",
        }
        assert index.is_broken
        with pytest.raises(StoreError, match="removing the broken index"):
            index.forget([segment(1)])
    index.forget([segment(0)])
    assert list(index_path.parent.iterdir()) == []
