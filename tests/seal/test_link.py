"""The agent's side: a sealer that dies, hangs or never starts does not matter to the agent."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from support import leaks, wait
from support.spooled import INSTALLATION, Draft, SpoolDir, log_lines
from zonebundle.errors import NoSuchBundleError, StoreError, UnavailableError, UsageError
from zonebundle.host import trace
from zonebundle.host.process import built_environment
from zonebundle.seal import link as link_module
from zonebundle.seal.link import SealerLink
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader


class Linked:
    """A link, and what it told."""

    def __init__(self, at: SpoolDir) -> None:
        self.at = at
        self.events: list[dict[str, Any]] = []
        self.link = SealerLink(
            state_dir=at.state,
            store_dirs=[at.store],
            installation=INSTALLATION,
            workers=2,
            on_event=self.events.append,
        )

    def told(self, kind: str, bundle_id: str) -> list[dict[str, Any]]:
        return [event[kind] for event in self.events if event.get(kind, {}).get("id") == bundle_id]

    async def wait_for(self, kind: str, draft: Draft) -> dict[str, Any]:
        await wait.until_async(lambda: self.told(kind, draft.bundle_id), 60, f"{kind}; {self.events[-3:]}")
        return self.told(kind, draft.bundle_id)[-1]

    @property
    def pid(self) -> int:
        assert self.link.pid is not None
        return self.link.pid


@pytest.fixture
async def linked(at: SpoolDir) -> AsyncIterator[Linked]:
    with leaks.no_leaks():
        linked = Linked(at)
        await linked.link.start()
        yield linked
        await linked.link.close()
        assert linked.link.pid is None


def small(at: SpoolDir, **more: Any) -> Draft:
    draft = Draft(at, **more)
    draft.add_log(b"app.log", log_lines(5000))
    draft.write()
    return draft


def large(at: SpoolDir) -> Draft:
    draft = Draft(at)
    draft.add_log(b"big.log", log_lines(120 * CHUNK))
    draft.write()
    return draft


async def test_a_bundle_is_sealed_and_told(linked: Linked, at: SpoolDir) -> None:
    draft = small(at)
    linked.link.seal(draft.bundle_id)
    told = await linked.wait_for("sealed", draft)
    assert told["header"]["zone"] == "web"
    assert at.logs(draft) == draft.expected
    # Progress only: neither `ready` nor anything else of the protocol reaches the agent.
    assert {next(iter(event)) for event in linked.events} <= {"progress", "sealed"}


@pytest.mark.slow
async def test_a_killed_sealer_is_replaced_and_goes_on(linked: Linked, at: SpoolDir) -> None:
    draft, later = large(at), small(at)
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


async def test_what_is_sealed_is_not_told_to_the_next_sealer(linked: Linked, at: SpoolDir) -> None:
    draft = small(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("sealed", draft)
    os.kill(linked.pid, signal.SIGKILL)
    other = small(at)
    linked.link.seal(other.bundle_id)
    await linked.wait_for("sealed", other)
    assert linked.told("failed", draft.bundle_id) == []


async def test_a_stopped_sealer_blocks_nothing(linked: Linked, at: SpoolDir) -> None:
    first = small(at)
    linked.link.seal(first.bundle_id)
    await linked.wait_for("sealed", first)
    os.kill(linked.pid, signal.SIGSTOP)
    drafts = [small(at) for _ in range(20)]
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
    draft = small(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("sealed", draft)
    assert await linked.link.delete("web", draft.bundle_id) > 0
    assert list(StoreReader.open(at.store).bundles()) == []
    with pytest.raises(NoSuchBundleError):
        await linked.link.delete("web", draft.bundle_id)


@pytest.mark.slow
async def test_a_bundle_on_its_way_is_deleted(linked: Linked, at: SpoolDir) -> None:
    draft = large(at)
    linked.link.seal(draft.bundle_id)
    await linked.wait_for("progress", draft)
    assert await linked.link.delete("web", draft.bundle_id) >= 0
    assert at.left() == []
    assert list(StoreReader.open(at.store).bundles()) == []
    # Also the next sealer does not hear of it.
    os.kill(linked.pid, signal.SIGKILL)
    other = small(at)
    linked.link.seal(other.bundle_id)
    await linked.wait_for("sealed", other)
    assert linked.told("failed", draft.bundle_id) == []


async def test_a_deletion_survives_the_sealer(linked: Linked, at: SpoolDir) -> None:
    draft = small(at)
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
    draft = small(at)
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
    draft = small(at)
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
        draft = large(at)
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
        draft = small(at)
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


async def test_damage_is_told_once_and_the_rest_goes_on(linked: Linked, at: SpoolDir) -> None:
    bad, good = small(at), small(at)
    record = bad.entry / "capture.jsonl"
    record.write_bytes(record.read_bytes()[:-1])
    linked.link.seal(bad.bundle_id)
    linked.link.seal(good.bundle_id)
    await linked.wait_for("sealed", good)
    assert (await linked.wait_for("failed", bad))["retry_in"] is None


SLOW = """
import pathlib, time
from zonebundle.seal.sealer import Sealer
from zonebundle.seal.upkeep import Upkeep
def wait_for(path):
    pathlib.Path(path + ".begun").touch()
    while not pathlib.Path(path).exists():
        time.sleep(0.005)
