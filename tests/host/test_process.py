"""host.process against programs that do not want to end, under both event loops."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from support.wait import until, until_async
from zonebundle.host import proc, process
from zonebundle.host.process import Completed, built_environment, run
from zonebundle.model.report import Outcome
from zonebundle.model.zone import ProcessRef

pytestmark = pytest.mark.usefixtures("leak_check")

T = TypeVar("T")
Loop = Callable[[Coroutine[Any, Any, T]], T]

# Long enough for any machine; a test that waits for it has failed.
_AGES = 60.0

# libuv opens a pipe for all loops with the first one, and keeps it.
uvloop.new_event_loop().close()


@pytest.fixture(params=[pytest.param("asyncio", marks=pytest.mark.slow), "uvloop"])
def loop(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """A function that runs a coroutine in a fresh loop of each kind in turn; the agent has uvloop's."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run_in_it(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(work)

    return run_in_it


def sh(script: str, **options: Any) -> Coroutine[Any, Any, Completed]:
    return run(["sh", "-c", script], **{"timeout": _AGES, **options})


def python(script: str, **options: Any) -> Coroutine[Any, Any, Completed]:
    return run([sys.executable, "-c", script], **{"timeout": _AGES, **options})


def test_what_a_program_printed_and_how_it_ended(loop: Loop[Completed]) -> None:
    done = loop(sh("echo out; echo err >&2; exit 3"))
    assert (done.outcome, done.status, done.detail) == (Outcome.FAIL, 3, "exit status 3")
    assert sorted(done.output.splitlines()) == [b"err", b"out"]
    assert done.errors == b""
    assert not done.truncated
    assert 0 < done.seconds < _AGES


def test_errors_apart(loop: Loop[Completed]) -> None:
    done = loop(sh("echo out; echo err >&2", separate_errors=True))
    assert (done.outcome, done.output, done.errors) == (Outcome.SUCCESS, b"out\n", b"err\n")


def test_a_program_killed_by_a_signal(loop: Loop[Completed]) -> None:
    done = loop(sh("kill -SEGV $$"))
    assert (done.outcome, done.status, done.detail) == (Outcome.FAIL, -11, "killed by signal 11")


def test_more_than_a_pipe_holds(loop: Loop[Completed]) -> None:
    done = loop(python("import sys; sys.stdout.buffer.write(b'x' * 900_000); sys.stderr.buffer.write(b'y' * 100_000)"))
    assert done.outcome is Outcome.SUCCESS
    assert (done.output.count(b"x"), done.output.count(b"y")) == (900_000, 100_000)


def test_output_of_exactly_the_limit_is_whole_and_one_byte_more_is_not(loop: Loop[Completed]) -> None:
    whole = loop(sh("printf 12345", limit=5))
    assert (whole.outcome, whole.output, whole.truncated) == (Outcome.SUCCESS, b"12345", False)
    cut = loop(sh("printf 123456", limit=5))
    assert (cut.outcome, cut.output, cut.truncated) == (Outcome.UNKNOWN, b"12345", True)
    assert "more than 5 bytes" in cut.detail


@pytest.mark.parametrize("script", ["yes", "trap '' TERM; yes", "yes & yes & wait", "exec cat /dev/zero >&2"])
def test_a_program_that_prints_without_end_is_ended(loop: Loop[Completed], script: str) -> None:
    done = loop(sh(script, limit=300_000))
    assert (done.outcome, len(done.output), done.truncated) == (Outcome.UNKNOWN, 300_000, True)


def test_a_time_out_ends_it_and_keeps_what_it_printed(loop: Loop[Completed]) -> None:
    done = loop(sh("echo begun; sleep 1000; echo never", timeout=0.3))
    assert (done.outcome, done.output) == (Outcome.TIMEOUT, b"begun\n")
    assert "0.3 s" in done.detail
    assert done.status == -signal.SIGTERM


