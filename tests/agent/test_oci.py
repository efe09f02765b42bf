"""Containers that runc runs, as zones of a real agent."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from support import wait
from support.agents import AgentProcess
from support.containers import RuncBundle
from support.misbehaving import BUDGET, check_misbehaved, sleepers, write_scripts
from support.talking import APP_LOG, LOGS, STUBBORN, TALKS, bundle_of, lines, run, settings
from support.zones import MakeBundle


@pytest.mark.slow
def test_a_graceful_stop_leaves_a_complete_bundle(agent: AgentProcess, container: RuncBundle) -> None:
    rotated = os.urandom(300_000)
    (container.rootfs / "var/log/app.log.1").write_bytes(rotated)
    (container.rootfs / "var/log/deep").mkdir()
    (container.rootfs / "var/log/deep/empty.log").touch()
    (container.rootfs / "etc/not-a-log").write_bytes(b"of no interest")
    pid = run(container)
    agent.start()
    assert agent.get("/zones").json() == [container.id]
    told = agent.get("/zones?all=true").json()
    assert told == [{"name": container.id, "runtime": "oci", "state": "running", "pid": pid}]

    stopped = agent.stop_zone(container.id)

    assert stopped["gaps"] == 0, stopped
    assert container.state()["status"] == "stopped"
    assert agent.zone_state(container.id) == "stopped"
    assert agent.get("/zones").json() == []
    contents = agent.contents(container.id, bundle_of(stopped))
    assert lines(contents[APP_LOG]) == LOGS
    assert contents["logs/zone/var/log/app.log.1"] == rotated
    assert contents["logs/zone/var/log/deep/empty.log"] == b""
    assert not [name for name in contents if "not-a-log" in name]
    assert str(pid).encode() in contents["ptree"]
    assert b"first words" in contents[f"pargs.{pid}"]
    assert f"pfiles.{pid}" in contents
    report = json.loads(contents["report.json"])
    assert report["gaps"] == []
    assert agent.spool_entries() == []
    again = agent.stop_zone(container.id)
    assert (again["state"], again["bundle"]) == ("stopped", None)


@pytest.mark.slow
def test_one_that_ignores_term_is_killed_after_the_grace(agent: AgentProcess, runc_bundle: MakeBundle) -> None:
    stubborn = runc_bundle("sh", "-c", STUBBORN)
    agent.settings = settings(stubborn.state_dir)
    run(stubborn)
    agent.start()
    begin = time.monotonic()
    told = agent.stop_zone(stubborn.id, grace="300ms")
    assert 0.3 <= time.monotonic() - begin < 30
    assert (told["state"], told["gaps"]) == ("stopped", 0)
    assert told["stop_seconds"] - told["hold_seconds"] >= 0.3
    assert stubborn.state()["status"] == "stopped"
    assert lines(agent.contents(stubborn.id, bundle_of(told))[APP_LOG]) == ["first words"]


@pytest.mark.slow
async def test_ten_at_once(agent: AgentProcess, runc_bundle: MakeBundle) -> None:
    containers = [runc_bundle("sh", "-c", TALKS) for _ in range(10)]
    agent.settings = settings(containers[0].state_dir)
    for number, container in enumerate(containers):
        (container.rootfs / "var/log/app.log.1").write_text(f"of {number}\n" * 50_000)
        run(container)
    agent.start()
    async with agent.async_client(timeout=100) as client:
        assert len((await client.get("/zones")).json()) == 10
        answers = await asyncio.gather(*(client.post(f"/zones/{container.id}/stop") for container in containers))
    for number, (container, answer) in enumerate(zip(containers, answers, strict=True)):
        assert answer.status_code == 200, answer.text
        assert answer.json()["gaps"] == 0, answer.text
        assert container.state()["status"] == "stopped"
        contents = agent.contents(container.id, bundle_of(answer.json()))
        assert lines(contents[APP_LOG]) == LOGS
        assert contents["logs/zone/var/log/app.log.1"] == f"of {number}\n".encode() * 50_000
        assert "ptree" in contents


@pytest.mark.slow
def test_stop_with_removal(agent: AgentProcess, container: RuncBundle) -> None:
    (container.rootfs / "var/log/app.log.1").write_bytes(b"rotated\n" * 1000)
    pid = run(container)
    agent.start()
    told = agent.stop_zone(container.id, remove="true")
    assert (told["state"], told["gaps"]) == ("stopped", 0)
    assert json.loads(container.runc("list", "-f", "json").stdout) is None
    assert agent.get("/zones?all=true").json() == []
    contents = agent.contents(container.id, bundle_of(told))
    assert lines(contents[APP_LOG]) == LOGS
    assert contents["logs/zone/var/log/app.log.1"] == b"rotated\n" * 1000
    assert f"pargs.{pid}" in contents
    # Its bundle is listed though the zone is gone; the zone itself is not known any more.
    assert [bundle["state"] for bundle in agent.bundles(container.id)] == ["sealed"]
    gone = agent.get(f"/zones/{container.id}")
    assert gone.status_code == 404, gone.text
    assert agent.post(f"/zones/{container.id}/stop").status_code == 404


@pytest.mark.slow
def test_create_then_stop_then_start_again(agent: AgentProcess, container: RuncBundle) -> None:
    pid = run(container)
    agent.start()
    created = agent.post(f"/zones/bundles/{container.id}")
    assert created.status_code == 201, created.text
    contents = agent.contents(container.id, created.json()["id"]["bundle_id"])
    assert lines(contents[APP_LOG]) == ["first words"]
    assert f"pargs.{pid}" in contents
    assert agent.status(container.id, created.json()["id"]["bundle_id"])["gaps"] == []
    assert container.state()["status"] == "running"
    assert agent.post(f"/zones/{container.id}/start").status_code == 409

    assert agent.stop_zone(container.id)["gaps"] == 0
    started = agent.post(f"/zones/{container.id}/start")
    assert started.status_code == 200, started.text
    assert started.json()["state"] == "running"
    assert container.state()["pid"] == started.json()["pid"] != pid
    log = container.rootfs / "var/log/app.log"
    wait.until(lambda: log.read_text().count("first words") == 2, what="it writes again")
    told = agent.stop_zone(container.id, remove="true")
    assert told["gaps"] == 0, told
    assert lines(agent.contents(container.id, bundle_of(told))[APP_LOG]) == LOGS * 2
    assert len(agent.bundles(container.id)) == 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize("living", [False, True])
def test_commands_inside_that_misbehave(agent: AgentProcess, runc_bundle: MakeBundle, living: bool) -> None:
    mark = f"{os.getpid()}3{int(living)}"
    container = runc_bundle("sh", "-c", TALKS)
    commands = [[program.name] for program in write_scripts(mark, container.rootfs / "bin")]
    agent.settings = f'[hold]\nbudget = "{BUDGET}s"\n' + settings(
        container.state_dir, f"commands = {json.dumps(commands)}"
    )
    run(container)
    agent.start()
    if living:
        created = agent.post(f"/zones/bundles/{container.id}")
        assert created.status_code == 201, created.text
        bundle_id = created.json()["id"]["bundle_id"]
        hold = agent.status(container.id, bundle_id)["hold_seconds"]
    else:
        told = agent.stop_zone(container.id)
        bundle_id, hold = bundle_of(told), told["hold_seconds"]
    # The budget, and what killing, staging and the record take on a loaded machine.
    assert hold < BUDGET + 1.5
    wait.until(lambda: not sleepers(mark), what="no process of a command is left")
    contents = agent.contents(container.id, bundle_id)
    check_misbehaved(contents, pipe_holds=True)
    assert lines(contents[APP_LOG]) == (["first words"] if living else LOGS)
    if living:
        assert container.state()["status"] == "running"
        assert "yes" not in container.exec("ps")


@pytest.mark.slow
def test_a_command_sees_the_inside(agent: AgentProcess, container: RuncBundle) -> None:
    agent.settings = settings(
        container.state_dir, 'commands = [["hostname"], ["ps"], ["false"], ["no-such-program-here"]]'
    )
    run(container)
    agent.start()
    told = agent.stop_zone(container.id)
    contents = agent.contents(container.id, bundle_of(told))
    assert contents["hostname"] == f'Command: ["hostname"]\n{container.id}\n'.encode()
    assert b"first words" in contents["ps"]
    report = json.loads(contents["report.json"])
    steps = {step["name"]: step["outcome"] for step in report["steps"]}
    assert (steps["hostname"], steps["false"], steps["no-such-program-here"]) == ("success", "fail", "fail")
    assert report["gaps"] == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ['"process", "oci"', '"oci", "process"'])
def test_without_runc_process_zones_go_on_working(agent: AgentProcess, tmp_path: Path, order: str) -> None:
    agent.settings = settings(tmp_path / "runc", command="no-such-runc", enabled=order)
    root = agent.add_zone("web")
    (root / "logs/app.log").write_text("kept\n")
    agent.start().start_zones()
    assert agent.get("/zones").json() == ["web"]
    told = agent.log.read_text()
    assert "no-such-runc" in told and "Traceback" not in told
    for answer in (
        agent.get("/zones/a-container"),
        agent.post("/zones/a-container/stop"),
        agent.post("/zones/bundles/a-container"),
    ):
        assert answer.status_code == 503, answer.text
        message = answer.json()["message"]
        assert "no-such-runc" in message and "[runtimes] enabled" in message and "\n" not in message
    stopped = agent.stop_zone("web")
    assert stopped["gaps"] == 0
    assert agent.contents("web", bundle_of(stopped))["logs/zone/logs/app.log"] == b"kept\n"


@pytest.mark.slow
def test_runc_alone_and_missing_is_told(agent: AgentProcess, tmp_path: Path) -> None:
    agent.settings = settings(tmp_path / "runc", command="no-such-runc")
    agent.start()
    answer = agent.get("/zones")
    assert answer.status_code == 503, answer.text
    assert "no-such-runc" in answer.json()["message"]
