"""The probe `netstat`: the sockets of a zone, in the manner of `netstat -an`."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence

from zonebundle.capture import socket_tables
from zonebundle.capture.probe_result import Skipped
from zonebundle.capture.process_view import Gone, ProcessView, host_namespaces, opened
from zonebundle.capture.socket_tables import DiagRefused, InetSocket, UnixSocket, Wanted
from zonebundle.model.paths import printable

# A line is at most about 120 bytes: some 8,000 of them are what an entry holds.
_MAX_SOCKETS = 8000
# The order is that of cost for what is found: most sockets of a zone are listening TCP, Unix and UDP ones.
_UDP = ("udp", "udp6")
_RAW = ("raw", "raw6")


class _Owners:
    """Which processes hold which sockets of one namespace; counts off those that were found in a table."""

    def __init__(self, views: Sequence[ProcessView]) -> None:
        self.by_inode: dict[int, list[int]] = {}
        self.denied = 0
        for view in views:
            try:
                files = view.files()
            except Gone:
                continue
            self.denied += bool(files.denied) or not files.is_complete
            for inode in files.sockets:
                self.by_inode.setdefault(inode, []).append(view.process.pid)
        self.missing = set(self.by_inode)

    def of(self, inode: int) -> str:
        pids = self.by_inode.get(inode, ())
        return ",".join(map(str, pids[:4])) + (",…" if len(pids) > 4 else "")


def netstat(views: Sequence[ProcessView]) -> Iterator[str]:
    """The sockets of each network namespace of the zone: all of a private one, of the host's only the zone's own."""
    spaces: dict[str, list[ProcessView]] = {}
    denied = 0
    for view in views:
        try:
            space = view.basics().net_namespace
        except Gone:
            continue
        if space:
            spaces.setdefault(space, []).append(view)
        else:
            denied += 1
    if not spaces:
        raise Skipped(f"the network namespaces of {denied} processes may not be seen" if denied else "no process runs")
    hosts = host_namespaces("net")
    for space, members in spaces.items():
        yield from _namespace(space, members, is_host=space in hosts)
    if denied:
        yield f"(the network namespaces of {denied} more processes may not be seen)"


def _namespace(space: str, members: list[ProcessView], *, is_host: bool) -> Iterator[str]:
    owners = _Owners(members)
    ours = os.readlink("/proc/self/ns/net")
    yield f"Network namespace {space}" + (" (the host's: sockets of the zone's processes)" if is_host else "")
    inet: list[InetSocket] = []
    unix: list[UnixSocket] = []
    if owners.by_inode or not is_host:
        for view in members:
            try:
                _collect(view, owners, inet, unix, is_host=is_host, is_ours=space == ours)
                break
            except Gone:
                inet.clear()
                unix.clear()
    yield "Active Internet connections (servers and established)"
    yield "Proto Recv-Q Send-Q Local Address           Foreign Address         State       PID"
    for one in inet[:_MAX_SOCKETS]:
        yield (
            f"{one.protocol:<5} {one.receive:>6} {one.send:>6} {one.local:<23} {one.remote:<23} "
            f"{one.state:<11} {owners.of(one.inode)}"
        ).rstrip()
    yield "Active UNIX domain sockets (servers and established)"
    yield "Proto RefCnt Flags       Type       State         I-Node   PID        Path"
    seen = set()
    for local in unix[:_MAX_SOCKETS]:
        doubt = " (this I-Node is told of twice: one line is forged by a name)" if local.inode in seen else ""
        seen.add(local.inode)
        state = "LISTENING" if local.listens and not local.state else local.state
        flags = "[ ACC ]" if local.listens else "[ ]"
        yield (
            f"unix  {local.references:<6} {flags:<11} {local.kind:<10} {state:<13} {local.inode:<8} "
            f"{owners.of(local.inode):<10} {printable(local.path)}{doubt}"
        ).rstrip()
    if owners.missing:
        yield f"Sockets of other kinds, or not bound yet: {len(owners.missing)}"
        yield from (f"inode {inode} of {owners.of(inode)}" for inode in sorted(owners.missing)[:100])
    if len(inet) > _MAX_SOCKETS or len(unix) > _MAX_SOCKETS:
        yield f"(cut: more than {_MAX_SOCKETS} sockets)"
    if owners.denied:
        yield f"(of {owners.denied} processes not all descriptors may be seen: sockets of theirs may be missing here)"


class _Tcp:
    """The TCP sockets of the namespace of a process directory: by netlink while the kernel answers, else by /proc."""

    def __init__(self, content: int, *, is_ours: bool, wanted: Wanted) -> None:
        self._content = content
        self._wanted = wanted
        self._diag: socket.socket | None = None
        with contextlib.suppress(DiagRefused):
            self._diag = socket_tables.open_diag(None if is_ours else content)

    def listening(self) -> Iterator[InetSocket]:
        """The listening sockets, where they can be had without the others."""
        if self._diag is not None:
            try:
                yield from socket_tables.tcp_by_diag(self._diag, socket_tables.LISTENING, self._wanted)
            except DiagRefused:
                self.close()

    def others(self) -> Iterator[InetSocket]:
        """All that `listening` did not give."""
        if self._diag is not None:
            yield from socket_tables.tcp_by_diag(self._diag, socket_tables.NOT_LISTENING, self._wanted)
        else:
            for table in ("tcp", "tcp6"):
                yield from socket_tables.inet_by_proc(self._content, table, self._wanted)

    def close(self) -> None:
        if self._diag is not None:
            self._diag.close()
            self._diag = None


def _collect(
    view: ProcessView, owners: _Owners, inet: list[InetSocket], unix: list[UnixSocket], *, is_host: bool, is_ours: bool
) -> None:
    """Read the tables, the cheap ones first, and those of the host only until the zone's sockets are all found."""
    wanted = owners.by_inode.__contains__ if is_host else _all
    with opened(view.process, check_after=False) as found:
        tcp = _Tcp(found.content, is_ours=is_ours, wanted=wanted)
        try:
            for one in socket_tables.unix_by_proc(found.content, wanted):
                owners.missing.discard(one.inode)
                if len(unix) <= _MAX_SOCKETS:
                    unix.append(one)
            udp, raw = (
                [socket_tables.inet_by_proc(found.content, table, wanted) for table in tables]
                for tables in (_UDP, _RAW)
            )
            for table in (tcp.listening(), *udp, tcp.others(), *raw):
                if is_host and not owners.missing:
                    break
                for other in table:
                    owners.missing.discard(other.inode)
                    if len(inet) <= _MAX_SOCKETS:
                        inet.append(other)
        except DiagRefused as error:
            raise OSError(str(error)) from None
        finally:
            tcp.close()


def _all(_inode: int) -> bool:
    return True
