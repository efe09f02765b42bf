import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.pids import fork_with_pid
from support.wait import until
from zonebundle.host import proc
from zonebundle.model.zone import Membership, ProcessRef

pytestmark = pytest.mark.usefixtures("leak_check")

Start = Callable[..., subprocess.Popen[str]]

SLEEP = "import time; print('up', flush=True); time.sleep(1000)"


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that runs a Python script as a child, and returns when it has printed a line."""
    with ExitStack() as stack:

        def begin(script: str = SLEEP, *, new_session: bool = False) -> subprocess.Popen[str]:
            argv = [sys.executable, "-c", script]
            child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=new_session)
            stack.callback(end, child)
            assert child.stdout is not None
            child.stdout.readline()
            return child

        yield begin


def end(child: subprocess.Popen[str]) -> None:
    with child:
        child.kill()


def reference(child: subprocess.Popen[str]) -> ProcessRef:
    found = proc.identify(child.pid)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["(sd-pam)", ") R 1 2 3", "a\nb", "x) S 0 0 (y", " ", "ü"])
def test_a_name_does_not_shift_the_fields(start: Start, name: str) -> None:
    script = f"import ctypes; ctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\n{SLEEP}"
    child = start(script)
    fields = proc.read_stat(child.pid)
    assert fields is not None
    assert fields[proc.STATE] in "SR"
    assert (int(fields[proc.PARENT]), int(fields[proc.GROUP])) == (os.getpid(), os.getpgrp())
    assert reference(child).start_time == int(fields[proc.START_TIME])


def test_a_zombie_is_not_alive(start: Start) -> None:
    child = start()
    process = reference(child)
    assert proc.is_alive(process)
    child.kill()
    until(lambda: not proc.is_alive(process))
    # Not reaped yet: it has its PID still.
    assert proc.read_stat(child.pid) is not None
    assert proc.identify(child.pid) is None
    assert not proc.send_signal(process, signal.SIGTERM)
    assert proc.open_pidfd(process) is None
    assert proc.descendants([process]) == []


def test_the_same_pid_with_another_start_is_another_process(start: Start) -> None:
    child = start()
    stranger = ProcessRef(child.pid, reference(child).start_time - 1)
    assert not proc.is_alive(stranger)
    assert proc.open_pidfd(stranger) is None
    assert not proc.send_signal(stranger, signal.SIGKILL)
    assert proc.descendants([stranger]) == []
    assert child.poll() is None


def test_a_recycled_pid_is_not_signalled(start: Start) -> None:
    child = start()
    process = reference(child)
    end(child)
    again = fork_with_pid(process.pid)
    try:
        # A start time counts in hundredths: recycled within one, even this could not tell.
        assert proc.identify(again) != process
        assert not proc.send_signal(process, signal.SIGKILL)
        assert os.waitpid(again, os.WNOHANG) == (0, 0)
    finally:
        os.kill(again, signal.SIGKILL)
        os.waitpid(again, 0)


# The main thread ends, another one goes on: the process looks like a zombie, and is none.
LEADER_ENDS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("up", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[__import__("platform").machine()], 0)
"""


def test_a_process_whose_first_thread_has_ended_lives_on(start: Start) -> None:
    child = start(LEADER_ENDS)
    until(lambda: (proc.read_stat(child.pid) or ["?"])[proc.STATE] == "Z")
    process = proc.identify(child.pid)
    assert process is not None
    assert proc.is_alive(process)
    assert proc.descendants([process]) == [process]
    assert proc.send_signal(process, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert not proc.is_alive(process)


def test_descendants_are_found_parents_first_also_those_of_other_threads(start: Start) -> None:
    child = start(
        "import subprocess, sys, threading, time\n"
        "family = []\n"
        "def fork(): family.append(subprocess.Popen(['sh', '-c', 'sleep 1000 & sleep 1000; :']))\n"
        "threads = [threading.Thread(target=lambda: (fork(), time.sleep(1000)), daemon=True) for _ in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "fork()\n"
        "while len(family) < 3: time.sleep(0.01)\n"
        "print('up', flush=True)\n"
        "time.sleep(1000)\n",
        new_session=True,
    )
    root = reference(child)
    until(lambda: len(proc.descendants([root])) == 10)
    found = proc.descendants([root])
    assert found[0] == root
    parents = {process.pid: int((proc.read_stat(process.pid) or [])[proc.PARENT]) for process in found}
    order = [process.pid for process in found]
    assert all(order.index(parents[pid]) < order.index(pid) for pid in order[1:])
    assert set(proc.in_session(child.pid)) == set(found)
    assert set(proc.members(Membership(roots=(root,), session=child.pid))) == set(found)
    assert len(proc.members(Membership(roots=(root,), session=child.pid))) == 10
    os.killpg(child.pid, signal.SIGKILL)
    until(lambda: proc.in_session(child.pid) == [])


def test_members_of_a_cgroup(start: Start, tmp_path: Path) -> None:
    child = start()
    (tmp_path / "inner").mkdir()
    (tmp_path / "cgroup.procs").write_text(f"{child.pid}\n")
    (tmp_path / "inner/cgroup.procs").write_text(f"{os.getpid()}\n0\n")
    assert {process.pid for process in proc.in_cgroup(str(tmp_path))} == {child.pid, os.getpid()}
    assert proc.in_cgroup(str(tmp_path / "nowhere")) == []


def test_no_process_has_nothing() -> None:
    # Above every limit of PIDs there is.
    nobody = 1 << 23
    assert proc.read_stat(nobody) is None
    assert proc.identify(nobody) is None
    assert proc.children(nobody) == []
    assert proc.open_pidfd(ProcessRef(nobody, 1)) is None


def test_a_thread_is_no_process(start: Start) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert thread.native_id is not None
    assert proc.open_pidfd(ProcessRef(thread.native_id, 1)) is None
    stop.set()
    thread.join()


def test_without_descriptors_nobody_is_taken_for_dead() -> None:
    # A stop that finds all its processes gone is over: being unable to look must not look like that.
    done = subprocess.run([sys.executable, "-c", _NO_DESCRIPTORS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["EMFILE"] * 4


_NO_DESCRIPTORS = """
import errno, os, resource
from zonebundle.host import proc
us = proc.identify(os.getpid())
limit = max(map(int, os.listdir("/proc/self/fd")))
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
looks = [proc.is_alive, proc.open_pidfd, lambda one: proc.send_signal(one, 0), lambda one: proc.descendants([one])]
for look in looks:
    try: print(look(us))
    except OSError as error: print(errno.errorcode[error.errno])
"""


def test_the_boot_has_an_id() -> None:
    assert len(proc.boot_id()) == 36
    assert proc.boot_id() == proc.boot_id()
