import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.indexed import FILESYSTEM, STORES, identity, piece, segment, small_files
from support.wait import until
from zonebundle.store.index import Index, IndexHint, KnownFile
from zonebundle.store.index_hint import HINTED_PIECES

pytestmark = pytest.mark.usefixtures("leak_check")

TESTS = Path(__file__).parent.parent


@pytest.fixture
def hint(index_path: Path) -> Iterator[IndexHint]:
    hint = IndexHint(index_path)
    yield hint
    hint.close()


def test_it_tells_what_is_known(index: Index, hint: IndexHint) -> None:
    index.add([(identity(7), [piece(1, 1), piece(2, 2, times=5)]), (identity((1 << 64) - 1), [piece(1)])])
    assert hint.known(FILESYSTEM, [7, 8, (1 << 64) - 1]) == {
        7: KnownFile(identity(7), (piece(1, 1), piece(2, 2, times=5))),
        (1 << 64) - 1: KnownFile(identity((1 << 64) - 1), (piece(1),)),
    }
    assert hint.known(FILESYSTEM - 1, [7]) == {}
    assert hint.known(FILESYSTEM, []) == {}


def test_it_sees_what_comes_later(index: Index, hint: IndexHint) -> None:
    assert hint.known(FILESYSTEM, [7]) == {}
    for state in range(3):
        index.add([(identity(7, state), [piece(state)])])
        assert hint.known(FILESYSTEM, [7])[7].identity == identity(7, state)
    index.forget([segment(2)])
    assert hint.known(FILESYSTEM, [7]) == {}


def test_more_files_than_a_query_takes(index: Index, hint: IndexHint) -> None:
    index.add(small_files(range(2000)))
    known = hint.known(FILESYSTEM, range(1234))
    assert [(file.identity, list(file.pieces)) for _, file in sorted(known.items())] == list(small_files(range(1234)))


def test_long_files_are_not_told(index: Index, hint: IndexHint) -> None:
    for inode, count in ((1, HINTED_PIECES), (2, HINTED_PIECES + 1)):
        index.add([(identity(inode), [piece(number) for number in range(count)])])
    assert list(hint.known(FILESYSTEM, [1, 2])) == [1]


def test_no_index_yet(index_path: Path, hint: IndexHint) -> None:
    assert hint.known(FILESYSTEM, [7]) == {}
    assert list(index_path.parent.iterdir()) == []
    index = Index.open(index_path, STORES)
    index.add([(identity(7), [piece(1)])])
    assert list(hint.known(FILESYSTEM, [7])) == [7]
    index.close()


def test_no_sealer_any_more(index_path: Path, hint: IndexHint) -> None:
    index = Index.open(index_path, STORES)
    index.add([(identity(7), [piece(1)])])
    index.close()
    assert list(hint.known(FILESYSTEM, [7])) == [7]


def test_an_index_made_anew_replaces_the_one_it_has_open(index_path: Path, hint: IndexHint) -> None:
    index = Index.open(index_path, STORES)
    index.add([(identity(7), [piece(1)]), (identity(8), [piece(1)])])
    assert len(hint.known(FILESYSTEM, [7, 8])) == 2
    index.close()
    index = Index.open(index_path, ["another"])
    assert hint.known(FILESYSTEM, [7, 8]) == {}
    index.add([(identity(8, 1), [piece(2)])])
    assert hint.known(FILESYSTEM, [7, 8]) == {8: KnownFile(identity(8, 1), (piece(2),))}
    index.close()


@pytest.mark.parametrize("data", [b"", b"not a database" * 1000, b"SQLite format 3\0" + bytes(8000)])
def test_a_foreign_file(index_path: Path, hint: IndexHint, data: bytes) -> None:
    index_path.write_bytes(data)
    assert hint.known(FILESYSTEM, [7]) == {}
    index = Index.open(index_path, STORES)
    index.add([(identity(7), [piece(1)])])
    assert list(hint.known(FILESYSTEM, [7])) == [7]
    index.close()


