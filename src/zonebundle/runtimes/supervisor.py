"""The supervisor of one zone: a process of its own, which outlives the agent.

Run as `python -I -S supervise.py ZONE` in the zone's state directory, in a session of its own, with the plan as its
standard input (NUL-separated: instance, root, number of arguments, arguments, environment as NAME=VALUE), the answer
to the agent as its standard output (one line) and `supervisor.log` as its standard error.

It starts the zone's command in a session of its own, adopts every orphan of it (a subreaper), reaps, and goes when no
child is left; then, and only then, `run.json` is removed: a zone that has none has nothing left. Until it says so, the
command is not executed: whoever kills the agent or the supervisor at any moment leaves either nothing or a `run.json`
that names what runs. Nothing is fsynced: after a power cut there is another boot, in which the file means nothing.

    run.json       boot, instance, supervisor and init (the command's first process), while any of them lives
    exit.json      how the init of the latest life ended
    console.log    what the zone writes to its standard output and error; one older one is kept as console.log.1
    (the directory itself is locked by flock while the supervisor lives)

There is one for each zone, so it imports little: with `signal` and `ctypes` instead of the modules that they wrap it
takes 1.1 MB and 10 ms more (Python 3.11). It uses no other module of this package either.
"""

import _ctypes
import _signal  # type: ignore[import-not-found]  # it is what `signal` wraps, without the enums
import errno
import fcntl
import os
import select
import sys
import time

CONSOLE_LIMIT = 1 << 20
_READ = 64 << 10
_LOCK_TRIES = 500
_LOCK_PAUSE = 0.01
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_WALL = 0x40000000  # linux/wait.h: children made by clone(2) without SIGCHLD too
_MARK = "ZONE_BUNDLE_INSTANCE"
# Signals that report a fault of the program itself, and those that cannot be caught.
_KEPT = {"SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGSEGV", "SIGSTOP", "SIGSYS", "SIGCHLD"}


class Plan:
    """What to run: read from the standard input."""

    def __init__(self, data: bytes) -> None:
        instance, root, count, *rest = data.split(b"\0")
        self.instance = instance.decode("ascii")
        self.root = root
        self.command = rest[: int(count)]
        self.environment = dict(pair.split(b"=", 1) for pair in rest[int(count) :])
        # By this mark the zone's processes are found again should the supervisor be killed.
        self.environment[_MARK.encode()] = instance


