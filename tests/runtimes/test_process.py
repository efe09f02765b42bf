"""Zones of the process runtime that behave: what they get, what is kept of them, and why one does not start."""

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from support.users import OrdinaryUser
from support.wait import until_async
from support.zones import GRACEFUL, Processes, living, running, with_processes
from zonebundle.errors import ConflictError, RuntimeFailedError, UsageError
from zonebundle.host import proc
from zonebundle.runtimes import supervise
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.process import ProcessRuntime, ProcessZone
from zonebundle.runtimes.supervisor import CONSOLE_LIMIT


async def ended(processes: Processes, name: str) -> None:
    """Return when the zone has ended by itself, with its supervisor."""
    await until_async(lambda: not (processes.directory(name) / "run.json").exists())


async def told(processes: Processes, name: str, code: str) -> dict[str, object]:
    """What Python code, run as a zone, prints as JSON."""
    processes.add(name, sys.executable, "-c", f"import json, os, sys\nprint(json.dumps({code}))")
    await processes.runtime.start(name)
    await ended(processes, name)
    answer: dict[str, object] = json.loads(processes.console(name))
    return answer


async def test_a_zone_runs_in_its_root_in_a_session_of_its_own_with_an_ordinary_umask(processes: Processes) -> None:
    code = "{'cwd': os.getcwd(), 'leads': os.getsid(0) == os.getpid(), 'umask': os.umask(0), 'parent': os.getppid()}"
    facts = await told(processes, "web", code)
    assert facts.pop("parent") != os.getpid()
    assert facts == {"cwd": str(processes.root), "leads": True, "umask": 0o022}