def test_another_format_is_not_read(index_path: Path, index: Index, hint: IndexHint) -> None:
    index.add([(identity(7), [piece(1)])])
    assert index._connection is not None
    index._connection.execute("PRAGMA user_version = 2")
    assert hint.known(FILESYSTEM, [7]) == {}


def test_numbers_that_are_no_inodes(index: Index, hint: IndexHint) -> None:
    index.add([(identity(7), [piece(1)])])
    assert hint.known(FILESYSTEM, [1 << 70]) == {}
    assert hint.known(1 << 70, [7]) == {}
    assert list(hint.known(FILESYSTEM, [7])) == [7]


def test_threads_share_it(index: Index, hint: IndexHint) -> None:
    index.add(small_files(range(1000)))
    wrong: list[dict[int, KnownFile]] = []

    def ask(first: int) -> None:
        for _ in range(30):
            known = hint.known(FILESYSTEM, range(first, first + 50))
            # Nothing, where another thread was in the way for too long.
            if known and list(known) != list(range(first, first + 50)):
                wrong.append(known)

    threads = [threading.Thread(target=ask, args=(number * 50,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(hint.known(FILESYSTEM, range(1000))) == 1000


# Each round gives all files a new state in one transaction; it stops itself, or is stopped, in the middle of one.
WRITER = """
import itertools, os, signal, sys
from pathlib import Path
from support.indexed import FILESYSTEM, STORES, identity, piece
from zonebundle.store.index import Index

index = Index.open(Path(sys.argv[1]), STORES)
index.add([(identity(inode, 0), [piece(0)]) for inode in range(100)])
if sys.argv[2] == "itself":
    index._connection.execute("BEGIN IMMEDIATE")
    index._connection.execute("DELETE FROM files")
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    index._connection.execute("ROLLBACK")
    index.add([(identity(inode, 1), [piece(1)]) for inode in range(100)])
    print("done", flush=True)
else:
    print("ready", flush=True)
    for state in itertools.count(1):
        index.add([(identity(inode, state), [piece(state)]) for inode in range(100)])
        index.forget([f"{state:064x}"])
"""


def writer(path: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS)


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


@pytest.mark.slow
def test_a_writer_stopped_in_a_transaction(index_path: Path, hint: IndexHint) -> None:
    with writer(index_path, "itself") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until_stopped(process)
        for _ in range(2):
            assert {file.identity for file in hint.known(FILESYSTEM, range(100)).values()} == {
                identity(inode, 0) for inode in range(100)
            }
            hint.close()
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "done\n"
        assert hint.known(FILESYSTEM, range(100))[99].identity == identity(99, 1)


def newer(hint: IndexHint, size: int) -> bool:
    file = hint.known(FILESYSTEM, [0]).get(0)
    return file is not None and file.identity.size > size


@pytest.mark.slow
def test_a_writer_stopped_anywhere(index_path: Path, hint: IndexHint) -> None:
    """One state of all files, whatever the writer is doing; and never nothing."""
    with writer(index_path, "forever") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        state = -1
        for number in range(150):
            until(functools.partial(newer, hint, state), what="a newer state")
            process.send_signal(signal.SIGSTOP)
            wait_until_stopped(process)
            if number % 5 == 0:
                hint.close()
            known = hint.known(FILESYSTEM, range(100))
            process.send_signal(signal.SIGCONT)
            assert len(known) == 100
            (state,) = {file.identity.size for file in known.values()}
        process.kill()


@pytest.mark.slow
def test_the_log_of_the_database_stays_small(index_path: Path, index: Index, hint: IndexHint) -> None:
    """Beside hints that have it open, and whatever is written."""
    largest = 0
    for state in range(40):
        index.add([(identity(inode, state), [piece(state, inode)]) for inode in range(3000)])
        assert len(hint.known(FILESYSTEM, range(3000))) == 3000
        largest = max(largest, os.stat(f"{index_path}-wal").st_size)
    assert (16 << 20) < largest < (40 << 20)
    assert os.stat(index_path).st_size > (16 << 20)
