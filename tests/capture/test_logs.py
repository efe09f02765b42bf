"""Where logs are looked for: prefixes, mounts, links."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zonebundle.capture.logs import OpenLogs, open_logs
from zonebundle.model.zone import LogTree, ProcessRef


@contextmanager
def opened(*trees: LogTree) -> Iterator[OpenLogs]:
    logs = open_logs(trees)
    try:
        yield logs
    finally:
        logs.close()


@pytest.mark.usefixtures("leak_check")
def test_the_directories_that_patterns_name_are_opened(tmp_path: Path) -> None:
    for name in ("var/log/app", "var/svc/log", "home"):
        (tmp_path / name).mkdir(parents=True)
    patterns = ("var/log/**", "var/log/app/*.log", "var/svc/log/**", "nowhere/**")
    with opened(LogTree("zone", str(tmp_path), patterns)) as logs:
        assert [tree.tree.prefix for tree in logs.trees] == ["var/log", "var/svc/log"]
        assert [tree.tree.path for tree in logs.trees] == [f"{tmp_path}/var/log", f"{tmp_path}/var/svc/log"]
        assert all(tree.tree.patterns == patterns for tree in logs.trees)
        assert os.listdir(logs.trees[0].descriptor) == ["app"]
        assert logs.gaps == []


@pytest.mark.usefixtures("leak_check")
@pytest.mark.parametrize(
    ("pattern", "prefixes"),
    [
        ("var/log/**", ["var/log"]),
        ("var/**", ["var/log"]),
        ("**/app.log", ["var/log"]),
        ("var/log/app/*.log", ["var/log/app"]),
        ("var/log/gone/*.log", []),
        ("var/logs/**", []),
        ("home/**", []),
    ],
)
def test_patterns_are_for_paths_with_the_prefix(tmp_path: Path, pattern: str, prefixes: list[str]) -> None:
    (tmp_path / "app").mkdir()
    with opened(LogTree("zone", str(tmp_path), (pattern,), prefix="var/log")) as logs:
        assert [tree.tree.prefix for tree in logs.trees] == prefixes
        assert all(tree.tree.patterns == (pattern,) for tree in logs.trees)
        assert logs.gaps == []


@pytest.mark.usefixtures("leak_check")
def test_a_missing_root_is_no_gap_and_a_link_is_one(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/logs").symlink_to("/etc")
    with opened(LogTree("zone", f"{tmp_path}/root", ("logs/**",)), LogTree("gone", f"{tmp_path}/gone")) as logs:
        assert logs.trees == []
        assert [gap.what for gap in logs.gaps] == ["logs/zone/logs"]
        assert "symbolic link" in logs.gaps[0].reason


@pytest.mark.usefixtures("leak_check")
def test_mounts_below_the_root_are_entered_each_by_itself(tmpfs_dir: Path) -> None:
    root = tmpfs_dir / "root"
    for name in ("logs/inner", "data"):
        (root / name).mkdir(parents=True)
    (tmpfs_dir / "volume").mkdir()
    (tmpfs_dir / "volume/of-the-volume.log").touch()
    mounted = []
    try:
        for point in (root / "logs/inner", root / "data"):
            subprocess.run(["mount", "--bind", tmpfs_dir / "volume", point], check=True)
            mounted.append(point)
        with opened(LogTree("zone", str(root), ("logs/**", "data/deep/**", "data/*.log"))) as logs:
            assert {tree.tree.prefix for tree in logs.trees} == {"logs", "logs/inner", "data"}
            inner = next(tree for tree in logs.trees if tree.tree.prefix == "logs/inner")
            assert os.listdir(inner.descriptor) == ["of-the-volume.log"]
            assert logs.gaps == []
    finally:
        for point in reversed(mounted):
            subprocess.run(["umount", point], check=True)


def test_a_tree_through_a_process_that_is_gone_is_a_gap(tmp_path: Path) -> None:
    with opened(LogTree("zone", "/var/log", via=ProcessRef(os.getpid(), 1))) as logs:
        assert logs.trees == []
        assert "is gone" in logs.gaps[0].reason
