"""Runs the agent: its socket, its signals, its log."""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn
import uvloop

from zonebundle.agent.agent import Agent
from zonebundle.agent.config import Config
from zonebundle.api.app import make_app
from zonebundle.errors import AlreadyRunningError, UnavailableError
from zonebundle.host.collector import collect_seldom
from zonebundle.model.paths import printable

_GROUP = "zone-bundle"
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_log = structlog.get_logger()


def serve(config: Config, log_level: str = "info") -> None:
    """Run an agent until SIGTERM or SIGINT. Raises ZoneBundleError if it cannot start."""
    os.umask(0o077)
    _configure_log(log_level)
    collect_seldom()
    uvloop.run(_serve(config))


async def _serve(config: Config) -> None:
    with contextlib.ExitStack() as stack:
        # The socket first: a second agent on it is refused before anything else is touched.
        sockets = [stack.enter_context(listening(path)) for path in config.agent.sockets]
        agent = Agent(config)
        await agent.start()
        try:
            server = _Server(
                uvicorn.Config(
                    make_app(agent),
                    log_config=None,
                    access_log=False,
                    lifespan="off",
                    timeout_graceful_shutdown=30,
                    backlog=1024,
                )
            )
            _notify_systemd("READY=1")
            _log.info("agent is ready", listen=list(config.agent.listen), zones=len(config.zones), pid=os.getpid())
            await server.serve(sockets)
            _notify_systemd("STOPPING=1")
        finally:
            _ignore_signals()
            await agent.close()
    _log.info("agent has stopped; zones run on")


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket, 0660 and of the group zone-bundle if there is one; removed at the end.

    Raises AlreadyRunningError if somebody answers there, UnavailableError if it cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead_socket(path)
        _make_socket_directory(path.parent)
        sock.bind(str(path))
        path.chmod(0o660)
        with contextlib.suppress(KeyError, PermissionError):
            os.chown(path, -1, grp.getgrnam(_GROUP).gr_gid)
        sock.listen(1024)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = "shorten the path to less than 108 bytes" if "too long" in str(error) else "make its directory writable"
        raise UnavailableError(f"cannot listen on unix:{path}: {reason}; {hint}, or set [agent] listen") from None
    except BaseException:
        sock.close()
        raise
    identity = path.stat()
    try:
        yield sock
    finally:
        sock.close()
        with contextlib.suppress(FileNotFoundError):
            # Not another agent's, which may have taken the place meanwhile.
            if (path.stat().st_ino, path.stat().st_dev) == (identity.st_ino, identity.st_dev):
                path.unlink()


def _make_socket_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(mode=0o755, parents=True)
        # The umask is 077, which would keep the group away from a socket that is made for it.
        directory.chmod(0o755)


def _remove_dead_socket(path: Path) -> None:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe.settimeout(2)
    try:
        probe.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        if not path.is_socket():
            raise OSError(errno.EEXIST, "a file that is not a socket is in its place") from None
        path.unlink()
        return
    except TimeoutError:
        pass
    finally:
        probe.close()
    raise AlreadyRunningError(f"unix:{path} is in use: another agent listens there; stop it, or set [agent] listen")


class _Server(uvicorn.Server):
    """Ends on SIGTERM, SIGINT, SIGHUP. uvicorn's own handlers raise the signal again, before the agent could close."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(_number: int, _frame: FrameType | None) -> None:
            self.should_exit = True

        # Not by the loop: to remove its handler would bring the default back, for the moment until it is ignored.
        for number in _ENDING:
            signal.signal(number, stop)
        yield


def _ignore_signals() -> None:
    """From here to the exit: a second signal does not end what the first one waits for."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def _notify_systemd(message: str) -> None:
    """Tell a service manager (sd_notify(3)); nothing happens where there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall(message.encode())


def _escape_values(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What a zone or a client wrote must not forge a line or drive the terminal."""
    for key, value in event.items():
        if isinstance(value, str) and key != "exception":
            event[key] = printable(value)
    return event


def _configure_log(level: str) -> None:
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _escape_values,
            structlog.dev.ConsoleRenderer(colors=True) if terminal else structlog.processors.LogfmtRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper(), logging.INFO)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
