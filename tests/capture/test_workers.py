"""The pool of hold workers: always there, always killable, never leaking."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from support import wait
from zonebundle.capture.order import HoldSettings
from zonebundle.capture.workers import HoldWorkers, WorkerDiedError
from zonebundle.errors import HostError
from zonebundle.host import proc
from zonebundle.host.channel import Channel


@contextlib.asynccontextmanager
async def workers(shared: int = 2) -> AsyncIterator[HoldWorkers]:
    pool = HoldWorkers(shared)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def test_workers_are_there_before_they_are_needed() -> None:
    async with workers(3) as pool:
        server, *resting = pool.pids
        assert len(resting) == 3 + 1
        assert sorted(proc.children(server)) == sorted(resting)


@pytest.mark.usefixtures("leak_check")
async def test_a_hold_never_waits_for_another() -> None:
    async with workers(2) as pool, contextlib.AsyncExitStack() as stack:
        taken = [await asyncio.wait_for(stack.enter_async_context(pool.take()), 10) for _ in range(12)]
        assert len({worker.pid for worker in taken}) == 2
        for worker in taken:
            with pytest.raises(HostError, match="not expected now"):
                await worker.call({"do": "nonsense"}, 10)


@pytest.mark.usefixtures("leak_check")
async def test_holds_with_commands_have_a_process_each() -> None:
    async with workers(1) as pool:
        server = pool.pids[0]
        async with contextlib.AsyncExitStack() as stack:
            taken = [await stack.enter_async_context(pool.take(exclusive=True)) for _ in range(6)]
            assert len({worker.pid for worker in taken}) == 6
        await wait.until_async(lambda: len(proc.children(server)) == 2, what="surplus workers end and are reaped")


@pytest.mark.parametrize("exclusive", [False, True])
async def test_a_worker_that_dies_is_reported_and_replaced(exclusive: bool) -> None:
    async with workers(1) as pool:
        async with pool.take(exclusive=exclusive) as worker:
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError, match="died during 'begin'"):
                await worker.call({"do": "begin"}, 5)
        await _answers(pool, exclusive)


async def test_settings_are_told_where_they_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    send = Channel.send

    def noting(channel: Channel, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        if message.get("do") == "settings":
            told.append(message["settings"]["index"])
        send(channel, message, descriptors)

    monkeypatch.setattr(Channel, "send", noting)
    before = HoldSettings(zone_roots=("/zone",))
    after = replace(before, index="/index")
    async with workers(1) as pool:
        async with pool.take() as one, pool.take() as other:
            for worker, settings in ((one, before), (other, replace(before)), (one, after), (other, after)):
                with pytest.raises(HostError, match="not expected now"):
                    await worker.call({"do": "nonsense"}, 10, settings)
            assert told == ["", "/index"]
        async with pool.take(exclusive=True) as fresh:
            with pytest.raises(HostError, match="not expected now"):
                await fresh.call({"do": "nonsense"}, 10, after)
    assert told == ["", "/index", "/index"]


async def test_a_worker_that_does_not_answer_gets_no_more_holds() -> None:
    async with workers(1) as pool:
        async with pool.take() as worker:
            os.kill(worker.pid, signal.SIGSTOP)
            with pytest.raises(WorkerDiedError, match="did not answer within"):
                await worker.call({"do": "begin"}, 0.2)
            async with pool.take() as other:
                assert other.pid != worker.pid
        await wait.until_async(partial(_has_ended, worker.pid), what="it is killed when it serves nobody any more")
        await _answers(pool, False)


async def test_an_exclusive_worker_that_does_not_answer_is_killed() -> None:
    async with workers(1) as pool:
        async with pool.take(exclusive=True) as worker:
            os.kill(worker.pid, signal.SIGSTOP)
            with pytest.raises(WorkerDiedError, match="did not answer within"):
                await worker.call({"do": "begin"}, 0.2)
            await wait.until_async(partial(_has_ended, worker.pid), what="it is killed")
        await _answers(pool, True)


async def test_one_hold_lost_does_not_cost_the_others() -> None:
    async with workers(1) as pool, pool.take() as one, pool.take() as other:
        assert one.pid == other.pid
        one.lose()
        with pytest.raises(HostError, match="not expected now"):
            await other.call({"do": "nonsense"}, 10)


async def test_a_dead_server_is_started_again() -> None:
    async with workers(1) as pool:
        pids = pool.pids
        os.kill(pids[0], signal.SIGKILL)
        for pid in pids:
            await wait.until_async(partial(_has_ended, pid), what="workers die with the server")
        await _answers(pool, False)


async def test_workers_end_when_the_pool_closes() -> None:
    async with workers(2) as pool:
        pids = pool.pids
    for pid in pids:
        await wait.until_async(partial(_has_ended, pid), what=f"{pid} has ended")


def _has_ended(pid: int) -> bool:
    return proc.identify(pid) is None


async def _answers(pool: HoldWorkers, exclusive: bool) -> None:
    async with pool.take(exclusive=exclusive) as worker:
        with pytest.raises(HostError, match="not expected now"):
            await worker.call({"do": "nonsense"}, 10)
