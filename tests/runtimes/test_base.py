import asyncio
import time

import pytest

from zonebundle.runtimes.base import Grace


async def test_what_is_done_in_time_is_told_so() -> None:
    assert await Grace(3600).wait(asyncio.sleep(0)) is True


async def test_the_grace_ends() -> None:
    begin = time.monotonic()
    assert await Grace(0.02).wait(asyncio.Event().wait()) is False
    assert time.monotonic() - begin >= 0.02


async def test_no_grace_still_sees_what_is_done_already() -> None:
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    assert await Grace(0).wait(done) is True
    assert await Grace(-1).wait(asyncio.Event().wait()) is False


async def test_shortened_before_the_wait_it_counts_from_its_start() -> None:
    grace = Grace(3600)
    grace.shorten(0.01)
    assert await grace.wait(asyncio.Event().wait()) is False


async def test_shortened_during_the_wait_it_counts_from_then() -> None:
    grace = Grace(3600)
    wait = asyncio.create_task(grace.wait(asyncio.Event().wait()))
    await asyncio.wait({wait}, timeout=0.01)
    grace.shorten(0.01)
    assert await wait is False


async def test_it_is_never_lengthened() -> None:
    grace = Grace(0.01)
    grace.shorten(3600)
    wait = asyncio.create_task(grace.wait(asyncio.Event().wait()))
    await asyncio.sleep(0)
    grace.shorten(3600)
    assert await wait is False


async def test_the_clock_goes_on_over_a_second_wait() -> None:
    grace = Grace(0.01)
    assert await grace.wait(asyncio.Event().wait()) is False
    assert await grace.wait(asyncio.Event().wait()) is False


async def test_a_coroutine_is_cancelled_at_the_end_and_a_future_is_not() -> None:
    cancelled = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    assert await Grace(0.01).wait(forever()) is False
    assert cancelled.is_set()
    future = asyncio.get_running_loop().create_future()
    assert await Grace(0.01).wait(future) is False
    assert not future.cancelled()


async def test_a_cancelled_wait_cancels_its_coroutine() -> None:
    cancelled = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    wait = asyncio.create_task(Grace(3600).wait(forever()))
    await asyncio.sleep(0.01)
    wait.cancel()
    await asyncio.wait({wait})
    assert wait.cancelled()
    assert cancelled.is_set()


async def test_a_failure_is_raised() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await Grace(3600).wait(fail())
