"""Turns: in order, a few at a time, and over when they last too long."""

import asyncio

from zonebundle.capture.turns import Turns


async def test_few_at_a_time_and_in_order() -> None:
    turns = Turns(2, longest=60)
    taken: list[int] = []
    at_once = most = 0

    async def work(number: int) -> None:
        nonlocal at_once, most
        async with turns.take():
            taken.append(number)
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0)
            at_once -= 1

    await asyncio.gather(*(work(number) for number in range(20)))
    assert taken == list(range(20))
    assert most == 2


async def test_one_that_hangs_does_not_hold_up_the_next() -> None:
    turns = Turns(1, longest=0.01)
    never = asyncio.Event()

    async def hang() -> None:
        async with turns.take():
            await never.wait()

    hanging = [asyncio.create_task(hang()) for _ in range(5)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10), turns.take():
        assert not any(task.done() for task in hanging)
    never.set()
    await asyncio.gather(*hanging)
    # Turns that were over have not been given back twice.
    async with turns.take():
        waiting = asyncio.create_task(hang())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting


async def test_a_cancelled_wait_takes_no_turn() -> None:
    turns = Turns(1, longest=60)
    async with turns.take():
        waiting = asyncio.create_task(turns.take().__aenter__())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(10), turns.take():
        pass


async def test_who_is_ahead_goes_before_those_who_came_earlier() -> None:
    turns = Turns(1, longest=60)
    taken: list[str] = []

    async def work(name: str, ahead: bool) -> None:
        async with turns.take(ahead=ahead):
            taken.append(name)

    async with turns.take():
        working = [asyncio.create_task(work(name, name == "end")) for name in ("one", "two", "end")]
        await asyncio.sleep(0)
    await asyncio.gather(*working)
    assert taken == ["end", "one", "two"]


async def test_a_turn_that_comes_as_its_waiter_is_cancelled_goes_to_the_next() -> None:
    turns = Turns(1, longest=60)
    holding = turns.take()
    await holding.__aenter__()
    cancelled = asyncio.create_task(turns.take().__aenter__())
    next_one = asyncio.create_task(turns.take().__aenter__())
    await asyncio.sleep(0)
    await holding.__aexit__(None, None, None)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    await asyncio.wait_for(next_one, 10)
