import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.wait import until
from zonebundle.host import proc, syscalls
from zonebundle.host.priority import lower_priority
from zonebundle.host.trace import POINTS

pytestmark = pytest.mark.usefixtures("leak_check")


def python(script: str, **options: object) -> subprocess.CompletedProcess[str]:
    given: dict[str, object] = {"capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run([sys.executable, "-c", script], **given)  # type: ignore[call-overload,no-any-return]


def test_syncfs(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    syscalls.syncfs(descriptor)
    os.close(descriptor)
    with pytest.raises(OSError):
        syscalls.syncfs(descriptor)


def test_a_child_dies_with_its_parent() -> None:
    script = (
        "import os, signal, sys, time\n"
        "from zonebundle.host import syscalls\n"
        "parent = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    syscalls.die_with_parent(parent, signal.SIGKILL)\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(1000)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert proc.identify(child) is not None
        parent.kill()
        until(lambda: proc.identify(child) is None)


def test_a_child_whose_parent_is_dead_already_ends_at_once() -> None:
    done = python("from zonebundle.host import syscalls\nsyscalls.die_with_parent(1, 9)\nprint('still here')")
    # This test's process, not PID 1, is the parent.
    assert done.stdout == ""


def test_a_subreaper_adopts_orphans() -> None:
    script = (
        "import os, time\n"
        "from zonebundle.host import syscalls\n"
        "syscalls.become_subreaper()\n"
        "reading, writing = os.pipe()\n"
        "if (child := os.fork()) == 0:\n"
        "    if os.fork() == 0:\n"
        "        os.close(writing)\n"
        "        os.read(reading, 1)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "os.close(writing)\n"
        "print(os.waitpid(-1, 0)[1])\n"
    )
    assert python(script).stdout == "0\n"


def test_background_work_steps_back() -> None:
    script = (
        "import os\n"
        "from zonebundle.host.priority import lower_priority\n"
        "lower_priority()\n"
        "print(os.nice(0), os.sched_getscheduler(0) == os.SCHED_BATCH)\n"
    )
    assert python(script).stdout == "19 True\n"
    assert callable(lower_priority)


def test_only_the_calling_thread_enters_a_network_namespace() -> None:
    if os.geteuid() != 0:
        pytest.skip("entering a namespace needs root")
    done = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo up; exec sleep 1000"], stdout=subprocess.PIPE, text=True
    )
    with done:
        assert done.stdout is not None
        assert done.stdout.readline() == "up\n"
        theirs = os.readlink(f"/proc/{done.pid}/ns/net")
        ours = os.readlink("/proc/self/ns/net")
        assert theirs != ours
        seen: list[str] = []

        def look() -> None:
            descriptor = os.open(f"/proc/{done.pid}/ns/net", os.O_RDONLY)
            try:
                with syscalls.network_namespace(descriptor):
                    seen.append(os.readlink("/proc/thread-self/ns/net"))
                    seen.append(os.readlink("/proc/self/ns/net"))
                    made = socket.socket()
                seen.append(os.readlink("/proc/thread-self/ns/net"))
                # No interface is up there but the loopback, and that is down.
                with made, pytest.raises(OSError):
                    made.connect(("127.0.0.1", 1))
            finally:
                os.close(descriptor)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert seen == [theirs, ours, ours]
        done.send_signal(signal.SIGKILL)


def test_what_is_no_namespace_is_refused(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError), syscalls.network_namespace(descriptor):
            raise AssertionError("entered")
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("at", "passes"), [("seal.planned", 0), ("seal.planned:3", 2), ("", 5), ("nothing", 5)])
def test_a_trace_point_kills_at_the_passage_asked_for(at: str, passes: int) -> None:
    script = (
        "from zonebundle.host import trace\n"
        "for _ in range(5):\n"
        "    trace.point('seal.planned')\n"
        "    print('passed', flush=True)\n"
    )
    done = python(script, env={**os.environ, "ZONE_BUNDLE_CRASH_AT": at})
    assert done.stdout.count("passed") == passes
    assert done.returncode == (0 if passes == 5 else -signal.SIGKILL)


def test_trace_points_are_named_once() -> None:
    assert len(set(POINTS)) == len(POINTS)
