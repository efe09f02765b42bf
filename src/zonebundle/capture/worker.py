"""A hold worker: does everything of a hold that can hang or burn CPU. It serves one zone at a time.

Messages: begin → open the logs, look at the processes, run the commands (these after the notice `go`: the intent is
durable); snapshot → take a snapshot that others may share; finish → stage what is not in one, write the record.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import traceback
from typing import Any

from zonebundle.capture.hold import Hold
from zonebundle.capture.order import FinishOrder, HoldOrder
from zonebundle.errors import ZoneBundleError
from zonebundle.host import syscalls
from zonebundle.host.channel import Channel, ChannelClosed, send_message


def serve(sock: socket.socket) -> None:
    """Serve holds until the agent closes its end or a thread of ours is stuck. Ends the process."""
    # Orphans of commands come to us and can be found and killed, wherever they tried to hide.
    syscalls.become_subreaper()
    pidfd = os.pidfd_open(os.getpid())
    send_message(sock, {"pid": os.getpid()}, (pidfd,))
    os.close(pidfd)
    asyncio.run(_serve(Channel(sock)))
    # Not a return: a thread that hangs in the kernel must not be joined.
    os._exit(0)


async def _serve(channel: Channel) -> None:
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    go = asyncio.Event()
    receiver = asyncio.ensure_future(_receive(channel, messages, go))
    hold: Hold | None = None
    with contextlib.suppress(ChannelClosed):
        while hold is None or not hold.is_stuck:
            message = await messages.get()
            match message["do"]:
                case "begin":
                    hold = Hold(HoldOrder.from_json(message["order"]))
                    reply = await _answer(hold.begin(go))
                case "snapshot" if hold:
                    reply = await _answer(hold.take_snapshot(message["group"]))
                case "finish" if hold:
                    reply = await _answer(hold.finish(FinishOrder.from_json(message["order"])))
                    if "error" not in reply:
                        # After an error the agent may try once more.
                        hold.close()
                        go.clear()
                case unknown:
                    reply = {"error": f"hold worker: '{unknown}' is not expected now"}
            if hold is not None and hold.is_stuck:
                reply["spent"] = True
            channel.send(reply)
    receiver.cancel()


async def _receive(channel: Channel, messages: asyncio.Queue[dict[str, Any]], go: asyncio.Event) -> None:
    while True:
        try:
            message, _ = await channel.receive()
        except ChannelClosed:
            # The agent is gone or needs us no more. What a hung thread does must not delay our end; commands that
            # still run are noted in the spool and ended by the next start.
            os._exit(0)
        if message["do"] == "go":
            go.set()
        else:
            messages.put_nowait(message)


async def _answer(work: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = await work
    except (OSError, ZoneBundleError) as error:
        return {"error": str(error)}
    except Exception as error:
        report_crash()
        return {"error": f"hold worker failed: {type(error).__name__}: {error}"}
    return answer


def report_crash() -> None:
    """Print the current exception to stderr, which is the agent's log."""
    traceback.print_exc(file=sys.stderr)
