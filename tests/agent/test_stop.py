"""The stop path from outside: real agents, real process zones."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from support import wait
from support.agents import AgentProcess

TALKS = """
trap 'echo "last words" >> logs/app.log; exit 0' TERM
echo "first words" >> logs/app.log
while :; do sleep 0.05; done
"""


def test_a_stop_leaves_a_complete_bundle(agent: AgentProcess) -> None:
    root = agent.add_zone("web", ["sh", "-c", TALKS])
    agent.start().start_zones()
    log = root / "logs/app.log"
    wait.until(log.exists, what="the zone writes")
    (root / "logs/app.log.1").write_bytes(b"rotated\n" * 1000)
    (root / "logs/deep/er").mkdir(parents=True)
    (root / "logs/deep/er/empty.log").touch()

    told = agent.stop_zone("web")

    assert told["state"] == "stopped"
    assert told["gaps"] == 0, agent.status("web", told["bundle"]["id"]["bundle_id"])["gaps"]
    assert 0 < told["hold_seconds"] <= told["stop_seconds"]
    assert agent.zone_state("web") == "stopped"
    bundle_id = told["bundle"]["id"]["bundle_id"]
    contents = agent.contents("web", bundle_id)
    names = list(contents)
    assert names[0] == "metadata.toml"
    assert names[-3:] == ["report.json", "trace.json", "manifest.jsonl"]
    assert contents["logs/zone/logs/app.log"] == b"first words\nlast words\n"
    assert contents["logs/zone/logs/app.log.1"] == b"rotated\n" * 1000
    assert contents["logs/zone/logs/deep/er/empty.log"] == b""
    for probe in ("ptree", "uptime", "netstat", "svcs"):
        assert contents[probe].startswith(b"Probe: ["), probe
    assert any(name.startswith("pargs.") for name in names)
    assert json.loads(contents["report.json"])["gaps"] == []
    assert {event["ph"] for event in json.loads(contents["trace.json"])["traceEvents"]} == {"M", "X"}
    assert agent.spool_entries() == []


@pytest.mark.slow
def test_the_environment_of_a_process_is_not_in_the_bundle(agent: AgentProcess) -> None:
    agent.add_zone("web", more='environment = { SECRET = "hunter2-in-the-environment" }')
    agent.start().start_zones()
    told = agent.stop_zone("web")
    contents = agent.contents("web", told["bundle"]["id"]["bundle_id"])
    assert not [name for name, data in contents.items() if b"hunter2" in data]


@pytest.mark.slow
def test_stop_of_a_stopped_zone_answers_without_a_bundle(agent: AgentProcess) -> None:
    agent.add_zone("web")
    agent.start()
    told = agent.stop_zone("web")
    assert (told["state"], told["bundle"]) == ("stopped", None)
    assert agent.bundles("web") == []


@pytest.mark.slow
def test_stop_without_a_bundle(agent: AgentProcess) -> None:
    agent.add_zone("web")
    agent.start().start_zones()
    assert agent.stop_zone("web", bundle="false")["bundle"] is None
    assert agent.zone_state("web") == "stopped"
    assert agent.bundles("web") == []
    assert agent.spool_entries() == []


@pytest.mark.slow
def test_create_bundles_a_living_zone_and_a_stopped_one(agent: AgentProcess) -> None:
    root = agent.add_zone("web", ["sh", "-c", TALKS])
    agent.start().start_zones()
    wait.until((root / "logs/app.log").exists, what="the zone writes")
    created = agent.post("/zones/bundles/web")
    assert created.status_code == 201
    assert created.json()["cause"] == "explicit_request"
    contents = agent.contents("web", created.json()["id"]["bundle_id"])
    assert contents["logs/zone/logs/app.log"] == b"first words\n"
    assert "ptree" in contents
    assert agent.zone_state("web") == "running"

    agent.stop_zone("web", bundle="false")
    created = agent.post("/zones/bundles/web")
    assert created.status_code == 201
    bundle_id = created.json()["id"]["bundle_id"]
    contents = agent.contents("web", bundle_id)
    assert contents["logs/zone/logs/app.log"] == b"first words\nlast words\n"
    assert "ptree" not in contents
    assert agent.status("web", bundle_id)["gaps"] == []
    assert len(agent.bundles("web")) == 2


@pytest.mark.slow
async def test_a_second_stop_joins_and_state_is_answered_during_a_stop(agent: AgentProcess) -> None:
    agent.add_zone("slow", ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"])
    agent.start().start_zones()
    async with agent.async_client() as client:
        first = asyncio.create_task(client.post("/zones/slow/stop", params={"grace": "60s"}))
        await wait.until_async(
            lambda: _state_is(client, "slow", "stopping"), what="the stop is on its way and state is answered"
        )
        begin = time.monotonic()
        assert (await client.get("/zones")).json() == ["slow"]
        assert (await client.get("/zones/bundles")).status_code == 200
        assert (await client.post("/zones/bundles/slow")).status_code == 410
        assert (await client.post("/zones/slow/start")).status_code == 410
        assert time.monotonic() - begin < 5
        assert not first.done()
        # The grace is shortened by the one who joins, and both get the one bundle.
        second = await client.post("/zones/slow/stop", params={"grace": "0s"})
        one, two = (await first).json(), second.json()
    assert one["bundle"]["id"] == two["bundle"]["id"]
    assert len(agent.bundles("slow")) == 1


async def _state_is(client: httpx.AsyncClient, zone: str, state: str) -> bool:
    answer = await client.get(f"/zones/{zone}")
    return bool(answer.json()["state"] == state)


@pytest.mark.slow
async def test_a_vanished_client_cancels_nothing(agent: AgentProcess) -> None:
    agent.add_zone("slow", ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"])
    agent.start().start_zones()
    async with agent.async_client() as client:
        stop = asyncio.create_task(client.post("/zones/slow/stop", params={"grace": "1s"}))
        await wait.until_async(lambda: _state_is(client, "slow", "stopping"), what="the stop is on its way")
        stop.cancel()
        await asyncio.gather(stop, return_exceptions=True)
        await wait.until_async(lambda: _state_is(client, "slow", "stopped"), what="the stop goes on")
    bundle = wait.until(lambda: agent.bundles("slow"), what="the bundle is listed")[0]
    agent.wait_sealed("slow", bundle["id"]["bundle_id"])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_fifty_stops_never_wait_for_the_sealer(agent: AgentProcess, how: signal.Signals) -> None:
    names = [f"zone-{number:02}" for number in range(50)]
    for name in names:
        root = agent.add_zone(name, ["sh", "-c", TALKS])
        (root / "logs/old.log.1").write_text(f"old of {name}\n" * 5000)
    agent.start()
    async with agent.async_client(timeout=120) as client:
        await asyncio.gather(*(client.post(f"/zones/{name}/start") for name in names))
        for name in names:
            log = Path(agent.directory, "zones", name, "logs/app.log")
            await wait.until_async(log.exists, what=f"{name} writes")
        sealer = (await client.get("/healthz")).json()["pids"]["sealer"][0]
        os.kill(sealer, how)
        answers = await asyncio.gather(*(client.post(f"/zones/{name}/stop") for name in names))
        assert [answer.text for answer in answers if answer.status_code != 200] == []
        bundles = {
            name: answer.json()["bundle"]["id"]["bundle_id"] for name, answer in zip(names, answers, strict=True)
        }
        if how is signal.SIGSTOP:
            listed = (await client.get("/zones/bundles")).json()
            assert {bundle["state"] for bundle in listed} == {"sealing"}
            assert len(agent.spool_entries()) == 50
            os.kill(sealer, signal.SIGCONT)
    for name, bundle_id in bundles.items():
        agent.wait_sealed(name, bundle_id)
        contents = agent.contents(name, bundle_id)
        assert contents["logs/zone/logs/app.log"].endswith(b"last words\n")
        assert contents["logs/zone/logs/old.log.1"] == f"old of {name}\n".encode() * 5000
    assert agent.spool_entries() == []
