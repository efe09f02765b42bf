"""Shared areas: a leader's snapshot lives exactly as long as somebody reads it."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sealing import NEVER
from support.spooled import INSTALLATION, Draft, SpoolDir
from zonebundle.errors import SnapshotError
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, SnapshotTree
from zonebundle.seal.entry import SpoolEntry
from zonebundle.seal.release import Releaser
from zonebundle.seal.sealer import Sealer
from zonebundle.seal.storage import Storage
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import Unlinked, destroy_area, prepare_area
from zonebundle.store.reader import StoreReader


class Group:
    """A leader and its followers, on a directory that stands for a snapshot."""

    def __init__(self, at: SpoolDir, followers: int) -> None:
        self.at = at
        self.leader = Draft(at, zone="leader")
        self.followers = [Draft(at, zone=f"follower-{number}") for number in range(followers)]
        self.leader.followers = tuple(follower.bundle_id for follower in self.followers)
        self.area = at.staging / snapshot_name(INSTALLATION, self.leader.bundle_id)
        prepare_area(self.area, INSTALLATION)
        for draft in self.all:
            logs = self.area / "snapshot" / draft.zone / "logs"
            logs.mkdir(parents=True)
            (logs / "app.log").write_text(f"log of {draft.zone}\n")

    @property
    def all(self) -> list[Draft]:
        return [self.leader, *self.followers]

    def record(self, draft: Draft) -> None:
        number = draft.add_area(Area("btrfs", str(self.area), self.leader.bundle_id))
        root = str(self.at.zone_root)
        draft.add_tree(SnapshotTree(number, f"{draft.zone}/logs", "zone", "logs", ("logs/**",), root))
        draft.write()

    def check_sealed(self, draft: Draft) -> None:
        assert self.at.logs(draft) == {b"zone/logs/app.log": f"log of {draft.zone}\n".encode()}


def seal(sealer: Sealer, draft: Draft) -> None:
    sealed = sealer.seal(draft.bundle_id, lambda total, done: None, NEVER)
    assert sealed is not None
    assert sealed.left == ""


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_last_one_ends_the_snapshot(at: SpoolDir, sealer: Sealer, order: tuple[int, ...]) -> None:
    group = Group(at, followers=2)
    for draft in group.all:
        group.record(draft)
    for index in order[:-1]:
        seal(sealer, group.all[index])
        assert group.area.is_dir()
    seal(sealer, group.all[order[-1]])
    assert at.left() == []
    for draft in group.all:
        group.check_sealed(draft)


def test_a_leader_that_is_kept_is_stripped_and_never_sealed_again(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=1)
    group.leader.add_output("who", b"x" * 1000)
    for draft in group.all:
        group.record(draft)
    seal(sealer, group.leader)
    assert sorted(path.name for path in group.leader.entry.iterdir()) == ["capture.jsonl", "sealed"]
    # A new agent does not know that and asks again.
    seal(sealer, group.leader)
    assert group.area.is_dir()
    seal(sealer, group.followers[0])
    assert at.left() == []


def test_a_follower_without_a_record_still_needs_the_snapshot(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=2)
    group.record(group.leader)
    seal(sealer, group.leader)
    assert group.area.is_dir()
    group.record(group.followers[0])
    seal(sealer, group.followers[0])
    assert group.area.is_dir()
    group.record(group.followers[1])
    seal(sealer, group.followers[1])
    group.check_sealed(group.followers[1])
    assert at.left() == []


def test_a_leader_without_a_record_still_needs_its_snapshot(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=1)
    group.record(group.followers[0])
    seal(sealer, group.followers[0])
    assert group.area.is_dir()
    group.record(group.leader)
    seal(sealer, group.leader)
    group.check_sealed(group.leader)
    assert at.left() == []


def test_a_leader_that_its_last_follower_has_ended_meanwhile(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=1)
    for draft in group.all:
        group.record(draft)
    leader = SpoolEntry(at.spool, group.leader.bundle_id)
    # As with several directories: before its own clean-up.
    leader.mark_sealed()
    seal(sealer, group.followers[0])
    assert at.left() == []
    Releaser(at.spool, lambda area: pytest.fail(f"{area} is destroyed twice")).release(leader)


def test_followers_that_went_away_by_themselves_are_noticed(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=1)
    group.record(group.leader)
    seal(sealer, group.leader)
    sealer.settle()
    assert group.area.is_dir()
    # Its capture failed; the agent removed its entry.
    group.followers[0].writer.close()
    SpoolEntry(at.spool, group.followers[0].bundle_id).remove()
    sealer.settle()
    assert at.left() == []


def test_a_deleted_leader_leaves_the_snapshot_to_its_followers(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=1)
    for draft in group.all:
        group.record(draft)
    assert sealer.delete("leader", group.leader.bundle_id) == 0
    assert group.area.is_dir()
    seal(sealer, group.followers[0])
    group.check_sealed(group.followers[0])
    assert at.left() == []
    assert [header.metadata.zone for header in StoreReader.open(at.store).bundles()] == ["follower-0"]


def test_a_follower_that_the_leaders_record_does_not_name_keeps_the_snapshot(at: SpoolDir, sealer: Sealer) -> None:
    # The agent died between the two records, and the leader was recorded anew.
    group = Group(at, followers=1)
    group.leader.followers = ()
    for draft in group.all:
        group.record(draft)
    seal(sealer, group.leader)
    assert group.area.is_dir()
    seal(sealer, group.followers[0])
    group.check_sealed(group.followers[0])
    assert at.left() == []


def test_a_follower_of_a_leader_that_is_gone_ends_the_snapshot(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=2)
    for draft in group.all:
        group.record(draft)
    SpoolEntry(at.spool, group.leader.bundle_id).remove()
    seal(sealer, group.followers[0])
    assert group.area.is_dir()
    seal(sealer, group.followers[1])
    assert at.left() == []


def test_a_damaged_record_keeps_what_it_names_until_it_is_deleted(at: SpoolDir, sealer: Sealer) -> None:
    group = Group(at, followers=1)
    for draft in group.all:
        group.record(draft)
    record = group.followers[0].entry / "capture.jsonl"
    record.write_bytes(record.read_bytes() + b'{"file":{"cut')
    seal(sealer, group.leader)
    assert group.area.is_dir()
    assert sealer.delete("follower-0", group.followers[0].bundle_id) == 0
    assert at.left() == []


def test_two_groups_that_follow_each_other(at: SpoolDir, sealer: Sealer) -> None:
    first, second = Group(at, followers=0), Group(at, followers=0)
    # Each leads one snapshot and follows the other's.
    for one, other in ((first, second), (second, first)):
        one.leader.followers = (other.leader.bundle_id,)
        one.leader.add_area(Area("btrfs", str(other.area), other.leader.bundle_id))
        one.record(one.leader)
    seal(sealer, first.leader)
    assert first.area.is_dir()
    seal(sealer, second.leader)
    assert at.left() == []


@pytest.fixture
def failing(at: SpoolDir) -> Iterator[tuple[Sealer, list[Path]]]:
    """A sealer that cannot destroy the areas in the list."""
    stuck: list[Path] = []

    def destroy(area: Area, unlinked: Unlinked | None) -> None:
        if Path(area.path) in stuck:
            raise SnapshotError(f"{area.path} is busy")
        destroy_area(area, INSTALLATION, unlinked)

    workers = Workers(1)
    sealer = Sealer(at.spool, Storage(at.state, [at.store]), destroy, workers)
    yield sealer, stuck
    workers.close()
    sealer.close()


def test_a_snapshot_that_cannot_be_removed_is_tried_again(at: SpoolDir, failing: tuple[Sealer, list[Path]]) -> None:
    sealer, stuck = failing
    group = Group(at, followers=1)
    for draft in group.all:
        group.record(draft)
    stuck.append(group.area)
    seal(sealer, group.leader)
    sealed = sealer.seal(group.followers[0].bundle_id, lambda total, done: None, NEVER)
    assert sealed is not None
    assert sealed.left.endswith("is busy")
    stuck.clear()
    seal(sealer, group.followers[0])
    assert at.left() == []
