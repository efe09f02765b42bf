"""Wait for the thing itself, never for a time."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar, overload

T = TypeVar("T")


def _pauses(timeout: float) -> Iterator[float]:
    """The seconds between two looks, until `timeout` has passed; there is always a last look after it."""
    deadline = time.monotonic() + timeout
    pause = 0.002
    while (left := deadline - time.monotonic()) > 0:
        yield min(pause, left)
        pause = min(pause * 1.5, 0.05)


def until(predicate: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """Call `predicate` until it gives something true, and return that; AssertionError after `timeout` seconds."""
    for pause in _pauses(timeout):
        if value := predicate():
            return value
        time.sleep(pause)
    if value := predicate():
        return value
    raise AssertionError(f"not within {timeout:g} s: {what or predicate}")


@overload
async def until_async(predicate: Callable[[], Awaitable[T]], timeout: float = ..., what: str = ...) -> T: ...


@overload
async def until_async(predicate: Callable[[], T], timeout: float = ..., what: str = ...) -> T: ...


async def until_async(predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """As `until`, without blocking the loop; `predicate` may be a coroutine function."""

    async def look() -> Any:
        value = predicate()
        return await value if inspect.isawaitable(value) else value

    for pause in _pauses(timeout):
        if value := await look():
            return value
        await asyncio.sleep(pause)
    if value := await look():
        return value
    raise AssertionError(f"not within {timeout:g} s: {what or predicate}")