async def test_the_environment_is_built_and_nothing_is_inherited(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_AGENT", "1")
    processes.add("web", "env", environment={"COLOUR": "grün", "EMPTY": "", "LD_LIBRARY_PATH": "/opt/lib"})
    zone = await processes.runtime.start("web")
    await ended(processes, "web")
    environment = dict(line.split("=", 1) for line in processes.console("web").splitlines())
    last = processes.runtime.last_exit("web")
    assert last is not None
    assert environment.pop("ZONE_BUNDLE_INSTANCE") == last.incarnation.instance
    assert set(environment) == {"PATH", "LC_ALL", "HOME", "COLOUR", "EMPTY", "LD_LIBRARY_PATH"}
    assert environment["COLOUR"] == "grün"
    assert zone.name == "web"


async def test_no_descriptor_of_the_agent_reaches_a_zone_or_its_supervisor(processes: Processes) -> None:
    leaky = os.open("/", os.O_RDONLY)
    os.set_inheritable(leaky, True)
    try:
        processes.add("web", sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(1000)")
        zone, (init,) = await running(processes, "web", 1)
        await until_async(lambda: "ready" in processes.console("web"))
    finally:
        os.close(leaky)
    assert sorted(os.listdir(f"/proc/{init.pid}/fd"), key=int) == ["0", "1", "2"]
    assert os.readlink(f"/proc/{init.pid}/fd/0") == "/dev/null"
    (supervisor,) = proc.children(os.getpid())
    held = {os.readlink(f"/proc/{supervisor}/fd/{name}") for name in os.listdir(f"/proc/{supervisor}/fd")}
    state = str(processes.directory("web"))
    kinds = {path if not path.startswith((state, "pipe:")) else path[: len(state)] for path in held}
    assert "/" not in held
    assert {kind.split(":")[0] for kind in kinds} == {"/dev/null", "pipe", state}
    assert zone.state == "running"


async def test_signals_are_as_a_program_expects_them(processes: Processes) -> None:
    # Python ignores SIGPIPE and the supervisor nearly everything: neither may be inherited.
    processes.add("web", "sh", "-c", "grep -E 'SigIgn|SigBlk' /proc/self/status")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        await processes.runtime.start("web")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    await ended(processes, "web")
    blocked, blocked_set, ignored, ignored_set = processes.console("web").split()
    assert (blocked, ignored) == ("SigBlk:", "SigIgn:")
    # Signals 32 and 33 are glibc's own: who starts us may have them blocked or ignored; nobody can change that.
    for mask in (blocked_set, ignored_set):
        assert int(mask, 16) & ~0x1_8000_0000 == 0


@pytest.mark.parametrize(
    ("script", "status", "number"), [("exit 7", 7, None), ("kill -9 $$", None, 9), ("exit 0", 0, None)]
)
async def test_how_a_zone_ended_is_kept(
    processes: Processes, script: str, status: int | None, number: int | None
) -> None:
    name = processes.make(script)
    assert processes.runtime.last_exit(name) is None
    await processes.runtime.start(name)
    await ended(processes, name)
    last = processes.runtime.last_exit(name)
    assert last is not None
    assert (last.status, last.signal) == (status, number)
    assert (await processes.find(name)).state == "stopped"


async def test_a_zone_can_be_started_again_at_once_when_it_ended_by_itself(processes: Processes) -> None:
    name = processes.make("exit 0")
    for _ in range(5):
        await processes.runtime.start(name)
        await until_async(lambda: is_stopped(processes, name))


async def is_stopped(processes: Processes, name: str) -> bool:
    return (await processes.find(name)).state == "stopped"


async def test_nobody_is_left_a_zombie_when_a_zone_ends_by_itself(processes: Processes) -> None:
    name = processes.make("sleep 0.01 & exit 0")
    await processes.runtime.start(name)
    await until_async(lambda: proc.children(os.getpid()) == [])


async def test_the_logs_are_the_root_by_its_patterns_and_the_console(processes: Processes) -> None:
    name = processes.make("exit 0")
    root, console = (await processes.find(name)).logs
    assert (root.source, root.path, root.patterns) == ("zone", str(processes.root), ("**/*.log",))
    assert (console.source, console.path, console.patterns) == (
        "console",
        str(processes.directory(name)),
        ("console.log*",),
    )
    processes.put("bare", ProcessZone(command=("true",)))
    assert [tree.source for tree in (await processes.find("bare")).logs] == ["console"]
    assert (await processes.find("bare")).directory == "/"


async def test_the_console_goes_on_over_lives(processes: Processes) -> None:
    name = processes.make("echo out; echo err >&2")
    for _ in range(2):
        await processes.runtime.start(name)
        await ended(processes, name)
    assert processes.console(name) == "out\nerr\n" * 2


async def test_the_console_is_bounded_and_keeps_the_newest(processes: Processes) -> None:
    name = processes.make("seq 1 1000000")
    await processes.runtime.start(name)
    await ended(processes, name)
    older = (processes.directory(name) / "console.log.1").read_text()
    text = older + processes.console(name)
    assert CONSOLE_LIMIT * 0.9 < len(older) <= CONSOLE_LIMIT
    assert len(processes.console(name)) <= CONSOLE_LIMIT
    lines = text.split("\n")
    assert lines[-2] == "1000000"
    assert [int(line) for line in lines[1:-1]] == list(range(int(lines[1]), 1000001))


async def test_a_full_disk_costs_output_and_not_the_zone(tmpfs_dir: Path, processes: Processes) -> None:
    processes.state_dir = tmpfs_dir / "state"
    name = processes.make("exec 3<> go; read go <&3; seq 1 100000; touch written; read go <&3; echo last words")
    os.mkfifo(processes.root / "go")
    go = os.open(processes.root / "go", os.O_RDWR)
    await processes.runtime.start(name)
    filling = tmpfs_dir / "filling"
    with filling.open("wb") as file:
        file.truncate(1 << 20)
        try:
            while os.write(file.fileno(), b"\0" * (1 << 20)):
                pass
        except OSError:
            pass
    os.write(go, b"go\n")
    await until_async(lambda: (processes.root / "written").exists())
    filling.unlink()
    os.write(go, b"go\n")
    os.close(go)
    await ended(processes, name)
    text = processes.console(name)
    assert text.endswith("last words\n")
    assert "bytes of output are missing here: No space left on device]" in text


async def test_private_files_are_private(processes: Processes) -> None:
    name = processes.make("echo hello; sleep 1000")
    await running(processes, name, 1)
    directory = processes.directory(name)
    await until_async(lambda: (directory / "console.log").exists())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {
        "run.json": 0o600,
        "console.log": 0o600,
        "supervisor.log": 0o600,
    }


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["/no/such/program"], "cannot execute '/no/such/program': no such file or directory"),
        (["no-such-program"], "cannot execute 'no-such-program': no such file or directory"),
        (["/etc/passwd"], "cannot execute '/etc/passwd': permission denied"),
        (["./script"], "cannot execute './script': exec format error .*#!/bin/sh"),
        (["./orphan"], "cannot execute './orphan': no such file or directory .*interpreter"),
    ],
)
async def test_a_command_that_cannot_be_executed_is_named(
    processes: Processes, command: list[str], reason: str
) -> None:
    for name, text in (("script", "echo no first line"), ("orphan", "#!/no/such/interpreter\n")):
        (processes.root / name).write_text(text)
        (processes.root / name).chmod(0o755)
    processes.add("web", *command)
    with pytest.raises(RuntimeFailedError, match=f"^cannot start zone 'web': {reason}"):
        await processes.runtime.start("web")
    assert await is_stopped(processes, "web")
    assert {path.name for path in processes.directory("web").iterdir()} == {"supervisor.log", "console.log"}
    assert proc.children(os.getpid()) == []


