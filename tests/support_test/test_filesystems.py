import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import filesystems

FICLONE = 0x40049409


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        fcntl.ioctl(writer, FICLONE, reader.fileno())


def _type(path: Path) -> str:
    return subprocess.check_output(["stat", "-f", "-c", "%T", path], text=True).strip()


def test_a_btrfs_subvolume_can_be_snapshot(btrfs_dir: Path) -> None:
    subvolume, snapshot = btrfs_dir / "zone", btrfs_dir / "snapshot"
    subprocess.run(["btrfs", "-q", "subvolume", "create", subvolume], check=True)
    (subvolume / "log").write_text("first")
    subprocess.run(["btrfs", "-q", "subvolume", "snapshot", "-r", subvolume, snapshot], check=True)
    (subvolume / "log").write_text("second")
    assert (snapshot / "log").read_text() == "first"


def test_xfs_clones_files(xfs_dir: Path) -> None:
    (xfs_dir / "a").write_text("content")
    _clone(xfs_dir / "a", xfs_dir / "b")
    assert (xfs_dir / "b").read_text() == "content"


def test_ext4_does_not(ext4_dir: Path) -> None:
    (ext4_dir / "a").write_text("content")
    with pytest.raises(OSError, match="not supported"):
        _clone(ext4_dir / "a", ext4_dir / "b")


def test_each_kind_is_what_it_says(fs_dir: Path, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["fs_dir"]
    names = {"ext4": "ext2/ext3", "xfs": "xfs", "btrfs": "btrfs", "tmpfs": "tmpfs", "plain": _type(fs_dir)}
    assert _type(fs_dir) == names[kind]
    assert list(fs_dir.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="no mkfs.ext4")
def test_a_failing_body_leaves_no_mount_and_no_device(tmp_path: Path) -> None:
    with pytest.raises(KeyError), filesystems.mounted("ext4", tmp_path) as point:
        raise KeyError
    assert point not in filesystems.mount_points()
    assert list(tmp_path.iterdir()) == []
    attached = subprocess.check_output(["losetup", "--noheadings", "--output", "BACK-FILE"], text=True)
    assert str(tmp_path) not in attached


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_what_a_killed_run_left_is_unmounted(tmp_path: Path) -> None:
    # Above the largest PID that Linux gives (PID_MAX_LIMIT).
    abandoned = tmp_path / f"zonebundle-fs-{2**22 + 1}-tmpfs"
    abandoned.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", abandoned], check=True)
    with filesystems.mounted("tmpfs", tmp_path):
        assert abandoned not in filesystems.mount_points()
