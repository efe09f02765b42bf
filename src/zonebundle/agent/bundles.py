"""The bundles as the API sees them: listed from the release on, read from the store, deleted through the sealer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

import structlog

from zonebundle.agent.catalogue import BundleEntry, BundleState, Catalogue
from zonebundle.agent.store_dirs import StoreDirs
from zonebundle.capture.spool import Spool
from zonebundle.errors import ConflictError, NoSuchBundleError, StoreError, UsageError
from zonebundle.host.files import make_private_directory, write_durably
from zonebundle.model.ids import check_zone_name
from zonebundle.model.manifest import Header
from zonebundle.model.metadata import Cause, Metadata, format_time
from zonebundle.model.record import RECORD_FILE
from zonebundle.seal.link import SealerLink
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.failure import store_errors
from zonebundle.store.reader import Debris, is_bundle_id

T = TypeVar("T")
_log = structlog.get_logger()

# Steps and gaps, as JSON.
_Report = tuple[list[Any], list[Any]]


class Bundles:
    """Everything that is asked about bundles. Reads happen in threads that the stop path does not use."""

    def __init__(
        self, catalogue: Catalogue, stores: StoreDirs, spool: Spool, link: SealerLink, threads: Executor
    ) -> None:
        self._catalogue = catalogue
        self._stores = stores
        self._store = stores.readers
        self._spool = spool
        self._link = link
        self._threads = threads
        # The store directory, resolved, of every download that is on its way, by bundle.
        self._readers: dict[str, list[str]] = {}
        self._unread = asyncio.Condition()
        self._deletions = spool.path.parent / "deletions"
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def load(self) -> None:
        """List what the store holds."""
        for entry in await self.in_thread(self._stored):
            self._catalogue.put(entry)
        for zone, bundle_id in await self.in_thread(self._noted_deletions):
            self._catalogue.hide(bundle_id)
            self._begin(self._delete_noted(zone, bundle_id))
        for debris in await self.in_thread(lambda: list(self._store.debris())):
            try:
                check_zone_name(debris.zone)
            except UsageError as error:
                # Nobody could ask for it; `verify` tells of it.
                _log.error("a foreign directory is in the store", reason=str(error))
                continue
            if self._catalogue.get(debris.bundle_id) is None:
                self._catalogue.put(_debris_entry(debris))

    def list(self, *, zone: str | None = None, containing: str = "") -> list[BundleEntry]:
        """Bundles of one zone, or of zones whose names contain a text."""
        return list(self._catalogue.list(zone=zone, containing=containing))

    async def status(self, zone: str, bundle_id: str) -> dict[str, Any]:
        """How far a bundle is, its steps and gaps; raises NoSuchBundleError."""
        entry = self._catalogue.find(zone, bundle_id)
        steps, gaps = await self._report(entry)
        return {
            "metadata": entry.metadata.to_json(),
            "state": str(entry.state),
            "bytes_total": entry.total,
            "bytes_sealed": entry.sealed,
            "size": entry.size,
            "steps": steps,
            "gaps": gaps,
            "hold_seconds": entry.hold_seconds,
            "graceful_seconds": entry.graceful_seconds,
            "seal_seconds": entry.seal_seconds,
            **({"reason": entry.reason} if entry.reason else {}),
        }

    async def _report(self, entry: BundleEntry) -> _Report:
        zone, bundle_id = entry.metadata.zone, entry.metadata.bundle_id
        if entry.state is BundleState.SEALED:
            report = json.loads(
                await self.in_thread(lambda: self._store.find(zone, bundle_id).read_own(b"report.json"))
            )
            return report["steps"], report["gaps"]
        try:
            return await self.in_thread(lambda: _read_record(self._spool.entry(bundle_id) / RECORD_FILE))
        except FileNotFoundError:
            # Not recorded yet, or sealed between the look and the read.
            return [], []

    async def sealed(
        self, zone: str, bundle_id: str, is_drained: Callable[[str], bool] = lambda directory: False
    ) -> StoredBundle:
        """The finished bundle, waited for if it is on its way; if it can be, from a directory that is not drained.

        Raises NoSuchBundleError, ConflictError if it failed.
        """
        while True:
            entry = self._catalogue.find(zone, bundle_id)
            if entry.state is BundleState.SEALED:
                return await self.in_thread(
                    lambda: self._store.find(zone, bundle_id, lambda one: is_drained(self._stores.resolved[one]))
                )
            if entry.is_debris:
                raise ConflictError(f"bundle {bundle_id} is damaged: {entry.reason}; repair the store, or delete it")
            if entry.state is BundleState.FAILED:
                raise ConflictError(f"bundle {bundle_id} is not sealed yet: {entry.reason}; it is tried again")
            changed = self._changed
            await changed.wait()

    def store_dir_of(self, bundle: StoredBundle) -> str:
        """The store directory, resolved, in which a bundle was found."""
        known = self._stores.resolved.items()
        return next(resolved for directory, resolved in known if bundle.directory.is_relative_to(directory))

    def downloads(self) -> Iterator[tuple[str, Iterable[str]]]:
        """What is being downloaded, with the directories that are read."""
        for bundle_id, directories in self._readers.items():
            yield f"bundle {bundle_id}", list(directories)

    @contextlib.asynccontextmanager
    async def reading(self, bundle: StoredBundle) -> AsyncIterator[None]:
        """While a download reads a bundle, its bytes are not freed."""
        bundle_id, directory = bundle.header.metadata.bundle_id, self.store_dir_of(bundle)
        self._readers.setdefault(bundle_id, []).append(directory)
        try:
            yield
        finally:
            async with self._unread:
                self._readers[bundle_id].remove(directory)
                if not self._readers[bundle_id]:
                    del self._readers[bundle_id]
                self._unread.notify_all()

    def pinned(self) -> set[str]:
        """The bundles that a clean-up leaves alone: those that are read, and those that are not sealed yet."""
        return {*self._readers, *(one.metadata.bundle_id for one in self._catalogue.all() if one.is_on_its_way)}

    def condemn(self, bundle_ids: Iterable[str]) -> set[str]:
        """Unlist bundles that are about to be removed; returns those that nobody reads."""
        free = {bundle_id for bundle_id in bundle_ids if bundle_id not in self._readers}
        for bundle_id in free:
            self._catalogue.hide(bundle_id)
        return free

    def reprieve(self, bundle_ids: Iterable[str]) -> None:
        """List bundles again that were not removed after all, or not all of them."""
        for bundle_id in bundle_ids:
            self._catalogue.show(bundle_id)

    def forget(self, bundle_ids: Iterable[str]) -> None:
        """Unlist bundles that are not in the store any more."""
        for bundle_id in bundle_ids:
            self._catalogue.drop(bundle_id)
        self._wake()

    async def compare_with_store(self) -> None:
        """Unlist what the store has lost while nobody could tell us."""
        listed = [(entry.metadata.zone, entry.metadata.bundle_id) for entry in self._catalogue.all() if entry.is_sealed]
        self.forget(await self.in_thread(lambda: [found for zone, found in listed if self._is_gone(zone, found)]))

    def _is_gone(self, zone: str, bundle_id: str) -> bool:
        try:
            self._store.find(zone, bundle_id)
        except NoSuchBundleError:
            # A directory that is away looks empty: what it has is not lost.
            return self._stores.are_all_there()
        except StoreError as error:
            _log.error("a bundle cannot be read", zone=zone, bundle=bundle_id, reason=str(error))
        return False

    async def delete(self, zone: str, bundle_id: str) -> None:
        """Delete a bundle: unlisted at once, its bytes freed after the last reader. Sealing is cancelled.

        Raises NoSuchBundleError, ConflictError while the zone is still held for it, StoreError.
        """
        entry = self._catalogue.find(zone, bundle_id)
        if entry.state is BundleState.CAPTURING:
            raise ConflictError(f"bundle {bundle_id} is being captured; delete it when the stop has answered")
        self._catalogue.hide(bundle_id)
        self._wake()
        if bundle_id in self._readers:
            # Answered before it is done: it must not come back with the next start.
            await self.in_thread(lambda: self._note_deletion(zone, bundle_id))
            self._begin(self._delete_noted(zone, bundle_id))
            return
        await self._delete(zone, bundle_id)

    async def _delete_noted(self, zone: str, bundle_id: str) -> None:
        async with self._unread:
            await self._unread.wait_for(lambda: bundle_id not in self._readers)
        await self._delete(zone, bundle_id)
        await self.in_thread(lambda: (self._deletions / bundle_id).unlink(missing_ok=True))

    def _note_deletion(self, zone: str, bundle_id: str) -> None:
        with store_errors(f"noting the deletion of bundle {bundle_id}"):
            make_private_directory(self._deletions)
            write_durably(self._deletions / bundle_id, zone.encode())

    def _noted_deletions(self) -> tuple[tuple[str, str], ...]:
        """The deletions that a former agent had answered and could not do while somebody read."""
        try:
            names = [name for name in os.listdir(self._deletions) if is_bundle_id(name)]
        except FileNotFoundError:
            return ()
        return tuple(((self._deletions / name).read_text(), name) for name in names)

    def _stored(self) -> tuple[BundleEntry, ...]:
        return tuple(_sealed_entry(bundle.header, bundle.size) for bundle in self._store.stored())

    async def _reload(self) -> None:
        """List what a directory has brought that has come, or come back."""
        for entry in await self.in_thread(self._stored):
            known = self._catalogue.known(entry.metadata.bundle_id)
            if known is None or known.is_debris:
                self._catalogue.put(entry)
        # What was deleted while we read is not listed again.
        await self.compare_with_store()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget_task)

    def _forget_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("what was to be done behind an answer failed", reason=str(error))

    async def _delete(self, zone: str, bundle_id: str) -> None:
        try:
            await self._link.delete(zone, bundle_id)
        except NoSuchBundleError:
            self._catalogue.drop(bundle_id)
        except StoreError as error:
            _log.error("bundle not deleted", zone=zone, bundle=bundle_id, reason=str(error))
            self._catalogue.show(bundle_id)
            raise
        else:
            self._catalogue.drop(bundle_id)

    def on_sealer_event(self, event: dict[str, Any]) -> None:
        """Take what the sealer tells: progress, sealed, failed."""
        match event:
            case {"stores": _}:
                self._begin(self._reload())
            case {"progress": told}:
                self._catalogue.update(told["id"], total=told["bytes_total"], sealed=told["bytes_sealed"])
            case {"sealed": told}:
                header = Header.from_json(told["header"])
                self._catalogue.update(
                    told["id"],
                    state=BundleState.SEALED,
                    gaps=header.gaps,
                    size=told["size"],
                    total=header.raw,
                    sealed=header.raw,
                    seal_seconds=told["seal_seconds"],
                    reason="",
                )
            case {"gone": told}:
                self._catalogue.drop(told["id"])
            case {"failed": told}:
                _log.warning("bundle not sealed", bundle=told["id"], reason=told["reason"])
                self._catalogue.update(told["id"], state=BundleState.FAILED, reason=told["reason"])
        self._wake()

    def _wake(self) -> None:
        """Have everybody who waits for a bundle look again."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what reads a store, in a thread that the stop path does not use."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def iterate(self, chunks: Iterator[bytes]) -> Any:
        """Turn a blocking iterator of bytes into an asynchronous one, outside the stop path's threads."""

        async def generate() -> Any:
            while chunk := await self.in_thread(lambda: next(chunks, b"")):
                yield chunk

        return generate()


def _sealed_entry(header: Header, size: int) -> BundleEntry:
    return BundleEntry(
        header.metadata,
        BundleState.SEALED,
        gaps=header.gaps,
        size=size,
        total=header.raw,
        sealed=header.raw,
        hold_seconds=header.hold_seconds,
        graceful_seconds=header.graceful_seconds,
    )


def _debris_entry(debris: Debris) -> BundleEntry:
    metadata = Metadata(debris.zone, debris.bundle_id, format_time(debris.created), Cause.OTHER)
    return BundleEntry(metadata, BundleState.FAILED, reason=debris.reason, is_debris=True)


def _read_record(path: Path) -> _Report:
    steps, gaps = [], []
    with path.open("rb") as file:
        for line in file:
            # A record may hold a million files: only what is asked for is parsed.
            if line.startswith(b'{"step":'):
                steps.append(json.loads(line)["step"])
            elif line.startswith(b'{"gap":'):
                gaps.append(json.loads(line)["gap"])
    return steps, gaps
