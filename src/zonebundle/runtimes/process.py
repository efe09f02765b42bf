"""The process runtime: zones that are plain processes of the host, each under a supervisor of its own.

A zone with a command is started by the agent and survives it. A zone with a PID file is started by somebody else; it
can be looked at and stopped. The runtime needs no daemon and no privileges.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import secrets
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from zonebundle.errors import ConflictError, NoSuchZoneError, RuntimeFailedError, UsageError
from zonebundle.host import proc
from zonebundle.host.files import remove_tree
from zonebundle.host.process import built_environment
from zonebundle.model.ids import check_zone_name, decode_zone_name, encode_zone_name
from zonebundle.model.zone import Incarnation, LogTree, Membership, ProcessRef, Zone
from zonebundle.runtimes import adopt
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.killing import PATIENCE, end
from zonebundle.runtimes.launch import Launcher, Plan
from zonebundle.runtimes.pid_file import read_pid_file
from zonebundle.runtimes.starts import Starts
from zonebundle.runtimes.tree import ScatteredTree, Session
from zonebundle.runtimes.waiting import ended

CONSOLE_PATTERNS = ("console.log*",)
_PID_FILE_TIMEOUT = 2.0
_SUPERVISOR_LINGERS = 5.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ProcessZone:
    """A zone as the configuration gives it: either a command or a PID file.

    `root` is where the command runs and below which `logs` (globs) are looked for; without it a command runs in `/`
    and only its console is collected. `environment` is added to a small built one. A PID file has to be on a local
    file system.
    """

    command: tuple[str, ...] = ()
    pid_file: str | None = None
    root: str | None = None
    logs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.pid_file):
            raise UsageError("a zone of the process runtime needs either a command or a PID file, and not both")
        for text in (*self.command, self.root or "", *self.environment, *self.environment.values()):
            if "\0" in text:
                raise UsageError(f"{text[:60]!r} holds a zero byte, which no command or environment can")
        for name in self.environment:
            if not name or "=" in name:
                raise UsageError(f"{name[:60]!r} cannot be the name of an environment variable")


class ProcessRuntime:
    """Runs the configured zones. State is kept in `<state_dir>/zones/<zone>/`; see supervise.py for what is there.

    A zone that still runs though it is no longer configured is known until it ends. `python` is the supervisors'
    interpreter, `start_timeout` and `patience` are seconds: until a command is executed, until what was killed is gone.
    """

    name = "process"

    def __init__(
        self,
        zones: Mapping[str, ProcessZone],
        state_dir: Path,
        *,
        python: str = sys.executable,
        start_timeout: float = 30.0,
        patience: float = PATIENCE,
    ) -> None:
        self._zones = {check_zone_name(name): zone for name, zone in zones.items()}
        self._directory = state_dir / "zones"
        self._patience = patience
        self._launcher = Launcher(python=python, timeout=start_timeout)
        self._starts = Starts()
        # A PID file that hangs must not take anything else with it.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="pid-file")

    async def list(self) -> builtins.list[Zone]:
        """The configured zones, and those that still run without being configured any more."""
        zones = []
        for name in [*self._zones, *self._unconfigured()]:
            try:
                zone = await self.find(name)
            except RuntimeFailedError as error:
                # One zone that cannot be judged must not hide the others; whoever asks for it hears why.
                log.warning("%s", error)
                zone = self._describe(name, None, Membership())
            if zone is not None:
                zones.append(zone)
        return zones

    def _unconfigured(self) -> builtins.list[str]:
        try:
            entries = sorted(entry.name for entry in os.scandir(self._directory) if entry.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RuntimeFailedError(f"cannot list the zones in {self._directory}: {error.strerror}") from error
        return [name for name in map(decode_zone_name, entries) if name not in self._zones]

    async def find(self, zone: str) -> Zone | None:
        """A fresh look at one zone: about 0.2 ms for five processes. Raises RuntimeFailedError if it cannot be told."""
        config = self._zones.get(zone)
        if config is not None and config.pid_file is not None:
            init = await self._read_pid_file(zone, config.pid_file)
            if init is None:
                return self._describe(zone, None, Membership())
            session = init.pid if _leads_session(init) else None
            return self._describe(zone, Incarnation(proc.boot_id(), init), Membership((init,), session))
        sight = await self._look(zone)
        if sight is not None and sight.processes:
            return self._describe(zone, sight.life.incarnation, sight.membership)
        return None if config is None else self._describe(zone, None, Membership())

    async def start(self, zone: str) -> Zone:
        """Start a zone with a command, under a new supervisor; returns what is then found.

        Raises NoSuchZoneError, UsageError for a zone with a PID file, ConflictError, RuntimeFailedError naming the
        zone and the program.
        """
        config = self._zones.get(zone)
        if config is None:
            raise NoSuchZoneError(zone)
        if config.pid_file is not None:
            raise UsageError(
                f"zone '{zone}' cannot be started here: it is known by its PID file {config.pid_file} only; "
                "start it by whatever writes that file"
            )
        return await self._starts.run(zone, self._start(zone, config))

    async def _start(self, zone: str, config: ProcessZone) -> Zone:
        sight = await self._look(zone)
        if sight is not None and sight.processes:
            raise ConflictError(f"zone '{zone}' runs already (process {sight.processes[0].pid})")
        if sight is not None:
            await _see_off(sight.life.supervisor)
        plan = Plan(
            instance=secrets.token_hex(16),
            command=config.command,
            root=config.root or "/",
            environment=built_environment(config.environment),
        )
        try:
            await self._launcher.launch(zone, self._directory_of(zone), plan)
        except RuntimeFailedError:
            # A supervisor that is killed before its answer leaves a zone all the same, if its command was executed.
            found = await self.find(zone)
            if found is None or found.incarnation is None or found.incarnation.instance != plan.instance:
                raise
            return found
        found = await self.find(zone)
        assert found is not None
        return found

    async def stop(self, zone: Zone, grace: Grace) -> None:
        """TERM to every process of the zone, then the grace, then KILL until none is left.

        Also waits for the supervisor. Raises RuntimeFailedError if something survives KILL, or cannot be told.
        """
        if zone.incarnation is None:
            return
        config = self._zones.get(zone.name)
        if config is not None and config.pid_file is not None:
            await self._stop_by_pid_file(zone, zone.incarnation, grace)
            return
        # Once is enough, unless the supervisor is killed meanwhile: then what it left is looked for.
        while (sight := await self._look(zone.name)) is not None and sight.life.incarnation == zone.incarnation:
            await end(sight.tree(), f"zone '{zone.name}'", grace, patience=self._patience)
            self._launcher.reap(sight.life.supervisor)

    async def _stop_by_pid_file(self, zone: Zone, incarnation: Incarnation, grace: Grace) -> None:
        init = incarnation.init
        if init is None or incarnation.boot_id != proc.boot_id() or not proc.is_alive(init):
            return
        searches = [Session(init)] if _leads_session(init) else []
        tree = ScatteredTree([init], *searches)
        await end(tree, f"zone '{zone.name}'", grace, patience=self._patience)

    async def remove(self, zone: Zone) -> None:
        """Remove what the runtime keeps of a stopped zone: its console and exit status. Its root is not touched."""
        sight = await self._look(zone.name)
        if zone.name in self._starts or (sight is not None and sight.processes):
            raise ConflictError(f"zone '{zone.name}' cannot be removed while it runs; stop it first")
        if sight is not None:
            await _see_off(sight.life.supervisor)
        try:
            remove_tree(self._directory_of(zone.name))
        except OSError as error:
            raise RuntimeFailedError(f"cannot remove the state of zone '{zone.name}': {error}") from error

    async def close(self) -> None:
        """Wait for starts that are under way, and let go. The zones go on under their supervisors."""
        await self._starts.drain()
        self._launcher.close()
        self._threads.shutdown(wait=False)

    def last_exit(self, zone: str) -> adopt.Exit | None:
        """How the zone's latest first process ended, if that is known."""
        return adopt.read_exit(self._directory_of(zone))

    def _directory_of(self, zone: str) -> Path:
        return self._directory / encode_zone_name(zone)

    async def _look(self, zone: str) -> adopt.Sight | None:
        try:
            sight = await adopt.look(self._directory_of(zone))
        except OSError as error:
            raise RuntimeFailedError(f"cannot tell whether zone '{zone}' runs: {error}") from error
        if sight is not None and sight.supervised:
            self._launcher.watch(sight.life.supervisor)
        return sight

    async def _read_pid_file(self, zone: str, path: str) -> ProcessRef | None:
        reading = asyncio.get_running_loop().run_in_executor(self._threads, read_pid_file, path)
        try:
            return await asyncio.wait_for(reading, _PID_FILE_TIMEOUT)
        except TimeoutError:
            reason = f"the PID file {path} cannot be read within {_PID_FILE_TIMEOUT:g} s"
            raise RuntimeFailedError(f"cannot tell whether zone '{zone}' runs: {reason}") from None
        except RuntimeFailedError as error:
            raise RuntimeFailedError(f"cannot tell whether zone '{zone}' runs: {error}") from error

    def _describe(self, name: str, incarnation: Incarnation | None, membership: Membership) -> Zone:
        config = self._zones.get(name)
        logs: list[LogTree] = []
        if config is not None and config.root is not None and config.logs:
            logs.append(LogTree(source="zone", path=config.root, patterns=config.logs))
        if config is None or config.pid_file is None:
            logs.append(LogTree(source="console", path=str(self._directory_of(name)), patterns=CONSOLE_PATTERNS))
        return Zone(
            name=name,
            runtime=self.name,
            state="stopped" if incarnation is None else "running",
            incarnation=incarnation,
            membership=membership,
            logs=tuple(logs),
            directory=(config.root if config else None) or "/",
        )


async def _see_off(supervisor: ProcessRef) -> None:
    """Let a supervisor go that has nothing left to supervise."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ended(supervisor), _SUPERVISOR_LINGERS)


def _leads_session(process: ProcessRef) -> bool:
    """Whether the session is the process's own: one it was merely born into may be the operator's login."""
    fields = proc.read_stat(process.pid)
    return fields is not None and int(fields[proc.SESSION]) == process.pid
