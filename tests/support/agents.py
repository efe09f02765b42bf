"""A real agent in a process of its own, with process zones, reached over its Unix socket."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from support import wait

# A zone that does nothing but live, and ends at TERM.
IDLE = ("sleep", "1000000")


@dataclass
class AgentProcess:
    """An agent on a configuration below `directory`; start, kill and start it again as often as needed.

    `zones` maps names to the TOML lines of their tables; `settings` is more TOML, whole tables. `stores` are the store
    directories, one in the state directory by default.
    """

    directory: Path
    settings: str = ""
    zones: dict[str, str] = field(default_factory=dict)
    stores: Sequence[Path] = ()
    process: subprocess.Popen[bytes] | None = None
    crashed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # A socket's path is short (108 bytes), a test's directory is not.
        self._short = tempfile.TemporaryDirectory(prefix="zb-")
        self.socket = Path(self._short.name, "s")

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def store_dirs(self) -> Sequence[Path]:
        return self.stores or [self.state / "store"]

    @property
    def config(self) -> Path:
        return self.directory / "config.toml"

    @property
    def log(self) -> Path:
        return self.directory / "agent.log"

    def add_zone(self, name: str, command: Sequence[str] = IDLE, *, root: Path | None = None, more: str = "") -> Path:
        """Configure a zone with a root of its own, in which `logs/` is there; returns the root."""
        root = root or self.directory / "zones" / name
        (root / "logs").mkdir(parents=True, exist_ok=True)
        self.zones[name] = f"command = {json.dumps(list(command))}\nroot = {json.dumps(str(root))}\n{more}\n"
        return root

    def write_config(self) -> None:
        self.config.write_text(
            f'[agent]\nstate-dir = "{self.state}"\nlisten = ["unix:{self.socket}"]\n'
            f"[store]\ndirs = {json.dumps([str(one) for one in self.store_dirs])}\n{self.settings}\n"
            + "".join(f"[zones.{json.dumps(name)}]\n{table}" for name, table in self.zones.items())
        )

    def start(self, *, crash_at: str = "", **environment: str) -> Self:
        """Start it and wait until it answers; with `crash_at`, it dies at that trace point."""
        self.write_config()
        extra = dict(environment)
        if crash_at:
            extra["ZONE_BUNDLE_CRASH_AT"] = crash_at
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zonebundle.cli.main", "agent", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | extra,
            )
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until it answers."""
        wait.until(self._answers, timeout=30, what=f"the agent answers; its log: {self.log}")

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the agent ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
        # httpx leaks its socket where nobody listens.
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.socket)) != 0:
                return False
        return self.get("/healthz").status_code == 200

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self, timeout: float = 60.0) -> httpx.Client:
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://zone-bundle", timeout=timeout
        )

    def async_client(self, timeout: float = 60.0) -> httpx.AsyncClient:
        transport = httpx.AsyncHTTPTransport(
            uds=str(self.socket), limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )
        return httpx.AsyncClient(transport=transport, base_url="http://zone-bundle", timeout=timeout)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def post(self, path: str, **parameters: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, params=parameters)

    def delete(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.delete(path)

    def start_zones(self, *names: str) -> None:
        for name in names or self.zones:
            answer = self.post(f"/zones/{name}/start")
            assert answer.status_code == 200, answer.text

    def stop_zone(self, name: str, **parameters: Any) -> dict[str, Any]:
        answer = self.post(f"/zones/{name}/stop", **parameters)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def zone_state(self, name: str) -> str:
        return str(self.get(f"/zones/{name}").json()["state"])

    def bundles(self, zone: str) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = self.get(f"/zones/bundles/{zone}").json()
        return told

    def status(self, zone: str, bundle_id: str) -> dict[str, Any]:
        told: dict[str, Any] = self.get(f"/zones/bundles/{zone}/{bundle_id}/status").json()
        return told

    def wait_sealed(self, zone: str, bundle_id: str, timeout: float = 60) -> dict[str, Any]:
        """Wait until a bundle is sealed; its status."""

        def sealed() -> dict[str, Any] | None:
            told = self.status(zone, bundle_id)
            return told if told.get("state") == "sealed" else None

        told = wait.until(sealed, timeout=timeout, what=f"bundle of {zone} is sealed; agent's log: {self.log}")
        assert told is not None
        return told

    def download(self, zone: str, bundle_id: str) -> bytes:
        """The bundle's bytes; waits for the seal."""
        answer = self.get(f"/zones/bundles/{zone}/{bundle_id}")
        assert answer.status_code == 200, answer.text
        return answer.content

    def contents(self, zone: str, bundle_id: str) -> dict[str, bytes]:
        """Every entry of a bundle, read from its download."""
        return read_bundle(self.download(zone, bundle_id))

    def kill(self) -> None:
        """kill -9, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def wait_dead(self, timeout: float = 30) -> None:
        """Wait until it has died by itself."""
        assert self.process is not None
        self.process.wait(timeout)

    def terminate(self, timeout: float = 60) -> int:
        """End it in order; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def spool_entries(self) -> list[str]:
        spool = self.state / "spool"
        return sorted(path.name for path in spool.iterdir()) if spool.is_dir() else []

    def close(self) -> None:
        """End it and every zone that still runs."""
        if self.process is not None:
            with contextlib.suppress(httpx.HTTPError):
                for name in self.zones:
                    self.post(f"/zones/{name}/stop", grace="0s", bundle="false")
            self.terminate()
        self._short.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self.log.exists():
            print(f"--- {self.log}\n{self.log.read_text()[-4000:]}")
        if self.process is not None and self.process.poll() is not None and self.zones:
            # It crashed on purpose: its zones still have to go.
            self.start()
        self.close()


def read_bundle(data: bytes) -> dict[str, bytes]:
    """Every entry of a tar.gz by name; a name that is there twice is an error."""
    contents: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz", errorlevel=2) as archive:
        for member in archive:
            assert member.name not in contents, f"two entries {member.name}"
            file = archive.extractfile(member)
            assert file is not None, f"{member.name} is no regular file"
            contents[member.name] = file.read()
    return contents


@contextlib.contextmanager
def running_agent(directory: Path, **arguments: Any) -> Iterator[AgentProcess]:
    """An agent that has started; ended, with its zones, at the end."""
    with AgentProcess(directory, **arguments) as agent:
        yield agent.start()
