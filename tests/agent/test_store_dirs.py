"""Several store directories, and what becomes of them while an agent runs."""

import contextlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import filesystems
from support.agents import AgentProcess
from support.freezing import freezable
from support.wait import until

PAUSE = 30.0


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [tmp_path / "first", tmp_path / "second"]


def bundle(agent: AgentProcess, seed: int = 0) -> str:
    """A new bundle of the zone `web` with 1 MiB that no other one has; its ID, when it is sealed."""
    log = agent.directory / f"zones/web/logs/app.log.{seed + 1}"
    log.write_bytes(random.Random(seed).randbytes(1 << 20))
    agent.start_zones("web")
    bundle_id: str = agent.stop_zone("web")["bundle"]["id"]["bundle_id"]
    agent.wait_sealed("web", bundle_id)
    return bundle_id


def files_of(directory: Path) -> dict[str, bytes]:
    """What a store directory holds of bundles and segments, by path."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for top in ("bundles", "segments")
        for path in (directory / top).rglob("*")
        if path.is_file()
    }


def are_equal(one: Path, other: Path) -> bool:
    try:
        return files_of(one) == files_of(other)
    except FileNotFoundError:
        # Being written.
        return False


@pytest.mark.slow
def test_every_directory_has_every_bundle(agent: AgentProcess, two: list[Path]) -> None:
    agent.stores = two
    agent.add_zone("web")
    agent.start()
    made = [bundle(agent, seed) for seed in range(2)]
    until(lambda: are_equal(*two), what="both directories hold the same")
    assert len(files_of(two[0])) > 4
    agent.delete(f"/zones/bundles/web/{made[0]}").raise_for_status()
    until(lambda: are_equal(*two), what="both directories hold the same")
    for directory in two:
        assert not (directory / "bundles/web" / made[0]).exists()
        assert list((directory / "tombstones").iterdir()) == []
    assert list((agent.state / "tombstones").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_directory_that_is_lost_and_comes_back(agent: AgentProcess, two: list[Path], lost: int) -> None:
    agent.stores = two
    agent.add_zone("web")
    agent.start()
    before = bundle(agent, 0)
    doomed = bundle(agent, 1)
    until(lambda: are_equal(*two))
    away = two[lost].with_name("away")
    two[lost].rename(away)
    after = bundle(agent, 2)
    assert agent.delete(f"/zones/bundles/web/{doomed}").status_code == 204
    for bundle_id in (before, after):
        assert "metadata.toml" in agent.contents("web", bundle_id)
    assert not two[lost].exists()
    away.rename(two[lost])
    until(lambda: are_equal(*two), timeout=PAUSE, what="the directory is brought up to date")
    assert sorted(path.name for path in (two[lost] / "bundles/web").iterdir()) == sorted([before, after])
    # What was left of the deletion goes with the agreement.
    until(lambda: not list(agent.state.glob("tombstones/*")), timeout=PAUSE, what="the tombstones go")
    agent.terminate()
    agent.start()
    assert {one["id"]["bundle_id"] for one in agent.bundles("web")} == {before, after}


@pytest.mark.slow
def test_a_directory_that_is_missing_at_the_start(agent: AgentProcess, tmp_path: Path) -> None:
    with filesystems.mounted("ext4", tmp_path, 64 << 20) as mount:
        stores = [tmp_path / "first", mount / "store"]
        agent.stores = stores
        agent.add_zone("web")
        agent.start()
        made = bundle(agent)
        until(lambda: are_equal(*stores))
        agent.terminate()
        subprocess.run(["umount", mount], check=True)
        try:
            agent.start()
            # Nothing is made in the place where the disk should be.
            assert not (mount / "store/format").exists()
            assert "which is not there" in agent.log.read_text()
            assert "metadata.toml" in agent.contents("web", made)
            agent.terminate()
        finally:
            shutil.rmtree(mount / "store", ignore_errors=True)
            subprocess.run(["mount", "-o", "loop", next(tmp_path.glob("**/*.img")), mount], check=True)
        agent.start()
        other = bundle(agent, 1)
        until(lambda: are_equal(*stores), timeout=PAUSE)
        assert (mount / "store/bundles/web" / other).exists()
        agent.terminate()


@pytest.mark.slow
def test_two_agents_on_one_store(agent: AgentProcess, two: list[Path], tmp_path: Path) -> None:
    agent.stores = two
    agent.add_zone("web")
    agent.start()
    with AgentProcess(tmp_path / "other") as other:
        other.directory.mkdir()
        other.stores = [tmp_path / "third", two[1]]
        other.write_config()
        told = subprocess.run(
            [sys.executable, "-m", "zonebundle.cli.main", "agent", "--config", other.config],
            capture_output=True,
            text=True,
        )
        assert told.returncode == 1
        assert f"another agent uses the store {two[1]}: stop it, or set [store] dirs" in told.stderr
    assert bundle(agent)


@pytest.mark.slow
def test_bundles_of_a_directory_that_comes_later_are_listed(agent: AgentProcess, two: list[Path]) -> None:
    agent.stores = two
    agent.add_zone("web")
    agent.start()
    made = bundle(agent)
    until(lambda: are_equal(*two))
    agent.terminate()
    # One disk is replaced by a fresh one, the other is not there when the agent starts.
    shutil.rmtree(two[0])
    away = two[1].with_name("away")
    two[1].rename(away)
    agent.start()
    assert agent.bundles("web") == []
    shutil.rmtree(two[1])
    away.rename(two[1])
    until(lambda: [one["id"]["bundle_id"] for one in agent.bundles("web")] == [made], timeout=PAUSE)
    until(lambda: are_equal(*two), timeout=PAUSE)


@pytest.mark.slow
def test_a_disk_that_hangs(agent: AgentProcess, tmp_path: Path) -> None:
    """Stops are not held up by it, nor the start of the agent, for longer than some seconds."""
    (tmp_path / "disk").mkdir()
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(freezable(tmp_path / "disk"))
        except filesystems.Unavailable as error:
            pytest.skip(str(error))
        agent.stores = [disk.store, tmp_path / "second"]
        agent.add_zone("web")
        agent.start()
        stack.callback(agent.terminate)
        made = [bundle(agent)]
        stack.callback(disk.thaw)
        disk.freeze()
        made.append(bundle(agent, 1))
        assert [one["id"]["bundle_id"] for one in agent.bundles("web")] == made
        agent.terminate()
        agent.start()
        assert [one["id"]["bundle_id"] for one in agent.bundles("web")] == made
        made.append(bundle(agent, 2))
        assert not (disk.store / "bundles/web" / made[2]).exists()
        disk.thaw()
        until(lambda: are_equal(*agent.stores), timeout=PAUSE, what="the disk is brought up to date")
        assert (disk.store / "bundles/web" / made[2]).exists()
