"""Probes of real processes, some of which would rather not be looked at."""

import ctypes
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.pids import fork_with_pid
from support.probed import SLEEP, Start, body, identified, one, run, starting, zone
from support.users import OrdinaryUser
from support.wait import until
from zonebundle.capture import probe_process, process_view
from zonebundle.capture.probe_result import OUTPUT_LIMIT, Probe, ProbeResult, Skipped, make_probe
from zonebundle.capture.probes import probe_groups, zone_probes
from zonebundle.capture.process_view import Gone, opened, parse_stat, read_at, read_small
from zonebundle.host import proc
from zonebundle.model.report import Outcome
from zonebundle.model.zone import ProcessRef

pytestmark = pytest.mark.usefixtures("leak_check")

ZONE_WIDE = {"ptree", "uptime", "last", "who", "svcs", "netstat"}


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as begin:
        yield begin


def test_every_probe_says_what_it_is_and_ends_its_last_line(start: Start) -> None:
    process = start()
    results = {**run(zone_probes(zone(process), [process])), **one(process)}
    assert set(results) == ZONE_WIDE | {"pargs", "pfiles", "pstack"}
    for name, result in results.items():
        first, _, rest = result.text.partition(b"\n")
        argv = [name] if name in ZONE_WIDE else [name, str(process.pid)]
        assert first == f"Probe: {json.dumps(argv)}".encode()
        assert result.name == ".".join(argv)
        assert rest.endswith(b"\n")
        assert result.outcome in (Outcome.SUCCESS, Outcome.SKIP)
        assert bool(result.detail) == (result.outcome is Outcome.SKIP)
        assert 0 < result.seconds < 5


def test_the_groups_hold_every_probe_once(start: Start) -> None:
    processes = [start(), start()]
    groups = probe_groups(zone(), processes)
    assert {probe.name for probe in groups[0]} == ZONE_WIDE
    assert [{probe.name for probe in group} for group in groups[1:]] == [
        {f"{kind}.{process.pid}" for kind in ("pargs", "pfiles", "pstack")} for process in processes
    ]


def test_what_two_probes_need_is_read_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start()
    listed: list[int] = []
    list_files = process_view._list_files

    def noted(content: int) -> process_view.Files:
        listed.append(content)
        return list_files(content)

    monkeypatch.setattr(process_view, "_list_files", noted)
    for group in probe_groups(zone(), [process]):
        run(group)
    assert len(listed) == 1


def test_all_probes_at_once_in_threads_find_the_same(start: Start) -> None:
    processes = [start() for _ in range(3)]

    def text(groups: list[list[Probe]], pool: ThreadPoolExecutor) -> dict[str, bytes]:
        done = [pool.submit(probe.run) for group in groups for probe in group]
        return {result.name: result.text for result in (future.result() for future in done)}

    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(12) as together:
        expected = text(probe_groups(zone(), processes), alone)
        for _ in range(10):
            found = text(probe_groups(zone(), processes), together)
            # The time runs on.
            assert {**found, "uptime": b""} == {**expected, "uptime": b""}


def test_a_zone_without_processes_is_skipped() -> None:
    for result in run(zone_probes(zone(), [])).values():
        assert result.outcome is Outcome.SKIP
        assert b"runs" in result.text


def test_a_process_that_is_gone_is_a_skip(start: Start) -> None:
    process = start()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not proc.is_alive(process))
    # A zombie first: it has its PID still.
    for result in one(process).values():
        assert (result.outcome, result.detail) == (Outcome.SKIP, "the process is gone")
        assert body(result) == ["the process is gone"]


def test_one_that_is_gone_costs_the_others_nothing(start: Start) -> None:
    processes = [start(), start()]
    os.kill(processes[0].pid, signal.SIGKILL)
    until(lambda: not proc.is_alive(processes[0]))
    results = run(zone_probes(zone(), processes))
    assert results["ptree"].outcome is Outcome.SUCCESS
    assert body(results["ptree"])[-1] == "(1 of 2 processes are gone)"
    assert str(processes[1].pid) in body(results["ptree"])[0]
    assert results["netstat"].outcome is Outcome.SUCCESS


def test_another_start_time_is_another_process(start: Start) -> None:
    process = start("held = open('/etc/hostname')\n" + SLEEP, "its-secret")
    stranger = ProcessRef(process.pid, process.start_time + 1)
    for result in [*one(stranger).values(), *run(zone_probes(zone(), [stranger])).values()]:
        assert result.outcome is Outcome.SKIP
        assert b"secret" not in result.text
        assert b"hostname" not in result.text


