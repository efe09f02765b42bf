"""A disk that hangs, for real: a frozen file system, on which what writes waits in the kernel until it is thawed."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.filesystems import Unavailable, mounted
from support.several import StoreDisk
from zonebundle.store.store import prepare

_BYTES = 64 << 20
# Nothing stays frozen for longer, whatever becomes of the tests.
_LONGEST = 120


@dataclass
class Disk(StoreDisk):
    """One that can be frozen."""

    _guard: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def freeze(self) -> None:
        guard = ["sh", "-c", f'sleep {_LONGEST}; fsfreeze --unfreeze "$0"', str(self.point)]
        self._guard.append(subprocess.Popen(guard, start_new_session=True))
        subprocess.run(["fsfreeze", "--freeze", self.point], check=True)

    def thaw(self) -> None:
        """Also if it is not frozen."""
        subprocess.run(["fsfreeze", "--unfreeze", self.point], check=False, capture_output=True)
        while self._guard:
            guard = self._guard.pop()
            guard.kill()
            guard.wait()


@contextlib.contextmanager
def freezable(below: Path) -> Iterator[Disk]:
    """A disk, mounted below a directory until the context ends; raises Unavailable."""
    if shutil.which("fsfreeze") is None:
        raise Unavailable("no fsfreeze")
    with mounted("ext4", below, _BYTES) as point:
        disk = Disk(point)
        prepare(disk.store)
        try:
            yield disk
        finally:
            disk.thaw()