@pytest.mark.slow
def test_term_comes_first_and_its_last_words_are_kept(loop: Loop[Completed]) -> None:
    done = loop(python(_SAYS_GOODBYE, timeout=1.0, grace=_AGES))
    assert (done.outcome, done.output, done.status) == (Outcome.TIMEOUT, b"hello\ngoodbye\n", 7)


_SAYS_GOODBYE = """
import signal, sys, time
def end(*_):
    print("goodbye", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print("hello", flush=True)
time.sleep(1000)
"""


def test_kill_comes_after_the_grace(loop: Loop[Completed]) -> None:
    begin = time.monotonic()
    done = loop(sh("trap '' TERM; echo deaf; while :; do sleep 1000; done", timeout=0.3, grace=0.1))
    assert (done.outcome, done.output, done.status) == (Outcome.TIMEOUT, b"deaf\n", -signal.SIGKILL)
    assert time.monotonic() - begin < 10


def test_a_stopped_program_is_ended_too(loop: Loop[Completed]) -> None:
    assert loop(sh("kill -STOP $$", timeout=0.2, grace=0.1)).outcome is Outcome.TIMEOUT


def test_a_time_out_of_nothing(loop: Loop[Completed]) -> None:
    assert loop(sh("sleep 1000", timeout=0.0, grace=0.0)).outcome is Outcome.TIMEOUT


def test_a_grandchild_that_holds_the_pipe_is_not_waited_for(loop: Loop[Completed], tmp_path: Path) -> None:
    begin = time.monotonic()
    done = loop(sh(f"sleep 1000 & echo $! > {tmp_path}/pid; echo done"))
    assert (done.outcome, done.output) == (Outcome.SUCCESS, b"done\n")
    assert time.monotonic() - begin < 10
    assert gone(tmp_path / "pid")


def test_what_a_grandchild_prints_in_the_end_is_kept(loop: Loop[Completed]) -> None:
    assert loop(sh("echo first; (echo second) &")).output in (b"first\nsecond\n", b"second\nfirst\n")


@pytest.mark.slow
def test_the_whole_group_goes_with_a_time_out(loop: Loop[Completed], tmp_path: Path) -> None:
    script = f"trap '' TERM; (trap '' TERM; sleep 1000) & echo $! > {tmp_path}/pid; echo begun; wait"
    done = loop(sh(script, timeout=0.5, grace=0.05))
    assert (done.outcome, done.output) == (Outcome.TIMEOUT, b"begun\n")
    assert gone(tmp_path / "pid")


