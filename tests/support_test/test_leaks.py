import os
import subprocess
import threading
from pathlib import Path

import pytest

from support import leaks, wait


def test_a_descriptor_is_found(tmp_path: Path) -> None:
    descriptor = -1
    try:
        with pytest.raises(AssertionError, match=f"descriptor .* → {tmp_path}"), leaks.no_leaks(timeout=0.05):
            descriptor = os.open(tmp_path, os.O_RDONLY)
    finally:
        os.close(descriptor)


def test_a_living_child_is_found() -> None:
    children = []
    try:
        with pytest.raises(AssertionError, match=r"process .*sleep"), leaks.no_leaks(timeout=0.05):
            children.append(subprocess.Popen(["sleep", "60"]))
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_an_unreaped_child_is_found() -> None:
    children = []
    try:
        with pytest.raises(AssertionError, match="not reaped"), leaks.no_leaks(timeout=0.05):
            children.append(subprocess.Popen(["true"]))
            os.waitid(os.P_PID, children[0].pid, os.WEXITED | os.WNOWAIT)
    finally:
        for child in children:
            child.wait()


def test_an_orphan_is_found_when_asked_for() -> None:
    start_orphan = "sleep 60 >/dev/null & echo $!"
    pid = 0
    try:
        with pytest.raises(AssertionError, match=r"process .*sleep"), leaks.no_leaks(timeout=0.05, orphans=True):
            pid = int(subprocess.check_output(["setsid", "sh", "-c", start_orphan]))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_thread_is_found() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="straggler")
    try:
        with pytest.raises(AssertionError, match="thread straggler"), leaks.no_leaks(timeout=0.05):
            thread.start()
    finally:
        end.set()
        thread.join()


def test_a_mount_is_found(tmpfs_dir: Path) -> None:
    point = tmpfs_dir / "inner"
    point.mkdir()
    try:
        with pytest.raises(AssertionError, match=f"mount {point}"), leaks.no_leaks(timeout=0.05):
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], check=True)
    finally:
        subprocess.run(["umount", point], check=True)


def test_what_goes_away_in_time_is_no_leak() -> None:
    end = threading.Event()
    with leaks.no_leaks():
        thread = threading.Thread(target=end.wait)
        thread.start()
        threading.Timer(0.05, end.set).start()


@pytest.mark.usefixtures("leak_check")
def test_the_fixture_accepts_a_clean_test(fs_dir: Path) -> None:
    with (fs_dir / "file").open("w") as file:
        file.write("x")
    subprocess.run(["true"], check=True)


async def test_the_check_works_around_asynchronous_code() -> None:
    with leaks.no_leaks():
        await wait.until_async(lambda: True)