"""


@pytest.fixture
def sealer_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has every sealer run some code before it starts: its methods, made to do what a test needs."""
    real: Callable[..., Any] = subprocess.Popen

    def use(code: str) -> None:
        def start(command: list[str], **options: Any) -> Any:
            module = command.index("-m")
            text = f"{SLOW}\n{code}\nfrom zonebundle.seal.__main__ import main\nmain()"
            return real([*command[:module], "-c", text, *command[module + 2 :]], **options)

        monkeypatch.setattr(subprocess, "Popen", start)

    return use


@contextlib.asynccontextmanager
async def started(at: SpoolDir) -> AsyncIterator[Linked]:
    with leaks.no_leaks():
        linked = Linked(at)
        await linked.link.start()
        try:
            yield linked
        finally:
            await linked.link.close()


async def test_the_sealer_answers_what_it_is_asked(at: SpoolDir, sealer_code: Callable[[str], None]) -> None:
    sealer_code("Upkeep.clean_up = lambda self, storage_limit, pinned: [storage_limit, pinned]")
    async with started(at) as linked:
        # More than a line of asyncio's streams may hold, both ways.
        pinned = [f"{number:036}" for number in range(50_000)]
        assert await linked.link.ask("clean_up", storage_limit=25, pinned=pinned) == [25, pinned]
        assert linked.events == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        ("UsageError", UsageError),
        ("UnavailableError", UnavailableError),
        ("StoreError", StoreError),
        ("DamagedError", StoreError),
        ("OSError", StoreError),
        ("KeyError", StoreError),
    ],
)
async def test_an_error_is_told_as_what_it_is(
    at: SpoolDir, sealer_code: Callable[[str], None], raised: str, kind: type[Exception]
) -> None:
    sealer_code(f"from zonebundle.errors import *\ndef fail(self):\n    raise {raised}('no luck')\nUpkeep.prune = fail")
    async with started(at) as linked:
        with pytest.raises(kind, match="no luck") as caught:
            await linked.link.ask("prune")
        assert type(caught.value) is kind


async def test_only_what_is_in_the_table_is_done(linked: Linked) -> None:
    for name in ("close", "__init__", "delete", "nothing"):
        with pytest.raises(UsageError, match=f"'{name}' is nothing that a sealer"):
            await linked.link.ask(name)


