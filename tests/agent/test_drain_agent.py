"""Drains of a real agent, over HTTP."""

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from support import wait
from support.agents import AgentProcess


def drain(agent: AgentProcess, path: Path, **query: Any) -> httpx.Response:
    with agent.client() as client:
        return client.post("/drain", params={"path": str(path), **query})


def end(agent: AgentProcess, path: Path) -> httpx.Response:
    with agent.client() as client:
        return client.delete("/drain", params={"path": str(path)})


@pytest.mark.slow
def test_stops_and_creates_of_a_drained_zone(agent: AgentProcess) -> None:
    web, db = agent.add_zone("web"), agent.add_zone("db")
    agent.start().start_zones()
    assert drain(agent, web).json() == {"path": str(web), "drained": True}
    assert agent.get("/drain").json() == [{"path": str(web), "drained": True, "used_by": []}]
    for path in ("/zones/web/stop", "/zones/bundles/web"):
        refused = agent.post(path)
        assert refused.status_code == 503
        assert f"{web} is being drained" in refused.json()["message"]
    assert agent.zone_state("web") == "running"
    assert agent.bundles("web") == []
    assert agent.spool_entries() == []
    assert agent.stop_zone("db")["bundle"] is not None
    assert agent.stop_zone("web", bundle="false")["bundle"] is None
    assert end(agent, web).status_code == 204
    assert end(agent, web).status_code == 404
    assert agent.post("/zones/bundles/web").status_code == 201
    assert drain(agent, db, timeout="soon").status_code == 400
    assert drain(agent, Path("db")).status_code == 400
    assert drain(agent, agent.directory / "nowhere").status_code == 400
    assert agent.get("/drain").json() == []


@pytest.mark.slow
async def test_a_stop_on_its_way_is_waited_for(agent: AgentProcess) -> None:
    web = agent.add_zone("web", ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"])
    agent.start().start_zones()
    async with agent.async_client() as client:
        stop = asyncio.create_task(client.post("/zones/web/stop", params={"grace": "60s"}))
        await wait.until_async(lambda: agent.bundles("web"), what="the stop is on its way")
        late = await client.post("/drain", params={"path": str(web), "timeout": "1s"})
        assert late.status_code == 503
        assert "capture of zone web" in late.json()["message"]
        drained = asyncio.create_task(client.post("/drain", params={"path": str(web)}))
        # A second stop joins the first, it does not begin anything.
        second = await client.post("/zones/web/stop", params={"grace": "0s"})
        assert second.json()["bundle"] == (await stop).json()["bundle"]
        assert (await drained).json() == {"path": str(web), "drained": True}
    assert [bundle["state"] for bundle in agent.bundles("web")] == ["sealed"]


@pytest.mark.slow
async def test_one_who_joins_a_stop_without_a_bundle_gets_none(agent: AgentProcess) -> None:
    web = agent.add_zone("web", ["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"])
    agent.start().start_zones()
    assert drain(agent, web).status_code == 200
    async with agent.async_client() as client:
        first = asyncio.create_task(client.post("/zones/web/stop", params={"grace": "60s", "bundle": "false"}))

        async def is_stopping() -> bool:
            return bool((await client.get("/zones/web")).json()["state"] == "stopping")

        await wait.until_async(is_stopping)
        told = (await client.post("/zones/web/stop", params={"grace": "0s"})).json()
        await first
    assert (told["state"], told["bundle"]) == ("stopped", None)
    assert "is being drained" in told["reasons"][0]["reason"]


@pytest.mark.slow
async def test_a_download_is_waited_for(agent: AgentProcess, tmp_path: Path) -> None:
    agent.stores = [tmp_path / "disk/store"]
    root = agent.add_zone("web")
    (root / "logs/app.log").write_bytes(os.urandom(32 << 20))
    agent.start().start_zones()
    bundle_id = agent.stop_zone("web")["bundle"]["id"]["bundle_id"]
    agent.wait_sealed("web", bundle_id)
    path = f"/zones/bundles/web/{bundle_id}"
    async with agent.async_client() as client:
        async with client.stream("GET", path) as answer:
            chunks = answer.aiter_raw(1000)
            length = len(await anext(chunks))
            late = await client.post("/drain", params={"path": str(tmp_path / "disk"), "timeout": "300ms"})
            assert late.status_code == 503
            assert f"download of bundle {bundle_id}" in late.json()["message"]
            assert (await client.get(path)).status_code == 503
            drained = asyncio.create_task(client.post("/drain", params={"path": str(tmp_path / "disk")}))
            async for chunk in chunks:
                length += len(chunk)
            assert length == int(answer.headers["content-length"])
        assert (await drained).status_code == 200
        # Nobody has anything of it open.
        pids = (await client.get("/healthz")).json()["pids"]
        for pid in (pid for group in pids.values() for pid in group):
            assert [path for path in _open_files(pid) if path.startswith(str(tmp_path / "disk"))] == []
        await client.delete("/drain", params={"path": str(tmp_path / "disk")})
        assert (await client.get(path)).status_code == 200


def _open_files(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return found


@pytest.mark.slow
async def test_a_bundle_that_is_sealed_is_waited_for(agent: AgentProcess, ext4_dir: Path) -> None:
    # Neither cloned nor wholly copied: its older part is read from its place.
    agent.settings = '[hold]\ncopy = "1MiB"\n'
    web = agent.add_zone("web", root=ext4_dir / "web")
    (web / "logs/app.log").write_bytes(os.urandom(4 << 20))
    agent.start().start_zones()
    [sealer] = agent.get("/healthz").json()["pids"]["sealer"]
    os.kill(sealer, signal.SIGSTOP)
    agent.stop_zone("web")
    begin = time.monotonic()
    late = drain(agent, web, timeout="300ms")
    assert late.status_code == 503
    assert "the sealer, which has not answered yet" in late.json()["message"]
    assert not agent.get("/drain").json()[0]["drained"]
    assert time.monotonic() - begin < 30
    os.kill(sealer, signal.SIGCONT)
    assert drain(agent, web).status_code == 200
    # Nothing is read there any more: every byte is in the bundle, though the files go now.
    bundle_id = agent.bundles("web")[0]["id"]["bundle_id"]
    (web / "logs/app.log").unlink()
    assert len(agent.contents("web", bundle_id)["logs/zone/logs/app.log"]) == 4 << 20
    assert agent.status("web", bundle_id)["gaps"] == []


@pytest.mark.slow
def test_a_drain_ends_with_the_agent(agent: AgentProcess) -> None:
    web = agent.add_zone("web")
    agent.start().start_zones()
    assert drain(agent, web).status_code == 200
    agent.kill()
    agent.start()
    assert agent.get("/drain").json() == []
    assert agent.stop_zone("web")["bundle"] is not None
