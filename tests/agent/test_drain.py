"""A drain waits for what uses a path, and refuses what would."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support import leaks, wait
from zonebundle.agent.drain import Drains
from zonebundle.errors import ConflictError, NotFoundError, StoreError, UnavailableError, UsageError
from zonebundle.model.ids import new_bundle_id
from zonebundle.model.metadata import Cause, Metadata
from zonebundle.model.record import Intent, Operation
from zonebundle.model.zone import LogTree, ProcessRef, Zone


class FakeSealer:
    """Answers when its gate is open."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.work: dict[str, list[str]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def ask(self, do: str, **arguments: Any) -> Any:
        assert do == "uses"
        await self.gate.wait()
        return self.work.get(arguments["path"], [])

    async def drain(self, path: str) -> None:
        await self._take(f"drain {path}")

    async def undrain(self, path: str) -> None:
        await self._take(f"undrain {path}")

    async def _take(self, told: str) -> None:
        await self.gate.wait()
        if self.error:
            raise self.error
        self.told.append(told)


class Made:
    """Drains over `directory`, with a spool in it, and what they work on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealer = FakeSealer()
        self.downloads: dict[str, list[str]] = {}
        self.staging: list[str] = []
        self.given_up: list[str] = []
        for name in ("spool", "disk/web/logs", "disk2/db/logs"):
            (directory / name).mkdir(parents=True)
        self.drains = Drains(
            self.sealer,
            self.downloads.items,
            self,
            spool=str(directory / "spool"),
            staging=lambda: self.staging,
        )

    def give_up(self, path: str) -> None:
        self.given_up.append(path)

    def take_back(self, path: str) -> None:
        if path in self.given_up:
            self.given_up.remove(path)

    @property
    def disk(self) -> str:
        return str(self.directory / "disk")

    def intent(self, *paths: str, operation: Operation = "stop", **tree: Any) -> Intent:
        """Of a capture of the zone web, whose logs are in those directories."""
        trees = tuple(LogTree("zone", str(self.directory / path), **tree) for path in paths or ("disk/web",))
        metadata = Metadata("web", new_bundle_id(), "2026-01-02T03:04:05.000006Z", Cause.OTHER)
        return Intent(metadata, operation, Zone("web", "process", "running", logs=trees), "zb-x")

    async def is_refused(self, intent: Intent) -> bool:
        try:
            await self.drains.admit(intent)
        except UnavailableError:
            return True
        self.drains.end_capture(intent.metadata.bundle_id)
        return False

    async def waiting(self, path: str, timeout: float | None = None) -> asyncio.Task[str]:
        """A drain that has begun and is not done."""
        task = asyncio.create_task(self.drains.drain(path, timeout))
        await wait.until_async(self.drains.standing)
        return task


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Made]:
    with leaks.no_leaks():
        made = Made(tmp_path)
        yield made
        await made.drains.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_nobody_uses_is_drained_at_once(made: Made) -> None:
    assert await made.drains.drain(made.disk) == made.disk
    assert await made.drains.standing() == [{"path": made.disk, "drained": True, "used_by": []}]
    assert made.sealer.told == [f"drain {made.disk}"]
    # Again: it stands already.
    assert await made.drains.drain(made.disk + "/") == made.disk
    await made.drains.end(made.disk)
    assert await made.drains.standing() == []
    assert made.sealer.told[1:] == [f"undrain {made.disk}"]
    with pytest.raises(NotFoundError, match="is not being drained"):
        await made.drains.end(made.disk)


@pytest.mark.parametrize(
    ("barrier", "logs", "refused"),
    [
        ("disk", "disk/web", True),
        ("disk", "disk", True),
        ("disk/web", "disk/web", True),
        # Components, not characters.
        ("disk", "disk2/db", False),
        ("disk2", "disk/web", False),
        # The logs are looked for below it.
        ("disk/web/logs", "disk/web", True),
        ("disk/web/other", "disk/web", False),
        # The spool is used by every capture.
        ("spool", "disk/web", True),
    ],
)
async def test_captures_below_the_path_are_refused(made: Made, barrier: str, logs: str, refused: bool) -> None:
    (made.directory / "disk/web/other").mkdir()
    await made.drains.drain(str(made.directory / barrier))
    assert await made.is_refused(made.intent(logs, patterns=("logs/**",))) is refused
    # Whoever is refused is not waited for.
    assert (await made.drains.standing())[0]["drained"]
    await made.drains.end(str(made.directory / barrier))
    assert not await made.is_refused(made.intent(logs))


async def test_any_tree_of_a_zone_counts(made: Made) -> None:
    await made.drains.drain(made.disk)
    assert await made.is_refused(made.intent("disk2/db", "disk/web"))
    # In the namespace of a process the path means something else.
    assert not await made.is_refused(made.intent("disk/web", via=ProcessRef(1, 1)))


async def test_links_are_resolved(made: Made) -> None:
    (made.directory / "link").symlink_to("disk")
    assert await made.drains.drain(str(made.directory / "link")) == made.disk
    assert await made.is_refused(made.intent("link/web"))
    assert await made.is_refused(made.intent("disk/web"))
    # By the name that was asked for, also when the link has gone.
    (made.directory / "link").unlink()
    await made.drains.end(str(made.directory / "link"))
    assert not await made.is_refused(made.intent("disk/web"))


async def test_a_zone_cannot_have_itself_refused(made: Made) -> None:
    (made.directory / "disk2/db/logs").rmdir()
    (made.directory / "disk2/db/logs").symlink_to(made.disk)
    await made.drains.drain(made.disk)
    assert not await made.is_refused(made.intent("disk2/db", patterns=("logs/**",)))


async def test_staging_on_the_logs_file_system_counts(made: Made, tmpfs_dir: Path) -> None:
    ours, others = made.directory / "disk/staging", tmpfs_dir / "staging"
    ours.mkdir()
    others.mkdir()
    made.staging = [str(ours), str(others)]
    await made.drains.drain(str(tmpfs_dir))
    assert not await made.is_refused(made.intent("disk2/db"))
    await made.drains.drain(made.disk)
    assert await made.is_refused(made.intent("disk2/db"))


async def test_another_mount_below_the_logs_is_not_read(made: Made, tmpfs_dir: Path) -> None:
    await made.drains.drain(str(tmpfs_dir))
    assert not await made.is_refused(made.intent("disk/web"))
    intent = made.intent()
    above = Zone("web", "process", "running", logs=(LogTree("zone", str(tmpfs_dir.parent)),))
    assert not await made.is_refused(Intent(intent.metadata, "stop", above, "zb-x"))


@pytest.mark.parametrize(("operation", "advice"), [("stop", True), ("create", False)])
async def test_the_refusal_says_what_to_do(made: Made, operation: Operation, advice: bool) -> None:
    await made.drains.drain(made.disk)
    with pytest.raises(UnavailableError) as caught:
        await made.drains.admit(made.intent(operation=operation))
    told = str(caught.value)
    assert f"{made.disk} is being drained" in told
    assert f"`zone-bundle drain --end {made.disk}`" in told
    assert ("stop with --no-bundle" in told) is advice


async def test_a_capture_that_began_before_is_waited_for(made: Made) -> None:
    intent = made.intent()
    await made.drains.admit(intent)
    task = await made.waiting(made.disk)
    [told] = await made.drains.standing()
    assert told == {
        "path": made.disk,
        "drained": False,
        "used_by": [f"capture of zone web ({intent.metadata.bundle_id})"],
    }
    # Noted again by the hold itself, it is not refused.
    made.drains.begin_capture(intent)
    assert not task.done()
    made.drains.end_capture(intent.metadata.bundle_id)
    assert await task == made.disk


async def test_downloads_are_waited_for_and_refused(made: Made) -> None:
    store = f"{made.disk}/store"
    made.drains.check_download("x", [store])
    made.downloads["bundle x"] = [store]
    made.downloads["bundle y"] = [f"{made.disk}2/store"]
    task = await made.waiting(made.disk)
    assert (await made.drains.standing())[0]["used_by"] == ["download of bundle x"]
    with pytest.raises(UnavailableError, match="is being drained"):
        made.drains.check_download("z", [f"{made.disk}2/store", store])
    made.drains.check_download("z", [f"{made.disk}2/store"])
    del made.downloads["bundle x"]
    assert await task == made.disk


async def test_the_sealers_work_is_waited_for(made: Made) -> None:
    made.sealer.work[made.disk] = ["seal of bundle x"]
    task = await made.waiting(made.disk)
    assert (await made.drains.standing())[0]["used_by"] == ["seal of bundle x"]
    made.sealer.work.clear()
    assert await task == made.disk


async def test_a_timeout_names_who_uses_it_and_leaves_the_barrier(made: Made) -> None:
    made.sealer.work[made.disk] = [f"seal {number}" for number in range(7)]
    with pytest.raises(UnavailableError, match=r"still used after 300\.0 ms: seal 0; .*seal 4 and 2 more; drain it"):
        await made.drains.drain(made.disk, 0.3)
    assert await made.is_refused(made.intent())


async def test_a_sealer_that_is_silent_is_named(made: Made) -> None:
    made.sealer.gate.clear()
    intent = made.intent()
    made.drains.begin_capture(intent)
    with pytest.raises(UnavailableError, match=r"capture of zone .*; the sealer, which has not answered yet"):
        await made.drains.drain(made.disk, 0.3)
    made.drains.end_capture(intent.metadata.bundle_id)
    # Refused all the same, from the first moment on.
    assert await made.is_refused(made.intent())
    made.sealer.gate.set()
    assert await made.drains.drain(made.disk) == made.disk
    assert made.sealer.told == [f"drain {made.disk}"]


async def test_a_vanished_client_leaves_the_barrier(made: Made) -> None:
    made.sealer.gate.clear()
    task = asyncio.create_task(made.drains.drain(made.disk))
    await wait.until_async(lambda: made.is_refused(made.intent()))
    task.cancel()
    await asyncio.wait([task])
    assert await made.is_refused(made.intent())
    made.sealer.gate.set()
    await wait.until_async(lambda: made.sealer.told == [f"drain {made.disk}"])


async def test_a_drain_that_is_ended_stops_waiting(made: Made) -> None:
    made.sealer.work[made.disk] = ["seal of bundle x"]
    task = await made.waiting(made.disk)
    await made.drains.end(made.disk)
    with pytest.raises(ConflictError, match="was ended"):
        await task


async def test_the_sealer_is_told_in_order(made: Made) -> None:
    made.sealer.gate.clear()
    drains = [asyncio.create_task(made.drains.drain(made.disk))]
    await wait.until_async(lambda: made.is_refused(made.intent()))
    ends = asyncio.create_task(made.drains.end(made.disk))
    await wait.until_async(lambda: _is_not_refused(made))
    drains.append(asyncio.create_task(made.drains.drain(made.disk)))
    await wait.until_async(lambda: made.is_refused(made.intent()))
    made.sealer.gate.set()
    await asyncio.wait([*drains, ends])
    assert made.sealer.told == [f"{word} {made.disk}" for word in ("drain", "undrain", "drain")]
    assert await drains[1] == made.disk


async def _is_not_refused(made: Made) -> bool:
    return not await made.is_refused(made.intent())


async def test_what_the_sealer_cannot_do_fails_and_is_tried_again(made: Made) -> None:
    made.sealer.error = StoreError("cannot close it")
    with pytest.raises(StoreError, match="cannot close it"):
        await made.drains.drain(made.disk)
    assert await made.is_refused(made.intent())
    made.sealer.error = None
    assert await made.drains.drain(made.disk) == made.disk


@pytest.mark.parametrize("path", ["", "disk", "./disk", "/nowhere/at/all", "/a\0b"])
async def test_only_a_path_that_is_there_is_drained(made: Made, path: str) -> None:
    with pytest.raises(UsageError, match="cannot be drained"):
        await made.drains.drain(path)
    assert await made.drains.standing() == []


async def test_without_a_barrier_nothing_is_looked_at(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a stop has looked at a path")

    monkeypatch.setattr(os.path, "realpath", fail)
    await made.drains.admit(made.intent())


async def test_a_path_that_hangs_does_not_keep_a_stop(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    await made.drains.drain(made.disk)
    go = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang(_self: object, _barriers: object, _zone: object) -> set[str]:
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        return set()

    monkeypatch.setattr(Drains, "_touched", hang)
    monkeypatch.setattr("zonebundle.agent.drain._RESOLVE_PATIENCE", 0.05)
    # By the names alone.
    assert await made.is_refused(made.intent("disk/web"))
    assert not await made.is_refused(made.intent("disk2/db"))
    made.drains.begin_capture(made.intent("disk2/db"))
    assert (await made.drains.standing())[0]["used_by"] == ["a file system that does not answer"]
    go.set()
