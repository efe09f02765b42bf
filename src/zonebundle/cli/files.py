"""Files that a verb writes for its user."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from zonebundle.errors import UsageError, ZoneBundleError
from zonebundle.model.paths import printable


@contextlib.contextmanager
def written(name: str) -> Iterator[BinaryIO]:
    """A file to write a bundle to, which appears under its name only when it is whole; `-` is stdout.

    An OSError of the body is taken for one of writing. Raises UsageError if it is a directory, ZoneBundleError.
    """
    try:
        with _stdout() if name == "-" else _file(name) as file:
            yield file
    except OSError as error:
        shown = "stdout" if name == "-" else printable(name)
        raise ZoneBundleError(f"cannot write {shown}: {error.strerror}") from None


@contextlib.contextmanager
def _stdout() -> Iterator[BinaryIO]:
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # What is buffered goes nowhere; else the interpreter fails once more when it ends.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise


@contextlib.contextmanager
def _file(name: str) -> Iterator[BinaryIO]:
    import tempfile

    # The file behind a link is replaced, not the link.
    path = Path(os.path.realpath(name))
    with contextlib.suppress(FileNotFoundError):
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise UsageError(f"--output: {printable(name)} is a directory; name a file")
        if not stat.S_ISREG(kind):
            # A device or a pipe is written to, never replaced.
            with path.open("wb") as file:
                yield file
            return
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            yield file
        Path(temporary).rename(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
