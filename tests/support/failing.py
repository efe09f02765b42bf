"""System calls that fail on cue below one directory: once, or from the n-th on, as a disk that dies."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from zonebundle.host import syscalls

_BY_PATH = ("rename", "unlink", "link", "mkdir", "rmdir")
_BY_DESCRIPTOR = ("write", "fsync", "fdatasync", "posix_fallocate")


@dataclass
class Failing:
    """Calls that change something below `directory`; the n-th fails with `number`, and the later ones if `for_good`."""

    directory: Path
    nth: int
    number: int
    for_good: bool = False
    count: int = 0

    def wrap(self, call: Callable[..., Any], place: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if f"{place(*arguments, **options)}/".startswith(f"{self.directory}/"):
                self.count += 1
                if self.count == self.nth or (self.for_good and self.count > self.nth):
                    raise OSError(self.number, os.strerror(self.number), str(arguments[0]))
            return call(*arguments, **options)

        return wrapped

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """While the body runs, calls fail as told."""
        with contextlib.ExitStack() as stack:
            for name in _BY_PATH:
                stack.enter_context(mock.patch.object(os, name, self.wrap(getattr(os, name), _last_path)))
            for name in _BY_DESCRIPTOR:
                stack.enter_context(mock.patch.object(os, name, self.wrap(getattr(os, name), _of_descriptor)))
            stack.enter_context(mock.patch.object(os, "open", self.wrap(os.open, _created)))
            stack.enter_context(mock.patch.object(syscalls, "syncfs", self.wrap(syscalls.syncfs, _of_descriptor)))
            yield


def _last_path(*paths: Any, dir_fd: int | None = None, **_: Any) -> str:
    path = os.fspath(paths[-1] if not isinstance(paths[-1], int) else paths[0])
    return path if dir_fd is None else f"{_of_descriptor(dir_fd)}/{path}"


def _of_descriptor(descriptor: int, *_: Any) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _created(path: Any, flags: int, *_: Any, **__: Any) -> str:
    return os.fspath(path) if flags & os.O_CREAT else ""
