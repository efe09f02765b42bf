"""The stage of the demo: a private directory, the configuration of its zones, and an agent of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zonebundle.cli.client import AgentClient
from zonebundle.errors import AgentUnreachableError, ZoneBundleError
from zonebundle.host import proc
from zonebundle.host.process import kill_strays
from zonebundle.host.syscalls import become_subreaper, syncfs
from zonebundle.model.paths import printable

_ZONES = {"web": 6, "api": 5, "db": 3, "cache": 3, "queue": 3, "auth": 2, "mail": 2}
_LOGS = {"web": ("access", "error", "app"), "db": ("queries", "slow", "server")}
_OTHER_LOGS = ("requests", "events", "audit")
# A current log and 13 rotated ones a worker: 1,008 files and some 300 MB in all.
_FILES = 14
_FILE_BYTES = 300_000

NEEDED_BYTES: Final = 1 << 30
_LONGEST_SOCKET = 107
_START_TIMEOUT = 30.0
_END_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the demo happens: everything it makes lies in `directory`."""

    directory: Path

    @property
    def socket(self) -> Path:
        return self.directory / "agent.sock"

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def log(self) -> Path:
        return self.directory / "agent.log"

    @property
    def zones(self) -> list[str]:
        return [f"{kind}-{number:02}" for kind, count in _ZONES.items() for number in range(1, count + 1)]

    @property
    def expected_bytes(self) -> int:
        """About how much all zones will have written when they are ready."""
        return int(sum(count_workers(zone) for zone in self.zones) * _FILE_BYTES * (_FILES - 0.5))

    def root(self, zone: str) -> Path:
        return self.directory / "zones" / zone

    def logs(self, zone: str) -> list[Path]:
        """The zone's log files, as they are now."""
        try:
            return sorted((self.root(zone) / "logs").iterdir())
        except FileNotFoundError:
            return []

    def write_out(self) -> None:
        """Wait until the disk has what has been written."""
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            syncfs(descriptor)
        finally:
            os.close(descriptor)

    def is_ready(self, zone: str) -> bool:
        """Whether the zone's workers have written the logs of the past and go on at an everyday pace."""
        return (self.root(zone) / "ready").exists()


def count_workers(zone: str) -> int:
    """How many workers a zone of the demo has."""
    return len(_LOGS.get(zone.rpartition("-")[0], _OTHER_LOGS))


def set_stage() -> Stage:
    """Make the directory with its configuration; raises ZoneBundleError if there is no room."""
    # mkdtemp makes a private directory of an unpredictable name in any of them.
    for parent in dict.fromkeys((tempfile.gettempdir(), "/var/tmp", "/tmp")):  # noqa: S108
        with contextlib.suppress(OSError):
            if shutil.disk_usage(parent).free < NEEDED_BYTES:
                continue
            stage = Stage(Path(tempfile.mkdtemp(prefix="zone-bundle-demo-", dir=parent)))
            if len(os.fsencode(stage.socket)) > _LONGEST_SOCKET:
                stage.directory.rmdir()
                continue
            _write_config(stage)
            return stage
    raise ZoneBundleError(
        f"no place for the demo: it needs {NEEDED_BYTES >> 30} GiB free in a directory with a short name; set TMPDIR"
    )


def _write_config(stage: Stage) -> None:
    directory = stage.directory
    lines = [
        "[agent]",
        f"state-dir = {_toml(directory / 'state')}",
        f"listen = [{_toml(f'unix:{stage.socket}')}]",
        # A machine that is busy with other things shall take longer, not lose evidence.
        "[hold]",
        'budget = "20s"',
        # User stacks take 10 ms of CPU a process, if the host has a tool for them: with 24 zones of 4 processes each,
        # stopped in one moment on a small machine, they would be most of what is measured.
        "[evidence]",
        'stacks = "kernel"',
        "[store]",
        f"dirs = [{_toml(directory / 'store')}]",
    ]
    program = Path(__file__).with_name("demo_workload.py")
    for zone in stage.zones:
        stage.root(zone).mkdir(parents=True)
        logs = _LOGS.get(zone.rpartition("-")[0], _OTHER_LOGS)
        sizes = ("--files", str(_FILES), "--file-bytes", str(_FILE_BYTES))
        command = (sys.executable, "-I", "-S", str(program), "--service", zone, *sizes, *logs)
        lines += [
            f"[zones.{zone}]",
            f"command = [{', '.join(_toml(argument) for argument in command)}]",
            f"root = {_toml(stage.root(zone))}",
        ]
    stage.config.write_text("\n".join(lines) + "\n")


def _toml(text: str | Path) -> str:
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


class DemoAgent:
    """The agent of the demo: a real one, as `zone-bundle agent` runs it."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        with stage.log.open("wb") as log:
            # A session of its own: Ctrl-C is for the demo, which then ends the agent in order.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "zonebundle.cli.main", "agent", "--config", str(stage.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Return when it answers; raises ZoneBundleError with the end of its log if it does not."""
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            if not self.is_running:
                raise ZoneBundleError(f"the agent ended with status {self._process.returncode}: {self.last_words()}")
            with contextlib.suppress(AgentUnreachableError), AgentClient(self._stage.socket) as client:
                client.call("GET", "/zones")
                return
            time.sleep(0.02)
        raise ZoneBundleError(f"the agent did not answer within {_START_TIMEOUT:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        """The last line that it logged."""
        lines = self._stage.log.read_text(errors="replace").strip().splitlines()
        return printable(lines[-1]) if lines else "it logged nothing"

    def let_go(self) -> None:
        """Leave it running when this process ends."""
        # Popen would warn of a child that is still there.
        self._process.returncode = 0

    def end(self) -> None:
        """TERM, time to end, KILL; reaped in any case."""
        self._process.terminate()
        try:
            self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def performed(stage: Stage) -> Iterator[tuple[DemoAgent, contextlib.ExitStack]]:
    """Start the agent; at the end, all that ran because of it is ended and the directory removed.

    The clean-up is the stack that is given too: `pop_all()` on it, and everything stays.
    """
    # Zones outlive their agent: orphaned, they come to this process.
    become_subreaper()
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_remove, stage)
        cleanup.callback(_end_processes)
        agent = DemoAgent(stage)
        cleanup.callback(agent.end)
        # Pressed again, Ctrl-C does not break the clean-up, which takes seconds at most.
        cleanup.callback(_ignore_interrupts)
        yield agent, cleanup


def _ignore_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _end_processes() -> None:
    deadline = time.monotonic() + _END_TIMEOUT
    while proc.children(os.getpid()) and time.monotonic() < deadline:
        kill_strays()


def _remove(stage: Stage) -> None:
    try:
        shutil.rmtree(stage.directory)
    except OSError as error:
        raise ZoneBundleError(
            f"cannot remove {stage.directory}: {error.strerror} ({error.filename}); remove it yourself"
        ) from None
