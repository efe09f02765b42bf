import asyncio
import threading

import pytest

from support import wait


def test_until_returns_what_became_true() -> None:
    seen: list[int] = []
    threading.Timer(0.01, seen.append, [7]).start()
    assert wait.until(lambda: seen, what="the timer") == [7]


def test_until_names_what_did_not_happen() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the sky falls"):
        wait.until(lambda: False, timeout=0.01, what="the sky falls")


async def test_until_async_lets_the_loop_run() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await wait.until_async(event.is_set)


async def test_until_async_awaits_a_coroutine_function() -> None:
    left = [False, False, True]

    async def look() -> bool:
        return left.pop(0)

    assert await wait.until_async(look)
    assert left == []
