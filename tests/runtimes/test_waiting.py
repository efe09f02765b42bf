import asyncio
import os
import subprocess
import time

from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef
from zonebundle.runtimes.waiting import ended, give_way


async def work(seconds: float) -> None:
    """Long work of short steps."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        await give_way()
        time.sleep(0.00005)  # noqa: ASYNC251 - a step


async def turns_during(*tasks: asyncio.Task[None]) -> int:
    turns = 0
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turns += 1
    return turns


async def test_short_work_is_not_interrupted() -> None:
    assert await turns_during(asyncio.create_task(work(0.0001))) <= 2


async def test_long_work_lets_the_loop_go_on() -> None:
    assert await turns_during(asyncio.create_task(work(0.1))) > 20


async def test_much_long_work_together_lets_the_loop_go_on_as_often() -> None:
    # Each does 50 ms of work by itself; the loop gets its turn after half a millisecond of all of them.
    tasks = [asyncio.create_task(work(0.05)) for _ in range(50)]
    begin = time.perf_counter()
    turns = await turns_during(*tasks)
    assert turns > (time.perf_counter() - begin) / 0.01


async def test_one_that_is_cancelled_while_it_waits_for_its_turn_holds_up_nobody() -> None:
    tasks = [asyncio.create_task(work(0.02)) for _ in range(10)]
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
