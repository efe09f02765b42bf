import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.host.mounts import Mount, mount_id_of, mount_of, mounts_below, read_mounts


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that mounts a tmpfs on a directory of the given name below the test's own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    with ExitStack() as stack:

        def make(name: bytes, source: str = "tmpfs", options: str = "size=1m") -> Path:
            point = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
            point.mkdir(exist_ok=True)
            subprocess.run(["mount", "-i", "-t", "tmpfs", "-o", options, source, point], check=True)
            stack.callback(unmount, point)
            return point

        yield make


def unmount(point: Path) -> None:
    subprocess.run(["umount", point], check=True)


NAMES = [
    *(
        b"plain",
        b"a b",
        b"tab\there",
        b"new\nline",
        b"back\\slash",
        b"\\040",
        b"cr\rhere",
        b"ff\x0c",
        b"gs\x1d",
        b"#hash",
    ),
    *("line\u2028separator".encode(), "next\x85line".encode(), b"\xff\xfe", b" - "),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_mount_point_of_any_name_is_read(mount: Callable[..., Path], name: bytes) -> None:
    point = mount(name)
    (found,) = [one for one in read_mounts() if one.point == str(point)]
    assert (found.kind, found.root, found.read_only) == ("tmpfs", "/", False)
    # One hostile name must not cost the others either.
    assert any(one.point == "/" for one in read_mounts())


def test_what_a_mount_is(mount: Callable[..., Path]) -> None:
    point = mount(b"mnt", source="my source", options="size=1m,ro")
    (found,) = [one for one in read_mounts(os.getpid()) if one.point == str(point)]
    assert found.source == "my source"
    assert found.read_only
    status = point.stat()
    assert found.device == f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"


def test_the_mount_of_a_descriptor(mount: Callable[..., Path], tmp_path: Path) -> None:
    point = mount(b"mnt")
    for path in (point, tmp_path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            assert mount_id_of(descriptor) == mount_of(str(path), read_mounts()).id
        finally:
            os.close(descriptor)


def test_the_latest_of_stacked_mounts_counts(mount: Callable[..., Path]) -> None:
    mount(b"mnt", source="first")
    point = mount(b"mnt", source="second")
    assert mount_of(f"{point}/x", read_mounts()).source == "second"
    (below,) = mounts_below(str(point.parent), read_mounts())
    assert below.source == "second"


def made(point: str, number: int = 1) -> Mount:
    return Mount(number, point, "ext4", "/", "/dev/x", "8:1", read_only=False)


def test_a_path_belongs_to_whole_components_only() -> None:
    mounts = [made("/"), made("/srv"), made("/srv/web")]
    assert mount_of("/srv/web", mounts).point == "/srv/web"
    assert mount_of("/srv/web/logs", mounts).point == "/srv/web"
    assert mount_of("/srv/webmail", mounts).point == "/srv"
    assert mount_of("/home", mounts).point == "/"
    assert [one.point for one in mounts_below("/srv", mounts)] == ["/srv/web"]
    assert [one.point for one in mounts_below("/", mounts)] == ["/srv", "/srv/web"]
    assert mounts_below("/srv/web", mounts) == []
    with pytest.raises(OSError, match="no mount"):
        mount_of("/x", [made("/srv")])


_points = st.lists(st.sampled_from("abc"), max_size=3).map(lambda parts: "/" + "/".join(parts))


@given(st.lists(_points, min_size=1), _points)
def test_the_mount_of_a_path_is_the_longest_point_above_it(points: list[str], path: str) -> None:
    mounts = [made("/"), *map(made, points)]
    above = [one.point for one in mounts if Path(path).is_relative_to(one.point)]
    assert mount_of(path, mounts).point == max(above, key=len)
