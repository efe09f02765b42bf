"""A check beside a writer tells of nothing that only comes or goes meanwhile."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from support.flipping import Sample, flip
from support.stored import CREATED, File, add, content, metadata, put, seal
from zonebundle.errors import NoSuchBundleError
from zonebundle.model.manifest import Entry
from zonebundle.store import check_dir
from zonebundle.store.check import Kind, Problem, check_store
from zonebundle.store.check_bundle import Fault, find_faults
from zonebundle.store.draft import BundleDraft
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import Store

pytestmark = pytest.mark.usefixtures("leak_check")


def check(directory: Path, *, deep: bool = False) -> list[Problem]:
    return list(check_store(StoreReader.open(directory), deep=deep))


@contextlib.contextmanager
def _meanwhile(act: Callable[[], None], at: int = 1) -> Iterator[None]:
    """`act` happens when the check begins to look into its n-th bundle."""
    real = find_faults
    count = itertools.count(1)

    def instead(*arguments: Any, **options: Any) -> Iterator[Fault]:
        if next(count) == at:
            act()
        return real(*arguments, **options)

    with mock.patch.object(check_dir, "find_faults", instead):
        yield


def test_a_bundle_deleted_while_it_is_looked_at_is_no_problem(sample: Sample) -> None:
    def delete() -> None:
        with Store.open(sample.directory) as store:
            for made in sample.bundles:
                store.delete(made.zone, made.bundle_id)

    with _meanwhile(delete):
        assert check(sample.directory) == []


def test_a_bundle_sealed_after_the_listing_is_looked_at(sample: Sample) -> None:
    def act() -> None:
        with Store.open(sample.directory) as store:
            seal(store, [File(b"logs/new", content(70, CHUNK))])

    with _meanwhile(act):
        assert check(sample.directory) == []


def test_a_segment_used_by_a_bundle_sealed_meanwhile_is_not_unused(sample: Sample) -> None:
    made = metadata("later")
    with Store.open(sample.directory) as store, BundleDraft(store, made, CREATED) as draft:
        add(store, draft, made.bundle_id, [File(b"logs/new", content(70, CHUNK))])
        store.segments.flush()

        def commit() -> None:
            draft.commit(hold_seconds=0, graceful_seconds=0, gaps=0)

        with _meanwhile(commit):
            assert check(sample.directory) == []


def test_a_segment_used_by_a_zone_that_is_new_is_not_unused(sample: Sample) -> None:
    """The zones had been listed when it came."""
    with Store.open(sample.directory) as store:
        put(store, "a seal", content(70, CHUNK))
        store.segments.flush()

        def commit() -> None:
            seal(store, [File(b"logs/new", content(70, CHUNK))], metadata("later"))

        with _meanwhile(commit, at=len(sample.bundles)):
            assert check(sample.directory) == []


def test_a_damaged_bundle_deleted_while_it_is_looked_at_is_no_problem(sample: Sample) -> None:
    """Its files were open, its segments went while they were looked for."""
    real = find_faults
    made = sample.bundles[2]

    def late(directory: Path, *identity: str, on_entry: Callable[[Entry], None]) -> Iterator[Fault]:
        yield from real(directory, *identity, on_entry=on_entry)
        if directory == sample.bundle(2):
            with Store.open(sample.directory) as store, contextlib.suppress(NoSuchBundleError):
                store.delete(made.zone, made.bundle_id)

    flip(sample.bundle(2) / "frame", 8 * 40)
    with mock.patch.object(check_dir, "find_faults", late):
        assert [problem for problem in check(sample.directory) if problem.is_damage] == []


@pytest.mark.slow
def test_no_false_alarm_beside_a_writer(sample: Sample) -> None:
    """One thread seals and deletes, as a sealer does; a check beside it, again and again, finds nothing damaged."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            with Store.open(sample.directory) as store:
                for number in range(1_000_000):
                    if stop.is_set():
                        return
                    files = [File(b"logs/%d" % seed, content(seed % 7, 3000)) for seed in range(number, number + 5)]
                    made = seal(store, [*files, File(b"ptree", b"x" * 5000, own=True)]).metadata
                    if number % 3:
                        store.delete(made.zone, made.bundle_id)
        except BaseException as error:
            failures.append(error)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for _ in range(25):
            found = check(sample.directory, deep=True)
            assert [str(problem) for problem in found if problem.is_damage or problem.kind == Kind.FOREIGN] == []
    finally:
        stop.set()
        writing.join()
    assert failures == []
