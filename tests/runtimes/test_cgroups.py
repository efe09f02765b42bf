import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.wait import until
from zonebundle.host import proc
from zonebundle.host.mounts import read_mounts
from zonebundle.runtimes.cgroups import Cgroup, cgroup_names, find_cgroup


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup of our own in the unified hierarchy."""
    points = [mount.point for mount in read_mounts() if mount.kind == "cgroup2"]
    if not points or not os.access(points[0], os.W_OK):
        pytest.skip("no cgroup2 hierarchy that can be written")
    path = Path(points[0], f"zonebundle-test-{os.getpid()}")
    path.mkdir()
    yield path
    for inner in sorted(path.glob("**/"), reverse=True):
        inner.rmdir()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def enter(group: Path, pid: int) -> None:
    (group / "cgroup.procs").write_text(str(pid))


def test_a_name_is_the_id_or_a_scope_that_ends_in_it() -> None:
    assert cgroup_names("web", "") == {"web", "runc-web.scope"}
    assert cgroup_names("web", "/a/b/web") == {"web", "runc-web.scope"}
    assert cgroup_names("web", "/a/b/many") == {"web", "runc-web.scope"}
    assert "docker-web.scope" in cgroup_names("web", "system.slice:docker:web")
    assert "web.scope" in cgroup_names("web", "system.slice::web")
    assert "docker-many.scope" not in cgroup_names("web", "system.slice:docker:many")


def test_the_group_is_found_by_its_name_and_also_from_further_down(
    group: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    enter(group, sleeper.pid)
    assert find_cgroup(sleeper.pid, {group.name}) == str(group)
    (group / "init.scope").mkdir()
    enter(group / "init.scope", sleeper.pid)
    assert find_cgroup(sleeper.pid, {group.name}) == str(group)
    assert find_cgroup(sleeper.pid, {"another"}) is None
    sleeper.kill()
    sleeper.wait()
    assert find_cgroup(sleeper.pid, {group.name}) is None


def test_a_group_with_this_process_in_it_is_shared(group: Path, sleeper: subprocess.Popen[bytes]) -> None:
    enter(group, sleeper.pid)
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    home = Path(str(group.parent) + next(line for line in lines if line.startswith("0::"))[3:])
    enter(group, os.getpid())
    try:
        assert find_cgroup(sleeper.pid, {group.name}) is None
    finally:
        enter(home, os.getpid())
    assert find_cgroup(sleeper.pid, {group.name}) == str(group)


async def test_processes_further_down_are_found_and_a_group_made_anew_is_another(
    group: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    inner = group / "inner"
    inner.mkdir()
    enter(inner, sleeper.pid)
    with Cgroup(str(group)) as outer, Cgroup(str(inner)) as pinned:
        process = proc.identify(sleeper.pid)
        assert await outer() == [process]
        assert await pinned() == [process]
        enter(group, sleeper.pid)
        # Its removal fails for a moment while the process leaves.
        until(lambda: (inner / "cgroup.procs").read_text() == "")
        inner.rmdir()
        inner.mkdir()
        enter(inner, sleeper.pid)
        assert await pinned() == []
        assert await outer() == [process]
    sleeper.kill()
    sleeper.wait()
