import errno
import gzip
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import leaks
from support.stored import content
from zonebundle.errors import DamagedError, StoreError
from zonebundle.host import syscalls
from zonebundle.host.files import write_all
from zonebundle.store import objects
from zonebundle.store.objects import SegmentStore
from zonebundle.store.pieces import CHUNK, Run, deflate
from zonebundle.store.segments import Segments


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SegmentStore]:
    with leaks.no_leaks():
        store = SegmentStore(tmp_path)
        yield store
        store.close()


def remove(
    store: SegmentStore, candidates: Iterable[str], referenced: Callable[[frozenset[str]], Iterable[str]]
) -> int:
    """Both phases of a removal, with nothing between them."""
    return store.drop_aside(store.set_aside(candidates, lambda unleased: unleased - set(referenced(unleased))))


def run(seed: int) -> Run:
    return deflate(content(seed, 2000))


def put(store: SegmentStore, seed: int, owner: str = "bundle") -> str:
    (piece,) = store.put([run(seed)], owner)
    return piece.segment


def nothing(_: frozenset[str]) -> Iterable[str]:
    return ()


def temporaries(store: SegmentStore) -> list[str]:
    return os.listdir(os.path.dirname(os.path.dirname(store.path("0" * 64))) + "/tmp")


class Syncs:
    """Counts what makes data durable, and fails or waits on cue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = 0
        self.everything = 0
        self.error: int | None = None
        self.gate: threading.Event | None = None
        self.waiting = threading.Event()
        fdatasync, syncfs = os.fdatasync, syscalls.syncfs

        def count_data(descriptor: int) -> None:
            self.data += 1
            self._act()
            fdatasync(descriptor)

        def count_everything(descriptor: int) -> None:
            self.everything += 1
            self._act()
            syncfs(descriptor)

        monkeypatch.setattr(os, "fdatasync", count_data)
        monkeypatch.setattr(syscalls, "syncfs", count_everything)

    def _act(self) -> None:
        if self.gate is not None:
            self.waiting.set()
            assert self.gate.wait(30)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


def test_a_segment_has_its_name_when_it_is_flushed(store: SegmentStore) -> None:
    digest = put(store, 1)
    assert not store.exists(digest)
    with pytest.raises(DamagedError, match="is missing"):
        store.open(digest)
    store.flush()
    assert store.exists(digest)
    assert gzip.decompress(Path(store.path(digest)).read_bytes()) == content(1, 2000)
    assert stat.S_IMODE(os.stat(store.path(digest)).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(store.path(digest))).st_mode) == 0o700
    assert temporaries(store) == []
    os.close(store.open(digest))


def test_one_piece_a_run(store: SegmentStore) -> None:
    runs = [run(seed) for seed in range(5)]
    pieces = store.put(runs, "bundle")
    store.flush()
    data = Path(store.path(pieces[0].segment)).read_bytes()
    assert [data[piece.offset : piece.offset + piece.packed] for piece in pieces] == [run.data for run in runs]


def test_all_holes_share_one_segment(store: SegmentStore) -> None:
    few, many = store.zero_piece(2, "one"), store.zero_piece(1 << 20, "two")
    assert (few.segment, few.raw, few.times, many.times) == (many.segment, CHUNK, 2, 1 << 20)
    store.flush()
    assert list(store.digests()) == [few.segment]
    assert gzip.decompress(Path(store.path(few.segment)).read_bytes()) == bytes(CHUNK)


def test_a_known_segment_is_not_written_again(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = 0

    def count(descriptor: int, data: bytes) -> None:
        nonlocal writes
        writes += 1
        write_all(descriptor, data)

    monkeypatch.setattr(objects, "write_all", count)
    put(store, 1)
    put(store, 1, "another")
    assert writes == 1
    store.flush()
    put(store, 1)
    assert writes == 1
    assert temporaries(store) == []


def test_one_that_lost_bytes_is_written_again(store: SegmentStore) -> None:
    digest = put(store, 1)
    store.flush()
    os.truncate(store.path(digest), 100)
    put(store, 1)
    store.flush()
    assert gzip.decompress(Path(store.path(digest)).read_bytes()) == content(1, 2000)


def test_nothing_to_flush_costs_nothing(store: SegmentStore, syncs: Syncs) -> None:
    store.flush()
    put(store, 1)
    store.flush()
    store.flush()
    assert (syncs.data, syncs.everything) == (1, 0)


def test_many_are_flushed_at_once(store: SegmentStore, syncs: Syncs) -> None:
    digests = [put(store, seed) for seed in range(80)]
    store.flush()
    assert syncs.data == 0
    assert syncs.everything >= 1
    assert all(store.exists(digest) for digest in digests)


def test_flushes_at_the_same_time_share_one(store: SegmentStore, syncs: Syncs) -> None:
    syncs.gate = threading.Event()
    with ThreadPoolExecutor(9) as threads:
        put(store, 0)
        first = threads.submit(store.flush)
        assert syncs.waiting.wait(30)
        commits = _count_commits(store)
        # All of these are put while the first flush is on its way: the next one is theirs together.
        for seed in range(1, 9):
            put(store, seed)
        others = [threads.submit(store.flush) for _ in range(8)]
        syncs.gate.set()
        for future in (first, *others):
            future.result(30)
    assert commits() <= 1
    assert all(store.exists(put(store, seed)) for seed in range(9))


def _count_commits(store: SegmentStore) -> Callable[[], int]:
    commit = store._commit
    count = 0

    def counting(batch: dict[str, str]) -> None:
        nonlocal count
        count += 1
        commit(batch)

    store._commit = counting  # type: ignore[method-assign]
    return lambda: count


def test_the_same_segment_put_during_its_flush_is_durable_after_the_next(store: SegmentStore, syncs: Syncs) -> None:
    syncs.gate = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        digest = put(store, 1)
        first = threads.submit(store.flush)
        assert syncs.waiting.wait(30)
        assert put(store, 1, "another") == digest
        second = threads.submit(store.flush)
        assert not second.done()
        syncs.gate.set()
        second.result(30)
        assert store.exists(digest)
        first.result(30)
    assert syncs.data == 1


def test_a_writer_of_many_bytes_flushes_by_itself(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_UNWRITTEN", 1000)
    digests = [put(store, seed) for seed in range(20)]
    assert len(temporaries(store)) <= 3
    assert sum(store.exists(digest) for digest in digests) >= 17


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_flush_keeps_nothing(store: SegmentStore, syncs: Syncs, number: int) -> None:
    digest = put(store, 1)
    syncs.error = number
    with pytest.raises(StoreError, match="making 1 segments durable below ") as failed:
        store.flush()
    assert isinstance(failed.value.__cause__, OSError)
    assert failed.value.__cause__.errno == number
    assert store.missing("bundle") == [digest]
    assert temporaries(store) == []
    syncs.error = None
    # It was not durable, so it is not taken for known either.
    store.flush()
    assert store.missing("bundle") == [digest]
    put(store, 1)
    store.flush()
    assert store.missing("bundle") == []


def test_a_failed_flush_fails_for_all_who_wait(store: SegmentStore, syncs: Syncs) -> None:
    syncs.gate = threading.Event()
    syncs.error = errno.EIO
    with ThreadPoolExecutor(4) as threads:
        put(store, 1)
        first = threads.submit(store.flush)
        assert syncs.waiting.wait(30)
        others = [threads.submit(store.flush) for _ in range(3)]
        syncs.gate.set()
        for future in (first, *others):
            error = future.exception(30)
            # One that came when all was over has nothing to wait for any more; `missing` tells it.
            assert error is None or isinstance(error, StoreError)
        assert isinstance(first.exception(), StoreError)
    assert len(store.missing("bundle")) == 1


def test_names_that_were_not_made_durable_are_the_next_flushs_work(
    store: SegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "broken", path)

    put(store, 1)
    monkeypatch.setattr(objects, "sync_directory", fail)
    with pytest.raises(StoreError):
        store.flush()
    monkeypatch.setattr(objects, "sync_directory", synced.append)
    digest = put(store, 1)
    store.flush()
    directory = os.path.dirname(store.path(digest))
    assert sorted(synced) == [os.path.dirname(directory), directory]


def test_a_full_disk_leaves_no_temporary(store: SegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[:100])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(objects, "write_all", fail)
    with pytest.raises(StoreError, match="no space left on device; free space there"):
        put(store, 1)
    assert temporaries(store) == []


def test_what_was_not_flushed_is_gone_with_the_writer(tmp_path: Path) -> None:
    first = SegmentStore(tmp_path)
    lost, kept = put(first, 1), None
    first.close()
    second = SegmentStore(tmp_path)
    assert temporaries(second) == []
    assert not second.exists(lost)
    kept = put(second, 2)
    second.flush()
    second.close()
    assert Segments(tmp_path).exists(kept)


def test_only_what_nobody_uses_is_removed(store: SegmentStore) -> None:
    free, leased, used, pending = (put(store, seed, f"owner {seed}") for seed in range(4))
    store.flush()
    for owner in ("owner 0", "owner 2", "owner 3"):
        store.release(owner)
    size = os.stat(store.path(free)).st_size
    os.unlink(store.path(pending))
    put(store, 3, "owner 3")
    asked: list[frozenset[str]] = []

    def referenced(digests: frozenset[str]) -> set[str]:
        asked.append(digests)
        return {used}

    assert remove(store, [free, leased, used, pending, "f" * 64], referenced) == size
    assert asked == [{free, used, "f" * 64}]
    store.flush()
    assert [store.exists(digest) for digest in (free, leased, used, pending)] == [False, True, True, True]


def test_a_lease_that_comes_and_goes_during_a_removal_protects(store: SegmentStore) -> None:
    # As a bundle does that is committed meanwhile: the look for references may have missed it.
    reused, leased, other = put(store, 1), put(store, 2), put(store, 3)
    store.flush()
    store.release("bundle")

    def referenced(_: frozenset[str]) -> set[str]:
        put(store, 1, "new")
        store.lease("new", [leased])
        store.release("new")
        return set()

    remove(store, [reused, leased, other], referenced)
    assert [store.exists(digest) for digest in (reused, leased, other)] == [True, True, False]
    # The next one takes what that left.
    remove(store, [reused, leased], nothing)
    assert list(store.digests()) == []


def test_a_failing_look_for_references_removes_nothing(store: SegmentStore) -> None:
    digest = put(store, 1)
    store.flush()
    store.release("bundle")

    def referenced(_: frozenset[str]) -> set[str]:
        raise StoreError("no")

    with pytest.raises(StoreError):
        remove(store, [digest], referenced)
    assert store.exists(digest)


def test_what_is_aside_comes_back_where_it_is_wanted(store: SegmentStore) -> None:
    leased, put_again, put_back, dropped = (put(store, seed) for seed in range(4))
    store.flush()
    store.release("bundle")
    size = os.stat(store.path(dropped)).st_size
    moved = store.set_aside([leased, put_again, put_back, dropped], set)
    assert moved == set(store.aside()) == {leased, put_again, put_back, dropped}
    assert list(store.digests()) == []
    store.lease("new", [leased])
    put(store, 1, "new")
    store.flush()
    store.put_back([put_back, put_again])
    assert store.drop_aside([leased, put_again, put_back, dropped]) == size
    assert set(store.digests()) == {leased, put_again, put_back}
    assert store.aside() == []


def test_a_segment_of_another_store_is_adopted(store: SegmentStore, tmp_path: Path) -> None:
    other = SegmentStore(tmp_path / "other")
    digest = put(other, 1)
    other.flush()
    data = Path(other.path(digest)).read_bytes()
    with pytest.raises(DamagedError, match="are not its own"):
        store.adopt(digest, data[:-1], "copy")
    assert not store.holds("copy", digest)
    store.adopt(digest, data, "copy")
    store.flush()
    assert Path(store.path(digest)).read_bytes() == data
    assert store.holds("copy", digest)
    other.close()


def test_leases(store: SegmentStore) -> None:
    digest = put(store, 1, "one")
    store.lease("two", [digest])
    with pytest.raises(DamagedError, match="is missing"):
        store.lease("two", ["f" * 64])
    store.flush()
    assert store.holds("one", digest)
    assert store.release("one") == {digest}
    assert store.release("one") == set()
    assert not store.holds("one", digest)
    assert remove(store, [digest], nothing) == 0
    store.release("two")
    assert remove(store, [digest], nothing) > 0


@pytest.mark.parametrize("digest", ["", "ab", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_digests_name_segments(store: SegmentStore, digest: str) -> None:
    with pytest.raises(DamagedError, match="not a segment's digest"):
        store.path(digest)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["put", "flush", "release", "remove"]), max_size=30))
def test_what_is_leased_or_used_is_always_there(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    store = SegmentStore(tmp_path_factory.mktemp("segments"))
    known: dict[str, int] = {}
    used: set[str] = set()
    for number, step in enumerate(steps):
        owner = f"owner {number % 3}"
        match step:
            case "put":
                known[put(store, number % 5, owner)] = number % 5
            case "flush":
                store.flush()
                # As a commit: what an owner has leased is referred to from now on.
                used |= {digest for digest in known if store.holds(owner, digest)}
            case "release":
                store.release(owner)
            case "remove":
                remove(store, list(known), used.intersection)
        for digest in used:
            assert store.exists(digest)
    store.flush()
    for number in range(3):
        assert store.missing(f"owner {number}") == []
    store.close()


def test_many_threads(store: SegmentStore) -> None:
    def work(number: int) -> None:
        owner = f"bundle {number}"
        for seed in range(12):
            put(store, (seed + number) % 15, owner)
        store.flush()
        assert store.missing(owner) == []
        if number % 2:
            store.release(owner)
        remove(store, [put(store, 100 + number, "gone")], nothing)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(24)))
    store.flush()
    for number in range(0, 24, 2):
        assert store.missing(f"bundle {number}") == []
    assert temporaries(store) == []