class Console:
    """The zone's output, in two files of bounded size. A disk that is full costs output, never the zone."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._file = _open_console()
        self._size = os.fstat(self._file).st_size
        self._lost = 0
        self._problem = ""

    def pump(self) -> bool:
        """Move what one read gives; False at the end of the zone's output."""
        try:
            data = os.read(self.reader, _READ)
        except BlockingIOError:
            return True
        if self._lost:
            note = f"\n[zone-bundle: {self._lost} bytes of output are missing here: {self._problem}]\n"
            if self._keep(note.encode()):
                self._lost = 0
        self._keep(data)
        return bool(data)

    def _keep(self, data: bytes) -> bool:
        try:
            if self._size + len(data) > CONSOLE_LIMIT:
                self._rotate()
            while data:
                written = os.write(self._file, data)
                self._size += written
                data = data[written:]
        except OSError as error:
            self._lost += len(data)
            self._problem = error.strerror or str(error)
            return False
        return True

    def _rotate(self) -> None:
        try:
            os.rename("console.log", "console.log.1")
        except FileNotFoundError:
            pass
        fresh = _open_console()
        os.close(self._file)
        self._file = fresh
        self._size = 0

    def drain(self) -> None:
        """Take what the zone wrote before it ended. A stranger who was given the pipe cannot prolong this."""
        os.set_blocking(self.reader, False)
        for _ in range(2 * CONSOLE_LIMIT // _READ):
            if not select.select([self.reader], [], [], 0)[0] or not self.pump():
                break


def main() -> int:
    """Supervise until nothing is left; the exit status is 1 if the zone could not be started."""
    os.umask(0o077)
    _ignore_signals()
    plan = Plan(_read_all(0))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if not _lock():
        _answer("busy")
        return 1
    os.ftruncate(2, 0)
    wake = _watch_children()
    try:
        console = Console()
        init, failure = _start(plan, console)
    except OSError as error:
        _answer(f"failed state {error.errno}")
        return 1
    if failure:
        _answer(f"failed {failure}")
        return 1
    _answer("running")
    _supervise(plan, init, console, wake)
    return 0


def _lock() -> bool:
    """Lock the directory while this process lives; False if another supervisor has it and its zone runs."""
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            # Without run.json the other one has only begun, or is just going.
            if os.path.exists("run.json"):
                return False
            time.sleep(_LOCK_PAUSE)
    return False


def _start(plan: Plan, console: Console) -> tuple[int, str]:
    """Start the command: (its PID, ""), or what failed, when nothing is left of it. Raises OSError for the state."""
    waiting, go = os.pipe()
    result, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        _become_zone(plan, waiting, report, console.writer)
    os.close(waiting)
    os.close(report)
    os.close(console.writer)
    try:
        _write_run(plan, pid)
        os.write(go, b"g")
    except OSError:
        os.close(go)  # the child reads the end of file and goes
        os.waitpid(pid, 0)
        raise
    os.close(go)
    failure = _read_all(result).decode("ascii")
    os.close(result)
    if failure:
        os.waitpid(pid, 0)
        os.unlink("run.json")
    return pid, failure


def _become_zone(plan: Plan, waiting: int, report: int, output: int) -> None:
    """The child's part: waits for the word to go and becomes the zone's command. Does not return."""
    stage = "state"
    try:
        os.setsid()
        if os.read(waiting, 1) != b"g":
            os._exit(0)
        # Ignored signals stay ignored over an exec; Python ignores SIGPIPE, the supervisor nearly all.
        for number in range(1, _signal.NSIG):
            if number not in (_signal.SIGKILL, _signal.SIGSTOP):
                _set_signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.umask(0o022)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        stage = "root"
        os.chdir(plan.root)
        stage = "exec"
        os.execvpe(plan.command[0], plan.command, plan.environment)
    except Exception as error:
        os.write(report, f"{stage} {getattr(error, 'errno', None) or errno.EINVAL}".encode())
    finally:
        os._exit(127)


def _supervise(plan: Plan, init: int, console: Console, wake: int) -> None:
    """Pump the output and reap until no child is left."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(console.reader, select.POLLIN)
    start_time = _start_time(init)
    while True:
        ready = dict(poll.poll())
        if console.reader in ready and not console.pump():
            poll.unregister(console.reader)
        if wake in ready:
            os.read(wake, _READ)
            ended, status = _reap(init)
            if status is not None:
                _write_exit(plan, init, start_time, status)
            if ended:
                break
    console.drain()
    os.unlink("run.json")


def _reap(init: int) -> tuple[bool, int | None]:
    """Reap the dead: (whether no child is left, the init's status if it was among them)."""
    init_status = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | _WALL)
        except ChildProcessError:
            return True, init_status
        if pid == 0:
            return False, init_status
        if pid == init:
            init_status = status


def _write_run(plan: Plan, init: int) -> None:
    supervisor = os.getpid()
    _replace(
        "run.json",
        f'{{"boot_id": "{_boot_id()}", "instance": "{plan.instance}", '
        f'"supervisor": {{"pid": {supervisor}, "start_time": {_start_time(supervisor)}}}, '
        f'"init": {{"pid": {init}, "start_time": {_start_time(init)}}}}}\n',
    )


def _write_exit(plan: Plan, init: int, start_time: int, status: int) -> None:
    killed = os.WIFSIGNALED(status)
    try:
        _replace(
            "exit.json",
            f'{{"boot_id": "{_boot_id()}", "instance": "{plan.instance}", '
            f'"init": {{"pid": {init}, "start_time": {start_time}}}, "ended": {time.time():.3f}, '
            f'"status": {"null" if killed else os.WEXITSTATUS(status)}, '
            f'"signal": {os.WTERMSIG(status) if killed else "null"}}}\n',
        )
    except OSError as error:
        sys.stderr.write(f"exit.json cannot be written: {error}\n")


def _open_console() -> int:
    return os.open("console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _replace(name: str, text: str) -> None:
    data = text.encode()
    descriptor = os.open(f"{name}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)
    os.rename(f"{name}.tmp", name)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _start_time(pid: int) -> int:
    # Field 22 of proc(5), counted from the last bracket: the name before it may hold anything.
    with open(f"/proc/{pid}/stat", "rb") as file:
        data = file.read()
    return int(data[data.rfind(b")") + 2 :].split()[19])


def _answer(line: str) -> None:
    """Tell the agent how the start went, and let go of it. An agent that died meanwhile will find run.json."""
    try:
        os.write(1, f"{line}\n".encode())
    except OSError:
        pass
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, 0, inheritable=False)
    os.dup2(nothing, 1, inheritable=False)


def _ignore_signals() -> None:
    """End with the zone or by SIGKILL only: whoever signals everything of a session or user means the zone."""
    kept = {getattr(_signal, name) for name in _KEPT}
    for number in range(1, _signal.NSIG):
        if number not in kept:
            _set_signal(number, _signal.SIG_IGN)


def _set_signal(number: int, action: int) -> None:
    try:
        _signal.signal(number, action)
    except (OSError, ValueError):
        pass  # the C library keeps two of the real-time signals for itself


def _watch_children() -> int:
    """A descriptor that becomes readable when a child has ended."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGCHLD, lambda *_: None)
    return reader


def _read_all(descriptor: int) -> bytes:
    data = b""
    while chunk := os.read(descriptor, _READ):
        data += chunk
    return data


def _prctl(option: int, value: int) -> None:
    function = _ctypes.dlsym(_ctypes.dlopen(None, os.RTLD_NOW), "prctl")  # type: ignore[arg-type]
    if _ctypes.call_function(function, (option, value, 0, 0, 0)) != 0:
        raise OSError(f"prctl {option} was refused")
