"""PID files: which process one names, if it may be believed."""

from __future__ import annotations

import os
import stat
import time

from zonebundle.errors import RuntimeFailedError
from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef

_LARGEST = 64
# A daemon writes its file after it has started; a process that started later has come by a recycled PID. The slack is
# for a wall clock that was put forward since, as at boot.
_SLACK = 60.0
_FLAGS = 6  # in the list of read_stat
_PF_KTHREAD = 0x00200000  # linux/sched.h


def read_pid_file(path: str) -> ProcessRef | None:
    """The living process that a PID file names; None if there is no file, or its process has ended.

    A file that may not be believed raises RuntimeFailedError: whoever can write one must not have any process of the
    host ended by it. So the process must run as the file's owner, unless that is root or this process's user.
    May block on a file system that hangs.
    """
    try:
        # The file may lie where a zone can put a FIFO or a link in its place.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RuntimeFailedError(f"the PID file {path} cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _doubt(path, "it is not a regular file")
        text = os.read(descriptor, _LARGEST + 1)
    finally:
        os.close(descriptor)
    # An empty file is one that is just being written.
    return _identify(path, text, status) if text.strip() else None


def _identify(path: str, text: bytes, status: os.stat_result) -> ProcessRef | None:
    digits = text.strip()
    if len(text) > _LARGEST or not digits.isdigit():
        raise _doubt(path, "it holds something else than one number")
    pid = int(digits)
    process = proc.identify(pid)
    if process is None or _start_on_clock(process) > status.st_mtime + _SLACK:
        return None
    if pid in (1, os.getpid(), os.getppid()):
        raise _doubt(path, f"process {pid} is {'the first of the host' if pid == 1 else 'the agent or its parent'}")
    facts, fields = proc.read_status(pid), proc.read_stat(pid)
    if facts is None or fields is None:
        return None
    if int(fields[_FLAGS]) & _PF_KTHREAD:
        raise _doubt(path, f"{pid} is a thread of the kernel")
    if int(facts["Tgid"]) != pid:
        raise _doubt(path, f"{pid} is a thread of process {facts['Tgid']}")
    user = int(facts["Uid"].split()[0])
    if status.st_uid not in (0, os.geteuid(), user):
        raise _doubt(path, f"it is owned by user {status.st_uid}, but process {pid} runs as user {user}")
    return process if proc.is_alive(process) else None


def _start_on_clock(process: ProcessRef) -> float:
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot + process.start_time / os.sysconf("SC_CLK_TCK")


def _doubt(path: str, reason: str) -> RuntimeFailedError:
    return RuntimeFailedError(f"the PID file {path} is not believed: {reason}; correct or remove it")
