"""The kernel's tables of sockets, of one network namespace.

TCP is asked for by netlink (sock_diag(7), linux/inet_diag.h): /proc/net/tcp and tcp6 each walk the whole hash table of
the host, 1.8 ms a piece for 262,144 buckets even where it is empty, against 0.3 ms for one dump of both families, and
0.03 ms for the listening sockets alone. Where netlink is refused, and for everything else, /proc/PID/net is read.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zonebundle.capture.process_view import read_at
from zonebundle.host import syscalls

# Of one table; a busy host's is longer, and its end is then not looked at.
TABLE_LIMIT = 8 << 20

LISTENING = 1 << 10
NOT_LISTENING = 0x1FFF & ~LISTENING

# include/net/tcp_states.h, in the words of netstat(8).
_STATES = (
    *("", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT"),
    *("LAST_ACK", "LISTEN", "CLOSING", "SYN_RECV"),
)
_UNIX_TYPES = {1: "STREAM", 2: "DGRAM", 5: "SEQPACKET"}
_UNIX_STATES = {1: "", 2: "CONNECTING", 3: "CONNECTED", 4: "DISCONNECTING"}
_UNIX_LISTENS = 0x10000

_NETLINK_SOCK_DIAG = 4
_TCPDIAG_GETSOCK = 18
_NLM_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
# struct inet_diag_msg: family, state, timer, retransmissions, ports, addresses, interface, cookie, then five counts.
_MESSAGE = struct.Struct("=BBBB2s2s16s16s12s5I")


class DiagRefused(Exception):
    """The kernel does not answer by netlink here: it cannot, or we may not ask in that namespace."""


@dataclass(frozen=True, slots=True)
class InetSocket:
    """A line of netstat: bytes in the queues, addresses with port, the state in words, the inode (0: none any more)."""

    protocol: str
    receive: int
    send: int
    local: str
    remote: str
    state: str
    inode: int


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A Unix socket. `path` is its name, of any bytes, empty if it has none; abstract ones begin with `@`."""

    references: int
    listens: bool
    kind: str
    state: str
    inode: int
    path: bytes


Wanted = Callable[[int], bool]


def open_diag(content: int | None) -> socket.socket:
    """A netlink socket for dumps, in the network namespace of the process directory `content`, ours if None.

    A socket stays in the namespace it was made in, so the calling thread enters the other one for that call alone.
    Raises DiagRefused.
    """
    try:
        if content is None:
            return _diag_socket()
        theirs = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=content)
        try:
            with syscalls.network_namespace(theirs):
                return _diag_socket()
        finally:
            os.close(theirs)
    except OSError as error:
        raise DiagRefused(error.strerror) from None


def _diag_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)


def tcp_by_diag(sock: socket.socket, states: int, wanted: Wanted) -> Iterator[InetSocket]:
    """The TCP sockets of both families in `states` (a bit each) whose inode is `wanted`. Raises DiagRefused."""
    request = bytes(52) + struct.pack("=II", states, 0)
    for message in _dump(sock, _TCPDIAG_GETSOCK, request):
        if len(message) < _MESSAGE.size or not wanted(int.from_bytes(message[68:72], sys.byteorder)):
            continue
        family, state, _, _, source, target, local, remote, _, _, receive, send, _, inode = _MESSAGE.unpack_from(
            message
        )
        name = "tcp6" if family == socket.AF_INET6 else "tcp"
        size = 16 if family == socket.AF_INET6 else 4
        yield InetSocket(
            name,
            receive,
            send,
            _address(local[:size], int.from_bytes(source, "big")),
            _address(remote[:size], int.from_bytes(target, "big")),
            _state(state),
            inode,
        )


def _dump(sock: socket.socket, kind: int, request: bytes) -> Iterator[bytes]:
    # Bounded: the kernel answers a dump at once, or not at all.
    sock.settimeout(1.0)
    read = 0
    try:
        sock.send(_HEADER.pack(_HEADER.size + len(request), kind, _NLM_REQUEST_DUMP, 1, 0) + request)
        while read < TABLE_LIMIT:
            data = sock.recv(64 << 10)
            read += len(data)
            at = 0
            while at + _HEADER.size <= len(data):
                length, what, _, _, _ = _HEADER.unpack_from(data, at)
                if what == _NLMSG_DONE:
                    return
                if what == _NLMSG_ERROR or length < _HEADER.size:
                    raise DiagRefused("the kernel has no TCP dump by netlink")
                yield data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3
    except OSError as error:
        raise DiagRefused(str(error)) from None


def inet_by_proc(content: int, protocol: str, wanted: Wanted) -> Iterator[InetSocket]:
    """The sockets of /proc/PID/net/`protocol` (tcp, tcp6, udp, udp6, raw, raw6) whose inode is `wanted`."""
    with contextlib.suppress(FileNotFoundError):
        for line in read_at(content, f"net/{protocol}", TABLE_LIMIT).split(b"\n")[1:]:
            fields = line.split(None, 10)
            if len(fields) < 10 or not wanted(int(fields[9])):
                continue
            send, _, receive = fields[4].partition(b":")
            state = int(fields[3], 16)
            yield InetSocket(
                protocol,
                int(receive, 16),
                int(send, 16),
                _hex_address(fields[1]),
                _hex_address(fields[2]),
                # A datagram socket has no connection: the kernel calls it closed until it has a peer.
                "" if state == 7 and not protocol.startswith("tcp") else _state(state),
                int(fields[9]),
            )


def unix_by_proc(content: int, wanted: Wanted) -> Iterator[UnixSocket]:
    """The sockets of /proc/PID/net/unix whose inode is `wanted`.

    The kernel writes names as they are, newlines too, so a name may forge lines. One that does not look like the
    kernel's is taken as the name's continuation; one that does is indistinguishable, and shows as a second line of an
    inode that is there already.
    """
    with contextlib.suppress(FileNotFoundError):
        found: UnixSocket | None = None
        for line in read_at(content, "net/unix", TABLE_LIMIT).split(b"\n")[1:]:
            fields = line.split(None, 7)
            if len(fields) < 7 or line.find(b": ") != len(fields[0]) - 1 or not fields[6].isdigit():
                if found is not None and line:
                    found = _continued(found, line)
                continue
            if found is not None:
                yield found
                found = None
            inode = int(fields[6])
            if wanted(inode):
                found = UnixSocket(
                    references=int(fields[1], 16),
                    listens=bool(int(fields[3], 16) & _UNIX_LISTENS),
                    kind=_UNIX_TYPES.get(int(fields[4], 16), "?"),
                    state=_UNIX_STATES.get(int(fields[5], 16), "?"),
                    inode=inode,
                    path=fields[7] if len(fields) > 7 else b"",
                )
        if found is not None:
            yield found


def _continued(found: UnixSocket, line: bytes) -> UnixSocket:
    return UnixSocket(
        found.references, found.listens, found.kind, found.state, found.inode, found.path + b"\n" + line[:256]
    )


def _state(number: int) -> str:
    return _STATES[number] if number < len(_STATES) else str(number)


def _hex_address(field: bytes) -> str:
    # "0100007F:0035": 32-bit words in the host's byte order, the port as a number.
    words, _, port = field.partition(b":")
    numbers = [int(words[start : start + 8], 16) for start in range(0, len(words), 8)]
    return _address(struct.pack(f"={len(numbers)}I", *numbers), int(port, 16))


def _address(packed: bytes, port: int) -> str:
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return f"{socket.inet_ntop(family, packed)}:{port or '*'}"
