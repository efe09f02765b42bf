"""The real sealer process, with the test as its agent."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zonebundle
from support.spooled import INSTALLATION, SpoolDir
from zonebundle.host.process import built_environment

TIMEOUT = 60.0


class SealerProcess:
    """One sealer on `at`; the context ends it. `code` runs instead of the module, to break something first."""

    def __init__(self, at: SpoolDir, *, crash_at: str = "", code: str = "", workers: int = 2) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT)
        self._unread = b""
        self.messages: list[dict[str, Any]] = []
        arguments = [
            *("--state", str(at.state)),
            *("--store", str(at.store)),
            *("--installation", INSTALLATION),
            *("--workers", str(workers)),
            *("--fd", str(theirs.fileno())),
            *("--agent", str(os.getpid())),
        ]
        started = (
            ["-c", f"{code}\nfrom zonebundle.seal.__main__ import main\nmain()"] if code else ["-m", "zonebundle.seal"]
        )
        environment = {"PYTHONPATH": str(Path(zonebundle.__file__).parents[1])}
        if crash_at:
            environment["ZONE_BUNDLE_CRASH_AT"] = crash_at
        with theirs:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-P", *started, *arguments],
                stdin=subprocess.DEVNULL,
                env=built_environment(environment),
                cwd="/",
                pass_fds=(theirs.fileno(),),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> int:
        """Close the agent's end, as an agent's death would; returns the exit status."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)

    def send(self, message: dict[str, Any]) -> None:
        # A sealer that has crashed does not read any more.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message, None when the sealer has gone."""
        while b"\n" not in self._unread:
            try:
                block = self._socket.recv(65536)
            except ConnectionResetError:
                block = b""
            if not block:
                return None
            self._unread += block
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        self.messages.append(message)
        return message

    def wait_for(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The value of the next message of that kind with those fields."""
        deadline = time.monotonic() + TIMEOUT
        while (message := self.receive()) is not None and time.monotonic() < deadline:
            value = message.get(kind)
            if value is True:
                return message
            if isinstance(value, dict) and fields.items() <= value.items():
                told: dict[str, Any] = value
                return told
        raise AssertionError(f"no {kind} {fields} in {self.messages}, exit status {self.process.poll()}")

    def seal(self, bundle_id: str) -> dict[str, Any]:
        """Have it sealed; returns what the sealer tells."""
        self.send({"seal": bundle_id})
        return self.wait_for("sealed", id=bundle_id)

    def wait_crashed(self) -> None:
        """Wait until the process has been killed."""
        while self.receive() is not None:
            pass
        assert self.process.wait(TIMEOUT) == -signal.SIGKILL
