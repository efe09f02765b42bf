"""host.files turned loose on directories that somebody else arranged."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.leaks import no_leaks
from zonebundle.errors import HostError, NotRegularFileError, OutsideRootError
from zonebundle.host import files, syscalls
from zonebundle.host.files import Found, Passed, open_directory_beneath, open_regular_beneath, open_root, walk_beneath

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A zone's root, with a secret beside it that must never be reached."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/app.log").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def root(place: Path) -> Iterator[int]:
    descriptor = open_root(str(place))
    yield descriptor
    os.close(descriptor)


def read(root: int, path: str) -> bytes:
    descriptor, _ = open_regular_beneath(root, path)
    try:
        return os.read(descriptor, 1 << 20)
    finally:
        os.close(descriptor)


def found(root: int, top: str = "") -> dict[str, Found | Passed]:
    return {item.path: item for item in walk_beneath(root, top)}


def test_a_plain_file_is_read(place: Path, root: int) -> None:
    (place / "var").mkdir()
    (place / "var/app.log").write_text("line")
    assert read(root, "var/app.log") == b"line"
    descriptor, status = open_regular_beneath(root, "var/app.log")
    try:
        assert os.fstat(descriptor) == status
        assert not os.get_inheritable(descriptor)
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    finally:
        os.close(descriptor)


LINKS: dict[str, Callable[[Path], str]] = {
    "final, absolute": lambda root: _link(root / "app.log", root.parent / "secret"),
    "final, relative": lambda root: _link(root / "app.log", "../secret"),
    "final, inside": lambda root: _link(root / "app.log", "other.log"),
    "intermediate, absolute": lambda root: _link(root / "var", root.parent / "outside") + "/app.log",
    "intermediate, relative": lambda root: _link(root / "var", "../outside") + "/app.log",
    "intermediate, inside": lambda root: _link(root / "var", "inner") + "/app.log",
    "to the root": lambda root: _link(root / "var", "/") + f"{root.parent}/secret",
    "magic": lambda root: _link(root / "var", "/proc/self/root") + f"{root.parent}/secret",
    "loop": lambda root: _link(root / "var", "var") + "/app.log",
}


def _link(link: Path, target: str | Path) -> str:
    link.symlink_to(target)
    return link.name


@pytest.mark.parametrize("kind", LINKS)
def test_no_link_is_followed(place: Path, root: int, kind: str) -> None:
    (place / "other.log").write_text("other")
    (place / "inner").mkdir()
    (place / "inner/app.log").write_text("other")
    path = LINKS[kind](place)
    with pytest.raises((OutsideRootError, NotRegularFileError)):
        open_regular_beneath(root, path)
    with pytest.raises((OutsideRootError, NotADirectoryError)):
        open_directory_beneath(root, path)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "var/../../secret", "..", "/", "var/../../outside/app.log"]
)
def test_no_path_leads_out(place: Path, root: int, path: str) -> None:
    (place / "var").mkdir()
    with pytest.raises((OutsideRootError, NotRegularFileError)) as caught:
        open_regular_beneath(root, path)
    assert "secret" not in str(caught.value) or "secret" in path


def test_dots_that_stay_inside_are_fine(place: Path, root: int) -> None:
    (place / "var").mkdir()
    (place / "app.log").write_text("line")
    assert read(root, "var/../app.log") == b"line"


def test_a_null_byte_does_not_end_the_path_early(place: Path, root: int) -> None:
    (place / "app.log").write_text("line")
    with pytest.raises(ValueError, match="null"):
        open_regular_beneath(root, "app.log\0.gz")


def _make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "socket": _make_socket,
    "directory": os.mkdir,
    "symbolic link": lambda path: path.symlink_to("nowhere"),
    "character device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    "block device": lambda path: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 250)),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_opened_and_nothing_is_waited_for(place: Path, root: int, kind: str) -> None:
    if "device" in kind and os.geteuid() != 0:
        pytest.skip("devices are made by root")
    SPECIAL[kind](place / "app.log")
    with pytest.raises((NotRegularFileError, OutsideRootError), match=kind if kind != "symbolic link" else "link"):
        open_regular_beneath(root, "app.log")


def test_a_walk_passes_over_all_that_is_no_file_as_no_loss(place: Path, root: int) -> None:
    for kind, make in SPECIAL.items():
        if "device" not in kind or os.geteuid() == 0:
            make(place / kind)
    (place / "app.log").write_text("line")
    walked = found(root)
    assert isinstance(walked.pop("app.log"), Found)
    assert {path for path, item in walked.items() if isinstance(item, Passed) and not item.lost} == set(walked)
    assert "directory" not in walked
    assert {"FIFO", "socket", "symbolic link"} <= set(walked)


def test_a_link_to_a_directory_is_not_walked(place: Path, root: int) -> None:
    (place / "var").symlink_to(place.parent / "outside")
    assert set(found(root)) == {"var"}
    with pytest.raises((OutsideRootError, NotADirectoryError)):
        open_directory_beneath(root, "var")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.binary(min_size=1, max_size=60).filter(
        lambda raw: b"/" not in raw and b"\0" not in raw and raw not in (b".", b"..")
    )
)
def test_a_name_of_any_bytes_is_found_and_read(place: Path, root: int, raw: bytes) -> None:
    path = os.path.join(os.fsencode(place), raw)
    with open(path, "wb") as file:
        file.write(raw)
    try:
        walked = [item for item in walk_beneath(root) if os.fsencode(item.path) == raw]
        assert len(walked) == 1
        assert isinstance(walked[0], Found)
        assert read(root, walked[0].path) == raw
    finally:
        os.unlink(path)


def test_a_mount_is_neither_walked_nor_opened(place: Path, root: int, tmpfs_dir: Path) -> None:
    (place / "mnt").mkdir()
    (tmpfs_dir / "app.log").write_text("elsewhere")
    (place / "file").write_text("covered")
    subprocess.run(["mount", "--bind", tmpfs_dir, place / "mnt"], check=True)
    try:
        subprocess.run(["mount", "--bind", tmpfs_dir / "app.log", place / "file"], check=True)
        try:
            walked = found(root)
            lost = walked["mnt"]
            assert isinstance(lost, Passed)
            assert lost.lost
            assert "mount" in lost.reason
            assert "mnt/app.log" not in walked
            for path in ("mnt/app.log", "file"):
                with pytest.raises(OutsideRootError, match="mount"):
                    open_regular_beneath(root, path)
        finally:
            subprocess.run(["umount", place / "file"], check=True)
        inside = open_root(str(place / "mnt"))
        try:
            # Entered explicitly, it is a root like any other.
            assert read(inside, "app.log") == b"elsewhere"
        finally:
            os.close(inside)
    finally:
        subprocess.run(["umount", place / "mnt"], check=True)


def test_the_directory_held_open_outlives_its_mount(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], check=True)
    (point / "app.log").write_text("line")
    held = open_root(str(point))
    try:
        subprocess.run(["umount", "--lazy", point], check=True)
        assert read(held, "app.log") == b"line"
        assert set(found(held)) == {"app.log"}
    finally:
        os.close(held)


def test_a_tree_that_is_too_deep_is_a_loss_and_not_an_error(place: Path, root: int) -> None:
    with contextlib.chdir(place):
        for _ in range(files.MAX_DEPTH + 8):
            os.mkdir("d")
            os.chdir("d")
    (place / "top.log").write_text("line")
    walked = found(root)
    lost = [item for item in walked.values() if isinstance(item, Passed)]
    assert len(lost) == 1
    assert lost[0].lost
    assert "deeper" in lost[0].reason
    assert isinstance(walked["top.log"], Found)
    filesystems_remove(place / "d")


def test_a_path_longer_than_the_kernel_takes_is_a_loss(place: Path, root: int) -> None:
    name = "n" * 200
    descriptor = os.dup(root)
    for _ in range(30):
        os.mkdir(name, dir_fd=descriptor)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    items = list(walk_beneath(root))
    assert [item for item in items if isinstance(item, Passed) and item.lost]
    filesystems_remove(place / name)


def filesystems_remove(path: Path) -> None:
    subprocess.run(["rm", "-rf", path], check=True)


def test_the_number_of_directories_is_bounded(place: Path, root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_DIRECTORIES", 20)
    for number in range(50):
        (place / f"d{number}").mkdir()
        (place / f"d{number}/app.log").write_text("line")
    items = list(walk_beneath(root))
    lost = [item for item in items if isinstance(item, Passed)]
    assert lost
    assert all(item.lost for item in lost)
    assert 0 < len([item for item in items if isinstance(item, Found)]) <= 20


def test_a_huge_sparse_file_costs_nothing_to_find(place: Path, root: int) -> None:
    with (place / "sparse.log").open("wb") as file:
        file.truncate(1 << 40)
    item = found(root)["sparse.log"]
    assert isinstance(item, Found)
    assert item.status.st_size == 1 << 40
    assert item.status.st_blocks == 0


def test_what_vanishes_meanwhile_is_no_loss(place: Path, root: int) -> None:
    (place / "a").mkdir()
    (place / "b").mkdir()
    (place / "a/app.log").write_text("line")
    walk = walk_beneath(root)
    (place / "z.log").write_text("line")
    first = next(walk)
    assert isinstance(first, Found)
    for path in ("a/app.log", "z.log"):
        (place / path).unlink()
    (place / "a").rmdir()
    (place / "b").rmdir()
    assert [item for item in walk if isinstance(item, Passed)] == []
    with pytest.raises(FileNotFoundError):
        open_regular_beneath(root, "a/app.log")


def test_a_directory_that_cannot_be_read_costs_only_itself(place: Path, ordinary_user: object) -> None:
    if os.geteuid() != 0:
        pytest.skip("switching users needs root")
    (place / "closed").mkdir(mode=0o700)
    (place / "closed/secret.log").write_text("secret")
    (place / "open.log").write_text("line")
    for directory in (place, place.parent):
        directory.chmod(0o755)
    root = open_root(str(place))
    try:
        os.seteuid(65534)
        try:
            walked = found(root)
            with pytest.raises(PermissionError):
                open_regular_beneath(root, "closed/secret.log")
        finally:
            os.seteuid(0)
    finally:
        os.close(root)
    lost = walked["closed"]
    assert isinstance(lost, Passed)
    assert lost.lost
    assert isinstance(walked["open.log"], Found)


def test_a_missing_top_is_told_and_a_file_as_top_is_passed(place: Path, root: int) -> None:
    with pytest.raises(FileNotFoundError):
        list(walk_beneath(root, "nowhere"))
    (place / "app.log").write_text("line")
    (item,) = walk_beneath(root, "app.log")
    assert isinstance(item, Passed)


def test_a_walk_that_is_left_halfway_closes_what_it_opened(place: Path, root: int) -> None:
    for number in range(100):
        (place / f"{number}.log").write_text("line")
    with no_leaks():
        walk = walk_beneath(root)
        next(walk)
        del walk


def test_a_file_under_a_lease_is_refused_at_once(place: Path, root: int) -> None:
    # Whoever holds a write lease would keep an ordinary open waiting for 45 seconds.
    (place / "app.log").write_text("line")
    holder = subprocess.Popen(
        ["python3", "-c", _LEASE, place / "app.log"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            open_regular_beneath(root, "app.log")
        holder.kill()


_LEASE = """
import fcntl, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = open(sys.argv[1], "r+b")
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("link", [True, False])
def test_the_root_itself_is_no_link_and_no_file(place: Path, link: bool) -> None:
    other = place.parent / "other"
    if link:
        other.symlink_to(place)
    else:
        other.write_text("file")
    with pytest.raises(OSError) as caught:
        open_root(str(other))
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)


def test_every_kind_of_file_has_a_word() -> None:
    assert files.describe_kind(stat.S_IFIFO) == "FIFO"
    assert "unknown" in files.describe_kind(0)


def test_the_kernels_refusals_keep_their_numbers(place: Path, root: int) -> None:
    with pytest.raises(OSError) as caught:
        syscalls.openat2(root, b"nowhere", os.O_PATH, 0)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(HostError):
        open_directory_beneath(root, "..")


def test_walk_on_every_filesystem(fs_dir: Path) -> None:
    (fs_dir / "a/b").mkdir(parents=True)
    for path in ("x.log", "a/y.log", "a/b/z.log"):
        (fs_dir / path).write_text(path)
    root = open_root(str(fs_dir))
    try:
        walked = found(root)
        assert set(walked) == {"x.log", "a/y.log", "a/b/z.log"}
        assert {path: read(root, path) for path in walked} == {path: path.encode() for path in walked}
        assert set(found(root, "a")) == {"a/y.log", "a/b/z.log"}
    finally:
        os.close(root)
