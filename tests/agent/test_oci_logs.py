"""Where a container's logs are: in mounts of its own, and behind links that must not be followed."""

import os
import subprocess
from pathlib import Path

import pytest

from support.agents import AgentProcess
from support.containers import RuncBundle
from support.talking import APP_LOG, LOGS, TALKS, bundle_of, lines, run, settings
from support.zones import MakeBundle

SECRET = b"the host's secret, not the container's"


@pytest.mark.slow
def test_logs_in_a_bind_mount(agent: AgentProcess, runc_bundle: MakeBundle, tmp_path: Path) -> None:
    source = tmp_path / "kept logs"
    source.mkdir()
    (source / "app.log.1").write_bytes(b"rotated\n" * 1000)
    mount = {"destination": "/var/log", "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
    container = runc_bundle("sh", "-c", TALKS, mounts=[mount])
    (container.rootfs / "var/log/hidden.log").write_bytes(b"the mount hides it")
    agent.settings = settings(container.state_dir)
    run(container)
    agent.start()
    told = agent.stop_zone(container.id, remove="true")
    assert told["gaps"] == 0, told
    contents = agent.contents(container.id, bundle_of(told))
    assert lines(contents[APP_LOG]) == LOGS
    assert contents["logs/zone/var/log/app.log.1"] == b"rotated\n" * 1000
    assert "logs/zone/var/log/hidden.log" not in contents


@pytest.mark.slow
@pytest.mark.parametrize("remove", [False, True])
def test_logs_in_a_tmpfs_that_goes_with_the_container(
    agent: AgentProcess, runc_bundle: MakeBundle, remove: bool
) -> None:
    mount = {"destination": "/var/log", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "size=16m"]}
    script = f"seq 100000 > /var/log/app.log.1; {TALKS}"
    container = runc_bundle("sh", "-c", script, mounts=[mount])
    agent.settings = settings(container.state_dir)
    run(container)
    agent.start()
    told = agent.stop_zone(container.id, remove=remove)
    assert told["gaps"] == 0, told
    assert list((container.rootfs / "var/log").iterdir()) == []
    contents = agent.contents(container.id, bundle_of(told))
    # The descriptor outlives the container's mount: last words are there too.
    assert lines(contents[APP_LOG]) == LOGS
    assert lines(contents["logs/zone/var/log/app.log.1"]) == [str(number) for number in range(1, 100_001)]


@pytest.mark.slow
def test_links_out_of_the_container_are_not_followed(
    agent: AgentProcess, container: RuncBundle, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.log").write_bytes(SECRET)
    # Absolute links mean the container's root to the container, and the host's to whoever follows them here.
    logs = container.rootfs / "var/log"
    (logs / "final.log").symlink_to(outside / "secret.log")
    (logs / "absolute").symlink_to(outside)
    (logs / "relative").symlink_to(os.path.relpath(outside, logs))
    (logs / "proc").symlink_to("/proc/self")
    (logs / "loop").symlink_to(".")
    os.mkfifo(logs / "fifo.log")
    os.mknod(logs / "device.log", 0o600 | 0o020000, os.makedev(1, 5))
    run(container)
    agent.start()
    told = agent.stop_zone(container.id)
    contents = agent.contents(container.id, bundle_of(told))
    assert not [name for name, data in contents.items() if SECRET in data]
    assert [name for name in contents if name.startswith("logs/")] == [APP_LOG]
    assert lines(contents[APP_LOG]) == LOGS


@pytest.mark.slow
def test_a_log_directory_that_is_a_link_out_of_the_container(
    agent: AgentProcess, runc_bundle: MakeBundle, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "log").mkdir(parents=True)
    (outside / "log/secret.log").write_bytes(SECRET)
    container = runc_bundle("sleep", "1000")
    agent.settings = settings(container.state_dir)
    subprocess.run(["rm", "-r", container.rootfs / "var"], check=True)
    (container.rootfs / "var").symlink_to(outside)
    container.run()
    agent.start()
    told = agent.stop_zone(container.id, grace="0s")
    contents = agent.contents(container.id, bundle_of(told))
    assert [name for name in contents if name.startswith("logs/")] == []
    assert not [name for name, data in contents.items() if SECRET in data]
