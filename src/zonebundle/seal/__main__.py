"""`python -m zonebundle.seal`: the sealer process, started and supervised by the agent (see link)."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import signal
import socket
import sys
from pathlib import Path

import structlog

from zonebundle.host import proc, syscalls
from zonebundle.host.collector import collect_seldom
from zonebundle.host.priority import lower_priority
from zonebundle.model.record import Area
from zonebundle.seal.ahead import Ahead
from zonebundle.seal.sealer import Sealer
from zonebundle.seal.service import Service
from zonebundle.seal.storage import SPOOL, Storage
from zonebundle.seal.upkeep import Upkeep
from zonebundle.seal.workers import Workers
from zonebundle.snapshots.areas import Unlinked, destroy_area

_LOCK_FILE = "spool.lock"


def main(arguments: list[str] | None = None) -> None:
    """Serve until the agent's end of the socket closes; never returns."""
    parser = argparse.ArgumentParser(prog="zonebundle.seal")
    parser.add_argument("--state", type=Path, required=True, help="the agent's state directory")
    parser.add_argument(
        "--store", type=Path, required=True, action="append", help="a store directory; the first is preferred"
    )
    parser.add_argument(
        "--quota", type=int, help="bytes that a store directory may use, instead of what the disk tells"
    )
    parser.add_argument("--installation", required=True, help="the ID that marks what is ours")
    parser.add_argument("--workers", type=int, default=0, help="threads that compress; 0: one a core")
    parser.add_argument("--drained", default=[], action="append", help="a path below which nothing is to be used")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the agent")
    parser.add_argument("--agent", type=int, required=True, help="the agent's PID")
    options = parser.parse_args(arguments)
    os.umask(0o077)
    syscalls.die_with_parent(options.agent, signal.SIGKILL)
    # The terminal's Ctrl-C is for the agent: it ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    collect_seldom()
    lock = _lock(options.state / _LOCK_FILE)
    asyncio.run(_serve(options, lock))


def _lock(path: Path) -> int:
    """Wait until no other sealer has the spool; the lock is held as long as this process lives."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


async def _serve(options: argparse.Namespace, lock: int) -> None:
    installation: str = options.installation

    def destroy(area: Area, unlinked: Unlinked | None) -> None:
        destroy_area(area, installation, unlinked)

    storage = Storage(options.state, options.store)
    workers = Workers(options.workers or len(os.sched_getaffinity(0)))
    agent = proc.identify(options.agent)
    sealer = Sealer(
        options.state / SPOOL,
        storage,
        destroy,
        workers,
        agent=agent,
    )
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=options.fd))
    upkeep = Upkeep(options.state / SPOOL, storage, Ahead(storage, workers, agent=agent), options.quota)
    for path in options.drained:
        upkeep.drain(path)
    await Service(sealer, upkeep, reader, writer).run()
    if storage.stores.are_silent:
        # A thread that hangs in the kernel keeps this process, and its locks, from their end.
        storage.stores.unlock()
        fcntl.flock(lock, fcntl.LOCK_UN)
    # Threads may be in the middle of anything; every state is one that the next sealer can go on from.
    os._exit(0)


if __name__ == "__main__":
    main()
