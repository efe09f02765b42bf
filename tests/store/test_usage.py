import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import filesystems
from support.users import NOBODY
from zonebundle.errors import StoreError
from zonebundle.host import mounts, syscalls
from zonebundle.store import usage as usage_module
from zonebundle.store.usage import Usage, bytes_used, usage

MIB = 1 << 20
PROJECT = "42"

pytestmark = pytest.mark.usefixtures("leak_check")


def settle(directory: Path) -> None:
    """Have the file system place every block, so that nothing changes any more."""
    subprocess.run(["sync", "--file-system", directory], check=True)


def fill(directory: Path) -> None:
    """Files of many sizes in nested directories, holes, names twice, links."""
    for number in range(20):
        below = directory / f"{number % 4:02x}" / "deeper"
        below.mkdir(parents=True, exist_ok=True)
        (below / f"{number}.gz").write_bytes(os.urandom(number * 10_000))
    with (directory / "sparse").open("wb") as file:
        file.write(b"begin")
        file.truncate(1 << 30)
    os.link(directory / "03" / "deeper" / "19.gz", directory / "same")
    os.link(directory / "same", directory / "00" / "again")
    (directory / "out").symlink_to("/usr")
    (directory / "nowhere").symlink_to("nowhere")
    os.mkfifo(directory / "pipe")
    settle(directory)


def free(directory: Path) -> int:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def test_it_is_what_du_counts(fs_dir: Path) -> None:
    fill(fs_dir)
    told = subprocess.check_output(["du", "--summarize", "--block-size=1", fs_dir], text=True)
    assert bytes_used(fs_dir) == int(told.split()[0])


def test_holes_take_no_space(tmp_path: Path) -> None:
    before = bytes_used(tmp_path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    settle(tmp_path)
    assert bytes_used(tmp_path) - before < MIB


def test_a_second_name_takes_no_space_and_the_last_one_frees_it(tmpfs_dir: Path) -> None:
    (tmpfs_dir / "a").write_bytes(bytes(3 * MIB))
    once = bytes_used(tmpfs_dir)
    os.link(tmpfs_dir / "a", tmpfs_dir / "b")
    assert bytes_used(tmpfs_dir) == once
    (tmpfs_dir / "a").unlink()
    assert bytes_used(tmpfs_dir) == once
    (tmpfs_dir / "b").unlink()
    assert bytes_used(tmpfs_dir) == once - 3 * MIB


def test_a_link_is_not_followed_unless_it_is_the_directory_itself(tmpfs_dir: Path) -> None:
    store, outside = tmpfs_dir / "store", tmpfs_dir / "outside"
    store.mkdir()
    outside.mkdir()
    (outside / "big").write_bytes(bytes(MIB))
    (store / "directory").symlink_to(outside)
    (store / "file").symlink_to(outside / "big")
    assert bytes_used(store) < MIB
    (tmpfs_dir / "link").symlink_to(store)
    assert bytes_used(tmpfs_dir / "link") == bytes_used(store)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_vanishes_while_it_is_counted_is_not_counted(
    tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmpfs_dir / "stays").write_bytes(bytes(MIB))
    expected = bytes_used(tmpfs_dir)
    going = tmpfs_dir / "going"
    if kind == "file":
        going.write_bytes(bytes(MIB))
        after_listing(monkeypatch, going.unlink)
    else:
        going.mkdir()
        (going / "inner").write_bytes(bytes(MIB))
        after_stat(monkeypatch, "going", lambda: shutil.rmtree(going))
    assert bytes_used(tmpfs_dir) == expected
    assert not going.exists()


def test_a_directory_that_becomes_a_link_is_not_followed(tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, outside = tmpfs_dir / "store", tmpfs_dir / "outside"
    (store / "turning").mkdir(parents=True)
    outside.mkdir()
    (outside / "big").write_bytes(bytes(MIB))

    def turn() -> None:
        (store / "turning").rmdir()
        (store / "turning").symlink_to(outside)

    after_stat(monkeypatch, "turning", turn)
    assert bytes_used(store) < MIB
    assert (store / "turning").is_symlink()


def after_listing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do `act` once a directory's names have been read, and nothing else of its entries."""

    def late(entries: list[Any]) -> list[Any]:
        act()
        return entries

    wrap_scandir(monkeypatch, late)


def after_stat(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], None]) -> None:
    """Do `act` once the entry `name` has been looked at."""

    def watched(entries: list[Any]) -> Iterator[Any]:
        for entry in entries:
            yield entry
            if entry.name == name:
                act()

    wrap_scandir(monkeypatch, watched)


def wrap_scandir(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[list[Any]], Any]) -> None:
    scandir = os.scandir

    class Listing:
        def __init__(self, descriptor: Any) -> None:
            with scandir(descriptor) as entries:
                self.entries = list(entries)

        def __enter__(self) -> Any:
            # Only the first directory is tampered with.
            monkeypatch.undo()
            return wrap(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Listing)


def test_a_missing_directory_is_a_store_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"measuring .*/missing failed"):
        usage(tmp_path / "missing", None)


