"""Probes of one process: its arguments, its open files, the kernel stacks of its threads."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator

from zonebundle.capture.probe_result import Skipped
from zonebundle.capture.process_view import (
    COMMAND_LIMIT,
    MAX_DESCRIPTORS,
    Opened,
    ProcessView,
    Stat,
    flag_names,
    opened,
    parse_stat,
    read_at,
    read_small,
    title,
)
from zonebundle.model.paths import printable

_MAX_THREADS = 256
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "uninterruptible sleep",
    "T": "stopped",
    "t": "stopped by a tracer",
    "Z": "ended",
    "I": "idle",
}
# Lines of /proc/PID/status that say who the process is, also as the zone numbers it. Never its environment.
_STATUS = re.compile(rb"^(Uid|Gid|NSpid|CapEff|Seccomp):\t(.*)$", re.MULTILINE)


def pargs(view: ProcessView) -> Iterator[str]:
    """The arguments, one a line, after the program, its directory and its identity."""
    with opened(view.process) as found:
        command = read_at(found.content, "cmdline", COMMAND_LIMIT)
        yield f"{view.process.pid}:\t{title(found.stat.name, command)}"
        yield f"name: {printable(found.stat.name)}"
        yield from (f"{link}: {_read_link(found.content, link)}" for link in ("exe", "cwd", "root"))
        for key, value in _STATUS.findall(read_small(found.content, "status")):
            yield f"{key.decode('ascii')}: {printable(value.replace(b'	', b' '))}"
    # A process may write over its arguments, zeroes included: what is there is shown, empty arguments too.
    text = os.fsdecode(command)
    arguments = text.split("\0")
    if not arguments[-1]:
        arguments.pop()
    if not text.replace("\0", "").isprintable():
        arguments = [printable(argument) for argument in arguments]
    yield from (f"argv[{number}]: {argument}" for number, argument in enumerate(arguments))
    if len(command) >= COMMAND_LIMIT:
        yield f"(cut: the first {COMMAND_LIMIT >> 10} KiB of the arguments)"


def _read_link(directory: int, name: str) -> str:
    try:
        return printable(os.readlink(name, dir_fd=directory))
    except PermissionError:
        return "(not permitted)"


def pfiles(view: ProcessView) -> Iterator[str]:
    """The open files: number, flags, offset, and what the descriptor leads to (read, never followed)."""
    files = view.files()
    if files.denied:
        raise Skipped(f"its descriptors cannot be listed: {files.denied}")
    yield f"{view.process.pid}:\t{printable(view.basics().stat.name)}"
    yield f"  Current rlimit: {files.limit} file descriptors"
    for number, target, flags, offset in files.entries:
        position = "" if offset == b"0" else f" offset:{offset.decode('ascii', 'replace')}"
        yield f"{number:4d}: {printable(target)}{' ' + flag_names(flags) if flags else ''}{position}"
    if not files.is_complete:
        yield f"(the first {MAX_DESCRIPTORS} that the kernel lists; there are more)"


def pstack(view: ProcessView) -> Iterator[str]:
    """The kernel stacks of all threads, with state and wait channel; without the right to see stacks, only these."""
    with opened(view.process) as found:
        yield f"{view.process.pid}:\t{printable(found.stat.name)}"
        yield from _threads(found)


def _threads(found: Opened) -> Iterator[str]:
    tasks = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=found.directory)
    denied = ""
    try:
        with os.scandir(tasks) as listing:
            threads = [entry.name for entry in itertools.islice(listing, _MAX_THREADS)]
        for thread in threads:
            try:
                is_only = len(threads) == 1
                yield _describe(thread, found.stat if is_only else parse_stat(read_small(tasks, f"{thread}/stat")))
                # A frame is "[<0>] name+0x1/0x2"; the first is what wchan would tell.
                stack = b"" if denied else read_small(tasks, f"{thread}/stack")
                yield from (f"  {printable(frame[6:])}" for frame in stack.split(b"\n") if frame)
            except PermissionError as error:
                denied = error.strerror or "not permitted"
                yield f"  (kernel stacks cannot be read: {denied})"
            except (FileNotFoundError, ProcessLookupError):
                yield "  (it has ended meanwhile, or this kernel tells no stacks)"
                continue
            if denied:
                yield f"  waits in {_wait_channel(tasks, thread)}"
        if found.stat.threads > len(threads) >= _MAX_THREADS:
            yield f"(the first {_MAX_THREADS} of {found.stat.threads} threads)"
    finally:
        os.close(tasks)


def _wait_channel(tasks: int, thread: str) -> str:
    try:
        name = read_small(tasks, f"{thread}/wchan")
    except OSError:
        name = b""
    return "(not told)" if name in (b"", b"0") else printable(name)


def _describe(thread: str, stat: Stat) -> str:
    return f"thread {thread} ({printable(stat.name)}): {_STATES.get(stat.state, stat.state)}"
