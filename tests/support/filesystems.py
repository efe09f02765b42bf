"""Real filesystems on loop devices, as fixtures want them: made, given away, and gone at the end."""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

IMAGE_BYTES = 1 << 30
TMPFS_BYTES = 256 << 20
MAKE = {
    "btrfs": ["mkfs.btrfs", "-q"],
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1"],
}
# The owner's PID is in the name, so that what a killed run left behind can be told from what another run uses.
_FIXTURE_MOUNT = re.compile(r"zonebundle-fs-(\d+)-\w+")
_BTRFS_SUBVOLUME_INODE = 256


class Unavailable(Exception):
    """This machine cannot have that filesystem; the message names what is missing."""


def mount_points() -> list[Path]:
    """Every mount point of this process's namespace, in the order of mounting."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    # Space, tab, newline and backslash are written as octal escapes.
    raw = [re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4]) for line in lines]
    return [Path(os.fsdecode(point)) for point in raw]


def is_fixture_mount(point: Path) -> bool:
    """Whether `mounted` made it, in this or another test process."""
    return _FIXTURE_MOUNT.fullmatch(point.name) is not None


@contextlib.contextmanager
def mounted(kind: str, below: Path, size: int = IMAGE_BYTES, options: str = "") -> Iterator[Path]:
    """A fresh filesystem of `kind` (btrfs, xfs, ext4, tmpfs) and `size`, mounted on a directory made in `below`.

    `options` are further ones for the mount of a filesystem on a loop device, as mount(8) takes them.

    It is unmounted, and its loop device free again, when the context ends. Raises Unavailable.
    """
    if os.geteuid() != 0:
        raise Unavailable(f"{kind}: mounting needs root")
    _unmount_abandoned()
    point = below / f"zonebundle-fs-{os.getpid()}-{kind}"
    point.mkdir()
    try:
        if kind == "tmpfs":
            _mount(kind, ["-t", "tmpfs", "-o", f"size={min(size, TMPFS_BYTES)},mode=0700", "tmpfs", str(point)])
        else:
            _mount_image(kind, below / f"{kind}.img", point, size, options)
        try:
            yield point
        finally:
            _unmount(point)
    finally:
        (below / f"{kind}.img").unlink(missing_ok=True)
        point.rmdir()


def fill(point: Path) -> Path:
    """Take every free block, also of what root may have beyond others, with a file; once more, what has come free."""
    filler = point / "filler"
    with filler.open("ab", buffering=0) as file:
        length = -1
        # What is freed on the way, or was before, can be had only when it has been written out.
        while length != (length := os.fstat(file.fileno()).st_size):
            os.fsync(file.fileno())
            # To the last block; not by one call, which on some takes all or nothing.
            for size in (1 << 20, 4096):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        os.fsync(file.fileno())
    return filler


def empty(directory: Path) -> None:
    """Remove `directory` with everything in it, read-only btrfs snapshots and mounts below it included."""
    for point in reversed(mount_points()):
        if point != directory and point.is_relative_to(directory):
            _unmount(point)
    for inner, names, _ in os.walk(directory, topdown=False):
        for path in (Path(inner, name) for name in names):
            if not path.is_symlink() and path.stat().st_ino == _BTRFS_SUBVOLUME_INODE:
                # A read-only snapshot cannot be emptied first.
                subprocess.run(["btrfs", "-q", "subvolume", "delete", path], check=False, capture_output=True)
    shutil.rmtree(directory)


def _mount_image(kind: str, image: Path, point: Path, size: int, options: str) -> None:
    make = MAKE[kind]
    if shutil.which(make[0]) is None:
        raise Unavailable(f"{kind}: no {make[0]}")
    if not Path("/dev/loop-control").exists():
        raise Unavailable(f"{kind}: no /dev/loop-control")
    with image.open("wb") as file:
        file.truncate(size)
    made = subprocess.run([*make, image], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise Unavailable(f"{kind}: {make[0]} failed: {made.stderr.strip()}")
    # The loop device frees itself at the unmount (mount sets autoclear).
    _mount(kind, ["-t", kind, "-o", f"loop,{options}" if options else "loop", str(image), str(point)])


def _mount(kind: str, arguments: list[str]) -> None:
    # There may be only eight loop devices for all test runs of a machine: another one may free its own soon.
    deadline = time.monotonic() + 20
    while True:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if "loop device" not in done.stderr or time.monotonic() > deadline:
            raise Unavailable(f"{kind}: mount failed: {done.stderr.strip()}")
        time.sleep(0.2)


def _unmount(point: Path) -> None:
    done = subprocess.run(["umount", point], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # Detached at least, so that the device is free once the last user has gone; the test run still fails.
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
        raise RuntimeError(f"could not unmount {point}: {done.stderr.strip()}")


def _unmount_abandoned() -> None:
    for point in reversed(mount_points()):
        owner = _FIXTURE_MOUNT.fullmatch(point.name)
        if owner and not Path("/proc", owner[1]).exists():
            # Two workers may find the same one.
            subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
