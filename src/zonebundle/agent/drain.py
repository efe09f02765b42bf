"""Draining: nothing new is begun below a path, and what is there is waited for, so that a disk can be removed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import structlog

from zonebundle.errors import ConflictError, NotFoundError, UnavailableError, UsageError
from zonebundle.host.mounts import Mount, mount_of, read_mounts
from zonebundle.model.globs import static_prefix
from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_seconds
from zonebundle.model.record import Intent
from zonebundle.model.zone import LogTree, Zone

T = TypeVar("T")
_log = structlog.get_logger()

_LOOK_AGAIN = 0.2
# How long a stop waits to learn where links lead, and a list for the sealer: what they are on may hang.
_RESOLVE_PATIENCE = 1.0
_LIST_PATIENCE = 5.0
# Of those who still use a path, so many are named in an error.
_NAMED = 5
_SILENT = "the sealer, which has not answered yet"

Downloads = Callable[[], Iterable[tuple[str, Iterable[str]]]]
"""The downloads that are on their way: what each is called, and the directories that it reads."""


class Stores(Protocol):
    """What a drain needs of the agent's own hold on the store directories."""

    def give_up(self, path: str) -> None: ...

    def take_back(self, path: str) -> None: ...


class Sealer(Protocol):
    """What a drain needs of the link to the sealer."""

    async def ask(self, do: str, **arguments: Any) -> Any: ...

    async def drain(self, path: str) -> None: ...

    async def undrain(self, path: str) -> None: ...


@dataclass(slots=True)
class _Barrier:
    """A path that is drained, resolved and as it was asked for. `told` ends when the sealer knows of it."""

    path: str
    asked: str
    told: asyncio.Task[None]


