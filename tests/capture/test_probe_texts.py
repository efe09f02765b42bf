"""What the probes tell of processes that have nothing to hide."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.probed import ONE_MORE_THREAD, SLEEP, Start, body, one, run, starting, zone
from support.wait import until
from zonebundle.capture import process_view
from zonebundle.capture.probes import zone_probes
from zonebundle.host import proc
from zonebundle.model.report import Outcome

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture
def start() -> Iterator[Start]:
    with starting() as begin:
        yield begin


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {inner}, "a child"], stdout=subprocess.DEVNULL)
while open(f"/proc/{{child.pid}}/cmdline").read()[-8:] != "a child\\0": time.sleep(0.01)
print("up", flush=True)
time.sleep(1000)
"""


def test_ptree(start: Start) -> None:
    process = start(PARENT.format(inner=repr(PARENT.format(inner="'import time; time.sleep(1000)'"))))
    until(lambda: len(proc.descendants([process])) == 3)
    processes = proc.descendants([process])
    lines = body(run(zone_probes(zone(), processes[::-1]))["ptree"])
    assert [re.match(r"( *)(\d+)", line).groups() for line in lines if line[0:1] in " 0123456789"] == [  # type: ignore[union-attr]
        ("  " * depth, str(each.pid)) for depth, each in enumerate(processes)
    ]
    assert lines[-1].endswith("a child")
    for each in reversed(processes[1:]):
        os.kill(each.pid, signal.SIGKILL)


def test_ptree_of_processes_without_their_parents(start: Start) -> None:
    processes = [start(), start()]
    lines = body(run(zone_probes(zone(), processes))["ptree"])
    assert [line.split()[0] for line in lines] == [str(process.pid) for process in processes]


def test_a_loop_of_parents_neither_hangs_nor_hides(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read at different moments, two processes may each seem to be the other's parent.
    processes = [start(), start()]
    parents = {processes[0].pid: processes[1].pid, processes[1].pid: processes[0].pid}
    parse = process_view.parse_stat

    def crossed(data: bytes) -> process_view.Stat:
        stat = parse(data)
        pid = int(data.split()[0])
        return process_view.Stat(stat.name, stat.state, parents.get(pid, 1), 0, 0, 1, stat.start_time, 0)

    monkeypatch.setattr(process_view, "parse_stat", crossed)
    lines = body(run(zone_probes(zone(), processes))["ptree"])
    assert {int(line.split()[0]) for line in lines} == set(parents)


def test_uptime(start: Start) -> None:
    process = start(f"import threading, time\n{ONE_MORE_THREAD}\n{SLEEP}")
    text = "\n".join(body(run(zone_probes(zone(process), [process]))["uptime"]))
    assert re.search(r"zone: +up 0:00:\d\d, since 20\d\d-", text)
    assert "processes: 1, threads: 2" in text
    assert re.search(r"cpu: +user \d+\.\d\d s", text)
    assert re.search(r"host: +up .*load average: \d", text)


def test_pargs(start: Start) -> None:
    process = start(SLEEP, "two words", "", "-x", "ünï")
    lines = body(one(process)["pargs"])
    assert lines[0].startswith(f"{process.pid}:\t")
    assert [line for line in lines if line.startswith("argv[")][2:] == [
        f"argv[2]: {SLEEP}",
        "argv[3]: two words",
        "argv[4]: ",
        "argv[5]: -x",
        "argv[6]: ünï",
    ]
    assert "cwd: /" in lines
    assert f"exe: {os.path.realpath(sys.executable)}" in lines
    assert f"NSpid: {process.pid}" in lines


def test_the_environment_is_never_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZONEBUNDLE_TEST_SECRET", "hunter2-in-environment")
    process = start("import ctypes; ctypes.CDLL(None).prctl(15, b'renamed', 0, 0, 0)\n" + SLEEP)
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert b"hunter2" in environment
    for result in [*one(process).values(), *run(zone_probes(zone(process), [process])).values()]:
        assert b"hunter2" not in result.text


def test_pfiles(start: Start, tmp_path: Path) -> None:
    (tmp_path / "new\nline").write_text("x" * 100)
    (tmp_path / "gone").write_text("x")
    process = start(
        "import os, socket, sys\n"
        "directory = sys.argv[1]\n"
        "named = open(directory + '/new\\nline'); named.seek(42)\n"
        "gone = open(directory + '/gone', 'a'); os.unlink(gone.name)\n"
        "pipe = os.pipe(); sock = socket.socket()\n" + SLEEP,
        str(tmp_path),
    )
    text = "\n".join(body(one(process)["pfiles"]))
    assert re.search(r"Current rlimit: \d+ file descriptors", text)
    assert "   0: /dev/null O_RDWR" in text
    assert f"{tmp_path}/new\\x0aline O_RDONLY offset:100" in text or "new\\x0aline O_RDONLY offset:42" in text
    assert re.search(r"gone \(deleted\) O_WRONLY\|O_APPEND", text)
    assert re.search(r"\d+: pipe:\[\d+\]", text)
    assert re.search(r"\d+: socket:\[\d+\]", text)


def test_pstack_tells_every_thread(start: Start) -> None:
    process = start(
        "import threading, time\n"
        "for _ in range(3): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n" + SLEEP
    )
    result = one(process)["pstack"]
    threads = [line for line in body(result) if line.startswith("thread ")]
    assert {line.split()[1] for line in threads} == set(os.listdir(f"/proc/{process.pid}/task"))
    assert all(line.endswith((": sleeping", ": running")) for line in threads)
    if os.geteuid() == 0:
        assert b"nanosleep" in result.text or b"futex" in result.text


def test_svcs_finds_units_in_cgroups(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [start(), start(), start()]
    cgroups = {
        processes[0].pid: b"1:name=systemd:/system.slice/nginx.service\n0::/\n",
        processes[1].pid: b"0::/system.slice/docker-1.scope/system.slice/ssh\\x2d1\x1b.service/payload\n",
        processes[2].pid: b"4:memory:/x.service\n0::/user.slice\n",
    }
    read = process_view.read_at

    def told(directory: int, name: str, limit: int = 4096) -> bytes:
        if name != "cgroup":
            return read(directory, name, limit)
        return cgroups[int(read(directory, "stat").split()[0])]

    monkeypatch.setattr(process_view, "read_at", told)
    lines = body(run(zone_probes(zone(), processes))["svcs"])
    assert lines[0] == "nginx.service  /system.slice/nginx.service"
    assert lines[1].split()[0] == str(processes[0].pid)
    assert lines[2].startswith(r"ssh\x2d1\x1b.service  /system.slice/docker-1.scope/")
    assert str(processes[2].pid) not in " ".join(lines)


def test_no_unit_is_a_skip(start: Start) -> None:
    result = run(zone_probes(zone(), [start()]))["svcs"]
    if b".service" in Path("/proc/self/cgroup").read_bytes():
        pytest.skip("this test runs inside a unit")
    assert result.outcome is Outcome.SKIP
    assert "unit" in result.detail
