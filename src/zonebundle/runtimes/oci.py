"""The oci runtime: containers that `runc`, or a tool with its command line, runs on this host."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import secrets
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from zonebundle.errors import ConflictError, NoSuchZoneError, RuntimeFailedError, RuntimeUnavailableError, UsageError
from zonebundle.host import proc
from zonebundle.host.files import remove_tree
from zonebundle.host.process import Completed, built_environment, run
from zonebundle.model.ids import check_zone_name, encode_zone_name
from zonebundle.model.report import Outcome
from zonebundle.model.zone import COMMAND_MARK, Incarnation, LogTree, Membership, ProcessRef, Zone
from zonebundle.runtimes import adopt
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.cgroups import Cgroup, cgroup_names, find_cgroup
from zonebundle.runtimes.killing import PATIENCE, end
from zonebundle.runtimes.launch import Launcher, Plan
from zonebundle.runtimes.oci_config import OciConfig, log_trees, read_config
from zonebundle.runtimes.starts import Starts
from zonebundle.runtimes.tree import ScatteredTree
from zonebundle.runtimes.waiting import ended

CONSOLE_PATTERNS = ("console.log*",)
_LARGEST_LIST = 64 << 20
_TOOL_TIMEOUT = 30.0
_LOOK_TIMEOUT = 2.0
_SUPERVISOR_LINGERS = 5.0
_TAIL = 500

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Container:
    """What `runc state` says of a container. `created` tells its lives apart: an ID may be used again."""

    id: str
    status: str
    pid: int
    bundle: str
    rootfs: str
    created: str

    @property
    def is_running(self) -> bool:
        return self.status in ("running", "paused")


class OciRuntime:
    """Zones are the containers of one runc state directory, each named as its container's ID.

    `command` is the tool, `root` its state directory (None: its default), `log_patterns` globs relative to a
    container's root. `state_dir` is the agent's: the console of containers that the agent starts is kept below it.
    """

    name = "oci"

    def __init__(
        self,
        command: str = "runc",
        root: str | None = None,
        log_patterns: tuple[str, ...] = ("var/log/**",),
        *,
        state_dir: Path,
        python: str = sys.executable,
        patience: float = PATIENCE,
    ) -> None:
        self._tool = (command, *(("--root", root) if root is not None else ()))
        self._patterns = log_patterns
        self._directory = state_dir / "oci"
        self._patience = patience
        self._launcher = Launcher(python=python)
        self._starts = Starts()
        # Stopped containers that the tool does not know between their deletion and their new life.
        self._away: dict[str, Container] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="oci")

    async def list(self) -> builtins.list[Zone]:
        """Every container of the state directory whose ID can be a zone's name."""
        done = await self._run("list", "-f", "json", limit=_LARGEST_LIST)
        entries = _parse(done, list)
        known = [_container(entry) for entry in entries or []]
        away = self._away.keys() - {container.id for container in known}
        zones = []
        for container in [*known, *(self._away[zone] for zone in away)]:
            try:
                check_zone_name(container.id)
            except UsageError as error:
                log.warning("a container of %s is passed over: %s", self._tool[0], error)
                continue
            zones.append(await self._describe(container))
        return zones

    async def find(self, zone: str) -> Zone | None:
        """A fresh look at one container; takes one run of the tool."""
        container = await self._state(zone) or self._away.get(zone)
        return None if container is None else await self._describe(container)

    async def start(self, zone: str) -> Zone:
        """Start a created container, or run a stopped one again from its bundle."""
        return await self._starts.run(zone, self._start(zone))

    async def _start(self, zone: str) -> Zone:
        container = await self._state(zone)
        if container is None:
            raise NoSuchZoneError(zone)
        if container.is_running:
            raise ConflictError(f"zone '{zone}' runs already (process {container.pid})")
        if container.status == "created":
            await self._run("start", "--", zone)
        else:
            self._away[zone] = container
            try:
                await self._run("delete", "--", zone)
                await self._run_again(container)
            finally:
                del self._away[zone]
        found = await self.find(zone)
        if found is None:
            raise RuntimeFailedError(f"zone '{zone}' was started, but {self._tool[0]} does not know it any more")
        return found

    async def _run_again(self, container: Container) -> None:
        """Run a container detached, under a supervisor that keeps its output, as its adopted parent, until it ends."""
        directory = self._directory_of(container.id)
        command = (*self._tool, "run", "--detach", "--bundle", container.bundle, "--", container.id)
        plan = Plan(secrets.token_hex(16), command, container.bundle, built_environment())
        await self._see_off(self._supervisor_of(container.id))
        await self._launcher.launch(container.id, directory, plan)
        # What the supervisor calls init is the tool itself, which ends when the container runs.
        life = adopt.read_life(directory)
        if life is not None:
            await ended(life.init)
        if await self._state(container.id) is None:
            # Its last words are in the console when it has gone.
            await self._see_off(life.supervisor if life is not None else None)
            raise RuntimeFailedError(
                f"cannot start zone '{container.id}': {shlex.join(command)} failed and the container is deleted: "
                f"{_tail(directory / 'console.log')}; when that is mended, run this command yourself"
            )

    async def stop(self, zone: Zone, grace: Grace) -> None:
        """TERM to the container's first process, as its image expects it, then the grace, then KILL to all of it.

        The signals go to processes that are pinned, never to an ID that may have another life by now. A paused
        container is resumed for it.
        """
        init = zone.incarnation.init if zone.incarnation is not None else None
        if zone.incarnation is None or init is None or zone.incarnation.boot_id != proc.boot_id():
            return
        container = await self._state(zone.name)
        same_life = container is not None and _is_life(container, zone.incarnation)
        if not same_life and not proc.is_alive(init):
            return
        supervisor = self._supervisor_of(zone.name)
        if container is not None and same_life and container.status == "paused":
            await self._run("resume", "--", zone.name)
        with contextlib.ExitStack() as stack:
            searches: builtins.list[Callable[[], Any]] = []
            if same_life and zone.membership.cgroup is not None:
                with contextlib.suppress(FileNotFoundError):
                    searches.append(stack.enter_context(Cgroup(zone.membership.cgroup)))
            tree = ScatteredTree([init], *searches)
            await end(tree, f"zone '{zone.name}'", grace, ask=[init], patience=self._patience)
        await self._see_off(supervisor)

    async def remove(self, zone: Zone) -> None:
        """Delete a container that does not run, unless it has been made anew since `zone` was looked at."""
        container = await self._state(zone.name)
        if container is not None and container.is_running:
            raise ConflictError(f"zone '{zone.name}' cannot be removed while it runs; stop it first")
        if container is not None:
            if zone.incarnation is not None and container.created != zone.incarnation.instance:
                return
            # A created one has a process that waits to become the container's first.
            force = ["--force"] if container.status == "created" else []
            await self._run("delete", *force, "--", zone.name)
        await self._see_off(self._supervisor_of(zone.name))
        try:
            remove_tree(self._directory_of(zone.name))
        except OSError as error:
            raise RuntimeFailedError(f"cannot remove the console of zone '{zone.name}': {error}") from error

    async def close(self) -> None:
        """Wait for starts that are under way, and let go. The containers go on."""
        await self._starts.drain()
        self._launcher.close()
        self._threads.shutdown(wait=False)

    async def _state(self, zone: str) -> Container | None:
        done = await run([*self._tool, "state", "--", zone], timeout=_TOOL_TIMEOUT, separate_errors=True)
        if done.outcome is Outcome.SUCCESS:
            return _container(_parse(done, dict))
        # Tools word it differently that there is no such container: the list of all says it for certain.
        entries = _parse(await self._run("list", "-f", "json", limit=_LARGEST_LIST), list)
        return next((container for container in map(_container, entries or []) if container.id == zone), None)

    async def _run(self, *arguments: str, limit: int = 1 << 20) -> Completed:
        done = await run([*self._tool, *arguments], timeout=_TOOL_TIMEOUT, limit=limit, separate_errors=True)
        if done.status is None:
            raise RuntimeUnavailableError(
                f"runtime 'oci' is not available: {done.detail}; install it, or take 'oci' out of [runtimes] enabled"
            )
        if done.outcome is not Outcome.SUCCESS:
            raise _failure(done)
        return done

    async def _describe(self, container: Container) -> Zone:
        """The zone with its logs; with those of its root alone where the rest cannot be told: it can be stopped so."""
        # The bundle and the sources of mounts may lie on a file system that hangs.
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(self._threads, lambda: self._zone(container, read_config(container.bundle)))
        try:
            return await asyncio.wait_for(looking, _LOOK_TIMEOUT)
        except TimeoutError:
            log.warning("mounts of zone '%s' are not looked at: no answer from %s", container.id, container.bundle)
        except RuntimeFailedError as error:
            log.warning("mounts of zone '%s' are not looked at: %s", container.id, error)
        return self._zone(container, OciConfig(container.rootfs, (), ""))

    def _zone(self, container: Container, config: OciConfig) -> Zone:
        init = proc.identify(container.pid) if container.is_running else None
        cgroup = None if init is None else find_cgroup(init.pid, cgroup_names(container.id, config.cgroups_path))
        logs = list(log_trees(config, self._patterns, init))
        console = self._directory_of(container.id)
        if console.exists():
            logs.append(LogTree("console", str(console), CONSOLE_PATTERNS))
        return Zone(
            name=container.id,
            runtime=self.name,
            state="running" if init is not None else "stopped",
            incarnation=Incarnation(proc.boot_id(), init, container.created),
            membership=Membership() if init is None else Membership((init,), cgroup=cgroup),
            logs=tuple(logs),
            command_prefix=(*self._tool, "exec", "--env", COMMAND_MARK, "--", container.id),
        )

    def _directory_of(self, zone: str) -> Path:
        return self._directory / encode_zone_name(zone)

    def _supervisor_of(self, zone: str) -> ProcessRef | None:
        """The supervisor of a container that the agent started."""
        life = adopt.read_life(self._directory_of(zone))
        return life.supervisor if life is not None and life.boot_id == proc.boot_id() else None

    async def _see_off(self, supervisor: ProcessRef | None) -> None:
        """Wait for a supervisor whose container has ended."""
        if supervisor is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended(supervisor), _SUPERVISOR_LINGERS)
            self._launcher.reap(supervisor)