def test_a_daemon_that_left_the_group_does_not_hold_up_the_end(loop: Loop[Completed], tmp_path: Path) -> None:
    # It is beyond a process group; kill_strays of the subreaper finds it.
    done = loop(sh(f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' & sleep 0.2; echo done"))
    assert (done.outcome, done.output) == (Outcome.SUCCESS, b"done\n")
    os.kill(int(until(lambda: (tmp_path / "pid").read_text())), signal.SIGKILL)


def gone(pid_file: Path) -> bool:
    pid = int(pid_file.read_text())
    return until(lambda: proc.identify(pid) is None)


CANNOT: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "no such program": (["zonebundle-no-such-program"], {}, "no such program"),
    "no such path": (["/no/such/program"], {}, "no such program"),
    "a directory": (["/etc"], {}, "Permission denied"),
    "no such directory": (["true"], {"directory": "/no/such/directory"}, "in /no/such/directory"),
    "null byte": (["ec\0ho"], {}, "null byte"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_be_started_is_an_outcome(loop: Loop[Completed], what: str) -> None:
    argv, options, words = CANNOT[what]
    done = loop(run(argv, timeout=_AGES, **options))
    assert (done.outcome, done.status, done.output) == (Outcome.FAIL, None, b"")
    assert words in done.detail
    assert done.detail.startswith("cannot run ")


def test_a_file_of_no_known_format_cannot_be_started(loop: Loop[Completed], tmp_path: Path) -> None:
    (tmp_path / "program").write_text("neither a script nor a program")
    (tmp_path / "program").chmod(0o700)
    done = loop(run([str(tmp_path / "program")], timeout=_AGES))
    assert (done.outcome, done.status) == (Outcome.FAIL, None)


def test_the_child_gets_a_built_environment_no_input_and_a_group_of_its_own(
    loop: Loop[Completed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    done = loop(python(_TELL, environment=built_environment({"EXTRA": "y"}) | {"PYTHONUTF8": "1"}))
    told = json.loads(done.output)
    assert {"PATH", "HOME", "LC_ALL", "EXTRA"} <= set(told["environment"])
    assert "SECRET" not in told["environment"]
    assert told["input"] == ""
    assert told["group"] == told["session"] == told["pid"]
    assert told["directory"] == "/"
    # Three standard ones, and that of the listing itself.
    assert len(told["descriptors"]) == 4


_TELL = """
import json, os, sys
print(json.dumps({
    "environment": dict(os.environ), "input": sys.stdin.read(), "pid": os.getpid(), "group": os.getpgrp(),
    "session": os.getsid(0), "directory": os.getcwd(), "descriptors": os.listdir("/proc/self/fd"),
}))
"""


def test_the_start_is_told_with_the_identity(loop: Loop[Completed]) -> None:
    told: list[ProcessRef] = []
    done = loop(sh("echo $$", started=told.append))
    assert [reference.pid for reference in told] == [int(done.output)]
    assert told[0].start_time > 0


def test_a_failing_listener_ends_the_program(loop: Loop[Completed]) -> None:
    told: list[ProcessRef] = []

    def fail(reference: ProcessRef) -> None:
        told.append(reference)
        raise OSError("the spool is full")

    with pytest.raises(OSError, match="spool is full"):
        loop(sh("sleep 1000", started=fail))
    assert not proc.is_alive(told[0])


def test_the_command_can_be_pasted_into_a_shell(loop: Loop[Completed]) -> None:
    done = loop(run(["echo", "a b", "it's", "$HOME"], timeout=_AGES))
    assert shlex.split(done.command_line) == ["echo", "a b", "it's", "$HOME"]
    assert done.output == b"a b it's $HOME\n"


def test_cancelling_ends_the_whole_group(loop: Loop[None], tmp_path: Path) -> None:
    async def cancel() -> None:
        script = "sleep 1000 & echo $! > new; mv new pid; wait"
        work = asyncio.ensure_future(sh(script, directory=str(tmp_path)))
        await until_async((tmp_path / "pid").exists)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    loop(cancel())
    assert gone(tmp_path / "pid")


def test_cancelling_asks_before_it_kills(loop: Loop[None], tmp_path: Path) -> None:
    # A container runtime forwards the TERM to what it runs inside; a KILL it could not.
    async def cancel() -> None:
        script = "trap 'echo asked > asked; exit' TERM; touch up; while :; do sleep 0.01; done"
        work = asyncio.ensure_future(sh(script, directory=str(tmp_path), grace=_AGES))
        await until_async((tmp_path / "up").exists)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    loop(cancel())
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_cancelling_twice_leaves_nothing_either(loop: Loop[None], tmp_path: Path) -> None:
    async def cancel() -> None:
        told: list[ProcessRef] = []
        options: dict[str, Any] = {"directory": str(tmp_path), "grace": _AGES, "started": told.append}
        work = asyncio.ensure_future(sh("trap '' TERM; touch up; sleep 1000", **options))
        await until_async((tmp_path / "up").exists)
        work.cancel()
        await asyncio.sleep(0)
        work.cancel()
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await until_async(lambda: not proc.is_alive(told[0]))
        # The next run reaps what could not be waited for.
        await sh("true")

    loop(cancel())


def test_many_at_once(loop: Loop[list[Completed]]) -> None:
    async def all_of_them() -> list[Completed]:
        return list(await asyncio.gather(*(sh(f"echo {number}; exit {number % 2}") for number in range(40))))

    done = loop(all_of_them())
    assert [int(each.output) for each in done] == list(range(40))
    assert {each.outcome for each in done[1::2]} == {Outcome.FAIL}


@pytest.mark.slow
def test_the_loop_stays_awake_meanwhile(loop: Loop[float]) -> None:
    async def longest_pause() -> float:
        work = asyncio.ensure_future(sh("trap '' TERM; sleep 0.3; yes | head -c 200000; sleep 1000", timeout=0.6))
        longest = 0.0
        while not work.done():
            begin = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - begin)
        return longest

    # A blocked loop would show as the time-out, the grace, or the program's own pauses.
    assert loop(longest_pause()) < 0.25


def test_without_descriptors_it_is_an_error_and_no_leak(loop: Loop[None]) -> None:
    # In a child: the loop and the leak check of this process need descriptors as well.
    done = subprocess.run([sys.executable, "-c", _NO_DESCRIPTORS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["OSError"] * 12, done.stderr


_NO_DESCRIPTORS = """
import asyncio, os, resource
from zonebundle.host.process import run
async def main():
    await run(["true"], timeout=60)
    before = sorted(os.listdir("/proc/self/fd"))
    for room in range(12):
        full = [os.open("/dev/null", os.O_RDONLY) for _ in range(room)]
        limit = max(map(int, os.listdir("/proc/self/fd"))) + 1
        for descriptor in full:
            os.close(descriptor)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            done = await run(["sleep", "0"], timeout=60, separate_errors=True)
            print("OSError" if done.status in (0, None) else done)
        except OSError:
            print("OSError")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        await run(["true"], timeout=60)
        assert sorted(os.listdir("/proc/self/fd")) == before
        children = open(f"/proc/self/task/{os.getpid()}/children").read()
        assert children == "", children
asyncio.run(main())
"""


def test_kill_strays_ends_what_left_its_group_and_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", _STRAYS], capture_output=True, text=True, check=True, timeout=60)
    told = json.loads(done.stdout)
    assert told["killed"] >= 3
    assert told["left"] == []
    assert told["again"] == 0
    for pid in told["pids"]:
        assert proc.identify(pid) is None


_STRAYS = """
import asyncio, json, os, pathlib, resource, tempfile, time
from zonebundle.host import proc, syscalls
from zonebundle.host.process import kill_strays, run
syscalls.become_subreaper()
# Descriptors beyond what select() can take.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
high = [os.dup(0) for _ in range(1100)]
directory = pathlib.Path(tempfile.mkdtemp())
script = f'''
cd {directory}
for number in 1 2 3; do setsid sh -c "trap '' TERM HUP; echo \\$\\$ > $number; sleep 1000; sleep 1000" & done
while [ ! -s 1 -o ! -s 2 -o ! -s 3 ]; do sleep 0.01; done
'''
done = asyncio.run(run(["sh", "-c", script], timeout=60))
assert done.outcome == "success", done
pids = [int((directory / str(number)).read_text()) for number in (1, 2, 3)]
assert all(proc.identify(pid) for pid in pids)
killed = kill_strays()
print(json.dumps({"killed": killed, "left": proc.children(os.getpid()), "pids": pids, "again": kill_strays()}))
"""


def test_what_hangs_in_the_kernel_is_reaped_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KILL that does nothing stands for a process in uninterruptible sleep: neither waited for nor forgotten."""
    monkeypatch.setattr(process, "_REAP", 0.05)
    told: list[ProcessRef] = []
    kill = os.killpg

    def without_effect(group: int, number: int) -> None:
        if number != signal.SIGKILL:
            kill(group, number)

    async def hang() -> Completed:
        with monkeypatch.context() as patch:
            patch.setattr(os, "killpg", without_effect)
            return await sh("trap '' TERM; echo begun; sleep 1000", timeout=0.3, grace=0.05, started=told.append)

    done = asyncio.run(hang())
    assert (done.outcome, done.status, done.output) == (Outcome.TIMEOUT, None, b"begun\n")
    assert "still there" in done.detail
    assert proc.is_alive(told[0])
    os.killpg(told[0].pid, signal.SIGKILL)
    until(lambda: not proc.is_alive(told[0]))
    asyncio.run(sh("true"))
    assert not os.path.exists(f"/proc/{told[0].pid}")
