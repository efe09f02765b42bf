"""The clean-up from the agent's side: when it runs, and by which limit and priority. The sealer carries it out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Protocol

import structlog

from zonebundle.errors import UnavailableError, UsageError, ZoneBundleError
from zonebundle.host.files import write_durably
from zonebundle.model.retention import CleanupContext

_log = structlog.get_logger()

CONTEXT_FILE = "context.json"
_DAMAGED = ".damaged"


class Sealer(Protocol):
    """What a clean-up needs of the link to the sealer."""

    @property
    def pid(self) -> int | None: ...

    async def ask(self, do: str, **arguments: Any) -> Any: ...


class Listing(Protocol):
    """What a clean-up needs of the agent's bundles."""

    def pinned(self) -> Collection[str]: ...

    def condemn(self, bundle_ids: Iterable[str]) -> set[str]: ...

    def reprieve(self, bundle_ids: Iterable[str]) -> None: ...

    def forget(self, bundle_ids: Iterable[str]) -> None: ...

    async def compare_with_store(self) -> None: ...


class Cleanup:
    """Runs the clean-up every period and when asked, one at a time. Nothing of it is on the stop path.

    The context is the configuration's until it is changed for the first time; from then on `context.json` counts.
    """

    def __init__(
        self, state_dir: Path, configured: CleanupContext, sealer: Sealer, bundles: Listing, threads: Executor
    ) -> None:
        self._file = state_dir / CONTEXT_FILE
        self._context = configured
        self._sealer = sealer
        self._bundles = bundles
        self._threads = threads
        self._changing = asyncio.Lock()
        self._turn = asyncio.Lock()
        # The run that has not begun yet, which everybody who asks meanwhile waits for.
        self._waiting: asyncio.Task[dict[str, Any]] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._rescheduled = asyncio.Event()
        # On the loop's clock.
        self._last = 0.0

    @property
    def context(self) -> CleanupContext:
        return self._context

    async def start(self) -> None:
        """Read the context, and run from now on every period. The first run is one period from now."""
        kept = await asyncio.get_running_loop().run_in_executor(self._threads, self._read)
        self._context = self._context if kept is None else kept
        self._last = asyncio.get_running_loop().time()
        self._keep(asyncio.get_running_loop().create_task(self._run_every_period()))

    async def close(self) -> None:
        """Run no more. What the sealer has begun, it does not finish: the next clean-up does."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def utilization(self) -> dict[str, dict[str, int]]:
        """By store directory, in bytes: its quota, what bundles may use of that by the limit, and what they use.

        Raises StoreError, UnavailableError.
        """
        told = await self._sealer.ask("utilization")
        limit = self._context.storage_limit
        # As in Omicron, whose scripts compare it with what is used: the limit, not what the file system has left.
        return {
            directory: {
                "dataset_quota": usage["dataset_quota"],
                "bytes_available": usage["dataset_quota"] * limit // 100,
                "bytes_used": usage["bytes_used"],
            }
            for directory, usage in told.items()
        }

    async def change(self, **changes: Any) -> None:
        """Change `period`, `storage_limit` or `priority`, durably before it returns.

        A new period counts from the last run; a new limit or priority has a clean-up run at once, behind this call.
        Raises UsageError for what is not allowed, UnavailableError if it cannot be written: all is as before then.
        """
        async with self._changing:
            before, after = self._context, self._context.changed(**changes)
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._threads, write_durably, self._file, json.dumps(after.to_json(), indent=1).encode() + b"\n"
                )
            except OSError as error:
                raise UnavailableError(
                    f"the clean-up context cannot be written to {self._file}: {error.strerror}; nothing is changed"
                ) from None
            self._context = after
        self._rescheduled.set()
        if (before.storage_limit, before.priority) != (after.storage_limit, after.priority):
            # Behind this call: it tells of its failure by itself.
            _ = self._next_run()

    async def run(self) -> dict[str, Any]:
        """Clean up; returns by store directory how many bundles and bytes were removed.

        While a run is on its way, this waits for one that begins after the call: the first may have looked already.
        Raises StoreError, UnavailableError. Cancelling the call cancels nothing.
        """
        return await asyncio.shield(self._next_run())

    def _next_run(self) -> asyncio.Task[dict[str, Any]]:
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_task(self._run_in_turn())
            self._keep(self._waiting)
        return self._waiting

    async def _run_in_turn(self) -> dict[str, Any]:
        async with self._turn:
            self._waiting = None
            try:
                return await self._clean_up()
            finally:
                # From its end: one that takes longer than the period is not followed by the next at once.
                self._last = asyncio.get_running_loop().time()
                self._rescheduled.set()

    async def _clean_up(self) -> dict[str, Any]:
        sealer = self._sealer.pid
        condemned: set[str] = set()
        arguments = {
            "storage_limit": self._context.storage_limit,
            "priority": list(self._context.priority),
            "pinned": sorted(self._bundles.pinned()),
        }
        try:
            planned = await self._sealer.ask("plan_clean_up", **arguments)
            # A download that begins from here on does not find them; one that has begun keeps them.
            condemned = self._bundles.condemn(bundle_id for _, bundle_id in planned)
            told = await self._sealer.ask("clean_up", **arguments, among=sorted(condemned))
        except ZoneBundleError as error:
            _log.error("clean-up failed; it is tried again in the next period", reason=str(error))
            await self._bundles.compare_with_store()
            raise
        finally:
            self._bundles.reprieve(condemned)
        self._bundles.forget(bundle_id for _, bundle_id in told["removed"])
        if self._sealer.pid != sealer:
            # The sealer that died had perhaps begun; the one that finished does not know what it had removed.
            await self._bundles.compare_with_store()
        if told["removed"]:
            _log.info("clean-up has removed bundles", bundles=len(told["removed"]), directories=told["dirs"])
        dirs: dict[str, Any] = told["dirs"]
        return dirs

    async def _run_every_period(self) -> None:
        while True:
            self._rescheduled.clear()
            left = self._last + self._context.period - asyncio.get_running_loop().time()
            if left <= 0:
                # It tells of its failure by itself.
                await asyncio.wait({self._next_run()})
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._rescheduled.wait()

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Whoever waited for it may have been cancelled.
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ZoneBundleError):
            _log.error("clean-up failed unexpectedly", exc_info=error)

    def _read(self) -> CleanupContext | None:
        """The context that was kept; None if there is none, or none that can be used."""
        try:
            return CleanupContext.from_json(json.loads(self._file.read_bytes()))
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = f"{self._file} cannot be read: {error.strerror}"
        except (UsageError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            reason = f"{self._file} is damaged: {error!r}"
            with contextlib.suppress(OSError):
                self._file.replace(self._file.with_name(CONTEXT_FILE + _DAMAGED))
        _log.error("the configured clean-up context counts", reason=reason)
        return None
