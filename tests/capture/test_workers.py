"""The pool of hold workers: never empty, always killable, never leaking."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from functools import partial

import pytest

from support import wait
from zonebundle.capture.workers import HoldWorker, HoldWorkers, WorkerDiedError
from zonebundle.errors import HostError
from zonebundle.host import proc


@contextlib.asynccontextmanager
async def workers(idle: int = 2) -> AsyncIterator[HoldWorkers]:
    pool = HoldWorkers(idle)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def test_workers_are_there_before_they_are_needed() -> None:
    async with workers(3) as pool:
        server, *idle = pool.pids
        assert len(idle) == 3
        assert sorted(proc.children(server)) == sorted(idle)


@pytest.mark.usefixtures("leak_check")
async def test_a_hold_never_waits_for_another() -> None:
    async with workers(2) as pool, contextlib.AsyncExitStack() as stack:
        taken = [await asyncio.wait_for(stack.enter_async_context(pool.take()), 10) for _ in range(12)]
        assert len({worker.pid for worker in taken}) == 12


async def test_after_a_burst_the_surplus_goes() -> None:
    async with workers(2) as pool:
        server = pool.pids[0]
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(8):
                await stack.enter_async_context(pool.take())
        await wait.until_async(lambda: len(proc.children(server)) <= 3, what="surplus workers end and are reaped")


async def test_a_worker_that_dies_is_reported_and_replaced() -> None:
    async with workers(1) as pool:
        async with pool.take() as worker:
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError, match="died during 'begin'"):
                await worker.call({"do": "begin"}, 5)
        await _answers(pool)


async def test_a_worker_that_does_not_answer_is_killed() -> None:
    async with workers(1) as pool:
        async with pool.take() as worker:
            os.kill(worker.pid, signal.SIGSTOP)
            with pytest.raises(WorkerDiedError, match="did not answer within"):
                await worker.call({"do": "begin"}, 0.2)
            await wait.until_async(lambda: proc.identify(worker.pid) is None, what="it is killed")
        await _answers(pool)


async def test_a_dead_server_is_started_again() -> None:
    async with workers(1) as pool:
        os.kill(pool.pids[0], signal.SIGKILL)
        await wait.until_async(lambda: proc.identify(pool.pids[1]) is None, what="workers die with the server")
        await _answers(pool)


async def test_workers_end_when_the_pool_closes() -> None:
    async with workers(2) as pool:
        pids = pool.pids
    for pid in pids:
        await wait.until_async(partial(_has_ended, pid), what=f"{pid} has ended")


def _has_ended(pid: int) -> bool:
    return proc.identify(pid) is None


async def _answers(pool: HoldWorkers) -> None:
    async with pool.take() as worker:
        assert isinstance(worker, HoldWorker)
        with pytest.raises(HostError, match="not expected now"):
            await worker.call({"do": "nonsense"}, 10)
