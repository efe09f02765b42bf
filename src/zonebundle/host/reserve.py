"""A little space that is kept back, so that a full disk cannot prevent what has to be written all the same."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from zonebundle.host.files import preallocate

# Of 4 MiB a share is 256 KiB: much more than an intent needs.
_SHARES = 16


class Reserve:
    """A file of `size` preallocated bytes. Its methods may be called from any thread."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._turn = threading.Lock()
        self.is_spent = False

    def refill(self) -> None:
        """Take the space, or what was given away of it. Raises OSError (there is not that little)."""
        with self._turn:
            preallocate(self._path, self._size)
            self.is_spent = False

    def release(self) -> bool:
        """Give a share back to the file system; False if there was nothing left to give. Raises OSError."""
        return self._release(-(-self._size // _SHARES))

    def release_all(self) -> None:
        """Give everything back. Raises OSError."""
        self._release(self._size)

    def _release(self, share: int) -> bool:
        with self._turn:
            self.is_spent = True
            try:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
            try:
                left = os.fstat(descriptor).st_size - share
                os.ftruncate(descriptor, max(0, left))
                # ext4 hands freed blocks out only when the transaction that freed them is committed.
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if left <= 0:
                # It may be inodes that are wanting.
                self._path.unlink()
            return True
