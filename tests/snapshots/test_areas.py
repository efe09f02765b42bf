import json
import os
import subprocess
import uuid
from pathlib import Path

import pytest

from zonebundle.errors import SnapshotError
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area
from zonebundle.snapshots.areas import MARK, destroy_area, list_areas, prepare_area

_OURS = "0123456789ab"
_OTHER = "ba9876543210"
_BUNDLE = str(uuid.UUID(int=7))


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    directory = tmp_path / "staging"
    directory.mkdir(mode=0o700)
    return directory


def _area(staging: Path, installation: str = _OURS, bundle: str = _BUNDLE) -> Area:
    return Area("staged", str(staging / snapshot_name(installation, bundle)), bundle)


def _prepared(staging: Path, installation: str = _OURS, bundle: str = _BUNDLE) -> Area:
    area = _area(staging, installation, bundle)
    prepare_area(Path(area.path), installation)
    return area


def test_an_area_is_private_and_marked(staging: Path, leak_check: None) -> None:
    path = Path(_prepared(staging).path)
    assert path.stat().st_mode & 0o7777 == 0o700
    assert (path / MARK).stat().st_mode & 0o7777 == 0o600
    assert json.loads((path / MARK).read_text()) == {"installation": _OURS}
    prepare_area(path, _OURS)
    assert list(path.iterdir()) == [path / MARK]


def test_areas_of_ours_are_listed(staging: Path, leak_check: None) -> None:
    bundles = sorted(str(uuid.uuid4()) for _ in range(3))
    areas = [_prepared(staging, bundle=bundle) for bundle in bundles]
    _prepared(staging, _OTHER)
    (staging / "zb-something").mkdir()
    (staging / "notes.txt").touch()
    unmarked = Path(_area(staging, bundle=str(uuid.uuid4())).path)
    unmarked.mkdir(mode=0o700)
    (unmarked / "files").mkdir()
    Path(_area(staging, bundle=str(uuid.uuid4())).path).symlink_to("/etc")
    assert list(list_areas(staging, _OURS)) == areas
    assert list(list_areas(staging / "missing", _OURS)) == []


def test_an_area_without_a_mark_but_empty_is_ours_after_a_crash(staging: Path) -> None:
    area = _area(staging)
    Path(area.path).mkdir(mode=0o700)
    assert list(list_areas(staging, _OURS)) == [area]
    destroy_area(area, _OURS)
    assert list(staging.iterdir()) == []


def test_a_mark_that_a_power_cut_left_empty_is_ours(staging: Path) -> None:
    area = _prepared(staging)
    Path(area.path, MARK).write_bytes(b"")
    Path(area.path, "files").mkdir()
    assert list(list_areas(staging, _OURS)) == [area]
    destroy_area(area, _OURS)
    assert list(staging.iterdir()) == []


def test_destroying_removes_all_and_follows_nothing(staging: Path, tmp_path: Path, leak_check: None) -> None:
    area = _prepared(staging)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    files = Path(area.path, "files")
    files.mkdir()
    os.link(tmp_path / "precious" / "file", files / "0")
    (files / "1").symlink_to(tmp_path / "precious")
    Path(area.path, "stray").symlink_to(tmp_path / "precious")
    destroy_area(area, _OURS)
    assert list(staging.iterdir()) == []
    assert (tmp_path / "precious" / "file").stat().st_nlink == 1


def test_destroying_a_missing_area_is_fine(staging: Path, leak_check: None) -> None:
    destroy_area(_area(staging), _OURS)
    destroy_area(_area(staging / "missing"), _OURS)


def _stays(area: Area, installation: str, reason: str) -> None:
    before = sorted(Path(area.path).rglob("*"))
    with pytest.raises(SnapshotError, match=reason):
        destroy_area(area, installation)
    assert sorted(Path(area.path).rglob("*")) == before


