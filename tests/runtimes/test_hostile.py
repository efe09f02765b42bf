"""Zones that do not want to be found, to end, or to be supervised."""

import asyncio
import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from support.users import NOBODY
from support.wait import until_async
from support.zones import Processes, living, running, with_processes
from zonebundle.errors import RuntimeFailedError
from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef, Zone
from zonebundle.runtimes import adopt
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.tree import SupervisedTree

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")

# A chain in which each process forks the next in a new session and ends: there is only ever one, and soon another.
RABBIT = """
import os
while True:
    if os.fork():
        os._exit(0)
    os.setsid()
"""

# Every process forks as fast as it can, ignoring what it may; bounded by the user's number of processes.
FORK_BOMB = f"""
import os, resource, signal
for number in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:
    signal.signal(number, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_NPROC, (200, 200))
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
while True:
    try:
        os.fork()
    except OSError:
        pass
"""

# The first thread ends and a second one lives on: /proc shows the process as a zombie.
HEADLESS = """
import ctypes, threading, time
threading.Thread(target=lambda: time.sleep(1000)).start()
print("ready", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""

# A daemon as of old: forks, begins a session, forks again; its ancestors are gone.
DAEMON = "(setsid sh -c 'trap \"\" TERM HUP; sleep 1000 & exec sleep 1000' > /dev/null 2>&1 &)"


def supervisor_of(processes: Processes, name: str) -> ProcessRef:
    life = adopt.read_life(processes.directory(name))
    assert life is not None
    return life.supervisor


def stat(process: ProcessRef) -> list[str]:
    fields = proc.read_stat(process.pid)
    assert fields is not None
    return fields


async def stopped_wholly(processes: Processes, zone: Zone, members: list[ProcessRef], seconds: float = 0.05) -> None:
    """Stop the zone; nothing of it is left, not even its supervisor."""
    async with asyncio.timeout(60):
        await processes.runtime.stop(zone, Grace(seconds))
    assert living(members) == []
    assert (await processes.find(zone.name)).state == "stopped"
    assert not (processes.directory(zone.name) / "run.json").exists()


async def test_a_zone_runs_until_the_last_of_it_has_ended(processes: Processes) -> None:
    name = processes.make(f"{DAEMON}; sleep 0.1; exit 4")
    await processes.runtime.start(name)
    life = (await processes.find(name)).incarnation
    await until_async(lambda: processes.runtime.last_exit(name))
    zone, daemons = await with_processes(processes, name, 2)
    assert zone.incarnation == life
    assert life is not None
    assert life.init not in daemons
    last = processes.runtime.last_exit(name)
    assert last is not None
    assert last.status == 4
    supervisor = supervisor_of(processes, name)
    for daemon in daemons:
        proc.send_signal(daemon, signal.SIGKILL)
    await until_async(lambda: not proc.is_alive(supervisor))
    assert (await processes.find(name)).state == "stopped"


async def test_daemons_are_stopped_though_their_ancestors_are_gone(processes: Processes) -> None:
    name = processes.make(f"{DAEMON}; {DAEMON}; exit 0")
    zone, members = await running(processes, name, 4)
    await stopped_wholly(processes, zone, members)


async def test_one_that_changed_group_and_session_is_stopped(processes: Processes) -> None:
    zone, members = await running(processes, processes.make("setsid sleep 1000 & setsid sleep 1000 & wait"), 3)
    await until_async(lambda: len({fields[proc.SESSION] for fields in map(stat, members)}) == 3)
    await stopped_wholly(processes, zone, members)


async def test_a_chain_of_forks_is_stopped(processes: Processes) -> None:
    processes.add("rabbit", sys.executable, "-c", RABBIT)
    zone = await processes.runtime.start("rabbit")
    assert zone.incarnation is not None
    init = zone.incarnation.init
    assert init is not None
    await until_async(lambda: not proc.is_alive(init))
    assert (await processes.find("rabbit")).state == "running"
    await stopped_wholly(processes, zone, [])


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("grace", [0, 0.3])
async def test_a_fork_bomb_is_stopped(processes: Processes, grace: float) -> None:
    processes.root.chmod(0o755)
    processes.add("bomb", sys.executable, "-c", FORK_BOMB)
    zone, members = await running(processes, "bomb", 50)
    await stopped_wholly(processes, zone, members, grace)


async def test_a_process_whose_first_thread_has_ended_lives(processes: Processes) -> None:
    processes.add("headless", sys.executable, "-c", HEADLESS)
    await processes.runtime.start("headless")
    await until_async(lambda: "ready" in processes.console("headless"))
    (pid,) = proc.children(supervisor_of(processes, "headless").pid)
    await until_async(lambda: stat(ProcessRef(pid, 0))[proc.STATE] == "Z")
    zone, members = await with_processes(processes, "headless", 1)
    assert zone.state == "running"
    await stopped_wholly(processes, zone, members)


async def test_children_of_every_thread_are_found(processes: Processes) -> None:
    code = (
        "import subprocess, threading, time\n"
        "def run():\n  subprocess.Popen(['setsid', 'sleep', '1000']); time.sleep(1000)\n"
        "for n in range(3): threading.Thread(target=run).start()\n"
    )
    processes.add("threads", sys.executable, "-c", code)
    zone, members = await running(processes, "threads", 4)
    await stopped_wholly(processes, zone, members)


async def test_a_term_that_a_child_lost_between_fork_and_exec_is_sent_again(processes: Processes) -> None:
    # As a shell with a trap: the child has the handler for a while, and then becomes a program without one.
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: open('caught', 'w').close())\n"
        "open('ready', 'w').close()\n"
        "while not os.path.exists('caught'): time.sleep(0.001)\n"
        "os.execvp('sleep', ['sleep', '1000'])\n"
    )
    processes.add("web", sys.executable, "-c", code)
    zone, members = await running(processes, "web", 1)
    await until_async(lambda: (processes.root / "ready").exists())
    await stopped_wholly(processes, zone, members, 3600)
    assert (processes.root / "caught").exists()


async def test_what_a_handler_starts_to_end_well_is_not_asked_to_end(processes: Processes) -> None:
    # Ready when all are there: a child that is forked after the first look may as well be the handler's.
    name = processes.make("trap 'sleep 0.05 && echo saved; exit 0' TERM; sleep 1000 & touch ready; wait")
    for times in range(1, 11):
        zone, members = await running(processes, name, 2)
        await until_async(lambda: (processes.root / "ready").exists())
        await stopped_wholly(processes, zone, members, 3600)
        assert processes.console(name).count("saved") == times
        (processes.root / "ready").unlink()


@pytest.mark.parametrize("short", [1, 2])
async def test_what_was_forked_as_the_signal_came_is_asked_too(
    processes: Processes, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    # The first looks find one process less than there are: it was not there yet, or its parent ended meanwhile.
    zone, members = await running(processes, processes.make("sleep 1000 & sleep 1000 & wait"), 3)
    scan, looks = SupervisedTree.scan, 0

    async def short_of_one(tree: SupervisedTree) -> list[ProcessRef]:
        nonlocal looks
        looks += 1
        found = await scan(tree)
        return found[:-1] if looks <= short else found

    monkeypatch.setattr(SupervisedTree, "scan", short_of_one)
    await stopped_wholly(processes, zone, members, 3600)


async def test_a_zone_that_stops_itself_ends_at_term(processes: Processes) -> None:
    zone, members = await running(processes, processes.make("sleep 1000 & kill -STOP $! $$"), 2)
    await until_async(lambda: {fields[proc.STATE] for fields in map(stat, members)} == {"T"})
    await stopped_wholly(processes, zone, members, 3600)


async def test_a_supervisor_takes_no_notice_of_signals_but_kill(processes: Processes) -> None:
    zone, members = await running(processes, processes.add("sleeper", "sleep", "1000"), 1)
    supervisor = supervisor_of(processes, zone.name)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGPIPE, signal.SIGALRM):
        proc.send_signal(supervisor, number)
    await stopped_wholly(processes, zone, members)


@pytest.mark.slow
async def test_a_supervisor_that_was_stopped_does_not_hold_up_the_stop(processes: Processes) -> None:
    zone, members = await running(processes, processes.add("sleeper", "sleep", "1000"), 1)
    supervisor = supervisor_of(processes, zone.name)
    proc.send_signal(supervisor, signal.SIGSTOP)
    await stopped_wholly(processes, zone, members)
    assert not proc.is_alive(supervisor)


async def test_a_zone_whose_supervisor_was_killed_is_adopted_and_stopped(processes: Processes) -> None:
    zone, members = await running(processes, processes.make(f"{DAEMON}; sleep 1000 & sleep 1000"), 5)
    proc.send_signal(supervisor_of(processes, zone.name), signal.SIGKILL)
    await until_async(lambda: not proc.is_alive(supervisor_of(processes, zone.name)))
    found = await processes.find(zone.name)
    assert (found.state, found.incarnation) == ("running", zone.incarnation)
    assert found.membership.session == zone.incarnation.init.pid  # type: ignore[union-attr]
    assert set(proc.members(found.membership)) == set(members)
    await stopped_wholly(processes, found, members)


async def test_daemons_are_found_though_supervisor_and_init_are_gone(processes: Processes) -> None:
    zone, members = await running(processes, processes.make(f"{DAEMON}; sleep 1000"), 3)
    life = adopt.read_life(processes.directory(zone.name))
    assert life is not None
    proc.send_signal(life.supervisor, signal.SIGKILL)
    proc.send_signal(life.init, signal.SIGKILL)
    await until_async(lambda: living([life.supervisor, life.init]) == [])
    found = await processes.find(zone.name)
    assert (found.state, found.incarnation) == ("running", zone.incarnation)
    await stopped_wholly(processes, found, members)


@pytest.mark.slow
async def test_a_supervisor_killed_during_the_grace_does_not_let_anybody_go(processes: Processes) -> None:
    name = processes.make(f"{DAEMON}; trap '' TERM; while :; do sleep 1000; done")
    zone, members = await running(processes, name, 4)
    stop = asyncio.create_task(stopped_wholly(processes, zone, members, 1))
    await asyncio.sleep(0.1)
    proc.send_signal(supervisor_of(processes, name), signal.SIGKILL)
    await stop


@needs_root
async def test_a_zone_that_kills_its_supervisor_again_and_again_is_stopped(processes: Processes) -> None:
    zone, members = await running(processes, processes.make("kill -9 $PPID; sleep 1000 & sleep 1000"), 3)
    await stopped_wholly(processes, zone, members)


async def test_when_the_last_of_an_orphaned_zone_has_ended_it_is_stopped_and_can_start(processes: Processes) -> None:
    zone, members = await running(processes, processes.add("sleeper", "sleep", "1000"), 1)
    everybody = [supervisor_of(processes, zone.name), *members]
    for process in everybody:
        proc.send_signal(process, signal.SIGKILL)
    await until_async(lambda: living(everybody) == [])
    assert (await processes.find(zone.name)).state == "stopped"
    assert not (processes.directory(zone.name) / "run.json").exists()
    assert (await processes.runtime.start(zone.name)).state == "running"


async def test_a_run_file_that_cannot_be_removed_does_not_make_a_zone_run(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone, members = await running(processes, processes.add("sleeper", "sleep", "1000"), 1)
    everybody = [supervisor_of(processes, zone.name), *members]
    for process in everybody:
        proc.send_signal(process, signal.SIGKILL)
    await until_async(lambda: living(everybody) == [])

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert (await processes.find(zone.name)).state == "stopped"
        await processes.runtime.stop(zone, Grace(0))


async def test_what_cannot_be_killed_is_named(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process in an uninterruptible sleep cannot be made here: its signals are lost instead.
    processes.add("sleeper", "sleep", "1000")
    processes.reopen(patience=0.2)
    zone, (init,) = await running(processes, "sleeper", 1)
    with monkeypatch.context() as patch:
        patch.setattr(proc, "send_signal", lambda *_: True)
        with pytest.raises(RuntimeFailedError, match=rf"cannot end zone 'sleeper': process {init.pid} \(state S\) is"):
            await processes.runtime.stop(zone, Grace(0))


async def test_a_failed_signal_to_one_does_not_spare_the_others(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone, members = await running(processes, processes.make("sleep 1000 & sleep 1000 & wait"), 3)
    send, refused = proc.send_signal, members[1]

    def refuse(process: ProcessRef, *numbers: signal.Signals) -> bool:
        if process == refused:
            raise PermissionError
        return send(process, *numbers)

    processes.reopen(patience=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(proc, "send_signal", refuse)
        with pytest.raises(RuntimeFailedError, match=f"process {refused.pid} "):
            await processes.runtime.stop(zone, Grace(0))
    assert living(members) == [refused]


async def test_a_zone_of_very_many_orphans_keeps_a_small_description(processes: Processes) -> None:
    script = "n=0; while [ $n -lt 300 ]; do (sleep 1000 &); n=$((n + 1)); done; sleep 1000"
    zone, members = await running(processes, processes.make(script), 301)
    found = await processes.find(zone.name)
    assert len(found.membership.roots) <= 257
    assert set(proc.members(found.membership)) >= set(members)
    await stopped_wholly(processes, found, members, 10)


async def test_the_loop_goes_on_while_a_large_tree_is_ended(processes: Processes) -> None:
    script = "trap '' TERM; n=0; while [ $n -lt 300 ]; do sleep 1000 & n=$((n + 1)); done; wait"
    zone, members = await running(processes, processes.make(script), 301)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await stopped_wholly(processes, zone, members, 0)
    counting.cancel()
    # Four looks at 300 processes and three signals to each take some 20 ms, in slices of about half of one.
    assert turns > 20


async def test_a_directory_full_of_lies_is_no_zone(processes: Processes) -> None:
    name = processes.make("true")
    directory: Path = processes.directory(name)
    directory.mkdir(parents=True)
    for text in ("", "{", "[]", "null", '{"boot_id": 1}', "\0" * 100, "x" * 10000, '{"supervisor": {"pid": "x"}}'):
        (directory / "run.json").write_text(text)
        assert (await processes.find(name)).state == "stopped"
        (directory / "exit.json").write_text(text)
        assert processes.runtime.last_exit(name) is None