def _is_life(container: Container, incarnation: Incarnation) -> bool:
    init = proc.identify(container.pid) if container.is_running else None
    return container.created == incarnation.instance and init in (None, incarnation.init)


def _container(data: Any) -> Container:
    try:
        return Container(
            id=str(data["id"]),
            status=str(data["status"]),
            pid=int(data["pid"]),
            bundle=str(data["bundle"]),
            rootfs=str(data.get("rootfs") or ""),
            created=str(data.get("created") or ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RuntimeFailedError(f"a container's state is not understood: {error!r} in {str(data)[:_TAIL]}") from error


def _parse(done: Completed, kind: type) -> Any:
    try:
        data = json.loads(done.output)
    except ValueError as error:
        raise RuntimeFailedError(f"{done.command_line} printed no JSON: {error}") from error
    if data is not None and not isinstance(data, kind):
        raise RuntimeFailedError(f"{done.command_line} printed a {type(data).__name__}, not a {kind.__name__}")
    return data


def _failure(done: Completed) -> RuntimeFailedError:
    said = (done.errors or done.output).decode("utf-8", "replace").strip().replace("\n", " ")[-_TAIL:]
    return RuntimeFailedError(f"{done.command_line} failed: {done.detail}: {said}")


def _tail(path: Path) -> str:
    try:
        text = path.read_text(errors="replace").strip()
    except OSError as error:
        return str(error)
    return text.rpartition("\n")[2][-_TAIL:] or "it said nothing"
