import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")

from support import containers, filesystems, leaks  # noqa: E402
from support.containers import RuncBundle  # noqa: E402
from support.flipping import Sample, make_sample  # noqa: E402
from support.users import NOBODY, OrdinaryUser  # noqa: E402

# The same examples at every run: whoever breaks one has broken it. For others: --hypothesis-profile=random.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, derandomize=False, max_examples=1000, print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _scope_of_mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    leaks.mounts_below = tmp_path_factory.getbasetemp().resolve()


@pytest.fixture
def leak_check() -> Iterator[None]:
    """The test leaves no descriptor, process, thread or mount behind."""
    with leaks.no_leaks():
        yield


def _mounted(kind: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            point = stack.enter_context(filesystems.mounted(kind, factory.mktemp(kind)))
        except filesystems.Unavailable as error:
            pytest.skip(str(error))
        yield point


def _fresh(mount: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir=mount))
    yield directory
    filesystems.empty(directory)


@pytest.fixture(scope="session")
def _btrfs_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _mounted("btrfs", tmp_path_factory)


@pytest.fixture(scope="session")
def _xfs_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _mounted("xfs", tmp_path_factory)


@pytest.fixture(scope="session")
def _ext4_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _mounted("ext4", tmp_path_factory)


@pytest.fixture
def btrfs_dir(_btrfs_mount: Path) -> Iterator[Path]:
    """A fresh directory on btrfs. It is no subvolume: a test makes those it wants in it."""
    yield from _fresh(_btrfs_mount)


@pytest.fixture
def xfs_dir(_xfs_mount: Path) -> Iterator[Path]:
    """A fresh directory on XFS with reflinks."""
    yield from _fresh(_xfs_mount)


@pytest.fixture
def ext4_dir(_ext4_mount: Path) -> Iterator[Path]:
    """A fresh directory on ext4: hard links, but neither reflinks nor snapshots."""
    yield from _fresh(_ext4_mount)


@pytest.fixture
def tmpfs_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh tmpfs of 256 MiB."""
    yield from _mounted("tmpfs", tmp_path_factory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 of its own, to fill."""
    try:
        with filesystems.mounted("ext4", tmp_path, size=48 << 20) as point:
            yield point
    except filesystems.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=["plain", "ext4", "xfs", "btrfs", "tmpfs"])
def fs_dir(request: pytest.FixtureRequest) -> Path:
    """A fresh directory on each kind of filesystem in turn; plain is wherever temporary files are."""
    directory: Path = request.getfixturevalue("tmp_path" if request.param == "plain" else f"{request.param}_dir")
    return directory


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root filesystem of busybox. It is shared: a container gets a copy."""
    directory = tmp_path_factory.mktemp("rootfs")
    try:
        containers.make_rootfs(directory)
    except containers.Unavailable as error:
        pytest.skip(str(error))
    return directory


@pytest.fixture
def runc_bundle(rootfs: Path, tmp_path: Path) -> Iterator[Callable[..., RuncBundle]]:
    """A function that makes an OCI bundle running the command given; see `containers.runc_bundle`."""
    with ExitStack() as stack:

        def make(*command: str, below: Path = tmp_path, **options: Any) -> RuncBundle:
            try:
                return stack.enter_context(containers.runc_bundle(rootfs, below, *command, **options))
            except containers.Unavailable as error:
                pytest.skip(str(error))

        yield make


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A store with bundles of everything. It is shared: nothing may change it."""
    return make_sample(tmp_path_factory.mktemp("original") / "store")


@pytest.fixture
def sample(original: Sample, tmp_path: Path) -> Sample:
    """A store of its own for each test, to damage or to copy."""
    return original.copy(tmp_path / "store")


@pytest.fixture
def twin(original: Sample, tmp_path: Path) -> Sample:
    """Another store dir with the same bytes as `sample`."""
    return original.copy(tmp_path / "twin")


@pytest.fixture
def ordinary_user() -> Iterator[OrdinaryUser]:
    """A user without privileges: nobody where the tests run as root, else the one they run as."""
    # pytest's own directories are closed to other users.
    home = Path(tempfile.mkdtemp(prefix="zonebundle-test-home-"))
    uid, gid = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    if os.geteuid() == 0:
        os.chown(home, uid, gid)
    yield OrdinaryUser(uid, gid, home)
    shutil.rmtree(home)