async def test_what_is_asked_survives_the_sealer(
    at: SpoolDir, tmp_path: Path, sealer_code: Callable[[str], None]
) -> None:
    sealer_code("Upkeep.uses = lambda self, path: [wait_for(path), 'done'][1:]")
    async with started(at) as linked:
        asked = asyncio.create_task(linked.link.ask("uses", path=str(tmp_path / "go")))
        begun = tmp_path / "go.begun"
        await wait.until_async(begun.exists, 30)
        begun.unlink()
        os.kill(linked.pid, signal.SIGKILL)
        await wait.until_async(begun.exists, 30, "the next sealer is asked")
        assert not asked.done()
        (tmp_path / "go").touch()
        assert await asked == ["done"]


async def test_a_cancelled_caller_does_not_stop_what_it_asked(
    at: SpoolDir, tmp_path: Path, sealer_code: Callable[[str], None]
) -> None:
    sealer_code("Upkeep.uses = lambda self, path: pathlib.Path(path).touch()")
    async with started(at) as linked:
        asked = asyncio.create_task(linked.link.ask("uses", path=str(tmp_path / "done")))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait([asked])
        await wait.until_async((tmp_path / "done").exists, 30)


@pytest.mark.slow
async def test_closing_fails_what_was_asked(at: SpoolDir) -> None:
    async with started(at) as linked:
        os.kill(linked.pid, signal.SIGSTOP)
        asked = asyncio.create_task(linked.link.ask("prune"))
        await asyncio.sleep(0)
        await linked.link.close()
        with pytest.raises(UnavailableError, match="agent is stopping"):
            await asked


async def test_one_long_job_keeps_nobody_waiting(
    at: SpoolDir, tmp_path: Path, sealer_code: Callable[[str], None]
) -> None:
    sealer_code(
        "Upkeep.repair = lambda self: wait_for(GO)\nUpkeep.uses = lambda self, path: []".replace(
            "GO", repr(str(tmp_path / "go"))
        )
    )
    async with started(at) as linked:
        repair = asyncio.create_task(linked.link.ask("repair"))
        await wait.until_async((tmp_path / "go.begun").exists, 30)
        assert await linked.link.ask("uses", path="/") == []
        draft = small(at)
        linked.link.seal(draft.bundle_id)
        await linked.wait_for("sealed", draft)
        assert not repair.done()
        (tmp_path / "go").touch()
        await repair


async def test_a_new_sealer_hears_of_a_drain_before_all_else(
    at: SpoolDir, tmp_path: Path, sealer_code: Callable[[str], None]
) -> None:
    go, log = tmp_path / "go", tmp_path / "log"
    sealer_code(f"""
log = open({str(log)!r}, "a", buffering=1)
seal = Sealer.seal
def drain(self, path):
    wait_for({str(go)!r})
    print("drain", path, file=log)
def noted(self, bundle_id, *arguments):
    print("seal", file=log)
    return seal(self, bundle_id, *arguments)
Upkeep.drain, Sealer.seal = drain, noted
Upkeep.undrain = lambda self, path: print("undrain", path, file=log)
Upkeep.uses = lambda self, path: [print("uses", file=log)][1:]
""")
    async with started(at) as linked:
        go.touch()
        await linked.link.drain("/a")
        await linked.link.drain("/b")
        await linked.link.undrain("/b")
        # Asked before there was a sealer, the first is told twice.
        assert list(dict.fromkeys(log.read_text().splitlines())) == ["drain /a", "drain /b", "undrain /b"]
        log.write_text("")
        go.unlink()
        Path(f"{go}.begun").unlink()
        os.kill(linked.pid, signal.SIGKILL)
        draft = small(at)
        linked.link.seal(draft.bundle_id)
        asked = asyncio.create_task(linked.link.ask("uses", path="/a"))
        await wait.until_async(Path(f"{go}.begun").exists, 30, "the next sealer is told")
        assert log.read_text() == ""
        go.touch()
        await linked.wait_for("sealed", draft)
        await asked
        told = log.read_text().splitlines()
        assert told[0] == "drain /a"
        assert sorted(told[1:]) == ["seal", "uses"]