async def test_a_root_that_is_missing_is_named(processes: Processes) -> None:
    processes.put("web", ProcessZone(command=("true",), root="/no/such/root"))
    with pytest.raises(RuntimeFailedError, match="zone 'web': its root '/no/such/root' cannot be entered: no such"):
        await processes.runtime.start("web")


async def test_a_state_directory_that_cannot_be_made_is_named(processes: Processes) -> None:
    processes.state_dir.write_text("in the way")
    processes.make("true")
    with pytest.raises(RuntimeFailedError, match=r"zone 'zone-0'.*state/zones"):
        await processes.runtime.start("zone-0")
    with pytest.raises(RuntimeFailedError, match=r"cannot list .*state/zones"):
        await processes.runtime.list()
    processes.state_dir.unlink()


async def test_a_state_that_cannot_be_written_is_named(processes: Processes) -> None:
    processes.make("true")
    (processes.directory("zone-0") / "run.json.tmp").mkdir(parents=True)
    with pytest.raises(RuntimeFailedError, match=r"zone 'zone-0': its state in .*zone-0 cannot be written: is a dir"):
        await processes.runtime.start("zone-0")
    assert proc.children(os.getpid()) == []


async def test_an_interpreter_that_is_missing_or_fails_is_told(processes: Processes) -> None:
    processes.make("true")
    processes.reopen(python="/no/such/python")
    with pytest.raises(RuntimeFailedError, match=r"zone 'zone-0': no supervisor for it: .*/no/such/python"):
        await processes.runtime.start("zone-0")
    failing = processes.root / "python"
    failing.write_text("#!/bin/sh\necho it is not my day >&2; exit 1\n")
    failing.chmod(0o755)
    processes.reopen(python=str(failing))
    with pytest.raises(RuntimeFailedError, match="zone 'zone-0': its supervisor ended at once: it is not my day"):
        await processes.runtime.start("zone-0")


async def test_a_start_that_hangs_is_given_up_and_leaves_nothing(processes: Processes) -> None:
    processes.make("true")
    hanging = processes.root / "python"
    hanging.write_text("#!/bin/sh\nsleep 1000\n")
    hanging.chmod(0o755)
    processes.reopen(python=str(hanging), start_timeout=0.1)
    with pytest.raises(RuntimeFailedError, match=r"'sh' was not executed within 0\.1 s"):
        await processes.runtime.start("zone-0")
    assert await is_stopped(processes, "zone-0")
    await until_async(lambda: proc.children(os.getpid()) == [])


async def test_a_zone_that_is_no_longer_configured_can_still_be_stopped(processes: Processes) -> None:
    zone, members = await running(processes, processes.make(GRACEFUL))
    await processes.runtime.close()
    processes.zones.clear()
    processes.reopen()
    (listed,) = await processes.runtime.list()
    assert (listed.name, listed.state, listed.incarnation) == (zone.name, "running", zone.incarnation)
    await processes.runtime.stop(listed, Grace(10))
    assert living(members) == []
    assert await processes.runtime.list() == []
    assert await processes.runtime.find(zone.name) is None


async def test_what_else_lies_in_the_state_directory_is_no_zone(processes: Processes) -> None:
    processes.make("true")
    (processes.state_dir / "zones" / "lost+found").mkdir(parents=True)
    (processes.state_dir / "zones" / "file").write_text("")
    assert [zone.name for zone in await processes.runtime.list()] == ["zone-0"]


