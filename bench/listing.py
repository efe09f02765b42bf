"""A store with very many bundles: how long does it take to list them, and to start with them?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.load import Row, median_ms, without_sync, work_directory
from support.agents import AgentProcess
from zonebundle.model.metadata import Cause, Metadata, format_time
from zonebundle.store.draft import BundleDraft
from zonebundle.store.store import Store

BUNDLES = 10_000
ZONES = 100
ROUNDS = 9
CREATED = 1_767_225_600.0


def listing() -> Iterator[Row]:
    """Listing 10,000 bundles, by HTTP and by the command, and starting an agent that has them."""
    with work_directory() as work:
        store = work / "store"
        _fill(store)
        for name in ("empty", "full"):
            (work / name).mkdir()
        with AgentProcess(work / "empty") as agent:
            empty = _seconds(agent.start)
        with AgentProcess(work / "full", stores=[store]) as agent:
            start = _seconds(agent.start)
            with agent.client() as client:
                count = len(client.get("/zones/bundles").raise_for_status().json())
                assert count == BUNDLES, count
                asked = median_ms([_seconds(lambda: client.get("/zones/bundles")) for _ in range(ROUNDS)])
            told = median_ms([_seconds(lambda: _ls(agent.socket)) for _ in range(ROUNDS)])
            again = _restart(agent)
    yield Row(f"GET /zones/bundles with {BUNDLES:,} bundles", "<= 100 ms", f"{asked:.0f} ms", asked <= 100)
    yield Row("the same, zone-bundle ls", "-", f"{told:.0f} ms, with the interpreter's start")
    yield Row(
        f"start of an agent with {BUNDLES:,} bundles, first and again / with none",
        "-",
        f"{start:.2f} s and {again:.2f} s / {empty:.2f} s",
    )


def _fill(directory: Path) -> None:
    """Bundles without logs, made by the store's own writer."""
    with Store.open(directory) as store, without_sync():
        for number in range(BUNDLES):
            created = CREATED + number
            made = Metadata(
                f"zone-{number % ZONES}", str(uuid.uuid4()), format_time(created), Cause.TERMINATED_INSTANCE
            )
            with BundleDraft(store, made, created) as draft:
                draft.add_bytes(b"metadata.toml", made.to_toml())
                draft.commit(hold_seconds=0.01, graceful_seconds=0.1, gaps=0)
    os.sync()


def _seconds(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def _restart(agent: AgentProcess) -> float:
    agent.terminate()
    return _seconds(agent.start)


def _ls(socket: Path) -> None:
    command = [sys.executable, "-m", "zonebundle.cli.main", "--host", f"unix:{socket}", "ls"]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
