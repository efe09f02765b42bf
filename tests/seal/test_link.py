"""The agent's side: a sealer that dies, hangs or never starts does not matter to the agent."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import leaks, wait
from support.linked import Linked, large_draft, small_draft
from support.spooled import SpoolDir
from zonebundle.errors import NoSuchBundleError, UnavailableError
from zonebundle.host import trace
from zonebundle.host.process import built_environment
from zonebundle.seal import link as link_module
from zonebundle.store.reader import StoreReader


async def test_a_bundle_is_sealed_and_told(linked: Linked, at: SpoolDir) -> None:
    draft = small_draft(at)
    linked.link.seal(draft.bundle_id)
    told = await linked.wait_for("sealed", draft)
    assert told["header"]["zone"] == "web"
    assert at.logs(draft) == draft.expected
    # Progress only: neither `ready` nor anything else of the protocol reaches the agent.
    assert {next(iter(event)) for event in linked.events} <= {"progress", "sealed"}


@pytest.mark.slow
async def test_a_killed_sealer_is_replaced_and_goes_on(linked: Linked, at: SpoolDir) -> None:
    draft, later = large_draft(at), small_draft(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("progress", draft)
    first = linked.pid
    os.kill(first, signal.SIGKILL)
    linked.link.seal(later.bundle_id)
    await linked.wait_for("sealed", draft)
    await linked.wait_for("sealed", later)
    assert linked.pid != first
    assert at.logs(draft) == draft.expected
    assert at.left() == []


@pytest.mark.slow
async def test_what_is_sealed_is_not_told_to_the_next_sealer(linked: Linked, at: SpoolDir) -> None:
    draft = small_draft(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("sealed", draft)
    os.kill(linked.pid, signal.SIGKILL)
    other = small_draft(at)
    linked.link.seal(other.bundle_id)
    await linked.wait_for("sealed", other)
    assert linked.told("failed", draft.bundle_id) == []


@pytest.mark.slow
async def test_a_stopped_sealer_blocks_nothing(linked: Linked, at: SpoolDir) -> None:
    first = small_draft(at)
    linked.link.seal(first.bundle_id)
    await linked.wait_for("sealed", first)
    os.kill(linked.pid, signal.SIGSTOP)
    drafts = [small_draft(at) for _ in range(20)]
    begin = time.monotonic()
    for number in range(20_000):
        linked.link.seal(drafts[number % 20].bundle_id)
    # More than any socket buffer holds, and the loop has not waited for it.
    assert time.monotonic() - begin < 10
    assert len(linked.events) < 10
    os.kill(linked.pid, signal.SIGCONT)
    for draft in drafts:
        await linked.wait_for("sealed", draft)


async def test_a_bundle_is_deleted(linked: Linked, at: SpoolDir) -> None:
    draft = small_draft(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("sealed", draft)
    assert await linked.link.delete("web", draft.bundle_id) > 0
    assert list(StoreReader.open(at.store).bundles()) == []
    with pytest.raises(NoSuchBundleError):
        await linked.link.delete("web", draft.bundle_id)


@pytest.mark.slow
async def test_a_bundle_on_its_way_is_deleted(linked: Linked, at: SpoolDir) -> None:
    draft = large_draft(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("progress", draft)
    assert await linked.link.delete("web", draft.bundle_id) >= 0
    assert at.left() == []
    assert list(StoreReader.open(at.store).bundles()) == []
    # Also the next sealer does not hear of it.
    os.kill(linked.pid, signal.SIGKILL)
    other = small_draft(at)
    linked.link.seal(other.bundle_id)
    await linked.wait_for("sealed", other)
    assert linked.told("failed", draft.bundle_id) == []


@pytest.mark.slow
async def test_a_deletion_survives_the_sealer(linked: Linked, at: SpoolDir) -> None:
    draft = small_draft(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("sealed", draft)
    os.kill(linked.pid, signal.SIGSTOP)
    deletion = asyncio.create_task(linked.link.delete("web", draft.bundle_id))
    done, _ = await asyncio.wait([deletion], timeout=0.1)
    assert not done
    os.kill(linked.pid, signal.SIGKILL)
    assert await deletion > 0
    assert list(StoreReader.open(at.store).bundles()) == []


@pytest.mark.slow
@pytest.mark.parametrize("point", [name for name in trace.POINTS if name.startswith("delete.")])
async def test_a_deletion_during_which_the_sealer_dies_is_done(
    at: SpoolDir, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = small_draft(at)
    linked = Linked(at)
    # Only the first sealer dies there, and not its agent with it.
    monkeypatch.setenv(trace.CRASH_AT, point)
    monkeypatch.setattr(
        link_module, "built_environment", lambda extra: built_environment({**extra, trace.CRASH_PID: "0"})
    )
    await linked.link.start()
    monkeypatch.delenv(trace.CRASH_AT)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("sealed", draft)
    # How much was freed is told by the sealer that finished it: the recovery of the second, or its own deletion.
    assert await linked.link.delete("web", draft.bundle_id) >= 0
    assert list(StoreReader.open(at.store).directories()) == []
    await linked.link.close()


async def test_a_cancelled_caller_does_not_stop_a_deletion(linked: Linked, at: SpoolDir) -> None:
    draft = small_draft(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("sealed", draft)
    deletion = asyncio.create_task(linked.link.delete("web", draft.bundle_id))
    await asyncio.sleep(0)
    deletion.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await deletion
    await wait.until_async(lambda: list(StoreReader.open(at.store).directories()) == [])


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
async def test_closing_ends_the_sealer(at: SpoolDir, stopped: bool) -> None:
    with leaks.no_leaks():
        linked = Linked(at)
        await linked.link.start()
        draft = large_draft(at)
        linked.link.seal(draft.bundle_id)
        await linked.wait_for("progress", draft)
        pid = linked.pid
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        deletion = asyncio.create_task(linked.link.delete("web", "6f0ee1a2-4e49-4b0f-8f1c-7a4f3a3f9d11"))
        await asyncio.sleep(0)
        await linked.link.close()
        assert not Path(f"/proc/{pid}").exists()
        with pytest.raises((UnavailableError, NoSuchBundleError)):
            await deletion


@pytest.mark.slow
async def test_a_sealer_that_cannot_start_is_tried_later_and_later(
    at: SpoolDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    real: Callable[..., Any] = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        starts.append(time.monotonic())
        if len(starts) < 4:
            command = [sys.executable, "-c", "raise SystemExit(1)"]
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    with leaks.no_leaks():
        linked = Linked(at)
        await linked.link.start()
        draft = small_draft(at)
        linked.link.seal(draft.bundle_id)
        await linked.wait_for("sealed", draft)
        await linked.link.close()
    assert len(starts) == 4
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    assert pauses[0] >= 0.1
    assert pauses[1] >= 0.2
    assert pauses[2] >= 0.4


async def test_a_missing_interpreter_is_said(at: SpoolDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with leaks.no_leaks(), pytest.raises(UnavailableError, match="cannot be started"):
        await Linked(at).link.start()


@pytest.mark.slow
async def test_damage_is_told_once_and_the_rest_goes_on(linked: Linked, at: SpoolDir) -> None:
    bad, good = small_draft(at), small_draft(at)
    record = bad.entry / "capture.jsonl"
    record.write_bytes(record.read_bytes()[:-1])
    linked.link.seal(bad.bundle_id)
    linked.link.seal(good.bundle_id)
    await linked.wait_for("sealed", good)
    assert (await linked.wait_for("failed", bad))["retry_in"] is None
