"""Messages between the agent and its children: JSON objects over a socket pair, with descriptors where needed.

SOCK_SEQPACKET keeps message borders and reports the peer's death as an end of file. A long message (the settings name
every zone's root) is handed over in a memory file, so a send never waits: a full buffer means that the peer does not
read, and is an error.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from typing import Any

from zonebundle.host.files import write_all
from zonebundle.model.manifest import decode_line, encode_line

_MESSAGE = 128 << 10
_DESCRIPTORS = 4
# One more: the carrier of a long message.
_RIGHTS = socket.CMSG_LEN((_DESCRIPTORS + 1) * array.array("i").itemsize)
_CARRIED = b"carried"


class ChannelClosed(ConnectionError):
    """The peer has closed its end, or died."""


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets for Channel; both non-inheritable."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


# Not socket.send_fds and recv_fds: they take flags and forget them, so that descriptors would arrive inheritable.


def send_message(sock: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send one message; raises ChannelClosed if the peer is gone, ValueError for too many descriptors.

    One that is too long for the socket travels in a memory file, whose descriptor goes first.
    """
    data = encode_line(message)
    if len(descriptors) > _DESCRIPTORS:
        raise ValueError(f"{len(descriptors)} descriptors do not fit into a message: at most {_DESCRIPTORS}")
    if len(data) <= _MESSAGE:
        _send(sock, data, descriptors)
        return
    carrier = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        write_all(carrier, data)
        _send(sock, _CARRIED, (carrier, *descriptors))
    finally:
        os.close(carrier)


def _send(sock: socket.socket, data: bytes, descriptors: tuple[int, ...]) -> None:
    try:
        sock.sendmsg([data], _rights(descriptors), socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ChannelClosed(str(error)) from None


def _rights(descriptors: tuple[int, ...]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []


def receive_message(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive one message and the descriptors with it; raises ChannelClosed at the end, BlockingIOError if none."""
    try:
        data, rights, flags, _ = sock.recvmsg(_MESSAGE, _RIGHTS, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError as error:
        raise ChannelClosed(str(error)) from None
    if not data:
        raise ChannelClosed("the peer has closed the channel")
    descriptors = _descriptors(rights)
    try:
        if flags & socket.MSG_TRUNC:
            raise ValueError(f"a message of more than {_MESSAGE} bytes was cut")
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, "the descriptors of a message were lost: too many are open here")
        if data == _CARRIED:
            data = _read_carrier(descriptors.pop(0))
        message: dict[str, Any] = decode_line(data)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return message, descriptors


def _read_carrier(carrier: int) -> bytes:
    with open(carrier, "rb") as file:
        file.seek(0)
        return file.read()


def _descriptors(rights: list[tuple[int, int, bytes]]) -> list[int]:
    received = array.array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    return received.tolist()


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Channel:
    """One end of a pair inside an event loop; one task receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._watch: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def send(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        """Send without waiting; raises ChannelClosed, or BlockingIOError if the peer does not read."""
        send_message(self._sock, message, descriptors)

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message and its descriptors (the caller closes them); raises ChannelClosed. Cancellable."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return receive_message(self._sock)
            except BlockingIOError:
                pass
            ready: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self._sock.fileno(), _wake, ready)
            self._watch = loop, ready
            try:
                await ready
            finally:
                self._unwatch()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch[0].remove_reader(self._sock.fileno())
            self._watch = None

    def close(self) -> None:
        """Close our end; a task that receives gets ChannelClosed."""
        if self._watch is not None:
            _, ready = self._watch
            # Now, not when that task comes to run: by then the descriptor's number may be somebody else's, whose
            # reader would be removed in our place, and who would wait for ever.
            self._unwatch()
            if not ready.done():
                ready.set_exception(ChannelClosed("this end was closed"))
                # The task may have been cancelled, and not look at it.
                ready.exception()
        self._sock.close()