def test_a_process_held_open_is_never_another_one(start: Start) -> None:
    process = start()
    with pytest.raises(Gone), opened(process) as found:
        assert parse_stat(read_small(found.directory, "stat")).start_time == process.start_time
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)
        again = fork_with_pid(process.pid)
        try:
            for name in ("stat", "cmdline", "status", "cgroup", "limits", "stack", "task"):
                with pytest.raises((FileNotFoundError, ProcessLookupError)):
                    read_at(found.directory, name)
            for name in ("exe", "cwd", "fd/0", "ns/net"):
                with pytest.raises((FileNotFoundError, ProcessLookupError)):
                    os.readlink(name, dir_fd=found.directory)
        finally:
            os.kill(again, signal.SIGKILL)
            os.waitpid(again, 0)


def test_a_recycled_pid_tells_nothing_of_the_new_process(start: Start) -> None:
    process = start()
    groups = probe_groups(zone(process), [process])
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)
    again = fork_with_pid(process.pid)
    try:
        for probe in (probe for group in groups for probe in group):
            result = probe.run()
            assert result.outcome is Outcome.SKIP
            assert b"pytest" not in result.text
    finally:
        os.kill(again, signal.SIGKILL)
        os.waitpid(again, 0)


def test_one_that_ends_while_it_is_read_gives_no_half_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start()
    read = process_view.read_small

    def end_first(directory: int, name: str) -> bytes:
        if name == "status":
            os.kill(process.pid, signal.SIGKILL)
            until(lambda: not proc.is_alive(process))
        return read(directory, name)

    monkeypatch.setattr(probe_process, "read_small", end_first)
    result = one(process)["pargs"]
    assert (result.outcome, body(result)) == (Outcome.SKIP, ["the process is gone"])


def test_processes_that_come_and_go_all_the_time(start: Start) -> None:
    # Each round probes processes that end at any moment of it; nothing but success and skip may come of that.
    outcomes = set()
    for _ in range(40):
        child = subprocess.Popen(["sh", "-c", "sleep 0.00$(($$ % 9)); :"])
        process = proc.identify(child.pid)
        if process is not None:
            for group in probe_groups(zone(process), [process]):
                outcomes |= {(probe.name.partition(".")[0], probe.run().outcome) for probe in group}
        child.wait()
    assert {outcome for _, outcome in outcomes} <= {Outcome.SUCCESS, Outcome.SKIP}


LEADER_ENDS = """
import ctypes, platform, threading, time
held = open("/etc/hostname")
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("up", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
"""


def test_a_process_whose_first_thread_has_ended_hides_nothing(start: Start) -> None:
    process = start(LEADER_ENDS)
    until(lambda: (proc.read_stat(process.pid) or ["?"])[proc.STATE] == "Z")
    results = one(process)
    assert "/etc/hostname" in results["pfiles"].text.decode()
    assert any(line.startswith("argv[2]: ") for line in body(results["pargs"]))
    assert len([line for line in body(results["pstack"]) if line.startswith("thread ")]) == 2


CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")


def test_what_strangers_wrote_is_escaped(start: Start, tmp_path: Path) -> None:
    nasty = "a\x1b[2Jb\nProbe: forged\r\u202e\x7f"
    for name in ("file", "directory"):
        (tmp_path / f"{name}{nasty}").mkdir() if name == "directory" else (tmp_path / f"{name}{nasty}").write_text("")
    process = start(
        "import ctypes, os, socket, sys\n"
        "nasty = sys.argv[1]\n"
        "os.chdir(sys.argv[2] + '/directory' + nasty)\n"
        "held = open(sys.argv[2] + '/file' + nasty)\n"
        "ctypes.CDLL(None).prctl(15, ('n' + nasty).encode()[:15], 0, 0, 0)\n"
        "sock = socket.socket(socket.AF_UNIX); sock.bind('\\0s' + nasty); sock.listen()\n" + SLEEP,
        nasty,
        str(tmp_path),
    )
    for result in [*one(process).values(), *run(zone_probes(zone(process), [process])).values()]:
        assert result.outcome in (Outcome.SUCCESS, Outcome.SKIP)
        assert CONTROL.search(result.text) is None
        assert "\u202e" not in result.text.decode()
        assert not [line for line in result.text.splitlines()[1:] if line.startswith(b"Probe: ")]
    assert rb"\x1b[2J" in one(process)["pargs"].text


def test_the_arguments_are_bounded(start: Start) -> None:
    process = start(SLEEP, *["\x1b" * 100_000] * 15)
    begin = time.process_time()
    results = {**one(process), **run(zone_probes(zone(process), [process]))}
    assert time.process_time() - begin < 1
    assert len(results["pargs"].text) < OUTPUT_LIMIT
    assert b"(cut: the first 128 KiB" in results["pargs"].text
    assert len(results["ptree"].text) < 10_000


def test_the_descriptors_are_bounded(start: Start) -> None:
    process = start(
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)\n"
        "for _ in range(4000): os.dup(0)\n" + SLEEP
    )
    begin = time.process_time()
    results = {**one(process), **run(zone_probes(zone(process), [process]))}
    assert time.process_time() - begin < 1
    lines = body(results["pfiles"])
    assert len(lines) == process_view.MAX_DESCRIPTORS + 3
    assert "there are more" in lines[-1]
    assert "may be missing" in results["netstat"].text.decode()


