"""Reading the segments of one store directory, in any process, beside the one that writes (see objects)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from zonebundle.errors import DamagedError
from zonebundle.store.failure import explain

TEMPORARY = "tmp"
PRUNED = "pruned"
DIGEST = re.compile(r"[0-9a-f]{64}")


class Segments:
    """Read access to the segments below `directory`; nothing needs to exist yet."""

    def __init__(self, directory: Path) -> None:
        self._root = str(directory)

    def path(self, digest: str) -> str:
        """Where the segment is, or would be."""
        if not DIGEST.fullmatch(digest):
            raise DamagedError(
                f"{digest[:80]!r} in a manifest is not a segment's digest; restore the bundle from a copy"
            )
        return f"{self._root}/{digest[:2]}/{digest}.gz"

    def exists(self, digest: str) -> bool:
        """Whether the segment is there; the bytes of one that is there are durable."""
        return os.path.exists(self.path(digest))

    def open(self, digest: str) -> int:
        """A descriptor for reading, which the caller closes. Raises DamagedError if the segment is missing."""
        path = self.path(digest)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DamagedError(f"segment {path} is missing; restore it from a copy of the store") from None
        except OSError as error:
            raise explain(f"opening segment {path}", error) from error

    def digests(self) -> Iterator[str]:
        """The digest of every segment that is there."""
        for first in os.listdir(self._root):
            if first in (TEMPORARY, PRUNED):
                continue
            for name in os.listdir(f"{self._root}/{first}"):
                digest = name.removesuffix(".gz")
                if DIGEST.fullmatch(digest):
                    yield digest
