import errno
import os
import threading
from pathlib import Path

import pytest

from zonebundle.host import files
from zonebundle.host.files import make_private_directory, remove_temporaries, remove_tree, write_all, write_durably

pytestmark = pytest.mark.usefixtures("leak_check")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    for data in (b"first", b"", b"x" * 5_000_000):
        write_durably(path, data)
        assert path.read_bytes() == data
        assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["context.json"]


def test_the_order_is_write_fsync_rename_fsync_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        size = os.fstat(descriptor).st_size
        done.append("directory" if target == str(tmp_path) else f"file of {size}")
        fsync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    write_durably(tmp_path / "intent.json", b"12345")
    assert done == ["file of 5", "rename", "directory"]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failure_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "intent.json"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(*{"write": (os, "write"), "fsync": (os, "fsync"), "rename": (Path, "rename")}[call], fail)
    with pytest.raises(OSError, match="disk full"):
        write_durably(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["intent.json"]


def test_a_disk_that_fills_up_is_told(tmpfs_dir: Path) -> None:
    (tmpfs_dir / "filler").write_bytes(b"x" * (250 << 20))
    with pytest.raises(OSError) as caught:
        write_durably(tmpfs_dir / "intent.json", b"x" * (20 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmpfs_dir) == ["filler"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:7])))
    with (tmp_path / "file").open("wb") as file:
        write_all(file.fileno(), bytes(range(256)))
    assert (tmp_path / "file").read_bytes() == bytes(range(256))


def test_threads_that_write_the_same_file_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    texts = [bytes([65 + number]) * 200_000 for number in range(8)]
    errors: list[BaseException] = []

    def write(text: bytes) -> None:
        try:
            for _ in range(10):
                write_durably(path, text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in texts
    assert os.listdir(tmp_path) == ["context.json"]


def test_a_link_in_the_temporarys_place_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    temporary = tmp_path / f".intent.json.{threading.get_native_id()}.tmp"
    temporary.symlink_to(victim)
    with pytest.raises(OSError):
        write_durably(tmp_path / "intent.json", b"new")
    assert victim.read_text() == "mine"


def test_a_directory_of_ours_is_private(tmp_path: Path) -> None:
    path = tmp_path / "a/b"
    make_private_directory(path)
    make_private_directory(path)
    assert path.stat().st_mode & 0o777 == 0o700


def test_removing_a_tree_follows_no_link_and_minds_no_absence(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/keep").write_text("keep")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_text("x")
    (tree / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(tree / "fifo")
    remove_tree(tree)
    remove_tree(tree)
    assert not tree.exists()
    assert (tmp_path / "outside/keep").read_text() == "keep"


def test_a_link_in_place_of_the_tree_is_not_removed_through(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/keep").write_text("keep")
    (tmp_path / "tree").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError):
        remove_tree(tmp_path / "tree")
    assert (tmp_path / "outside/keep").exists()


def test_sync_directory_takes_directories_only(tmp_path: Path) -> None:
    files.sync_directory(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        files.sync_directory(tmp_path / "file")


def test_temporaries_of_killed_writes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".format.1234.tmp", ".state.json.7.tmp", ".tmp", "x.1.tmp", ".hidden", ".a.b.tmp"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.b.tmp", ".hidden", ".tmp", "x.1.tmp"]