def test_the_threads_are_bounded(start: Start) -> None:
    process = start(
        "import threading, time\n"
        "threading.stack_size(65536)\n"
        "for _ in range(400): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n" + SLEEP
    )
    lines = body(one(process)["pstack"])
    assert len([line for line in lines if line.startswith("thread ")]) == 256
    assert lines[-1] == "(the first 256 of 401 threads)"


def test_output_over_the_limit_is_cut_at_a_line() -> None:
    result = make_probe(("pargs", "1"), lambda: (f"line {number:090d}" for number in range(20_000))).run()
    assert result.outcome is Outcome.SUCCESS
    assert len(result.text) <= OUTPUT_LIMIT
    assert len(result.text) > OUTPUT_LIMIT - 200
    assert result.text.endswith(b"\n(cut: there is more than 1 MiB)\n")
    assert "cut" in result.detail
    assert {len(line) for line in result.text.splitlines()[1:-1]} == {95}


def test_one_line_over_the_limit_is_cut_as_well() -> None:
    result = make_probe(("x",), lambda: ["y" * (2 << 20)]).run()
    assert len(result.text) <= OUTPUT_LIMIT
    assert result.text.startswith(b'Probe: ["x"]\n')


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Gone(), Outcome.SKIP),
        (Skipped("nothing there"), Outcome.SKIP),
        (PermissionError(13, "Permission denied"), Outcome.SKIP),
        (OSError(5, "Input/output error"), Outcome.FAIL),
        (ValueError("not a number"), Outcome.FAIL),
    ],
)
def test_a_probe_never_raises(error: Exception, outcome: Outcome) -> None:
    def look() -> Iterator[str]:
        yield "half of it"
        raise error

    result = make_probe(("ptree",), look).run()
    assert result.outcome is outcome
    assert b"half of it" not in result.text
    assert result.detail
    assert result.detail.encode() in result.text


def test_a_table_that_comes_in_pieces_is_read_to_its_end(start: Start) -> None:
    # A piece holds whole lines, so each but the last is a little shorter than a page.
    process = start(
        "import os, socket, time\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(500)]\n"
        "for number, one in enumerate(held): one.bind(f'\\0zb-{os.getpid()}-{number}')\n" + SLEEP
    )
    text = run(zone_probes(zone(), [process]))["netstat"].text.decode()
    assert {int(number) for number in re.findall(rf"@zb-{process.pid}-(\d+)\n", text)} == set(range(500))


@pytest.mark.parametrize("name", ["(sd-pam)", ") R 1 2 3 4", "x\ny", ") S 0 0"])
def test_names_do_not_shift_the_fields(name: str) -> None:
    data = Path("/proc/self/stat").read_bytes()
    head, _, tail = data.rpartition(b")")
    stat = parse_stat(head.partition(b"(")[0] + b"(" + name.encode() + b")" + tail)
    assert stat.name == name.encode()
    assert (stat.parent, stat.state) == (os.getppid(), "R")


def test_an_ordinary_user_is_told_what_may_be_seen_and_why_the_rest_not(ordinary_user: OrdinaryUser) -> None:
    if os.geteuid() != 0:
        pytest.skip("switching users needs root")
    with subprocess.Popen(["sleep", "1000"], user=ordinary_user.uid, group=ordinary_user.gid) as own:
        process = identified(own.pid)
        until(lambda: os.readlink(f"/proc/{own.pid}/exe").endswith("sleep"))
        results: dict[str, ProbeResult] = {}

        def look() -> None:
            # In a thread of its own: glibc changes the ids of all threads, the system call those of one.
            for call, number in ((SETRESGID, ordinary_user.gid), (SETRESUID, ordinary_user.uid)):
                assert ctypes.CDLL(None).syscall(call, number, number, number) == 0
            results.update(one(process))
            results.update({f"init {name}": result for name, result in one(init).items()})

        init = identified(1)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        own.kill()
    stacks = results["pstack"]
    assert stacks.outcome is Outcome.SUCCESS
    assert b"kernel stacks cannot be read: Permission denied" in stacks.text
    assert b"waits in " in stacks.text
    assert results["pfiles"].outcome is Outcome.SUCCESS
    assert results["pargs"].outcome is Outcome.SUCCESS
    # Somebody else's: no descriptor, no link, but no failure either.
    assert results["init pfiles"].outcome is Outcome.SKIP
    assert "cannot be listed" in results["init pfiles"].detail
    assert b"exe: (not permitted)" in results["init pargs"].text
    assert results["init pstack"].outcome is Outcome.SUCCESS


SETRESUID, SETRESGID = {"x86_64": (117, 119), "aarch64": (147, 149)}.get(os.uname().machine, (0, 0))