def test_omicrons_three_numbers() -> None:
    assert Usage(3, 2, 1).to_json() == {"dataset_quota": 3, "bytes_available": 2, "bytes_used": 1}


def test_the_operators_quota_counts(tmpfs_dir: Path) -> None:
    (tmpfs_dir / "a").write_bytes(bytes(3 * MIB))
    used = bytes_used(tmpfs_dir)
    assert usage(tmpfs_dir, 10 * MIB) == Usage(10 * MIB, 10 * MIB - used, used)


def test_more_than_the_quota_leaves_nothing_available(tmpfs_dir: Path) -> None:
    (tmpfs_dir / "a").write_bytes(bytes(3 * MIB))
    for quota in (0, MIB):
        assert usage(tmpfs_dir, quota) == Usage(quota, 0, bytes_used(tmpfs_dir))


def test_no_more_is_available_than_the_file_system_has(tmpfs_dir: Path) -> None:
    told = usage(tmpfs_dir, 1 << 50)
    assert told == Usage(1 << 50, free(tmpfs_dir), told.bytes_used)


def test_without_a_quota_it_is_what_the_directory_can_have(fs_dir: Path) -> None:
    settle(fs_dir)
    before, left = usage(fs_dir, None), free(fs_dir)
    # Others may write to the file system between the two looks.
    assert before.dataset_quota == pytest.approx(before.bytes_used + left, abs=64 * MIB)
    assert before.bytes_available == before.dataset_quota - before.bytes_used


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_without_a_quota_it_does_not_shrink_while_the_store_fills(kind: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(f"{kind}_dir")
    settle(directory)
    before = usage(directory, None)
    (directory / "a").write_bytes(os.urandom(48 * MIB))
    settle(directory)
    after = usage(directory, None)
    assert after.bytes_used - before.bytes_used == pytest.approx(48 * MIB, abs=MIB)
    assert after.dataset_quota == pytest.approx(before.dataset_quota, abs=12 * MIB)
    assert before.bytes_available - after.bytes_available == pytest.approx(48 * MIB, abs=12 * MIB)


def test_a_zfs_dataset_tells_its_quota_by_its_size(tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = mounts.mount_of(str(tmpfs_dir), mounts.read_mounts())
    as_zfs = mounts.Mount(mine.id, mine.point, "zfs", mine.root, "tank/store", mine.device, mine.read_only)
    monkeypatch.setattr(usage_module, "read_mounts", lambda: [as_zfs])
    assert usage(tmpfs_dir, None).dataset_quota == filesystems.TMPFS_BYTES


@pytest.fixture
def subvolume(tmp_path: Path) -> Iterator[Path]:
    """A subvolume of a btrfs of its own, without quotas yet."""
    try:
        with filesystems.mounted("btrfs", tmp_path) as point:
            btrfs("subvolume", "create", point / "store")
            yield point / "store"
    except filesystems.Unavailable as error:
        pytest.skip(str(error))


def btrfs(*arguments: str | Path) -> None:
    subprocess.run(["btrfs", *arguments], check=True, capture_output=True)


def quota(directory: Path) -> int | None:
    """The quota told; None where it is what the directory can have."""
    told = usage(directory, None)
    # A commit of the file system between the two looks may move some space.
    is_all = abs(told.dataset_quota - told.bytes_used - free(directory)) < 16 * MIB
    return None if is_all else told.dataset_quota


def group_of(subvolume: Path) -> str:
    shown = subprocess.check_output(["btrfs", "inspect-internal", "rootid", subvolume], text=True)
    return f"0/{shown.strip()}"


def test_the_limit_of_a_subvolumes_qgroup_is_the_quota(subvolume: Path) -> None:
    inner = subvolume / "inner"
    inner.mkdir()
    assert quota(inner) is None
    btrfs("quota", "enable", subvolume)
    assert quota(inner) is None
    btrfs("qgroup", "limit", "64M", subvolume)
    assert quota(inner) == 64 * MIB
    assert quota(subvolume.parent) is None
    told = usage(inner, None)
    assert told.bytes_available == 64 * MIB - told.bytes_used
    btrfs("qgroup", "limit", "-e", "48M", subvolume)
    assert quota(inner) == 48 * MIB
    btrfs("qgroup", "limit", "32M", subvolume)
    assert quota(inner) == 32 * MIB
    btrfs("qgroup", "limit", "none", subvolume)
    assert quota(inner) == 48 * MIB
    btrfs("qgroup", "limit", "-e", "none", subvolume)
    assert quota(inner) is None
    btrfs("qgroup", "limit", "64M", subvolume)
    btrfs("quota", "disable", subvolume)
    assert quota(inner) is None


def test_the_smallest_limit_of_the_qgroups_above_counts(subvolume: Path) -> None:
    btrfs("quota", "enable", subvolume)
    for above in ("1/7", "2/7", "1/8"):
        btrfs("qgroup", "create", above, subvolume)
    btrfs("qgroup", "assign", "--no-rescan", group_of(subvolume), "1/7", subvolume)
    btrfs("qgroup", "assign", "--no-rescan", "1/7", "2/7", subvolume)
    # Neither a group beside those above it, nor another member of them.
    btrfs("qgroup", "limit", "16M", "1/8", subvolume)
    btrfs("subvolume", "create", subvolume / "other")
    btrfs("qgroup", "assign", "--no-rescan", group_of(subvolume / "other"), "1/7", subvolume)
    btrfs("qgroup", "limit", "8M", subvolume / "other")
    assert quota(subvolume) is None
    btrfs("qgroup", "limit", "80M", "2/7", subvolume)
    assert quota(subvolume) == 80 * MIB
    btrfs("qgroup", "limit", "96M", subvolume)
    assert quota(subvolume) == 80 * MIB
    btrfs("qgroup", "limit", "64M", "1/7", subvolume)
    assert quota(subvolume) == 64 * MIB


def test_a_limit_that_may_not_be_read_is_none(subvolume: Path) -> None:
    btrfs("quota", "enable", subvolume)
    btrfs("qgroup", "limit", "64M", subvolume)
    assert quota(subvolume) == 64 * MIB
    descriptor = os.open(subvolume, os.O_RDONLY)
    try:
        os.seteuid(NOBODY)
        try:
            assert usage_module._qgroup_limit(descriptor) is None
        finally:
            os.seteuid(0)
    finally:
        os.close(descriptor)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A directory that hands a project down, on an XFS with project quotas; no limit is set yet."""
    if shutil.which("xfs_quota") is None:
        pytest.skip("xfs: no xfs_quota")
    try:
        with filesystems.mounted("xfs", tmp_path, options="prjquota") as point:
            (point / "store").mkdir()
            (point / "store" / "format").write_text("1")
            xfs_quota(point, f"project -s -p {point}/store {PROJECT}")
            yield point / "store"
    except filesystems.Unavailable as error:
        pytest.skip(f"XFS project quotas (CONFIG_XFS_QUOTA in the kernel): {str(error).splitlines()[0]}")


def xfs_quota(point: Path, command: str) -> None:
    subprocess.run(["xfs_quota", "-x", "-c", command, point], check=True, capture_output=True)


def limit_project(store: Path, limits: str) -> None:
    xfs_quota(store.parent, f"limit -p {limits} {PROJECT}")


def test_the_limit_of_an_xfs_project_is_the_quota(project: Path) -> None:
    assert quota(project) is None
    limit_project(project, "bhard=64m")
    assert usage(project, None).dataset_quota == 64 * MIB
    assert quota(project.parent) is None
    inner = project / "inner"
    inner.mkdir()
    assert usage(inner, None).dataset_quota == 64 * MIB
    (inner / "a").write_bytes(bytes(10 * MIB))
    settle(project)
    told = usage(project, None)
    assert told.dataset_quota == 64 * MIB
    assert told.bytes_available == pytest.approx(54 * MIB, abs=MIB)
    limit_project(project, "bsoft=32m bhard=64m")
    assert usage(project, None).dataset_quota == 32 * MIB


def test_a_project_limit_above_the_file_system_is_none(project: Path) -> None:
    limit_project(project, "bhard=4g")
    assert quota(project) is None


def test_a_project_is_told_from_the_file_system_through_a_bind_mount(project: Path, tmp_path: Path) -> None:
    bind = tmp_path / "bind"
    bind.mkdir()
    subprocess.run(["mount", "--bind", project, bind], check=True)
    try:
        assert quota(bind) is None
        limit_project(project, "bhard=64m")
        assert usage(bind, None).dataset_quota == 64 * MIB
    finally:
        subprocess.run(["umount", bind], check=True)


# The same without such a kernel: XFS's answers, as they were seen on one.


@pytest.mark.parametrize(
    ("flags", "limit", "has_file", "expected"),
    [
        (0x200, 16384, True, 16384 * 4096),
        (0x200, 65536, True, None),
        (0x200, 16384, False, 16384 * 4096),
        (0, 16384, True, None),
    ],
)
def test_a_project_is_told_by_the_flag_and_a_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int, limit: int, has_file: bool, expected: int | None
) -> None:
    if has_file:
        (tmp_path / "format").write_text("1")
    (tmp_path / "link").symlink_to("/usr/bin/env")

    def attributes(_: int, request: int, argument: bytearray) -> None:
        assert request == 0x801C581F
        struct.pack_into("=5I", argument, 0, flags, 0, 2, int(PROJECT), 0)

    def space(descriptor: int) -> os.statvfs_result:
        blocks = limit if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else 65536
        return os.statvfs_result((4096, 4096, blocks, 1000, 1000, 9, 9, 9, 0, 255))

    monkeypatch.setattr(syscalls, "ioctl", attributes)
    monkeypatch.setattr(os, "fstatvfs", space)
    monkeypatch.setattr(usage_module, "read_mounts", list)
    told = usage(tmp_path, None)
    assert told.dataset_quota == (told.bytes_used + 1000 * 4096 if expected is None else expected)


def test_a_file_system_without_projects_has_no_project_limit(tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(syscalls, "ioctl", refuse)
    assert quota(tmpfs_dir) is None
