"""A sealer that is killed while it changes the index, and a power cut."""

import fcntl
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import filesystems
from support.indexed import FILESYSTEM, STORES, check_nothing_wrong, segment, small_files
from zonebundle.store.index import Index

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leak_check")]

TESTS = Path(__file__).parent.parent

# Adds the files of each round, forgets the segments of an earlier one, and tells what is done.
WRITER = """
import sys
from pathlib import Path
from support.indexed import FILESYSTEM, STORES, segment, small_files
from zonebundle.store.index import Index

index = Index.open(Path(sys.argv[1]), STORES)
assert not index.is_broken
start = int(sys.argv[2])
for number in range(start, start + 100_000):
    index.add(small_files(range(number * 100, number * 100 + 100)))
    index.claim("web", [(FILESYSTEM, number * 100)])
    print("added", number, flush=True)
    if number >= start + 2:
        index.forget([segment((number - 2) * 10 + part) for part in range(10)])
        print("forgot", number - 2, flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    random_ = random.Random(5)
    forgotten: list[int] = []
    added = -1
    for _ in range(15):
        start = added + 10
        stop = start + random_.randrange(3, 12)
        command = [sys.executable, "-c", WRITER, str(path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                word, number = line.split()
                if word == "forgot":
                    forgotten += [int(number) * 10 + part for part in range(10)]
                else:
                    added = int(number)
                    if added == stop:
                        # Anywhere in what it does next, which takes some milliseconds.
                        time.sleep(random_.random() * 0.01)
                        writer.kill()
        assert added >= stop
        index = Index.open(path, STORES)
        assert not index.is_broken
        check_nothing_wrong(index, range(added * 100 + 1000), forgotten)
        # A killed process loses nothing that it had committed, and these were not forgotten yet.
        assert check_nothing_wrong(index, range((added - 1) * 100, added * 100 + 100)) == 200
        assert index.claimed([segment((added - 1) * 10)])
        assert not index.claimed([segment(number) for number in forgotten])
        index.close()


def test_a_power_cut_after_forget(tmp_path: Path) -> None:
    """The file system loses what was not synced: it is shut down under the index, as by a cut, and mounted again."""
    # EXT4_IOC_SHUTDOWN of fs/ext4/ext4.h, with EXT4_GOING_FLAGS_NOLOGFLUSH.
    shutdown, no_log_flush = 0x8004587D, 2
    try:
        with filesystems.mounted("ext4", tmp_path, size=128 << 20) as point:
            path = point / "index.sqlite"
            index = Index.open(path, STORES)
            index.add(small_files(range(100)))
            # It makes what was there before durable too, so that there is something to come back.
            index.forget([segment(0)])
            index.forget([segment(1), segment(5)])
            index.add(small_files(range(100, 1000)))
            directory = os.open(point, os.O_RDONLY)
            fcntl.ioctl(directory, shutdown, struct.pack("I", no_log_flush))
            os.close(directory)
            index.close()
            subprocess.run(["umount", point], check=True)
            subprocess.run(["mount", "-o", "loop", tmp_path / "ext4.img", point], check=True)
            index = Index.open(path, STORES)
            assert not index.is_broken
            assert check_nothing_wrong(index, range(1000), forgotten=[0, 1, 5]) >= 70
            assert index.find_file(FILESYSTEM, 20) is not None
            index.close()
    except filesystems.Unavailable as error:
        pytest.skip(str(error))