class Drains:
    """The barriers of one agent, and the captures that they wait for.

    A barrier stands until it is ended, whatever becomes of the client that asked for it; it does not survive a restart
    of the agent. A capture that began before it is waited for, never broken. Paths are compared by their components
    after links are resolved. Where no barrier stands, a capture costs nothing more.
    """

    def __init__(
        self, sealer: Sealer, downloads: Downloads, stores: Stores, *, spool: str, staging: Callable[[], Iterable[str]]
    ) -> None:
        """`spool` is used by every capture; `staging` gives the staging directories that are known."""
        self._sealer = sealer
        self._downloads = downloads
        self._stores = stores
        self._spool = spool
        self._staging = staging
        self._barriers: dict[str, _Barrier] = {}
        self._captures: dict[str, Intent] = {}
        # Not shared with anything: looking at a path may hang, and a stop may wait for it.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="drain")
        # For those who want to begin: looks of the others may hang on the very disk that is drained.
        self._admissions = ThreadPoolExecutor(4, thread_name_prefix="admit")
        self._order = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Give up; the barriers end with the agent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._admissions.shutdown(wait=False, cancel_futures=True)

    async def drain(self, path: str, timeout: float | None = None) -> str:
        """Put up a barrier, and wait until nothing uses what is below it; returns the resolved path.

        Raises UsageError if there is no such path, UnavailableError naming what still uses it after `timeout` seconds
        (the barrier stays), ConflictError if the drain is ended meanwhile, StoreError if the sealer cannot do it.
        """
        barrier = self._put_up(await self._resolve(path), path)
        users = [_SILENT]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while users:
                    local = await self._local_users(barrier)
                    users = [*local, _SILENT]
                    await asyncio.shield(barrier.told)
                    users = local + await self._sealers_work(barrier)
                    if self._barriers.get(barrier.path) is not barrier:
                        raise ConflictError(f"the drain of {barrier.path} was ended while it waited")
                    if users:
                        await asyncio.sleep(_LOOK_AGAIN)
                self._stores.give_up(barrier.path)
                return barrier.path
        assert timeout is not None
        more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
        raise UnavailableError(
            f"{barrier.path} is still used after {format_seconds(timeout)}: {'; '.join(users[:_NAMED])}{more}; "
            f"drain it again to wait longer, or end it with `zone-bundle drain --end {barrier.path}`"
        )

    def _put_up(self, resolved: str, asked: str) -> _Barrier:
        barrier = self._barriers.get(resolved)
        if barrier is None:
            told = self._tell(lambda: self._sealer.drain(resolved))
            barrier = self._barriers[resolved] = _Barrier(resolved, asked, told)
            _log.info("drain begun", path=resolved)
        elif barrier.told.done() and barrier.told.exception() is not None:
            barrier.told = self._tell(lambda: self._sealer.drain(resolved))
        return barrier

    async def end(self, path: str) -> None:
        """Take a barrier down; raises NotFoundError if there is none for the path."""
        barrier = self._find(os.path.normpath(_checked(path)))
        if barrier is None:
            # Not the first attempt: what is on a disk that has gone cannot be resolved.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RESOLVE_PATIENCE):
                    barrier = self._find(await self._in_thread(lambda: os.path.realpath(path)))
        if barrier is None:
            raise NotFoundError(f"{path} is not being drained; `zone-bundle drain --list` shows what is")
        del self._barriers[barrier.path]
        _log.info("drain ended", path=barrier.path)
        await asyncio.shield(self._tell(lambda: self._sealer.undrain(barrier.path)))
        await self._in_thread(lambda: self._stores.take_back(barrier.path))

    def _find(self, path: str) -> _Barrier | None:
        found = (one for one in self._barriers.values() if path in (one.path, os.path.normpath(one.asked)))
        return next(found, None)

    async def standing(self) -> list[dict[str, Any]]:
        """Every barrier, with what still uses the path."""

        async def users(barrier: _Barrier) -> list[str]:
            local = await self._local_users(barrier)
            try:
                async with asyncio.timeout(_LIST_PATIENCE):
                    await asyncio.shield(barrier.told)
                    return local + await self._sealers_work(barrier)
            except TimeoutError:
                return [*local, _SILENT]

        barriers = sorted(self._barriers.values(), key=lambda barrier: barrier.path)
        used = await asyncio.gather(*(users(barrier) for barrier in barriers))
        return [
            {"path": barrier.path, "drained": not by, "used_by": by} for barrier, by in zip(barriers, used, strict=True)
        ]

    def _tell(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Tell the sealer, one thing after the other, whether or not anybody waits for it."""

        async def tell() -> None:
            async with self._order:
                await work()

        task = asyncio.get_running_loop().create_task(tell())
        self._tasks.add(task)
        task.add_done_callback(self._on_told)
        return task

    def _on_told(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the sealer does not follow a drain", reason=str(error))

    async def admit(self, intent: Intent) -> None:
        """Note that a capture begins, until `end_capture`. Raises UnavailableError if its zone's logs are drained."""
        # First noted, then looked: a drain that begins meanwhile finds it.
        self.begin_capture(intent)
        if not self._barriers:
            return
        try:
            barrier = await self._barrier_of(intent.zone)
            if barrier is not None:
                advice = "stop with --no-bundle, or end it" if intent.operation == "stop" else "end it"
                raise UnavailableError(
                    f"no bundle of zone '{intent.metadata.zone}' can be made: {barrier} is being drained; "
                    f"{advice} with `zone-bundle drain --end {barrier}`"
                )
        except BaseException:
            self.end_capture(intent.metadata.bundle_id)
            raise

    def begin_capture(self, intent: Intent) -> None:
        """Note a capture that nothing may refuse: it began before any barrier. Noting it again changes nothing."""
        self._captures[intent.metadata.bundle_id] = intent

    def end_capture(self, bundle_id: str) -> None:
        """It is recorded and the sealer knows of it, or there is nothing of it."""
        self._captures.pop(bundle_id, None)

    def covers(self, directory: str) -> bool:
        """Whether a resolved directory lies on a path that is being drained."""
        return any(_is_below(directory, barrier) for barrier in self._barriers)

    def check_download(self, bundle_id: str, directories: Iterable[str]) -> None:
        """Raise UnavailableError if one of the resolved directories that a download reads is drained."""
        for barrier in self._barriers:
            if any(_is_below(directory, barrier) for directory in directories):
                raise UnavailableError(
                    f"bundle {bundle_id} cannot be read: {barrier} is being drained; "
                    f"end it with `zone-bundle drain --end {barrier}`"
                )

    async def _barrier_of(self, zone: Zone) -> str | None:
        """A barrier that the zone's capture would touch."""
        barriers = list(self._barriers)
        try:
            async with asyncio.timeout(_RESOLVE_PATIENCE):
                touched = await asyncio.get_running_loop().run_in_executor(
                    self._admissions, self._touched, barriers, zone
                )
        except TimeoutError:
            # The stop goes on: by the names alone, as far as they tell.
            touched = {barrier for barrier in barriers for tree in zone.logs if _is_below(tree.path, barrier)}
        # One that was ended meanwhile refuses nothing.
        return next((barrier for barrier in barriers if barrier in touched and barrier in self._barriers), None)

    async def _local_users(self, barrier: _Barrier) -> list[str]:
        captures = list(self._captures.values())
        reading = [
            f"download of {what}"
            for what, directories in self._downloads()
            if any(_is_below(directory, barrier.path) for directory in directories)
        ]
        if not captures:
            return reading
        try:
            async with asyncio.timeout(_RESOLVE_PATIENCE):
                used = await self._in_thread(
                    lambda: [intent for intent in captures if self._touched([barrier.path], intent.zone)]
                )
        except TimeoutError:
            return [*reading, "a file system that does not answer"]
        return [
            f"capture of zone {printable(intent.metadata.zone)} ({intent.metadata.bundle_id})" for intent in used
        ] + reading

    async def _sealers_work(self, barrier: _Barrier) -> list[str]:
        used: list[str] = await self._sealer.ask("uses", path=barrier.path)
        return used

    def _touched(self, barriers: Iterable[str], zone: Zone) -> set[str]:
        """Those of the barriers that the capture of a zone reads or writes below. Blocks."""
        mounts = read_mounts()
        # What is opened in the namespace of a process is its own: memory, or a mount that is a tree by itself.
        used = {path for tree in zone.logs if tree.via is None for path in _read_directories(tree)}
        devices = {mount.device for path in used if (mount := _mount_of(path, mounts)) is not None}
        used.add(os.path.realpath(self._spool))
        for staging in map(os.path.realpath, self._staging()):
            # Logs are staged on their own file system alone.
            mount = _mount_of(staging, mounts)
            if mount is not None and mount.device in devices:
                used.add(staging)
        return {barrier for barrier in barriers if any(_touches(path, barrier, mounts) for path in used)}

    async def _resolve(self, path: str) -> str:
        try:
            return await self._in_thread(lambda: os.path.realpath(_checked(path), strict=True))
        except OSError as error:
            raise UsageError(f"{path} cannot be drained: {error.strerror}") from None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _checked(path: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise UsageError(f"'{path}' cannot be drained: name an absolute path")
    return path


def _is_below(path: str, directory: str) -> bool:
    """Whether a path is the directory or lies below it. By components: /srv/ab is not below /srv/a."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _read_directories(tree: LogTree) -> set[str]:
    """Where on the host the logs of a tree are looked for. Links below its directory are never followed."""
    directory = os.path.realpath(tree.path)
    # With a prefix, the patterns are not relative to the directory.
    below = {""} if tree.prefix else {static_prefix(pattern) for pattern in tree.patterns}
    return {os.path.normpath(os.path.join(directory, prefix)) for prefix in below}


def _touches(path: str, barrier: str, mounts: list[Mount]) -> bool:
    """Whether what is done in `path` touches the barrier: below it, or above it on one mount, which a walk stays on."""
    if _is_below(path, barrier):
        return True
    return _is_below(barrier, path) and _mount_of(barrier, mounts) == _mount_of(path, mounts)


def _mount_of(path: str, mounts: list[Mount]) -> Mount | None:
    try:
        return mount_of(path, mounts)
    except OSError:
        return None