def test_what_is_not_named_ours_stays(staging: Path) -> None:
    _stays(_prepared(staging, _OTHER), _OURS, "is not named for")
    area = _prepared(staging)
    _stays(Area("staged", area.path, str(uuid.uuid4())), _OURS, "is not named for")
    (staging / "logs").mkdir()
    _stays(Area("staged", str(staging / "logs"), _BUNDLE), _OURS, "is not named for")


@pytest.mark.parametrize("mark", [None, b"{}", b"garbage", b"[]", b'{"installation": "ba9876543210"}', b"\xff"])
def test_what_is_not_marked_ours_stays(staging: Path, mark: bytes | None, leak_check: None) -> None:
    area = _area(staging)
    Path(area.path).mkdir(mode=0o700)
    Path(area.path, "logs").mkdir()
    if mark is not None:
        Path(area.path, MARK).write_bytes(mark)
    _stays(area, _OURS, "is not ours")
    with pytest.raises(SnapshotError, match="is not ours"):
        prepare_area(Path(area.path), _OURS) if mark is not None else destroy_area(area, _OURS)


def test_a_mark_that_is_no_file_is_not_read(staging: Path, leak_check: None) -> None:
    area = _area(staging)
    Path(area.path).mkdir(mode=0o700)
    os.mkfifo(Path(area.path, MARK))
    _stays(area, _OURS, "is not ours")
    Path(area.path, MARK).unlink()
    Path(area.path, MARK).symlink_to("/etc/hostname")
    _stays(area, _OURS, "is not ours")


def test_a_directory_that_others_may_write_is_not_ours(staging: Path) -> None:
    area = _prepared(staging)
    Path(area.path).chmod(0o770)
    _stays(area, _OURS, "is not ours")
    with pytest.raises(SnapshotError, match="is not ours"):
        prepare_area(Path(area.path), _OURS)


def test_a_link_in_place_of_an_area_is_not_followed(staging: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    area = _area(staging)
    Path(area.path).symlink_to(tmp_path / "other")
    with pytest.raises(SnapshotError, match="cannot be opened"):
        destroy_area(area, _OURS)
    with pytest.raises(OSError, match="Not a directory"):
        prepare_area(Path(area.path), _OURS)
    assert (tmp_path / "other").exists()


def test_only_areas_of_ours_are_prepared(staging: Path) -> None:
    for name in ("logs", snapshot_name(_OTHER, _BUNDLE)):
        with pytest.raises(SnapshotError, match="is not named like"):
            prepare_area(staging / name, _OURS)
    assert list(staging.iterdir()) == []


def test_a_directory_with_the_inode_number_of_a_subvolume_is_removed(ext4_dir: Path, leak_check: None) -> None:
    (ext4_dir / "staging").mkdir(mode=0o700)
    area = _prepared(ext4_dir / "staging")
    files = Path(area.path, "files")
    spare = ext4_dir / "spare"
    spare.mkdir()
    for number in range(2000):
        directory = spare / str(number)
        directory.mkdir()
        if directory.stat().st_ino == 256:
            directory.rename(files)
            break
    else:
        pytest.skip("no directory got inode 256")
    (files / "0").write_bytes(b"x")
    destroy_area(area, _OURS)
    assert list((ext4_dir / "staging").iterdir()) == []


def test_an_area_with_a_snapshot_and_files_is_destroyed_whole(btrfs_dir: Path, leak_check: None) -> None:
    (btrfs_dir / "staging").mkdir(mode=0o700)
    area = _prepared(btrfs_dir / "staging")
    zone = btrfs_dir / "zone"
    subprocess.run(["btrfs", "-q", "subvolume", "create", zone], check=True)
    (zone / "log").write_bytes(b"x")
    subprocess.run(["btrfs", "-q", "subvolume", "snapshot", "-r", zone, Path(area.path, "snapshot")], check=True)
    Path(area.path, "files").mkdir()
    Path(area.path, "files", "0").write_bytes(b"x")
    (listed,) = list_areas(btrfs_dir / "staging", _OURS)
    assert listed.kind == "btrfs"
    destroy_area(area, _OURS)
    assert list((btrfs_dir / "staging").iterdir()) == []
    assert (zone / "log").read_bytes() == b"x"
