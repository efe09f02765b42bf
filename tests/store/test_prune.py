from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from support import leaks
from support.stored import content
from zonebundle.errors import StoreError
from zonebundle.store.objects import SegmentStore
from zonebundle.store.pieces import deflate
from zonebundle.store.prune import NobodyElse, Pruner


class Host:
    """The guard of a store, as the sealer is one: records, claims, an index and holds on their way."""

    def __init__(self, segments: SegmentStore) -> None:
        self.segments = segments
        self.records: set[str] = set()
        self.holds: set[str] = set()
        self.forgotten: list[str] = []
        self.fails = False

    def used(self, digests: frozenset[str]) -> set[str]:
        return self.records & digests

    def forget(self, digests: Collection[str]) -> None:
        if self.fails:
            raise StoreError("the index cannot forget")
        assert all(self.segments.exists(digest) for digest in digests), "it leads to what is gone"
        self.forgotten += digests

    def open_holds(self) -> frozenset[str]:
        return frozenset(self.holds)


class World:
    def __init__(self, directory: Path) -> None:
        self.segments = SegmentStore(directory)
        self.host = Host(self.segments)
        self.bundles: set[str] = set()
        self.digests = [self._put(seed) for seed in range(4)]
        self.segments.flush()
        self.segments.release("bundle")
        self.pruner = self.make_pruner()

    def make_pruner(self) -> Pruner:
        return Pruner(self.segments, lambda digests: self.bundles & digests, self.host)

    def _put(self, seed: int) -> str:
        (piece,) = self.segments.put([deflate(content(seed, 2000))], "bundle")
        return piece.segment

    def waits(self) -> bool:
        return self.pruner.is_waiting

    @property
    def there(self) -> set[int]:
        return {number for number, digest in enumerate(self.digests) if self.segments.exists(digest)}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with leaks.no_leaks():
        world = World(tmp_path)
        yield world
        world.segments.close()


def test_what_nobody_uses_is_forgotten_and_removed(world: World) -> None:
    in_a_bundle, in_a_record, leased, free = world.digests
    world.bundles.add(in_a_bundle)
    world.host.records.add(in_a_record)
    world.segments.lease("download", [leased])
    size = Path(world.segments.path(free)).stat().st_size
    assert world.pruner.prune(world.digests) == size
    assert world.there == {0, 1, 2}
    assert world.host.forgotten == [free]
    assert not world.waits()


def test_an_index_that_cannot_forget_keeps_everything(world: World) -> None:
    world.host.fails = True
    with pytest.raises(StoreError, match="cannot forget"):
        world.pruner.prune(world.digests)
    assert world.there == {0, 1, 2, 3}


def test_a_hold_on_its_way_is_waited_for(world: World) -> None:
    world.host.holds = {"a hold"}
    assert world.pruner.prune(world.digests) == 0
    assert world.there == set()
    assert world.waits()
    # One that begins later cannot have been told.
    world.host.holds.add("a later one")
    assert world.pruner.finish() == 0
    world.host.holds.remove("a hold")
    world.host.records = {world.digests[2]}
    assert world.pruner.finish() > 0
    assert world.there == {2}
    assert not world.waits()
    assert world.segments.aside() == []


def test_a_bundle_may_take_what_is_aside(world: World) -> None:
    world.host.holds = {"a hold"}
    world.pruner.prune(world.digests)
    world.segments.lease("bundle", [world.digests[1]])
    world.host.holds.clear()
    world.pruner.finish()
    assert world.there == {1}


def test_what_a_crash_left_aside_is_gone_through_again(world: World) -> None:
    world.host.holds = {"a hold"}
    world.pruner.prune(world.digests)
    world.bundles.add(world.digests[0])
    world.host.records.add(world.digests[1])
    again = world.make_pruner()
    again.recover()
    assert world.there == {0}
    assert again.is_waiting
    world.host.holds.clear()
    again.finish()
    assert world.there == {0, 1}
    assert world.segments.aside() == []


def test_a_store_by_itself_waits_for_nobody(world: World) -> None:
    pruner = Pruner(world.segments, lambda _: set(), NobodyElse())
    pruner.prune(world.digests)
    assert world.there == set()
    assert not pruner.is_waiting
