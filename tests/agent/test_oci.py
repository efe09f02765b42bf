"""Containers that runc runs, as zones of a real agent."""

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from support import wait
from support.agents import AgentProcess
from support.containers import RuncBundle
from support.misbehaving import BUDGET, check_misbehaved, sleepers, write_scripts

MakeBundle = Callable[..., RuncBundle]

# Relative paths would do as well: a container's first process starts in its root.
TALKS = (
    "trap 'echo last words >> /var/log/app.log; exit 0' TERM; "
    "echo first words >> /var/log/app.log; while :; do sleep 0.05; done"
)
STUBBORN = "trap '' TERM; echo first words >> /var/log/app.log; while :; do sleep 0.05; done"
APP_LOG = "logs/zone/var/log/app.log"
LOGS = ["first words", "last words"]
SECRET = b"the host's secret, not the container's"


def settings(runc_root: Path, more: str = "", *, command: str = "runc", enabled: str = '"oci"') -> str:
    return (
        f"[runtimes]\nenabled = [{enabled}]\n"
        f'[runtimes.oci]\ncommand = "{command}"\nroot = "{runc_root}"\n'
        f'[evidence]\nstacks = "kernel"\n{more}\n'
    )


@pytest.fixture
def container(runc_bundle: MakeBundle, agent: AgentProcess) -> RuncBundle:
    """One that talks, configured in an agent that has not started; it runs when `run` is called."""
    bundle = runc_bundle("sh", "-c", TALKS)
    agent.settings = settings(bundle.state_dir)
    return bundle


def run(container: RuncBundle, log: str = "var/log/app.log") -> int:
    """Run it until it writes; the PID of its first process on the host."""
    pid = container.run()
    wait.until(lambda: "first words" in container.exec("cat", f"/{log}", check=False), what="the container writes")
    return pid


def lines(data: bytes) -> list[str]:
    return data.decode().splitlines()


def bundle_of(told: dict[str, object]) -> str:
    bundle = told["bundle"]
    assert isinstance(bundle, dict)
    return str(bundle["id"]["bundle_id"])


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
def test_logs_in_a_bind_mount(agent: AgentProcess, runc_bundle: MakeBundle, tmp_path: Path) -> None:
    source = tmp_path / "kept logs"
    source.mkdir()
    (source / "app.log.1").write_bytes(b"rotated\n" * 1000)
    mount = {"destination": "/var/log", "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
    container = runc_bundle("sh", "-c", TALKS, mounts=[mount])
    (container.rootfs / "var/log/hidden.log").write_bytes(b"the mount hides it")
    agent.settings = settings(container.state_dir)
    run(container)
    agent.start()
    told = agent.stop_zone(container.id, remove="true")
    assert told["gaps"] == 0, told
    contents = agent.contents(container.id, bundle_of(told))
    assert lines(contents[APP_LOG]) == LOGS
    assert contents["logs/zone/var/log/app.log.1"] == b"rotated\n" * 1000
    assert "logs/zone/var/log/hidden.log" not in contents


@pytest.mark.slow
@pytest.mark.parametrize("remove", [False, True])
def test_logs_in_a_tmpfs_that_goes_with_the_container(
    agent: AgentProcess, runc_bundle: MakeBundle, remove: bool
) -> None:
    mount = {"destination": "/var/log", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "size=16m"]}
    script = f"seq 100000 > /var/log/app.log.1; {TALKS}"
    container = runc_bundle("sh", "-c", script, mounts=[mount])
    agent.settings = settings(container.state_dir)
    run(container)
    agent.start()
    told = agent.stop_zone(container.id, remove=remove)
    assert told["gaps"] == 0, told
    assert list((container.rootfs / "var/log").iterdir()) == []
    contents = agent.contents(container.id, bundle_of(told))
    # The descriptor outlives the container's mount: last words are there too.
    assert lines(contents[APP_LOG]) == LOGS
    assert lines(contents["logs/zone/var/log/app.log.1"]) == [str(number) for number in range(1, 100_001)]


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


@pytest.mark.slow
def test_links_out_of_the_container_are_not_followed(
    agent: AgentProcess, container: RuncBundle, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.log").write_bytes(SECRET)
    # Absolute links mean the container's root to the container, and the host's to whoever follows them here.
    logs = container.rootfs / "var/log"
    (logs / "final.log").symlink_to(outside / "secret.log")
    (logs / "absolute").symlink_to(outside)
    (logs / "relative").symlink_to(os.path.relpath(outside, logs))
    (logs / "proc").symlink_to("/proc/self")
    (logs / "loop").symlink_to(".")
    os.mkfifo(logs / "fifo.log")
    os.mknod(logs / "device.log", 0o600 | 0o020000, os.makedev(1, 5))
    run(container)
    agent.start()
    told = agent.stop_zone(container.id)
    contents = agent.contents(container.id, bundle_of(told))
    assert not [name for name, data in contents.items() if SECRET in data]
    assert [name for name in contents if name.startswith("logs/")] == [APP_LOG]
    assert lines(contents[APP_LOG]) == LOGS


@pytest.mark.slow
def test_a_log_directory_that_is_a_link_out_of_the_container(
    agent: AgentProcess, runc_bundle: MakeBundle, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "log").mkdir(parents=True)
    (outside / "log/secret.log").write_bytes(SECRET)
    container = runc_bundle("sleep", "1000")
    agent.settings = settings(container.state_dir)
    subprocess.run(["rm", "-r", container.rootfs / "var"], check=True)
    (container.rootfs / "var").symlink_to(outside)
    container.run()
    agent.start()
    told = agent.stop_zone(container.id, grace="0s")
    contents = agent.contents(container.id, bundle_of(told))
    assert [name for name in contents if name.startswith("logs/")] == []
    assert not [name for name, data in contents.items() if SECRET in data]
