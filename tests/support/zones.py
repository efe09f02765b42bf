"""Runtimes with zones that run shell scripts, as processes or as containers, and scripts for them."""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

from support.containers import RuncBundle
from support.wait import until, until_async
from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef, Zone
from zonebundle.runtimes.base import Grace, Runtime
from zonebundle.runtimes.oci import OciRuntime
from zonebundle.runtimes.process import ProcessRuntime, ProcessZone

# Five processes: those that end at TERM, with a last word, and those that do not. busybox and dash both run it.
# When there are five, the trap is set and the first word is said.
GRACEFUL = """
trap 'echo last words; kill $(jobs -p) 2>/dev/null; exit 3' TERM
echo ready
for n in 1 2 3 4; do sleep 1000 & done
wait
"""
STUBBORN = "trap '' TERM; echo ready; for n in 1 2 3 4; do sleep 1000 & done; while :; do sleep 1000; done"


class Zones(Protocol):
    """A runtime whose zones run shell scripts."""

    @property
    def runtime(self) -> Runtime: ...

    def make(self, script: str) -> str:
        """A new zone, stopped; its name."""

    def reopen(self) -> None:
        """Replace the runtime by a new one, as after the agent's restart."""

    async def find(self, name: str) -> Zone:
        """The zone, which is known."""


class Processes:
    """A process runtime whose zones have `root` as their root."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self.state_dir = directory / "state"
        self.root = directory / "root"
        self.root.mkdir()
        self.zones: dict[str, ProcessZone] = {}
        self._stack = stack
        self._runtime: ProcessRuntime | None = None

    @property
    def runtime(self) -> ProcessRuntime:
        if self._runtime is None:
            self.reopen()
        assert self._runtime is not None
        return self._runtime

    def reopen(self, **options: Any) -> None:
        self._runtime = ProcessRuntime(self.zones, self.state_dir, **options)
        self._stack.push_async_callback(self._runtime.close)

    def add(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> str:
        self.put(name, ProcessZone(command, root=str(self.root), logs=("**/*.log",), environment=environment or {}))
        return name

    def put(self, name: str, zone: ProcessZone) -> None:
        self.zones[name] = zone
        self._runtime = None

    def make(self, script: str) -> str:
        return self.add(f"zone-{len(self.zones)}", "sh", "-c", script)

    def directory(self, name: str) -> Path:
        return self.state_dir / "zones" / name

    def console(self, name: str) -> str:
        return (self.directory(name) / "console.log").read_text()

    async def find(self, name: str) -> Zone:
        zone = await self.runtime.find(name)
        assert zone is not None
        return zone

    async def stop(self, name: str, seconds: float = 10) -> None:
        await self.runtime.stop(await self.find(name), Grace(seconds))


class MakeBundle(Protocol):
    def __call__(self, *command: str, **options: Any) -> RuncBundle: ...


class Containers:
    """An OCI runtime over a runc state directory of its own."""

    def __init__(self, directory: Path, make_bundle: MakeBundle, stack: AsyncExitStack) -> None:
        # All bundles of a test have their runc state there, see support.containers.
        self.root = directory / "runc"
        self.state_dir = directory / "state"
        self.bundles: dict[str, RuncBundle] = {}
        self._make_bundle = make_bundle
        self._stack = stack
        self.reopen()

    def reopen(self) -> None:
        self.runtime = OciRuntime(root=str(self.root), state_dir=self.state_dir)
        self._stack.push_async_callback(self.runtime.close)

    def bundle(self, *command: str, **options: Any) -> RuncBundle:
        bundle = self._make_bundle(*command, **options)
        self.bundles[bundle.id] = bundle
        return bundle

    def run(self, script: str, **options: Any) -> str:
        """A new container that runs; its name."""
        bundle = self.bundle("sh", "-c", script, **options)
        bundle.run()
        return bundle.id

    def make(self, script: str) -> str:
        name = self.run(script)
        self.bundles[name].kill()
        until(lambda: self.bundles[name].state()["status"] == "stopped")
        return name

    async def find(self, name: str) -> Zone:
        zone = await self.runtime.find(name)
        assert zone is not None
        return zone


async def running(zones: Zones, name: str, count: int = 5) -> tuple[Zone, list[ProcessRef]]:
    """Start a zone and wait until it has so many processes."""
    await zones.runtime.start(name)
    return await with_processes(zones, name, count)


async def with_processes(zones: Zones, name: str, count: int) -> tuple[Zone, list[ProcessRef]]:
    """The zone and its processes, as soon as there are so many."""

    async def look() -> tuple[Zone, list[ProcessRef]] | None:
        zone = await zones.find(name)
        found = proc.members(zone.membership)
        return (zone, found) if len(found) >= count else None

    looked = await until_async(look, what=f"{count} processes of {name}")
    assert looked is not None
    return looked


def living(processes: list[ProcessRef]) -> list[ProcessRef]:
    """Those of them that live."""
    return [process for process in processes if proc.is_alive(process)]
