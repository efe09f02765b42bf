"""An agent that dies while it stops a container."""

import contextlib
import json

import httpx
import pytest

from support import wait
from support.agents import AgentProcess
from support.containers import RuncBundle
from support.talking import APP_LOG, LOGS, lines, run


def crash_during_stop(agent: AgentProcess, container: RuncBundle, point: str, *, remove: bool) -> None:
    (container.rootfs / "var/log/app.log.1").write_bytes(b"rotated\n" * 100_000)
    run(container)
    agent.start(crash_at=point)
    with contextlib.suppress(httpx.HTTPError):
        agent.post(f"/zones/{container.id}/stop", remove=remove)
    agent.wait_dead()


def check_recovered(agent: AgentProcess, container: RuncBundle) -> dict[str, bytes]:
    bundles = wait.until(lambda: agent.bundles(container.id), what="the bundle is listed")
    assert len(bundles) == 1
    bundle_id = bundles[0]["id"]["bundle_id"]
    status = agent.wait_sealed(container.id, bundle_id)
    contents = agent.contents(container.id, bundle_id)
    assert lines(contents[APP_LOG]) == LOGS
    assert contents["logs/zone/var/log/app.log.1"] == b"rotated\n" * 100_000
    if "ptree" not in contents:
        assert "probes" in {gap["what"] for gap in status["gaps"]}
    else:
        assert status["gaps"] == []
    wait.until(lambda: agent.spool_entries() == [], what="the spool is empty")
    left = [path for path in agent.directory.rglob("zb-*") if not path.is_relative_to(container.path)]
    assert left == []
    return contents


def containers_known(container: RuncBundle) -> list[str]:
    known = json.loads(container.runc("list", "-f", "json").stdout) or []
    return [one["id"] for one in known]


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "stop.intent-durable",
        "stop.probed",
        "stop.terminated",
        "capture.staged",
        "capture.record-durable",
        "stop.removed",
        "stop.released",
    ],
)
def test_killed_during_a_stop_with_removal(agent: AgentProcess, container: RuncBundle, point: str) -> None:
    crash_during_stop(agent, container, point, remove=True)
    agent.start()
    check_recovered(agent, container)
    wait.until(lambda: containers_known(container) == [], what="the container is removed")


@pytest.mark.slow
@pytest.mark.parametrize("point", ["stop.accepted", "stop.probed", "stop.terminated", "seal.manifest-written"])
def test_killed_during_a_stop(agent: AgentProcess, container: RuncBundle, point: str) -> None:
    crash_during_stop(agent, container, point, remove=False)
    agent.start()
    if point == "stop.accepted":
        assert agent.zone_state(container.id) == "running"
        assert agent.get(f"/zones/bundles/{container.id}").json() == []
        assert agent.spool_entries() == []
        return
    check_recovered(agent, container)
    wait.until(lambda: agent.zone_state(container.id) == "stopped", what="the stop is finished")
    assert containers_known(container) == [container.id]


@pytest.mark.slow
@pytest.mark.parametrize("remove", [False, True])
def test_removed_behind_our_back_while_the_agent_was_dead(
    agent: AgentProcess, container: RuncBundle, remove: bool
) -> None:
    crash_during_stop(agent, container, "stop.terminated", remove=remove)
    container.delete()
    agent.start()
    contents = check_recovered(agent, container)
    assert "ptree" not in contents
    assert agent.get(f"/zones/{container.id}").status_code == 404


@pytest.mark.slow
def test_a_new_container_of_the_same_name_is_left_alone_by_recovery(agent: AgentProcess, container: RuncBundle) -> None:
    crash_during_stop(agent, container, "stop.terminated", remove=True)
    container.delete()
    run(container)
    log = container.rootfs / "var/log/app.log"
    wait.until(lambda: log.read_text().count("first words") == 2, what="it writes again")
    agent.start()
    bundle_id = wait.until(lambda: agent.bundles(container.id), what="listed")[0]["id"]["bundle_id"]
    status = agent.wait_sealed(container.id, bundle_id)
    assert "overtaken" in {gap["what"] for gap in status["gaps"]}
    assert container.state()["status"] == "running"
    assert lines(agent.contents(container.id, bundle_id)[APP_LOG])[:2] == LOGS
