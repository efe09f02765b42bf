"""The probe netstat against sockets whose addresses are known, in the host's network namespace and in private ones."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from support.wait import until
from zonebundle.capture import probe_sockets, socket_tables
from zonebundle.capture.probe_result import ProbeResult
from zonebundle.capture.probes import zone_probes
from zonebundle.capture.process_view import opened
from zonebundle.capture.socket_tables import DiagRefused, InetSocket, inet_by_proc, open_diag, tcp_by_diag, unix_by_proc
from zonebundle.host import proc
from zonebundle.model.report import Outcome
from zonebundle.model.zone import ProcessRef, Zone

pytestmark = pytest.mark.usefixtures("leak_check")

# Opens one socket of each kind and tells what it has, as JSON.
SOCKETS = """
import fcntl, json, os, socket, struct, sys, time
from socket import *
def lo_up():
    with socket(AF_INET, SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
if len(sys.argv) > 1: lo_up()
held = {}
def make(name, family, kind, address):
    held[name] = s = socket(family, kind); s.bind(address); return s
make("tcp", AF_INET, SOCK_STREAM, ("127.0.0.1", 0)).listen()
make("tcp6", AF_INET6, SOCK_STREAM, ("::1", 0)).listen()
make("udp", AF_INET, SOCK_DGRAM, ("127.0.0.1", 0))
make("udp6", AF_INET6, SOCK_DGRAM, ("::1", 0))
make("unix", AF_UNIX, SOCK_STREAM, f"\\0zb-{os.getpid()}-listen").listen()
make("dgram", AF_UNIX, SOCK_DGRAM, f"\\0zb-{os.getpid()}-dgram")
held["client"] = create_connection(held["tcp"].getsockname())
held["server"] = held["tcp"].accept()[0]
held["client"].send(b"12345")
held["unbound"] = socket(AF_INET, SOCK_STREAM)
print(json.dumps({name: [s.getsockname()[1] if s.family != AF_UNIX else 0, os.fstat(s.fileno()).st_ino]
                  for name, s in held.items()}), flush=True)
time.sleep(1000)
"""

Start = Callable[..., tuple[ProcessRef, dict[str, tuple[int, int]]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that runs a script which prints JSON, optionally in a network namespace of its own."""
    with ExitStack() as stack:

        def begin(script: str = SOCKETS, *, private: bool = False) -> tuple[ProcessRef, Any]:
            argv = [sys.executable, "-c", script]
            argv = ["unshare", "--net", *argv, "up"] if private else argv
            child = subprocess.Popen(argv, stdout=subprocess.PIPE)
            stack.callback(end, child)
            assert child.stdout is not None
            told = json.loads(child.stdout.readline())
            found = proc.identify(child.pid)
            assert found is not None
            return found, told

        yield begin


def end(child: subprocess.Popen[bytes]) -> None:
    with child:
        child.kill()


def netstat(*processes: ProcessRef) -> ProbeResult:
    probes = {probe.name: probe for probe in zone_probes(Zone("web", "process", "running"), processes)}
    return probes["netstat"].run()


def refuse(*_: object) -> socket.socket:
    raise DiagRefused("not here")


@pytest.fixture(params=["netlink", "netlink refused"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel's answers by netlink, and without: what is told must be the same."""
    if request.param == "netlink refused":
        monkeypatch.setattr(socket_tables, "open_diag", refuse)


@pytest.mark.usefixtures("either_way")
def test_the_zones_sockets_and_nobody_elses(start: Start) -> None:
    process, told = start()
    _, others = start()
    result = netstat(process)
    assert result.outcome is Outcome.SUCCESS
    text = result.text.decode()
    assert "(the host's: sockets of the zone's processes)" in text
    pid = process.pid
    port = {name: number for name, (number, _) in told.items()}
    for line in (
        f"tcp        0    128 127.0.0.1:{port['tcp']} +0.0.0.0:\\* +LISTEN +{pid}",
        f"tcp6       0    128 ::1:{port['tcp6']} +:::\\* +LISTEN +{pid}",
        f"udp        0      0 127.0.0.1:{port['udp']} +0.0.0.0:\\* +{pid}",
        f"udp6       0      0 ::1:{port['udp6']} +:::\\* +{pid}",
        f"tcp        0      0 127.0.0.1:{port['client']} +127.0.0.1:{port['tcp']} +ESTABLISHED +{pid}",
        f"tcp        5      0 127.0.0.1:{port['tcp']} +127.0.0.1:{port['client']} +ESTABLISHED +{pid}",
        f"unix  2      \\[ ACC \\] +STREAM +LISTENING +{told['unix'][1]} +{pid} +@zb-{pid}-listen",
        f"unix  2      \\[ \\] +DGRAM +{told['dgram'][1]} +{pid} +@zb-{pid}-dgram",
        f"inode {told['unbound'][1]} of {pid}",
    ):
        # The backlog that a listening socket shows as its queue is told by netlink alone.
        pattern = line.replace("0    128 ", r"0 +\d+ ")
        assert re.search(f"(?m)^{pattern}$", text), f"{line}\n{text}"
    for number, inode in others.values():
        assert not re.search(rf"\b{inode}\b", text)
        assert not number or f":{number} " not in text


@pytest.mark.usefixtures("either_way")
def test_all_sockets_of_a_private_namespace(start: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    process, _ = start(private=True)
    _, others = start()
    ours = os.readlink("/proc/thread-self/ns/net")
    text = netstat(process).text.decode()
    assert f"Network namespace {os.readlink(f'/proc/{process.pid}/ns/net')}\n" in text
    established = re.findall(r"(?m)^tcp .* ESTABLISHED +(\d+)$", text)
    assert established == [str(process.pid)] * 2
    assert len(re.findall(r"(?m)^tcp6? .* LISTEN ", text)) == 2
    assert len(re.findall(r"(?m)^udp6? ", text)) == 2
    assert f"@zb-{process.pid}-dgram" in text
    assert not re.search(rf"\b{others['tcp'][1]}\b", text)
    assert os.readlink("/proc/thread-self/ns/net") == ours


def test_zones_in_several_namespaces(start: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")
    processes = [start(private=True)[0], start()[0], start(private=True)[0]]
    text = netstat(*processes).text.decode()
    assert len(re.findall("(?m)^Network namespace ", text)) == 3
    assert {int(pid) for pid in re.findall(r"LISTEN +(\d+)", text)} == {process.pid for process in processes}


def test_a_socket_shared_by_processes_names_them_all(start: Start) -> None:
    process, _ = start(
        "import os, socket, time\n"
        "held = socket.socket(); held.bind(('127.0.0.1', 0)); held.listen()\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(1000)\n"
    )
    until(lambda: len(proc.descendants([process])) == 2)
    family = proc.descendants([process])
    assert re.search(rf"LISTEN +{family[0].pid},{family[1].pid}\n", netstat(*family).text.decode())
    os.kill(family[1].pid, 9)


def test_a_process_without_sockets_costs_no_table(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = start("import time; print(1, flush=True); time.sleep(1000)")
    monkeypatch.setattr(probe_sockets, "_collect", refuse)
    result = netstat(process)
    assert result.outcome is Outcome.SUCCESS


def test_the_long_table_is_read_only_for_sockets_that_are_in_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bucket of the host's hash table: 0.3 ms by netlink, 4 ms by /proc. Most zones only listen."""
    process, _ = start(
        "import socket, time\n"
        "held = [socket.socket() for _ in range(3)]\n"
        "for one in held: one.bind(('127.0.0.1', 0)); one.listen()\n"
        "print(1, flush=True); time.sleep(1000)\n"
    )
    asked: list[int] = []
    dump = tcp_by_diag

    def noted(sock: socket.socket, states: int, wanted: Callable[[int], bool]) -> Iterator[InetSocket]:
        asked.append(states)
        yield from dump(sock, states, wanted)

    monkeypatch.setattr(socket_tables, "tcp_by_diag", noted)
    assert netstat(process).text.count(b" LISTEN ") == 3
    assert asked == [socket_tables.LISTENING]


FORGED = """
import os, socket, sys, time
held = [socket.socket(socket.AF_UNIX) for _ in range(2)]
inode = os.fstat(held[0].fileno()).st_ino
held[0].bind("\\0plain-%d" % os.getpid())
line = b"\\n0000000000000000: 00000002 00000000 00010000 0001 01 %d /run/x" % inode
held[1].bind(b"\\0" + line)
print(inode, flush=True)
time.sleep(1000)
"""


def test_a_name_that_forges_a_line_is_marked(start: Start) -> None:
    process, inode = start(FORGED)
    text = netstat(process).text.decode()
    lines = [line for line in text.splitlines() if re.search(rf" {inode} ", line)]
    assert len(lines) == 2
    assert len([line for line in lines if "forged" in line]) == 1


def test_a_name_with_line_ends_is_one_line(start: Start) -> None:
    process, _ = start(
        "import os, socket, time\n"
        "held = socket.socket(socket.AF_UNIX); held.bind('\\0a\\nb: c\\n\\x1b[31m' + str(os.getpid()))\n"
        "print(1, flush=True); time.sleep(1000)\n"
    )
    lines = [line for line in netstat(process).text.decode().splitlines() if line.startswith("unix")]
    assert len(lines) == 1
    assert lines[0].endswith(rf"@a\x0ab: c\x0a\x1b[31m{process.pid}")


def test_too_many_sockets_are_cut(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_sockets, "_MAX_SOCKETS", 5)
    process, _ = start(
        "import socket, time\n"
        "held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(20)]\n"
        "for one in held: one.bind(('127.0.0.1', 0))\n"
        "print(1, flush=True); time.sleep(1000)\n"
    )
    text = netstat(process).text.decode()
    assert text.count("\nudp ") == 5
    assert "(cut: more than 5 sockets)" in text
    assert "other kinds" not in text


def all_of(_inode: int) -> bool:
    return True


def test_the_tables_of_the_kernel_agree(start: Start) -> None:
    """Netlink and /proc tell the same of what does not change meanwhile."""
    process, told = start()
    inodes = {inode for name, (_, inode) in told.items() if name in ("tcp", "tcp6", "client", "server")}
    with opened(process) as found:
        by_proc = [one for table in ("tcp", "tcp6") for one in inet_by_proc(found.content, table, inodes.__contains__)]
        with open_diag(None) as diag:
            by_diag = [
                one
                for states in (socket_tables.LISTENING, socket_tables.NOT_LISTENING)
                for one in tcp_by_diag(diag, states, inodes.__contains__)
            ]
        assert len(list(unix_by_proc(found.content, all_of))) >= 2
    assert len(by_proc) == 4
    assert {(one.protocol, one.local, one.remote, one.state, one.inode) for one in by_proc} == {
        (one.protocol, one.local, one.remote, one.state, one.inode) for one in by_diag
    }


def test_a_table_that_the_kernel_lacks_is_empty(start: Start) -> None:
    process, _ = start("import time; print(1, flush=True); time.sleep(1000)")
    with opened(process) as found:
        assert list(inet_by_proc(found.content, "sctp7", all_of)) == []


def test_a_namespace_that_cannot_be_entered_is_refused(tmp_path: Any) -> None:
    descriptor = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(DiagRefused):
            open_diag(descriptor)
    finally:
        os.close(descriptor)
