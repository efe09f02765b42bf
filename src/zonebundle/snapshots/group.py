"""Sharing snapshots, like a group commit: who comes while one is being taken shares the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Lead:
    """The waiter's turn: it takes the snapshot, for these others too."""

    followers: list[_Waiter]


@dataclass(frozen=True, slots=True)
class _Shared:
    """Another one took the snapshot, for this waiter too."""

    result: object


@dataclass(frozen=True, slots=True)
class _Alone:
    """The one that led failed: each of its followers tries by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    bundle_id: str
    turn: asyncio.Future[_Lead | _Shared | _Alone]


class SnapshotGroup:
    """Shares what `take` gives between captures with the same key. For one event loop.

    A snapshot must not be older than the request for it, so a capture that arrives while one is being taken cannot use
    that one: all that arrive meanwhile share the next, which the first of them takes.
    """

    def __init__(self) -> None:
        # The keys of which a snapshot is being taken, with those who wait for the next.
        self._waiting: dict[str, list[_Waiter]] = {}

    async def share(self, key: str, bundle_id: str, take: Callable[[list[str]], Awaitable[T]]) -> T:
        """The result of a `take` that began after this call: this one's, or that of the capture that led.

        `take` is called with the IDs of the bundles that follow. If it raises, this caller gets the error, and each
        follower calls its own `take`, alone and at once. If the leader is cancelled, one of the followers leads;
        a follower that is cancelled costs the others nothing. All takes of one key have to give the same type.
        """
        followers: list[_Waiter] = []
        if key in self._waiting:
            waiter = _Waiter(bundle_id, asyncio.get_running_loop().create_future())
            self._waiting[key].append(waiter)
            turn = await self._await_turn(key, waiter)
            if isinstance(turn, _Shared):
                return turn.result  # type: ignore[return-value]
            if isinstance(turn, _Alone):
                return await take([])
            followers = turn.followers
        else:
            self._waiting[key] = []
        return await self._lead(key, followers, take)

    async def _await_turn(self, key: str, waiter: _Waiter) -> _Lead | _Shared | _Alone:
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                # Its turn came in the same moment: it is handed on.
                turn = waiter.turn.result()
                if isinstance(turn, _Lead):
                    self._go_on(key, turn.followers)
            raise

    async def _lead(self, key: str, followers: list[_Waiter], take: Callable[[list[str]], Awaitable[T]]) -> T:
        try:
            result = await take([follower.bundle_id for follower in followers])
        except Exception:
            _answer(followers, _Alone())
            self._go_on(key, [])
            raise
        except BaseException:
            # Cancelled: those who followed share the next one, with all who came meanwhile.
            self._go_on(key, followers)
            raise
        _answer(followers, _Shared(result))
        self._go_on(key, [])
        return result

    def _go_on(self, key: str, followers: list[_Waiter]) -> None:
        """Let the next one lead, if anybody waits."""
        waiting = [waiter for waiter in (*followers, *self._waiting[key]) if not waiter.turn.done()]
        if waiting:
            self._waiting[key] = []
            waiting[0].turn.set_result(_Lead(waiting[1:]))
        else:
            del self._waiting[key]


def _answer(waiters: list[_Waiter], turn: _Shared | _Alone) -> None:
    for waiter in waiters:
        if not waiter.turn.done():
            waiter.turn.set_result(turn)
