"""What the agent asks of a sealer is answered once, by that one or by the next."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import wait
from support.linked import Linked, small_draft, started
from support.spooled import SpoolDir
from zonebundle.errors import StoreError, UnavailableError, UsageError

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


@pytest.mark.slow
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


@pytest.mark.slow
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
        draft = small_draft(at)
        linked.link.seal(draft.bundle_id)
        await linked.wait_for("sealed", draft)
        assert not repair.done()
        (tmp_path / "go").touch()
        await repair


@pytest.mark.slow
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
        draft = small_draft(at)
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
