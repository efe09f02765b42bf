"""A hold worker: does everything of a hold that can hang or burn CPU. It serves any number of zones at once.

Messages, each with the number of its hold: begin → open the logs, look at the processes, run the commands (these after
the notice `go`: the intent is durable); snapshot → take a snapshot that others may share; finish → stage what is not in
one, write the record; drop (a notice) → forget the hold. warm → learn how the logs of some zones will be kept. The
notice `settings`, of no hold, is for all that begin after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvloop

from zonebundle.capture.hold import Hold, find_choices
from zonebundle.capture.order import FinishOrder, HoldOrder, HoldSettings
from zonebundle.errors import HostError, ZoneBundleError
from zonebundle.host import syscalls
from zonebundle.host.channel import Channel, ChannelClosed, send_message
from zonebundle.model.zone import Zone
from zonebundle.snapshots.base import KnownFiles

_THREADS = 64
# Started when they are needed. Those of holds whose processes hang must not be missing in others.
_PROBE_THREADS = 4096

OpenIndex = Callable[[Path], KnownFiles]
"""Makes what a worker asks for known files, of the index file; opens nothing yet."""


def serve(sock: socket.socket, open_index: OpenIndex | None = None) -> None:
    """Serve holds until the agent closes its end. Ends the process."""
    # Orphans of commands come to us and can be found and killed, wherever they tried to hide.
    syscalls.become_subreaper()
    pidfd = os.pidfd_open(os.getpid())
    send_message(sock, {"pid": os.getpid()}, (pidfd,))
    os.close(pidfd)
    with contextlib.suppress(ChannelClosed):
        uvloop.run(_Worker(Channel(sock), open_index).serve())
    # Not a return: a thread that hangs in the kernel must not be joined. Commands that still run are noted in the
    # spool and ended by the agent, or by the next one.
    os._exit(0)


class _Worker:
    def __init__(self, channel: Channel, open_index: OpenIndex | None) -> None:
        self._channel = channel
        self._open_index = open_index
        self._indexes: dict[str, KnownFiles] = {}
        # Shared by the holds: starting threads for each would cost more than what they do. A stuck one is lost to it,
        # and ends this worker's career.
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hold")
        self._probe_threads = ThreadPoolExecutor(_PROBE_THREADS, thread_name_prefix="probe")
        self._settings = HoldSettings()
        self._holds: dict[int, Hold] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        while True:
            message, _ = await self._channel.receive()
            number = message.get("hold", 0)
            match message["do"]:
                case "settings":
                    self._settings = HoldSettings.from_json(message["settings"])
                case "go":
                    if (hold := self._holds.get(number)) is not None:
                        hold.go()
                case "drop":
                    if (hold := self._holds.pop(number, None)) is not None:
                        hold.close()
                case _:
                    if message["do"] == "begin" and number not in self._holds:
                        # Here and not in the task: `go` may be the next message, and must find the hold.
                        order = HoldOrder.from_json(message["order"], self._settings)
                        known = self._known_files(order.settings.index)
                        self._holds[number] = Hold(order, self._threads, self._probe_threads, known)
                    task = asyncio.create_task(self._answer(number, message))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    def _known_files(self, index: str) -> KnownFiles | None:
        if not index or self._open_index is None:
            return None
        if index not in self._indexes:
            self._indexes[index] = self._open_index(Path(index))
        return self._indexes[index]

    async def _answer(self, number: int, message: dict[str, Any]) -> None:
        try:
            reply = await self._do(number, message)
        except (OSError, ZoneBundleError) as error:
            reply = {"error": str(error)}
        except Exception as error:
            report_crash()
            reply = {"error": f"hold worker failed: {type(error).__name__}: {error}"}
        hold = self._holds.get(number)
        self._channel.send(
            reply | {"hold": number, "call": message["call"], "stuck": hold is not None and hold.is_stuck}
        )

    async def _warm(self, message: dict[str, Any]) -> dict[str, Any]:
        """Find out, before it is urgent, how the logs of these zones will be kept; answers with what to warn of."""
        trees = [tree for zone in message["zones"] for tree in Zone.from_json(zone).logs]
        loop = asyncio.get_running_loop()
        warnings, staging = await loop.run_in_executor(self._threads, find_choices, trees, self._settings)
        return {"warnings": warnings, "staging": staging}

    def _do(self, number: int, message: dict[str, Any]) -> Coroutine[Any, Any, dict[str, Any]]:
        hold = self._holds.get(number)
        match message["do"]:
            case "warm":
                return self._warm(message)
            case "begin" if hold is not None:
                return hold.begin()
            case "snapshot" if hold is not None:
                return hold.take_snapshot(message["group"])
            case "finish" if hold is not None:
                return hold.finish(FinishOrder.from_json(message["order"]))
            case unknown:
                raise HostError(f"hold worker: '{unknown}' is not expected now")


def report_crash() -> None:
    """Print the current exception to stderr, which is the agent's log."""
    traceback.print_exc(file=sys.stderr)
