"""An index that is damaged, cut, robbed of its files, or on a full disk: it knows less, and nothing wrong."""

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from support.indexed import FILESYSTEM, STORES, check_nothing_wrong, identity, piece, segment, small_files
from zonebundle.store.index import Index, IndexHint

pytestmark = pytest.mark.usefixtures("leak_check")

FILES = range(300)
# A log of more pieces than a page holds.
LONG = (identity(10**6), [piece(1000 + number, 1000 + number) for number in range(100)])


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def fill(index: Index) -> None:
    index.rebuild([])
    index.add([*small_files(FILES), LONG])
    index.claim("web", [(FILESYSTEM, inode) for inode in FILES])


def copy(path: Path, target: Path) -> Path:
    """The database and its log as they are on the disk now."""
    # By another process: to close a file here would end SQLite's locks on it.
    subprocess.run(["cp", *(file for file in (path, log_of(path)) if file.exists()), target], check=True)
    return target / path.name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An index that was closed, and one whose sealer was killed: database and log."""
    directory = tmp_path_factory.mktemp("images")
    (directory / "copy").mkdir()
    path = directory / "index.sqlite"
    index = Index.open(path, STORES)
    fill(index)
    killed = copy(path, directory / "copy")
    index.close()
    return {"closed": path.read_bytes(), "database": killed.read_bytes(), "log": log_of(killed).read_bytes()}


def use(path: Path) -> int:
    """Ask and change everything; returns how many of the files were still known."""
    hint = IndexHint(path)
    known = dict(small_files(FILES))
    index = Index.open(path, STORES)
    assert not (index.is_broken and index.is_fresh)
    for file in hint.known(FILESYSTEM, FILES).values():
        assert list(file.pieces) == known[file.identity]
    found = check_nothing_wrong(index, FILES)
    long = index.find_file(FILESYSTEM, 10**6)
    assert long is None or (long.identity, list(long.pieces)) == LONG
    segments = {segment(number) for number in range(1100)}
    assert index.claimed(segments) <= segments
    assert set(index.claimed_segments()) <= segments
    index.add(small_files(range(250, 350)))
    index.renew([(identity(5, 1), 5), (identity(299, 1), identity(299, 1).ctime_ns)])
    assert index.end_claims("web", [(FILESYSTEM, 5)]) <= segments
    index.release_claims([segment(0)])
    assert index.end_zones([]) <= segments
    index.forget([segment(3), segment(1010)])
    check_nothing_wrong(index, range(10, 350), forgotten=[3, 1010])
    hint.close()
    index.close()
    index = Index.open(path, STORES)
    assert not index.is_broken
    check_nothing_wrong(index, range(10, 350), forgotten=[3, 1010])
    index.close()
    for rest in path.parent.iterdir():
        rest.unlink()
    return found


def flipped(data: bytes, random_: random.Random) -> bytes:
    """With some bits of one place, or of many, turned around."""
    changed = bytearray(data)
    place = random_.randrange(len(data))
    for _ in range(random_.choice([1, 1, 3, 40])):
        changed[place] ^= 1 << random_.randrange(8)
        place = random_.randrange(len(data)) if random_.random() < 0.5 else min(place + 1, len(data) - 1)
    return bytes(changed)


def test_images_are_whole_without_damage(index_path: Path, images: dict[str, bytes]) -> None:
    index_path.write_bytes(images["closed"])
    assert use(index_path) == len(FILES)
    index_path.write_bytes(images["database"])
    log_of(index_path).write_bytes(images["log"])
    assert use(index_path) == len(FILES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_flipped_bits(index_path: Path, images: dict[str, bytes], seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(30):
        index_path.write_bytes(flipped(images["closed"], random_))
        use(index_path)
        index_path.write_bytes(flipped(images["database"], random_))
        log_of(index_path).write_bytes(flipped(images["log"], random_))
        use(index_path)


@pytest.mark.slow
def test_a_truncated_database(index_path: Path, images: dict[str, bytes]) -> None:
    random_ = random.Random(1)
    for length in [0, 1, 100, 4096, *(random_.randrange(len(images["closed"])) for _ in range(30))]:
        index_path.write_bytes(images["closed"][:length])
        assert use(index_path) < len(FILES)
        index_path.write_bytes(images["database"][:length])
        log_of(index_path).write_bytes(images["log"][: random_.randrange(len(images["log"]))])
        use(index_path)


def test_a_truncated_database_while_it_is_open(index_path: Path, index: Index) -> None:
    fill(index)
    index.close()
    index = Index.open(index_path, STORES)
    subprocess.run(["truncate", "--size=8192", index_path], check=True)
    with capture_logs() as logs:
        assert check_nothing_wrong(index, FILES) == 0
        index.add(small_files(FILES))
        index.forget([segment(1)])
    assert index.is_broken and not index.is_fresh
    assert [log["event"] for log in logs] == ["the index failed; the next start makes it anew"]
    assert list(index_path.parent.iterdir()) == []
    index.close()


@pytest.mark.parametrize("cut", [0, None])
def test_a_database_without_its_log_is_not_trusted(index_path: Path, tmp_path: Path, cut: int | None) -> None:
    """What is in the database alone may be from before the last `forget`."""
    (tmp_path / "copy").mkdir()
    index = Index.open(index_path, STORES)
    fill(index)
    index.close()
    index = Index.open(index_path, STORES)
    index.forget([segment(3)])
    older = copy(index_path, tmp_path / "copy")
    if cut is None:
        log_of(older).unlink()
    else:
        os.truncate(log_of(older), cut)
    index.close()
    index = Index.open(older, STORES)
    assert index.is_fresh and not index.is_broken
    assert check_nothing_wrong(index, FILES, forgotten=[3]) == 0
    index.close()


@pytest.mark.parametrize("suffixes", [[""], ["", "-wal", "-shm"], ["-wal"]])
def test_deleted_while_it_is_open(index_path: Path, index: Index, suffixes: list[str]) -> None:
    fill(index)
    hint = IndexHint(index_path)
    assert len(hint.known(FILESYSTEM, FILES)) == len(FILES)
    for suffix in suffixes:
        os.unlink(f"{index_path}{suffix}")
    if not index_path.exists():
        assert hint.known(FILESYSTEM, FILES) == {}
    index.add(small_files(range(300, 400)))
    index.forget([segment(3)])
    check_nothing_wrong(index, range(400), forgotten=[3])
    index.close()
    index = Index.open(index_path, STORES)
    assert not index.is_broken
    assert index.is_fresh is ("" in suffixes)
    check_nothing_wrong(index, range(400), forgotten=[3])
    index.add(small_files(FILES))
    assert check_nothing_wrong(index, FILES) == len(FILES)
    assert len(hint.known(FILESYSTEM, FILES)) == len(FILES)
    hint.close()
    index.close()


def test_leftovers_of_a_database_that_is_gone(index_path: Path, images: dict[str, bytes]) -> None:
    log_of(index_path).write_bytes(images["log"])
    index_path.with_name("index.sqlite-journal").write_bytes(b"x" * 5000)
    index = Index.open(index_path, STORES)
    assert index.is_fresh and not index.is_broken
    assert check_nothing_wrong(index, FILES) == 0
    index.close()


@pytest.mark.parametrize("obstacle", [lambda path: path.mkdir(), lambda path: path.parent.rmdir()])
def test_a_place_that_cannot_have_an_index(tmp_path: Path, obstacle: Callable[[Path], None]) -> None:
    path = tmp_path / "state/index.sqlite"
    path.parent.mkdir()
    obstacle(path)
    with capture_logs():
        index = Index.open(path, STORES)
        assert index.is_broken and not index.is_fresh
        index.rebuild([piece(1)])
        index.claim("web", [(FILESYSTEM, 1)])
        assert check_nothing_wrong(index, FILES) == 0
        assert IndexHint(path).known(FILESYSTEM, FILES) == {}
        assert index.claimed([segment(1)]) == index.end_zones([]) == set(index.claimed_segments()) == set()
        index.close()


def test_a_full_disk(tmpfs_dir: Path) -> None:
    """The index gives itself up and its space back, and what was forgotten stays so."""
    path = tmpfs_dir / "index.sqlite"
    index = Index.open(path, STORES)
    fill(index)
    ballast = tmpfs_dir / "ballast"
    status = os.statvfs(tmpfs_dir)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_bsize - (2 << 20))
    with capture_logs() as logs:
        index.add(small_files(range(20_000)))
        assert index.is_broken
        assert check_nothing_wrong(index, FILES) == 0
        index.add(small_files(FILES))
        index.forget([segment(3)])
    assert "full" in logs[0]["error"]
    assert list(tmpfs_dir.iterdir()) == [ballast]
    with ballast.open("ab") as file:
        status = os.statvfs(tmpfs_dir)
        os.posix_fallocate(file.fileno(), ballast.stat().st_size, status.f_bavail * status.f_bsize)
    with capture_logs() as logs:
        again = Index.open(path, STORES)
        again.rebuild([piece(1)])
        again.forget([segment(1)])
        assert again.is_broken
    again.close()
    index.close()
    ballast.unlink()
    index = Index.open(path, STORES)
    assert index.is_fresh
    index.add(small_files(FILES))
    assert check_nothing_wrong(index, FILES) == len(FILES)
    index.close()


def test_a_full_disk_at_forget(tmpfs_dir: Path) -> None:
    """Room is made by removing segments: the index must not stand in the way of that."""
    path = tmpfs_dir / "index.sqlite"
    index = Index.open(path, STORES)
    fill(index)
    index.add(small_files(range(20_000)))
    with (tmpfs_dir / "ballast").open("wb") as file:
        status = os.statvfs(tmpfs_dir)
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_bsize)
    with capture_logs():
        for number in range(500):
            index.forget([segment(number)])
            check_nothing_wrong(index, range(number * 10, number * 10 + 20), forgotten=[number])
    index.close()
