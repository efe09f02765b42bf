"""When rotated logs are sealed ahead, and of which zones; and with real agents."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support import stored, wait
from support.agents import AgentProcess
from support.spooled import log_lines
from zonebundle.agent.ahead import Ahead
from zonebundle.errors import RuntimeUnavailableError, StoreError
from zonebundle.model.zone import LogTree, Zone, ZoneState
from zonebundle.store.pieces import CHUNK

# Until the host is not too busy.
PATIENCE = 200


class FakeSealer:
    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.error: StoreError | None = None

    async def ask(self, do: str, **arguments: Any) -> Any:
        assert do == "ahead"
        self.asked.append(arguments)
        if self.error is not None:
            raise self.error
        return {}

    def zones(self) -> dict[str, bool]:
        """Of the last question."""
        return {zone["name"]: zone["is_running"] for zone in self.asked[-1]["zones"]}


class FakeRuntime:
    def __init__(self, name: str, *zones: str) -> None:
        self.name = name
        self.zones: list[Zone] = [zone(one) for one in zones]
        self.answers = asyncio.Event()
        self.answers.set()
        self.error: Exception | None = None
        self.lists = 0

    async def list(self) -> list[Zone]:
        self.lists += 1
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return self.zones


def zone(name: str, state: ZoneState = "running") -> Zone:
    return Zone(name, "fake", state, logs=(LogTree("zone", f"/srv/{name}", ("logs/**",)),))


def names(lists: Sequence[Sequence[Zone]]) -> list[tuple[Zone, bool]]:
    return [(one, one.name == "ending") for zones in lists for one in zones]


def timer(sealer: FakeSealer, *runtimes: FakeRuntime, period: float = 0.001, patience: float = 30.0) -> Ahead:
    return Ahead(period, runtimes, names, sealer, 1000, patience)


async def test_what_the_sealer_is_told() -> None:
    sealer, runtime = FakeSealer(), FakeRuntime("a", "web", "ending")
    runtime.zones.append(zone("old", "stopped"))
    await timer(sealer, runtime, FakeRuntime("b")).run_once()
    trees = [{"source": "zone", "path": "/srv/web", "patterns": ["logs/**"], "prefix": "", "via": None}]
    assert sealer.asked[0]["zones"][0] == {"name": "web", "is_running": True, "trees": trees}
    assert sealer.zones() == {"web": True, "ending": False, "old": False}
    assert (sealer.asked[0]["complete"], sealer.asked[0]["largest"]) == (True, 1000)


async def test_a_missing_runtime_costs_only_its_own_zones() -> None:
    sealer, one, other = FakeSealer(), FakeRuntime("a", "web"), FakeRuntime("b", "db")
    ahead = timer(sealer, one, other)
    other.error = RuntimeUnavailableError("runc is missing; install it")
    await ahead.run_once()
    assert (sealer.zones(), sealer.asked[-1]["complete"]) == ({"web": True}, False)
    other.error = None
    await ahead.run_once()
    assert (sealer.zones(), sealer.asked[-1]["complete"]) == ({"web": True, "db": True}, True)
    other.error = RuntimeUnavailableError("runc is missing; install it")
    await ahead.run_once()
    # Its zones keep their names; nothing of them is looked at.
    assert (sealer.zones(), sealer.asked[-1]["complete"]) == ({"web": True, "db": False}, False)


async def test_a_runtime_that_hangs_costs_only_its_own_zones() -> None:
    sealer, one, other = FakeSealer(), FakeRuntime("a", "web"), FakeRuntime("b", "db")
    ahead = timer(sealer, one, other, patience=0.01)
    other.answers.clear()
    for _ in range(3):
        await ahead.run_once()
        assert (sealer.zones(), sealer.asked[-1]["complete"]) == ({"web": True}, False)
    assert other.lists == 1
    other.answers.set()
    await ahead.run_once()
    assert (sealer.zones(), sealer.asked[-1]["complete"]) == ({"web": True, "db": True}, True)
    await ahead.close()


async def test_it_runs_every_period_whatever_fails(capsys: pytest.CaptureFixture[str]) -> None:
    sealer, runtime = FakeSealer(), FakeRuntime("a", "web")
    sealer.error = StoreError("no store")
    ahead = timer(sealer, runtime)
    ahead.start()
    await wait.until_async(lambda: len(sealer.asked) > 2)
    sealer.error, runtime.error = None, ValueError("unforeseen")
    await wait.until_async(lambda: not sealer.asked[-1]["complete"])
    runtime.error = None
    await wait.until_async(lambda: sealer.asked[-1]["complete"])
    await ahead.close()
    told = capsys.readouterr().out
    assert told.count("no store") == told.count("unforeseen") == 1


async def test_zero_seconds_is_off() -> None:
    sealer = FakeSealer()
    ahead = timer(sealer, FakeRuntime("a"), period=0.0)
    ahead.start()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await ahead.close()


def rotate(logs: Path) -> dict[str, bytes]:
    """A current log, and rotated ones; returns the files."""
    files = {"app.log": b"current\n", "app.log.1": log_lines(5000, 1), "app.log.2": log_lines(3 * CHUNK + 9000, 2)}
    for name, data in files.items():
        (logs / name).write_bytes(data)
    return files


def segments(agent: AgentProcess) -> set[str]:
    store = agent.state / "store"
    return stored.check_segments(store) if store.exists() else set()


def wait_for_segments(agent: AgentProcess, count: int) -> set[str]:
    wait.until(lambda: len(segments(agent)) == count, timeout=PATIENCE, what=f"{count} segments; log: {agent.log}")
    return segments(agent)


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_rotated_logs_are_in_the_store_before_the_stop(agent: AgentProcess) -> None:
    agent.settings = '[seal]\nahead = "200ms"\n'
    files = rotate(agent.add_zone("web") / "logs")
    idle = agent.add_zone("idle")
    (idle / "logs/app.log").touch()
    (idle / "logs/app.log.1").write_bytes(log_lines(7000, 9))
    agent.start().start_zones("web")
    before = wait_for_segments(agent, 2)
    assert agent.bundles("web") == []
    told = agent.stop_zone("web")
    bundle_id = told["bundle"]["id"]["bundle_id"]
    assert agent.wait_sealed("web", bundle_id)["gaps"] == []
    contents = agent.contents("web", bundle_id)
    assert {name: contents[f"logs/zone/logs/{name}"] for name in files} == files
    # Only the current log was new, and the zone's console, if it has said something.
    assert before < segments(agent)
    assert len(segments(agent) - before) == 1
    assert "Traceback" not in agent.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_segments_go_with_the_file_and_with_the_zone(agent: AgentProcess) -> None:
    agent.settings = '[seal]\nahead = "200ms"\n'
    logs = agent.add_zone("web") / "logs"
    rotate(logs)
    agent.add_zone("other")
    agent.start().start_zones()
    wait_for_segments(agent, 2)
    (logs / "app.log.2").unlink()
    wait_for_segments(agent, 1)
    agent.stop_zone("web", bundle="false")
    agent.kill()
    left = agent.zones.pop("web")
    agent.start()
    wait_for_segments(agent, 0)
    agent.zones["web"] = left
    assert "Traceback" not in agent.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("point", ["ahead.read", "ahead.added"])
def test_killed_at_a_trace_point(agent: AgentProcess, point: str) -> None:
    agent.settings = '[seal]\nahead = "200ms"\n'
    files = rotate(agent.add_zone("web") / "logs")
    agent.start()
    agent.start_zones()
    agent.terminate()
    (agent.state / "store").rename(agent.state / "gone")
    for path in agent.state.glob("index.sqlite*"):
        path.unlink()
    agent.start(crash_at=point)
    agent.wait_dead(PATIENCE)
    agent.start()
    wait_for_segments(agent, 2)
    told = agent.stop_zone("web")
    contents = agent.contents("web", told["bundle"]["id"]["bundle_id"])
    assert {name: contents[f"logs/zone/logs/{name}"] for name in files} == files
