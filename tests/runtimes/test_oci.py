"""What is particular to containers; what they have in common with other zones is in test_contract.py."""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.containers import RuncBundle
from support.wait import until, until_async
from support.zones import GRACEFUL, STUBBORN, Containers, living, running, with_processes
from zonebundle.errors import ConflictError, RuntimeFailedError, RuntimeUnavailableError
from zonebundle.host import proc
from zonebundle.host.process import run
from zonebundle.model.zone import LogTree, ProcessRef, Zone
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.oci import OciRuntime
from zonebundle.runtimes.waiting import ended


def edit(bundle: RuncBundle, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle.path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def without_pid_namespace(config: dict[str, Any]) -> None:
    config["linux"]["namespaces"] = [space for space in config["linux"]["namespaces"] if space["type"] != "pid"]


def quietly(bundle: RuncBundle, *arguments: str) -> None:
    """Call runc where a process that goes on would hold the pipes which it was called with."""
    nothing = subprocess.DEVNULL
    command = ["runc", "--root", str(bundle.state_dir), *arguments]
    subprocess.run(command, stdin=nothing, stdout=nothing, stderr=nothing, check=True)


def executed(bundle: RuncBundle, *command: str) -> ProcessRef:
    """A process executed into a running container that goes on, as `kubectl exec` makes one."""
    pid_file = bundle.path / "exec.pid"
    quietly(bundle, "exec", "--detach", "--pid-file", str(pid_file), bundle.id, *command)
    process = proc.identify(int(pid_file.read_text()))
    assert process is not None
    return process


async def reap(orphan: ProcessRef) -> None:
    await ended(orphan)
    os.waitpid(orphan.pid, 0)  # noqa: ASYNC222 - it has ended


async def state(containers: Containers, name: str) -> str:
    return (await containers.find(name)).state


@pytest.mark.slow
async def test_its_commands_run_inside(containers: Containers) -> None:
    zone, _ = await with_processes(containers, containers.run(GRACEFUL), 5)
    done = await run([*zone.command_prefix, "hostname"], timeout=10, directory=zone.directory)
    assert done.output.decode().strip() == zone.name
    done = await run([*zone.command_prefix, "echo", "--", "-x"], timeout=10)
    assert done.output == b"-- -x\n"


@pytest.mark.slow
async def test_a_created_container_is_stopped_and_can_be_started(containers: Containers) -> None:
    bundle = containers.bundle("sleep", "1000")
    quietly(bundle, "create", "--bundle", str(bundle.path), bundle.id)
    zone = await containers.find(bundle.id)
    assert (zone.state, zone.membership.roots) == ("stopped", ())
    await containers.runtime.stop(zone, Grace(0))
    assert bundle.state()["status"] == "created"
    started = await containers.runtime.start(bundle.id)
    assert started.state == "running"
    with pytest.raises(ConflictError):
        await containers.runtime.remove(started)


@pytest.mark.slow
async def test_a_created_container_is_removed_with_its_waiting_process(containers: Containers) -> None:
    bundle = containers.bundle("sleep", "1000")
    quietly(bundle, "create", "--bundle", str(bundle.path), bundle.id)
    waiting = proc.identify(bundle.state()["pid"])
    assert waiting is not None
    await containers.runtime.remove(await containers.find(bundle.id))
    assert not proc.is_alive(waiting)
    assert await containers.runtime.find(bundle.id) is None


@pytest.mark.slow
async def test_one_started_again_has_a_supervisor_that_keeps_its_output_and_reaps_it(containers: Containers) -> None:
    zone, members = await running(containers, containers.make(GRACEFUL))
    init = zone.membership.roots[0]
    fields = proc.read_stat(init.pid)
    assert fields is not None
    assert f"supervise.py\0{zone.name}" in Path(f"/proc/{fields[proc.PARENT]}/cmdline").read_text()
    await containers.runtime.stop(zone, Grace(30))
    assert living(members) == []
    # Reaped, and its supervisor too.
    assert proc.read_stat(init.pid) is None
    assert proc.read_stat(int(fields[proc.PARENT])) is None


@pytest.mark.slow
async def test_one_that_cannot_be_started_again_is_told_with_what_to_do(containers: Containers) -> None:
    name = containers.make(GRACEFUL)
    edit(containers.bundles[name], lambda config: config["process"].update(args=["/no/such/program"]))
    with pytest.raises(RuntimeFailedError, match=rf"zone '{name}': .*runc .*no/such/program.* this command yourself"):
        await containers.runtime.start(name)
    assert await containers.runtime.find(name) is None


@pytest.mark.slow
async def test_a_paused_container_runs_and_is_stopped_gracefully(containers: Containers) -> None:
    zone, members = await with_processes(containers, containers.run(GRACEFUL), 5)
    containers.bundles[zone.name].runc("pause", zone.name)
    assert await state(containers, zone.name) == "running"
    async with asyncio.timeout(30):
        await containers.runtime.stop(zone, Grace(3600))
    assert living(members) == []
    assert await state(containers, zone.name) == "stopped"


@pytest.mark.slow
async def test_what_is_executed_into_it_belongs_to_it(containers: Containers) -> None:
    name = containers.run(STUBBORN)
    zone, _ = await with_processes(containers, name, 6)
    inside = executed(containers.bundles[name], "sleep", "1000")
    assert zone.membership.cgroup is not None
    assert inside in proc.members(zone.membership)
    # It is this test's orphan, and its container ends only when all that died in its PID namespace has been reaped.
    reaping = asyncio.create_task(reap(inside))
    await containers.runtime.stop(zone, Grace(0.1))
    await reaping
    assert living([inside]) == []


@pytest.mark.slow
async def test_without_a_pid_namespace_everything_in_the_cgroup_is_ended(containers: Containers) -> None:
    # Here the death of the first process ends nobody else.
    bundle = containers.bundle("sh", "-c", "setsid sleep 1000 & setsid sleep 1000 & exec sleep 1000")
    edit(bundle, without_pid_namespace)
    bundle.run()
    zone, members = await with_processes(containers, bundle.id, 3)
    members.append(executed(bundle, "sleep", "1000"))
    await containers.runtime.stop(zone, Grace(0))
    assert living(members) == []
    assert await state(containers, bundle.id) == "stopped"


@pytest.mark.slow
async def test_what_outlives_its_first_process_is_ended_by_a_stop_of_that_life(containers: Containers) -> None:
    bundle = containers.bundle("sh", "-c", "setsid sleep 1000 & exec sleep 1000")
    edit(bundle, without_pid_namespace)
    bundle.run()
    zone, members = await with_processes(containers, bundle.id, 2)
    proc.send_signal(zone.membership.roots[0], signal.SIGKILL)
    await until_async(lambda: living(members) != members)
    await containers.runtime.stop(zone, Grace(0))
    assert living(members) == []


@pytest.mark.slow
async def test_a_cgroup_that_others_share_is_not_used(containers: Containers) -> None:
    shared = f"/zonebundle-test-shared-{os.getpid()}"
    names = []
    for _ in range(2):
        bundle = containers.bundle("sleep", "1000")
        edit(bundle, without_pid_namespace)
        edit(bundle, lambda config: config["linux"].update(cgroupsPath=shared))
        bundle.run()
        names.append(bundle.id)
    (one, _), (_, others) = [await with_processes(containers, name, 1) for name in names]
    assert one.membership.cgroup is None
    await containers.runtime.stop(one, Grace(0))
    assert living(others) == others


async def test_a_life_after_is_told_from_the_one_before(containers: Containers) -> None:
    name = containers.run("sleep 1000")
    before, _ = await with_processes(containers, name, 1)
    bundle = containers.bundles[name]
    bundle.delete()
    bundle.run()
    after, members = await with_processes(containers, name, 1)
    assert before.incarnation != after.incarnation
    await containers.runtime.stop(before, Grace(0))
    assert living(members) == members
    bundle.kill()
    await until_async(lambda: living(members) == [])
    # It is not this one that somebody wanted to have removed.
    await containers.runtime.remove(before)
    assert await state(containers, name) == "stopped"
    await containers.runtime.remove(after)
    assert await containers.runtime.find(name) is None


@pytest.mark.slow
async def test_a_container_that_was_deleted_by_force_is_no_error(containers: Containers) -> None:
    zone, members = await with_processes(containers, containers.run(GRACEFUL), 5)
    containers.bundles[zone.name].delete()
    await containers.runtime.stop(zone, Grace(3600))
    await containers.runtime.remove(zone)
    assert living(members) == []


@pytest.mark.slow
async def test_logs_are_in_the_root_and_in_mounts_over_it(containers: Containers, tmp_path: Path) -> None:
    source = tmp_path / "logs of nginx"
    source.mkdir()
    mounts = [
        {"destination": "/var/log/nginx", "type": "bind", "source": str(source), "options": ["rbind", "rw"]},
        {"destination": "/var/log/fast", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
    ]
    script = "for d in '' nginx/ fast/; do echo words > /var/log/${d}a.log; done; touch /var/done; exec sleep 1000"
    name = containers.run(script, mounts=mounts)
    bundle = containers.bundles[name]
    until(lambda: (bundle.rootfs / "var/done").exists())
    zone = await containers.find(name)
    init = zone.membership.roots[0]
    patterns = ("var/log/**",)
    assert zone.logs == (
        LogTree("zone", str(bundle.rootfs), patterns),
        LogTree("zone", str(source), patterns, prefix="var/log/nginx"),
        LogTree("zone", "var/log/fast", patterns, prefix="var/log/fast", via=init),
    )
    assert (bundle.rootfs / "var/log/a.log").read_text() == "words\n"
    assert (source / "a.log").read_text() == "words\n"
    assert Path(f"/proc/{init.pid}/root/{zone.logs[2].path}/a.log").read_text() == "words\n"


@pytest.mark.slow
async def test_a_damaged_configuration_does_not_prevent_a_stop(containers: Containers) -> None:
    name = containers.run(STUBBORN)
    bundle = containers.bundles[name]
    (bundle.path / "config.json").write_text("{")
    zone, members = await with_processes(containers, name, 6)
    assert zone.logs == (LogTree("zone", str(bundle.rootfs), ("var/log/**",)),)
    await containers.runtime.stop(zone, Grace(0))
    assert living(members) == []


@pytest.mark.parametrize("name", ["--help", "-h", "..", "a b"])
async def test_a_name_is_never_an_option(containers: Containers, name: str) -> None:
    assert await containers.runtime.find(name) is None


async def test_a_tool_that_is_missing_is_named(tmp_path: Path) -> None:
    runtime = OciRuntime("no-such-runc", state_dir=tmp_path)
    for call in (runtime.list(), runtime.find("web"), runtime.start("web")):
        with pytest.raises(RuntimeUnavailableError, match=r"'oci' is not available: .* no-such-runc: .*install"):
            await call
    await runtime.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo it is broken >&2; exit 3", "list -f json failed: exit status 3: it is broken"),
        ("echo '{'", "list -f json printed no JSON"),
        ("echo '{}'", "list -f json printed a dict, not a list"),
        ("echo '[1]'", "a container's state is not understood"),
        ('echo \'[{"id": "a"}]\'', "a container's state is not understood"),
    ],
)
async def test_a_tool_that_fails_is_told_with_its_words(tmp_path: Path, script: str, message: str) -> None:
    tool = tmp_path / "runc"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    runtime = OciRuntime(str(tool), state_dir=tmp_path)
    with pytest.raises(RuntimeFailedError, match=message):
        await runtime.list()
    await runtime.close()


async def test_containers_that_cannot_be_zones_are_passed_over(tmp_path: Path) -> None:
    tool = tmp_path / "runc"
    entry = {"status": "stopped", "pid": 0, "bundle": str(tmp_path), "rootfs": "/r", "created": "then"}
    listed = json.dumps([entry | {"id": "a+b"}, entry | {"id": "web"}])
    tool.write_text(f"#!/bin/sh\necho '{listed}'\n")
    tool.chmod(0o755)
    runtime = OciRuntime(str(tool), state_dir=tmp_path)
    zones: list[Zone] = await runtime.list()
    assert [zone.name for zone in zones] == ["web"]
    await runtime.close()
