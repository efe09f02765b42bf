"""Adoption: whatever was killed at whatever moment, there is nothing or a zone that is found and stopped."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.wait import until, until_async
from support.zones import GRACEFUL, Processes, living, running, with_processes
from zonebundle.errors import ConflictError
from zonebundle.host import proc
from zonebundle.model.zone import Incarnation, ProcessRef, Zone
from zonebundle.runtimes import adopt
from zonebundle.runtimes.base import Grace

# An agent of its own: it starts a zone, says so, and waits to be killed.
AGENT = """
import asyncio, json, sys
from pathlib import Path
from zonebundle.runtimes.process import ProcessRuntime, ProcessZone
async def main(state, root, name, python, *command):
    runtime = ProcessRuntime({name: ProcessZone(command=command, root=root)}, Path(state), python=python)
    print("starting", flush=True)
    try:
        await runtime.start(name)
    finally:
        Path(root, "answered").touch()
    print("started", flush=True)
    await asyncio.Event().wait()
asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def agent(processes: Processes, name: str, python: str = sys.executable) -> Iterator[subprocess.Popen[str]]:
    """An agent that has begun to start the zone, and is killed at the end."""
    command = [sys.executable, "-c", AGENT, str(processes.state_dir), str(processes.root), name, python]
    process = subprocess.Popen(
        [*command, *processes.zones[name].command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "starting\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def child(*command: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process in a session of its own that belongs to no zone."""
    return subprocess.Popen(command, start_new_session=True, env=environment)


def lie(processes: Processes, name: str, *, supervisor: ProcessRef, init: ProcessRef, boot: str = "") -> Incarnation:
    """Write a run.json that names processes which are not the zone's."""
    directory = processes.directory(name)
    directory.mkdir(parents=True, exist_ok=True)
    data = {
        "boot_id": boot or proc.boot_id(),
        "instance": "0" * 32,
        "supervisor": {"pid": supervisor.pid, "start_time": supervisor.start_time},
        "init": {"pid": init.pid, "start_time": init.start_time},
    }
    (directory / "run.json").write_text(json.dumps(data))
    return Incarnation(str(data["boot_id"]), init, "0" * 32)


async def settled(processes: Processes, name: str) -> Zone:
    """The zone, when nobody is at work on starting it any more."""

    def idle() -> bool:
        life = adopt.read_life(processes.directory(name))
        return supervisors(processes) <= ({life.supervisor.pid} if life else set())

    await until_async(idle)
    return await processes.find(name)


def supervisors(processes: Processes) -> set[int]:
    """The supervisors of these zones, and children of theirs or of an agent that are no zone yet.

    They have the state directory as their working directory; what a killed agent has just forked, still the agent's.
    """
    orphans = set(proc.children(os.getpid()))
    found = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            directory = Path(os.readlink(f"/proc/{pid}/cwd"))
            if directory.is_relative_to(processes.state_dir) or (pid in orphans and directory == Path.cwd()):
                found.add(pid)
    return found


async def test_a_zone_survives_its_agent_and_the_next_one_stops_it(processes: Processes) -> None:
    name = processes.make(GRACEFUL)
    with agent(processes, name) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
    zone, members = await with_processes(processes, name, 5)
    assert zone.incarnation is not None
    await processes.runtime.stop(zone, Grace(30))
    assert living(members) == []
    assert supervisors(processes) == set()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["agent", "supervisor", "both"])
async def test_whoever_is_killed_while_a_zone_starts_leaves_nothing_or_a_zone(
    processes: Processes, victim: str
) -> None:
    name = processes.make(GRACEFUL)
    for step in range(25):
        with agent(processes, name) as process:
            await asyncio.sleep(step * 0.0015)
            if victim != "agent":
                for supervisor in supervisors(processes) - {process.pid}:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(supervisor, signal.SIGKILL)
            if victim == "supervisor":
                # The agent is told that the start failed, or finds the zone running.
                await until_async((processes.root / "answered").exists)
        (processes.root / "answered").unlink(missing_ok=True)
        zone = await settled(processes, name)
        if zone.state == "running":
            # It may have ended since: its console died with the supervisor, and saying a word ends it.
            with contextlib.suppress(ConflictError):
                zone = await processes.runtime.start(name)
        members = proc.members(zone.membership)
        await processes.runtime.stop(zone, Grace(0))
        assert living(members) == []
        assert (await processes.find(name)).state == "stopped"
        assert supervisors(processes) == set()
        # Nothing was left that would be in the way of a start.
        zone = await processes.runtime.start(name)
        await processes.runtime.stop(zone, Grace(0))


async def test_a_supervisor_whose_agent_died_before_it_began_still_makes_a_zone_that_is_found(
    processes: Processes,
) -> None:
    name = processes.make(GRACEFUL)
    gate = processes.root / "gate"
    os.mkfifo(gate)
    python = processes.root / "python"
    python.write_text(f'#!/bin/sh\nread go < {gate}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with agent(processes, name, str(python)) as process:
        await until_async(lambda: supervisors(processes) - {process.pid})
    assert (await processes.find(name)).state == "stopped"
    descriptor = os.open(gate, os.O_RDWR)
    os.write(descriptor, b"go\n")
    zone, members = await with_processes(processes, name, 5)
    os.close(descriptor)
    await processes.runtime.stop(zone, Grace(30))
    assert living(members) == []


async def test_two_agents_cannot_start_one_zone(processes: Processes) -> None:
    name = processes.make(GRACEFUL)
    one = processes.runtime
    processes.reopen()
    other = processes.runtime
    results = await asyncio.gather(one.start(name), other.start(name), return_exceptions=True)
    refused = [result for result in results if isinstance(result, ConflictError)]
    assert len(refused) == 1
    assert f"zone '{name}' runs already" in str(refused[0])
    await with_processes(processes, name, 5)
    assert len(supervisors(processes)) == 1


async def test_a_start_waits_for_a_supervisor_that_is_just_going(processes: Processes) -> None:
    name = processes.make(GRACEFUL)
    directory = processes.directory(name)
    directory.mkdir(parents=True)
    # What such a one still has is the lock; run.json is gone.
    lock = os.open(directory, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    start = asyncio.create_task(processes.runtime.start(name))
    await until_async(lambda: supervisors(processes))
    done, _ = await asyncio.wait({start}, timeout=0.1)
    assert not done
    os.close(lock)
    assert (await start).state == "running"


async def test_pids_of_another_boot_are_nobody(processes: Processes) -> None:
    name = processes.make("true")
    bystander = child("sleep", "1000")
    try:
        reference = proc.identify(bystander.pid)
        assert reference is not None
        life = lie(processes, name, supervisor=reference, init=reference, boot="11111111-2222-3333-4444-555555555555")
        zone = await processes.find(name)
        assert zone.state == "stopped"
        assert not (processes.directory(name) / "run.json").exists()
        await processes.runtime.stop(Zone(name, "process", "running", life), Grace(0))
        assert bystander.poll() is None
        assert (await processes.runtime.start(name)).name == name
    finally:
        bystander.kill()
        bystander.wait()


async def test_a_pid_that_was_given_to_somebody_else_is_not_the_zone(processes: Processes) -> None:
    name = processes.make("true")
    bystander = child("sleep", "1000")
    try:
        reference = proc.identify(bystander.pid)
        assert reference is not None
        recycled = ProcessRef(bystander.pid, reference.start_time - 1)
        life = lie(processes, name, supervisor=recycled, init=recycled)
        await processes.runtime.stop(Zone(name, "process", "running", life), Grace(0))
        assert (await processes.find(name)).state == "stopped"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_a_session_number_that_came_again_is_not_the_zone(processes: Processes) -> None:
    # The zone's init is gone, and a stranger leads a session of the same number, with a process in it.
    name = processes.make("true")
    stranger = child("sh", "-c", "sleep 1000 & sleep 1000")
    try:
        until(lambda: len(proc.in_session(stranger.pid)) == 3)
        leader = proc.identify(stranger.pid)
        assert leader is not None
        gone = ProcessRef(leader.pid, leader.start_time - 1)
        life = lie(processes, name, supervisor=gone, init=gone)
        await processes.runtime.stop(Zone(name, "process", "running", life), Grace(0))
        assert len(proc.in_session(stranger.pid)) == 3
    finally:
        os.killpg(stranger.pid, signal.SIGKILL)
        stranger.wait()


async def test_a_run_file_of_before_is_not_removed_under_a_new_life(processes: Processes) -> None:
    zone, members = await running(processes, processes.make(GRACEFUL))
    directory = processes.directory(zone.name)
    life = adopt.read_life(directory)
    assert life is not None
    adopt._forget(directory, life)
    assert adopt.read_life(directory) == life
    assert living(members) == members


async def test_a_mark_is_found_in_whatever_session() -> None:
    instance = "f" * 32
    marked = child("sleep", "1000", environment={"ZONE_BUNDLE_INSTANCE": instance})
    other = child("sleep", "1000", environment={"ZONE_BUNDLE_INSTANCE": instance + "0"})
    try:
        reference = proc.identify(marked.pid)
        # Until it has executed its program, a child has its parent's environment.
        await until_async(lambda: b"sleep" in Path(f"/proc/{marked.pid}/cmdline").read_bytes())
        assert await adopt.Marked(instance)() == [reference]
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()
