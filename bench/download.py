"""Downloading a sealed bundle over the Unix socket."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator

from bench.load import SETTINGS, Row, work_directory
from support.agents import IDLE, AgentProcess

LOGS = 30
LOG_BYTES = 10_000_000
ROUNDS = 5
FIRSTS = 9
_BUFFER = 1 << 20


def download() -> Iterator[Row]:
    """GET of a sealed bundle of 300 MB that cannot be compressed."""
    with work_directory() as work, AgentProcess(work, settings=SETTINGS) as agent:
        logs = agent.add_zone("web", IDLE) / "logs"
        for number in range(1, LOGS + 1):
            (logs / f"app.log.{number}").write_bytes(os.urandom(LOG_BYTES))
        os.sync()
        agent.start()
        agent.start_zones()
        told = agent.stop_zone("web")
        bundle_id = told["bundle"]["id"]["bundle_id"]
        agent.wait_sealed("web", bundle_id, timeout=300)
        path = f"/zones/bundles/web/{bundle_id}"
        firsts = [_get(str(agent.socket), path, stop_at=1)[0] for _ in range(FIRSTS + 1)][1:]
        whole = [_get(str(agent.socket), path) for _ in range(ROUNDS)]
    size = whole[0][2]
    seconds = statistics.median(took for _, took, _ in whole)
    first = statistics.median(firsts) * 1000
    rate = size / seconds / 1e6
    what = f"download of a sealed bundle of {size / 1e6:.0f} MB over the Unix socket"
    yield Row(what, ">= 500 MB/s", f"{rate:.0f} MB/s ({seconds:.2f} s)", rate >= 500)
    yield Row(f"{what}: first byte", "<= 20 ms", f"{first:.1f} ms", first <= 20)


def _get(path: str, target: str, *, stop_at: int | None = None) -> tuple[float, float, int]:
    """Seconds to the body's first byte and to its end, and its bytes; `stop_at`: read so many and hang up."""
    # No HTTP library: some take longer to receive than the agent to send.
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(path)
        begin = time.monotonic()
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: zone-bundle\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head or head.endswith(b"\r\n\r\n"):
            block = connection.recv(65536)
            assert block, f"no body: {head[:200]!r}"
            head += block
        first = time.monotonic() - begin
        fields, _, body = head.partition(b"\r\n\r\n")
        assert fields.startswith(b"HTTP/1.1 200"), fields[:200]
        length = int(fields.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        received = len(body)
        buffer = bytearray(_BUFFER)
        while received < (length if stop_at is None else stop_at):
            count = connection.recv_into(buffer)
            assert count, f"{received} of {length} bytes, then nothing"
            received += count
        return first, time.monotonic() - begin, received
