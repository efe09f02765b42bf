import asyncio
from collections.abc import Awaitable, Callable

import pytest

from zonebundle.errors import SnapshotError
from zonebundle.snapshots.group import SnapshotGroup


class Snapshots:
    """Takes that last until they are let go; `taken` has each one's leader and followers."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, list[str]]] = []
        self.running = 0
        self.most = 0
        self._gates: list[asyncio.Event] = []
        self.failing: set[str] = set()

    def by(self, leader: str) -> Callable[[list[str]], Awaitable[str]]:
        async def take(followers: list[str]) -> str:
            self.taken.append((leader, followers))
            gate = asyncio.Event()
            self._gates.append(gate)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await gate.wait()
            finally:
                self.running -= 1
            if leader in self.failing:
                raise SnapshotError(f"{leader} failed")
            return f"snapshot {len(self.taken)} by {leader}"

        return take

    async def finish(self) -> None:
        """Let the takes that run now end."""
        for gate in self._gates:
            gate.set()
        self._gates.clear()
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class Captures:
    """Captures by name, each a task that shares."""

    def __init__(self) -> None:
        self.group = SnapshotGroup()
        self.snapshots = Snapshots()
        self.tasks: dict[str, asyncio.Task[str]] = {}

    async def arrive(self, *names: str, key: str = "key") -> None:
        for name in names:
            self.tasks[name] = asyncio.ensure_future(self.group.share(key, name, self.snapshots.by(name)))
            await settle()

    def result(self, name: str) -> str:
        return self.tasks[name].result()

    def check_is_empty(self) -> None:
        assert self.group._waiting == {}
        assert self.snapshots.running == 0


@pytest.fixture
def captures() -> Captures:
    return Captures()


async def test_a_capture_alone_takes_its_own(captures: Captures) -> None:
    await captures.arrive("a")
    await captures.snapshots.finish()
    assert captures.result("a") == "snapshot 1 by a"
    await captures.arrive("b")
    await captures.snapshots.finish()
    assert captures.snapshots.taken == [("a", []), ("b", [])]
    captures.check_is_empty()


async def test_who_arrives_during_a_take_shares_the_next(captures: Captures) -> None:
    await captures.arrive("a", "b", "c", "d")
    assert captures.snapshots.taken == [("a", [])]
    await captures.snapshots.finish()
    assert captures.tasks["a"].done()
    assert not captures.tasks["b"].done()
    assert captures.snapshots.taken[1:] == [("b", ["c", "d"])]
    await captures.arrive("e")
    await captures.snapshots.finish()
    assert {captures.result(name) for name in "bcd"} == {"snapshot 2 by b"}
    assert not captures.tasks["e"].done(), "its snapshot would be older than it"
    await captures.snapshots.finish()
    assert captures.result("e") == "snapshot 3 by e"
    assert captures.snapshots.most == 1
    captures.check_is_empty()


async def test_a_hundred_captures_need_two_snapshots(captures: Captures) -> None:
    names = [str(number) for number in range(100)]
    await captures.arrive(*names)
    await captures.snapshots.finish()
    await captures.snapshots.finish()
    assert all(captures.tasks[name].done() for name in names)
    assert [len(followers) for _, followers in captures.snapshots.taken] == [0, 98]
    captures.check_is_empty()


async def test_keys_do_not_wait_for_each_other(captures: Captures) -> None:
    await captures.arrive("a", key="one")
    await captures.arrive("b", key="two")
    assert captures.snapshots.taken == [("a", []), ("b", [])]
    await captures.snapshots.finish()
    captures.check_is_empty()


async def test_when_the_leader_fails_each_follower_tries_by_itself(captures: Captures) -> None:
    captures.snapshots.failing = {"b"}
    await captures.arrive("a", "b", "c", "d")
    await captures.snapshots.finish()
    await captures.snapshots.finish()
    with pytest.raises(SnapshotError, match="b failed"):
        captures.result("b")
    assert captures.snapshots.taken[2:] == [("c", []), ("d", [])]
    await captures.snapshots.finish()
    assert captures.result("c") == "snapshot 4 by c"
    assert captures.result("d") == "snapshot 4 by d"
    captures.check_is_empty()


async def test_a_failing_take_does_not_hold_up_who_came_meanwhile(captures: Captures) -> None:
    captures.snapshots.failing = {"a"}
    await captures.arrive("a", "b")
    await captures.snapshots.finish()
    with pytest.raises(SnapshotError):
        captures.result("a")
    await captures.snapshots.finish()
    assert captures.result("b") == "snapshot 2 by b"
    captures.check_is_empty()


async def test_when_the_leader_is_cancelled_a_follower_leads(captures: Captures) -> None:
    await captures.arrive("a", "b", "c")
    await captures.snapshots.finish()
    await captures.arrive("d")
    captures.tasks["b"].cancel()
    await settle()
    assert captures.snapshots.taken[2:] == [("c", ["d"])]
    await captures.snapshots.finish()
    assert captures.tasks["b"].cancelled()
    assert captures.result("c") == captures.result("d") == "snapshot 3 by c"
    captures.check_is_empty()


async def test_a_cancelled_take_without_followers_frees_the_key(captures: Captures) -> None:
    await captures.arrive("a")
    captures.tasks["a"].cancel()
    await settle()
    captures.check_is_empty()
    await captures.arrive("b")
    await captures.snapshots.finish()
    assert captures.result("b") == "snapshot 2 by b"


async def test_a_follower_that_is_cancelled_costs_nobody(captures: Captures) -> None:
    await captures.arrive("a", "b", "c", "d")
    captures.tasks["b"].cancel()
    await settle()
    await captures.snapshots.finish()
    assert captures.snapshots.taken[1:] == [("c", ["d"])]
    captures.tasks["d"].cancel()
    await settle()
    await captures.snapshots.finish()
    assert captures.result("c") == "snapshot 2 by c"
    captures.check_is_empty()


async def test_who_is_cancelled_as_its_turn_comes_hands_it_on(captures: Captures) -> None:
    await captures.arrive("a", "b", "c", "d")
    for gate in captures.snapshots._gates:
        gate.set()
    captures.snapshots._gates.clear()
    while not captures.tasks["a"].done():
        await asyncio.sleep(0)
    assert len(captures.snapshots.taken) == 1, "b has been told to lead and has not run yet"
    captures.tasks["b"].cancel()
    await settle()
    assert captures.snapshots.taken[1:] == [("c", ["d"])]
    await captures.snapshots.finish()
    assert captures.result("d") == "snapshot 2 by c"
    captures.check_is_empty()


async def test_all_waiters_cancelled_leave_nothing(captures: Captures) -> None:
    await captures.arrive("a", "b", "c")
    for name in "cba":
        captures.tasks[name].cancel()
        await settle()
    captures.check_is_empty()
