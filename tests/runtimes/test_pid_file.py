import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.users import OrdinaryUser
from support.wait import until, until_async
from support.zones import Processes, living
from zonebundle.errors import RuntimeFailedError, UsageError
from zonebundle.host import proc
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.pid_file import read_pid_file
from zonebundle.runtimes.process import ProcessZone


@pytest.fixture
def daemon() -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a session of three."""
    process = session("(sleep 1000 &); sleep 1000")
    until(lambda: len(proc.in_session(process.pid)) == 3)
    yield process
    end(process)


def session(script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", script], start_new_session=True, stdout=subprocess.PIPE)


def end(leader: subprocess.Popen[bytes]) -> None:
    for member in proc.in_session(leader.pid):
        os.kill(member.pid, 9)
    leader.wait()
    assert leader.stdout is not None
    leader.stdout.close()


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_process_is_told_with_its_start_time(daemon: subprocess.Popen[bytes], tmp_path: Path) -> None:
    path = write(tmp_path / "pid", f"{daemon.pid}\n")
    assert read_pid_file(path) == proc.identify(daemon.pid)


def test_without_file_or_process_there_is_none(tmp_path: Path) -> None:
    assert read_pid_file(str(tmp_path / "pid")) is None
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert read_pid_file(write(tmp_path / "pid", f"{gone.pid}")) is None
    assert read_pid_file(write(tmp_path / "pid", "\n")) is None
    assert read_pid_file(write(tmp_path / "pid", "9" * 60)) is None


@pytest.mark.parametrize("text", ["x", "-1", "12 13", "1" * 65, "0x10", "1\0"])
def test_what_is_no_number_is_not_believed(tmp_path: Path, text: str) -> None:
    with pytest.raises(RuntimeFailedError, match="not believed: it holds something else than one number"):
        read_pid_file(write(tmp_path / "pid", text))


@pytest.mark.parametrize("which", ["first", "agent", "parent"])
def test_processes_that_are_no_daemon_are_not_believed(tmp_path: Path, which: str) -> None:
    pid = {"first": 1, "agent": os.getpid(), "parent": os.getppid()}[which]
    with pytest.raises(RuntimeFailedError, match="not believed: process"):
        read_pid_file(write(tmp_path / "pid", str(pid)))


@pytest.mark.skipif(not Path("/proc/2/stat").exists(), reason="no kernel threads to be seen")
def test_a_kernel_thread_is_not_believed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailedError, match="2 is a thread of the kernel"):
        read_pid_file(write(tmp_path / "pid", "2"))


def test_a_thread_is_not_believed(tmp_path: Path) -> None:
    code = "import threading as t, time; a = t.Thread(target=time.sleep, args=(1000,)); a.start(); print(a.native_id)"
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        thread = int(process.stdout.readline())
        with pytest.raises(RuntimeFailedError, match=f"{thread} is a thread of process {process.pid}"):
            read_pid_file(write(tmp_path / "pid", str(thread)))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_process_that_started_after_the_file_was_written_has_a_recycled_pid(
    daemon: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    path = write(tmp_path / "pid", str(daemon.pid))
    os.utime(path, (time.time() - 3600,) * 2)
    assert read_pid_file(path) is None


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_plain_file_is_not_believed(daemon: subprocess.Popen[bytes], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pid"
    if kind == "link":
        path.symlink_to(write(tmp_path / "real", str(daemon.pid)))
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(RuntimeFailedError, match=f"the PID file {path} (is not believed|cannot be read)"):
        read_pid_file(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to write files of others")
def test_a_user_cannot_name_the_process_of_another(
    daemon: subprocess.Popen[bytes], ordinary_user: OrdinaryUser, tmp_path: Path
) -> None:
    path = write(tmp_path / "pid", str(daemon.pid))
    os.chown(path, ordinary_user.uid, ordinary_user.gid)
    with pytest.raises(RuntimeFailedError, match=f"owned by user {ordinary_user.uid}, but process .* runs as user 0"):
        read_pid_file(path)
    own = subprocess.Popen(["sleep", "1000"], **ordinary_user.popen_arguments)
    try:
        Path(path).write_text(str(own.pid))
        assert read_pid_file(path) == proc.identify(own.pid)
    finally:
        own.kill()
        own.wait()


async def test_a_zone_by_its_pid_file_is_found_and_stopped(
    processes: Processes, daemon: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    path = write(tmp_path / "pid", str(daemon.pid))
    processes.put("db", ProcessZone(pid_file=path, root="/srv/db", logs=("*.log",)))
    zone = await processes.find("db")
    assert zone.state == "running"
    assert zone.incarnation is not None
    assert zone.incarnation.init == proc.identify(daemon.pid)
    assert [tree.source for tree in zone.logs] == ["zone"]
    members = proc.members(zone.membership)
    assert len(members) == 3
    await processes.runtime.stop(zone, Grace(10))
    assert living(members) == []
    daemon.wait()
    assert (await processes.find("db")).state == "stopped"
    await processes.runtime.stop(zone, Grace(10))


async def test_it_is_killed_when_it_ignores_term(processes: Processes, tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 1000 & while :; do sleep 1000; done"
    daemon = session(script)
    await until_async(lambda: len(proc.in_session(daemon.pid)) == 3)
    processes.put("db", ProcessZone(pid_file=write(tmp_path / "pid", str(daemon.pid))))
    zone = await processes.find("db")
    members = proc.members(zone.membership)
    await processes.runtime.stop(zone, Grace(0.1))
    assert living(members) == []
    end(daemon)


async def test_a_session_that_it_does_not_lead_is_left_alone(processes: Processes, tmp_path: Path) -> None:
    # As started by hand from a login: the session is the operator's.
    login = session("sleep 1000 & echo $!; wait")
    assert login.stdout is not None
    try:
        daemon = int(login.stdout.readline())
        processes.put("db", ProcessZone(pid_file=write(tmp_path / "pid", str(daemon))))
        zone = await processes.find("db")
        assert zone.membership.session is None
        stranger = proc.identify(login.pid)
        assert stranger is not None
        assert proc.members(zone.membership) == [zone.membership.roots[0]]
        await processes.runtime.stop(zone, Grace(10))
        assert not proc.is_alive(zone.membership.roots[0])
    finally:
        end(login)


async def test_it_is_not_started_or_removed_here(processes: Processes, tmp_path: Path) -> None:
    path = str(tmp_path / "pid")
    processes.put("db", ProcessZone(pid_file=path))
    with pytest.raises(UsageError, match=f"zone 'db' cannot be started here: it is known by its PID file {path} only"):
        await processes.runtime.start("db")
    await processes.runtime.remove(await processes.find("db"))


async def test_a_doubtful_file_is_told_to_whoever_asks_for_the_zone_and_does_not_hide_others(
    processes: Processes, tmp_path: Path
) -> None:
    processes.put("db", ProcessZone(pid_file=write(tmp_path / "pid", "1")))
    processes.make("true")
    with pytest.raises(RuntimeFailedError, match=r"zone 'db' runs: the PID file .* is not believed"):
        await processes.runtime.find("db")
    assert {zone.name: zone.state for zone in await processes.runtime.list()} == {"db": "stopped", "zone-1": "stopped"}
