import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from support.wait import until
from zonebundle.capture import probe_stacks
from zonebundle.capture.probe_stacks import is_stopped, resume, stack_command, stack_text, stack_tool
from zonebundle.host import proc
from zonebundle.host import process as host_process
from zonebundle.model.report import Outcome
from zonebundle.model.zone import ProcessRef

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture
def process() -> Iterator[ProcessRef]:
    argv = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = proc.identify(child.pid)
        assert found is not None
        yield found
        child.kill()


def test_no_tool_is_no_command(process: ProcessRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_stacks, "stack_tool", lambda: None)
    assert stack_command(process) is None
    command = stack_command(process, "/opt/eu-stack")
    assert command is not None
    assert command[0] == "/opt/eu-stack"
    assert command[-2:] == ("-p", str(process.pid))


@pytest.mark.skipif(stack_tool() is None, reason="no eu-stack (elfutils)")
async def test_the_tool_tells_the_user_stacks_and_lets_go(process: ProcessRef) -> None:
    command = stack_command(process)
    assert command is not None
    done = await host_process.run(command, timeout=60)
    if b"not permitted" in done.output:
        pytest.skip("ptrace is not permitted here")
    assert done.outcome in (Outcome.SUCCESS, Outcome.FAIL), done
    assert f"TID {process.pid}".encode() in done.output
    assert b"#0 " in done.output
    assert not is_stopped(process)


def test_a_process_left_stopped_goes_on(process: ProcessRef) -> None:
    assert not is_stopped(process)
    proc.send_signal(process, signal.SIGSTOP)
    until(lambda: is_stopped(process))
    resume(process)
    until(lambda: not is_stopped(process))


def test_one_that_is_gone_is_not_resumed(process: ProcessRef) -> None:
    stranger = ProcessRef(process.pid, process.start_time - 1)
    proc.send_signal(process, signal.SIGSTOP)
    until(lambda: is_stopped(process))
    resume(stranger)
    assert is_stopped(process)


@pytest.mark.parametrize(
    ("output", "text"),
    [(b"#0  main\n#1 \x1b[31mx\r\xff\n", rb"#0  main" + b"\n" + rb"#1 \x1b[31mx\x0d\xff" + b"\n"), (b"", b"")],
)
def test_symbol_names_are_the_zones_and_are_escaped(output: bytes, text: bytes) -> None:
    assert stack_text(output) == text


def test_the_text_is_bounded() -> None:
    assert len(stack_text(b"x" * (1 << 20))) == 256 << 10
