"""The clean-up of a real agent, over HTTP."""

import json
import random
from typing import Any

import pytest

from support import wait
from support.agents import AgentProcess
from zonebundle.agent.cleanup import CONTEXT_FILE


def put(agent: AgentProcess, body: Any, status: int = 204) -> str:
    """PUT a context; the message of a refusal."""
    with agent.client() as client:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = client.put("/zones/bundle-cleanup/context", content=content)
    assert answer.status_code == status, answer.text
    return str(answer.json()["message"]) if answer.content else ""


def context_of(agent: AgentProcess) -> Any:
    return agent.get("/zones/bundle-cleanup/context").json()


FIRST = {"period": {"secs": 300, "nanos": 0}, "storage_limit": 20, "priority": ["time", "cause"]}


@pytest.mark.slow
def test_the_context_over_http(agent: AgentProcess) -> None:
    agent.settings = '[cleanup]\nperiod = "5m"\nstorage-limit = 20\npriority = ["time", "cause"]\n'
    agent.start()
    assert context_of(agent) == FIRST
    for body, message in (
        ({}, "nothing to change"),
        ({"storage_limit": None}, "nothing to change"),
        ({"storage-limit": 5}, "'storage-limit' is not known"),
        ({"storage_limit": 5, "\x1b[31m": 1}, "'\\x1b[31m' is not known"),
        ({"storage_limit": 0}, "1 to 50"),
        ({"storage_limit": 51}, "1 to 50"),
        ({"storage_limit": True}, "1 to 50"),
        ({"storage_limit": "5"}, "1 to 50"),
        ({"period": {"secs": 59, "nanos": 999_999_999}}, "60 to 86400"),
        ({"period": {"secs": 86400, "nanos": 1}}, "60 to 86400"),
        ({"period": {"secs": 10**400, "nanos": 0}}, "60 to 86400"),
        ({"period": 600}, "60 to 86400"),
        ({"period": {"secs": 600}}, "secs"),
        ({"priority": ["cause"]}, "cause,time or time,cause"),
        ({"priority": ["cause", "cause"]}, "cause,time or time,cause"),
        ({"priority": "cause"}, "cause,time or time,cause"),
        ([], "not a JSON object"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ):
        assert message in put(agent, body, 400), body
    assert context_of(agent) == FIRST
    put(agent, {"period": {"secs": 61, "nanos": 500_000_000}})
    put(agent, {"priority": ["cause", "time"], "storage_limit": 1, "period": None})
    changed = {"period": {"secs": 61, "nanos": 500_000_000}, "storage_limit": 1, "priority": ["cause", "time"]}
    assert context_of(agent) == changed
    agent.kill()
    agent.start()
    assert context_of(agent) == changed
    agent.terminate()
    (agent.state / CONTEXT_FILE).write_text("{")
    agent.start()
    assert context_of(agent) == FIRST
    assert (agent.state / "context.json.damaged").read_text() == "{"
    assert "Traceback" not in agent.log.read_text()


def fill(agent: AgentProcess, number: int) -> list[str]:
    """Make bundles of the zone web, each with 2 MB that compress badly and are in no other; their IDs, oldest first."""
    made = []
    for _ in range(number):
        (agent.directory / "zones/web/logs/app.log").write_bytes(random.randbytes(2 << 20))
        created = agent.post("/zones/bundles/web").json()["id"]["bundle_id"]
        agent.wait_sealed("web", created)
        made.append(created)
    return made


@pytest.mark.slow
def test_a_lower_limit_removes_the_oldest(agent: AgentProcess) -> None:
    agent.settings = 'quota = "100MB"\n[cleanup]\nstorage-limit = 50\n'
    agent.add_zone("web")
    agent.start()
    made = fill(agent, 5)
    [usage] = agent.get("/zones/bundle-cleanup/utilization").json().values()
    assert usage["dataset_quota"] == 100_000_000
    assert usage["bytes_available"] == 50_000_000
    # Five bundles, and the store's reserve of 4 MiB.
    assert 14 << 20 < usage["bytes_used"] < 15 << 20
    assert agent.post("/zones/bundle-cleanup").json() == {str(agent.state / "store"): {"bundles": 0, "bytes": 0}}
    # 10 MB: two bundles of 2 MiB each stay.
    put(agent, {"storage_limit": 10})
    wait.until(lambda: len(agent.bundles("web")) == 2, what="the clean-up runs behind the PUT")
    assert [one["id"]["bundle_id"] for one in agent.bundles("web")] == made[-2:]
    # They are unlisted before they are removed.
    wait.until(lambda: used(agent) <= 10_000_000, what="their bytes are free")
    assert len(agent.contents("web", made[-1])["logs/zone/logs/app.log"]) == 2 << 20
    agent.kill()
    agent.start()
    assert [one["id"]["bundle_id"] for one in agent.bundles("web")] == made[-2:]


def used(agent: AgentProcess) -> int:
    [usage] = agent.get("/zones/bundle-cleanup/utilization").json().values()
    return int(usage["bytes_used"])


@pytest.mark.slow
def test_a_bundle_that_is_read_stays(agent: AgentProcess) -> None:
    agent.settings = 'quota = "20MB"\n[cleanup]\nstorage-limit = 50\n'
    agent.add_zone("web")
    agent.start()
    (agent.directory / "zones/web/logs/old.log").write_bytes(random.randbytes(4 << 20))
    read = fill(agent, 2)[0]
    with agent.client() as client, client.stream("GET", f"/zones/bundles/web/{read}") as answer:
        chunks = answer.iter_raw(1000)
        begin = next(chunks)
        put(agent, {"storage_limit": 1})
        removed = agent.post("/zones/bundle-cleanup").json()
        assert removed[str(agent.state / "store")]["bundles"] <= 1
        assert [one["id"]["bundle_id"] for one in agent.bundles("web")] == [read]
        rest = b"".join(chunks)
    assert len(begin + rest) == int(answer.headers["content-length"])
    assert agent.post("/zones/bundle-cleanup").json()[str(agent.state / "store")]["bundles"] == 1
    assert agent.bundles("web") == []
