"""Prints the PIDs and start times of the processes that carry a mark in their environment: `marked.py NAME=VALUE`.

A program of its own, because reading a stranger's environment can wait for a lock of its memory: this can be killed.
"""

import os
import sys


def main(mark: bytes) -> None:
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            # Everything read through the directory's descriptor is the same process's, or an error.
            directory = os.open(f"/proc/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if mark in _read(directory, "environ").split(b"\0"):
                stat = _read(directory, "stat")
                print(name, int(stat[stat.rfind(b")") + 2 :].split()[19]))  # noqa: T201
        except OSError:
            continue
        finally:
            os.close(directory)


def _read(directory: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        data = b""
        while chunk := os.read(descriptor, 64 << 10):
            data += chunk
        return data
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(os.fsencode(sys.argv[1]))
