import errno
import os
from pathlib import Path

import pytest

from support.filesystems import fill
from zonebundle.host.files import write_durably
from zonebundle.host.reserve import Reserve

pytestmark = pytest.mark.usefixtures("leak_check")

SIZE = 4 << 20
SHARE = SIZE // 16


def _write(path: Path, size: int) -> bool:
    try:
        write_durably(path, os.urandom(size))
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return False
    return True


def test_a_share_of_it_is_room_on_a_full_disk(small_disk: Path) -> None:
    reserve = Reserve(small_disk / "reserve", SIZE)
    reserve.refill()
    for number in range(SIZE // SHARE):
        fill(small_disk)
        assert not _write(small_disk / str(number), SHARE // 2)
        assert reserve.release()
        assert _write(small_disk / str(number), SHARE // 2)
    assert not reserve.release()


def test_it_is_taken_again_where_there_is_space(small_disk: Path) -> None:
    reserve = Reserve(small_disk / "reserve", SIZE)
    reserve.refill()
    fill(small_disk)
    reserve.release_all()
    fill(small_disk)
    with pytest.raises(OSError, match="No space"):
        reserve.refill()
    spent = [reserve.is_spent]
    (small_disk / "filler").unlink()
    reserve.refill()
    assert [*spent, reserve.is_spent] == [True, False]
    assert (small_disk / "reserve").stat().st_blocks * 512 >= SIZE


def test_where_there_is_too_little_none_of_it_is_taken(small_disk: Path) -> None:
    reserve = Reserve(small_disk / "reserve", SIZE)
    reserve.refill()
    assert _write(small_disk / "other", SHARE)
    fill(small_disk)
    reserve.release()
    fill(small_disk)
    (small_disk / "other").unlink()
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            Reserve(small_disk / "another", SIZE).refill()
    assert _write(small_disk / "other", SHARE // 2)
    # What it has it keeps.
    assert (small_disk / "reserve").stat().st_blocks * 512 >= SIZE - SHARE


def test_without_the_file_nothing_is_given(tmp_path: Path) -> None:
    assert not Reserve(tmp_path / "reserve", SIZE).release()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"x" * 100)
    (tmp_path / "reserve").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        Reserve(tmp_path / "reserve", SIZE).release()
    assert (tmp_path / "other").stat().st_size == 100
