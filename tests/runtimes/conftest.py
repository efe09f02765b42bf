"""The runtimes as fixtures: at a test's end their zones are stopped, and nothing may be left."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from support import leaks
from support.zones import Containers, MakeBundle, Processes, Zones
from zonebundle.runtimes.base import Grace


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    """A process runtime."""
    with leaks.no_leaks(orphans=True):
        async with AsyncExitStack() as stack:
            made = Processes(tmp_path, stack)
            yield made
            for zone in await made.runtime.list():
                await made.runtime.stop(zone, Grace(0))


@pytest.fixture
async def containers(runc_bundle: MakeBundle, tmp_path: Path) -> AsyncIterator[Containers]:
    """An OCI runtime."""
    with leaks.no_leaks(orphans=True):
        async with AsyncExitStack() as stack:
            made = Containers(tmp_path, runc_bundle, stack)
            yield made
            for zone in await made.runtime.list():
                await made.runtime.stop(zone, Grace(0))


@pytest.fixture(params=["process", pytest.param("oci", marks=pytest.mark.slow)])
def zones(request: pytest.FixtureRequest) -> Zones:
    """Each runtime in turn."""
    fixture = {"process": "processes", "oci": "containers"}[request.param]
    made: Zones = request.getfixturevalue(fixture)
    return made