async def test_removal_takes_the_console_and_leaves_the_root(processes: Processes) -> None:
    name = processes.make("echo hello > my.log; echo hello")
    await processes.runtime.start(name)
    await ended(processes, name)
    await processes.runtime.remove(await processes.find(name))
    assert not processes.directory(name).exists()
    assert (processes.root / "my.log").exists()
    await processes.runtime.start(name)


async def test_a_zone_is_not_removed_while_it_is_being_started(processes: Processes) -> None:
    name = processes.make("sleep 1000")
    zone = await processes.find(name)
    start = asyncio.create_task(processes.runtime.start(name))
    await asyncio.sleep(0)
    with pytest.raises(ConflictError, match=name):
        await processes.runtime.remove(zone)
    await start


async def test_names_that_need_it_are_encoded(processes: Processes) -> None:
    processes.add("a:b", "sleep", "1000")
    processes.add(".hidden", "sleep", "1000")
    for name in ("a:b", ".hidden"):
        assert (await processes.runtime.start(name)).state == "running"
    assert sorted(path.name for path in (processes.state_dir / "zones").iterdir()) == ["%2Ehidden", "a:b"]


@pytest.mark.parametrize("zone", [{}, {"command": ("true",), "pid_file": "/run/x.pid"}])
def test_a_zone_has_either_a_command_or_a_pid_file(zone: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="either a command or a PID file"):
        ProcessZone(**zone)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "zone",
    [
        {"command": ("a\0b",)},
        {"command": ("true",), "environment": {"A": "b\0C=d"}},
        {"command": ("true",), "environment": {"A=B": "c"}},
        {"command": ("true",), "environment": {"": "c"}},
        {"command": ("true",), "root": "/\0"},
    ],
)
def test_what_no_program_can_be_given_is_refused(zone: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"zero byte|cannot be the name"):
        ProcessZone(**zone)  # type: ignore[arg-type]


def test_a_zone_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ProcessRuntime({"../x": ProcessZone(command=("true",))}, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without privileges already")
def test_no_privileges_are_needed(ordinary_user: OrdinaryUser) -> None:
    source = Path(supervise.__file__).parents[2]
    # The interpreter of the tests may be in root's home; the host's own will do.
    found = [Path(name) for name in (sys.executable, "/usr/bin/python3") if ordinary_user.can_read(Path(name))]
    readable = [python for python in found if is_recent(python)]
    if not readable or not ordinary_user.can_read(Path(supervise.__file__)):
        pytest.skip("no Python 3.11 and this package within reach of an ordinary user")
    code = """
import asyncio, sys
from pathlib import Path
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.process import ProcessRuntime, ProcessZone
async def main():
    runtime = ProcessRuntime({"web": ProcessZone(command=("sh", "-c", "setsid sleep 1000 & wait"))}, Path("state"))
    zone = await runtime.start("web")
    await runtime.stop(zone, Grace(10))
    print(zone.state, (await runtime.find("web")).state)
    await runtime.close()
asyncio.run(main())
"""
    path = f"{source}:{Path(structlog.__file__).parents[1]}"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = ordinary_user.run(readable[0], "-c", code, env=environment)
    assert done.stdout.split() == ["running", "stopped"], done.stderr


def is_recent(python: Path) -> bool:
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


async def test_many_zones_start_and_stop_together(processes: Processes) -> None:
    names = [processes.make(GRACEFUL) for _ in range(20)]
    await asyncio.gather(*(processes.runtime.start(name) for name in names))
    found = [await with_processes(processes, name, 5) for name in names]
    await asyncio.gather(*(processes.runtime.stop(zone, Grace(30)) for zone, _ in found))
    assert [process for _, members in found for process in living(members)] == []


def test_a_supervisor_loads_little() -> None:
    # Each of these costs every zone some 100 KB and a millisecond or more.
    source = Path(supervise.__file__).parents[2]
    code = f"import sys; sys.path.append({str(source)!r}); import zonebundle.runtimes.supervisor; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert loaded.isdisjoint({"signal", "enum", "re", "json", "ctypes", "typing", "subprocess", "pathlib", "asyncio"})
    assert "zonebundle.runtimes.supervisor" in loaded
