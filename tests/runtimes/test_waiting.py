import asyncio
import os
import subprocess

import pytest

from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef
from zonebundle.runtimes import waiting
from zonebundle.runtimes.waiting import ended, give_way


class Clock:
    """A clock that goes on by a tenth of a millisecond with each step of work, however busy the host is."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


async def work(clock: Clock, steps: int) -> None:
    for _ in range(steps):
        await give_way()
        clock.seconds += 0.0001


async def turns_during(*tasks: asyncio.Task[None]) -> int:
    turns = 0
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turns += 1
    return turns


async def test_short_work_is_not_interrupted(clock: Clock) -> None:
    assert await turns_during(asyncio.create_task(work(clock, 5))) == 1


async def test_long_work_lets_the_loop_go_on(clock: Clock) -> None:
    assert await turns_during(asyncio.create_task(work(clock, 1000))) > 1000 / 10


async def test_much_long_work_together_lets_the_loop_go_on_as_often(clock: Clock) -> None:
    tasks = [asyncio.create_task(work(clock, 20)) for _ in range(50)]
    longest, before = 0.0, clock.seconds
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        longest, before = max(longest, clock.seconds - before), clock.seconds
    assert longest < 0.002


async def test_one_that_is_cancelled_while_it_waits_for_its_turn_holds_up_nobody(clock: Clock) -> None:
    tasks = [asyncio.create_task(work(clock, 20)) for _ in range(10)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.wait(tasks, timeout=30)
    assert [task.cancelled() for task in tasks] == [True, False] * 5


async def test_the_end_of_a_process_is_waited_for_and_one_that_is_gone_is_not() -> None:
    process = await asyncio.to_thread(subprocess.Popen, ["sleep", "1000"])
    reference = proc.identify(process.pid)
    assert reference is not None
    before = len(os.listdir("/proc/self/fd"))
    wait = asyncio.create_task(ended(reference))
    cancelled = asyncio.create_task(ended(reference))
    done, _ = await asyncio.wait({wait, cancelled}, timeout=0.01)
    assert not done
    cancelled.cancel()
    process.kill()
    await wait
    process.wait()
    await ended(reference)
    await ended(ProcessRef(os.getpid(), 1))
    await asyncio.wait({cancelled})
    assert len(os.listdir("/proc/self/fd")) == before
