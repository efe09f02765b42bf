"""An agent that does nothing but answer: the HTTP shapes over a real Unix socket, with failures on cue."""

import contextlib
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from support.wait import until, until_async

CREATED = "2026-01-02T03:04:05.000006Z"
BYTES = 1000
PATIENCE = 60.0


@dataclass
class FakeAgent:
    """What it answers, and what it was asked. Tests change it while it runs."""

    socket: Path
    zones: dict[str, str] = field(default_factory=lambda: {"db-01": "running", "web-01": "running", "old": "stopped"})
    gaps: list[dict[str, str]] = field(default_factory=list)
    # How many times the status is "sealing" before it is `final_state`.
    polls_until_sealed: int = 2
    final_state: str = "sealed"
    fails: dict[str, tuple[int, str]] = field(default_factory=dict)
    # Set: a stop waits for it.
    release: threading.Event | None = None
    download: bytes = b"the bundle"
    broken_download: bool = False
    # Set: a download waits for it after its first half.
    stalled_download: threading.Event | None = None
    requests: list[str] = field(default_factory=list)
    stops_begun: int = 0
    bundles: dict[str, str] = field(default_factory=dict)
    polls: dict[str, int] = field(default_factory=dict)

    def metadata(self, zone: str, bundle_id: str, cause: str = "terminated_instance") -> dict[str, Any]:
        return {
            "id": {"zone_name": zone, "bundle_id": bundle_id},
            "time_created": CREATED,
            "version": 0,
            "cause": cause,
        }

    def add_bundle(self, zone: str) -> str:
        bundle_id = str(uuid.uuid4())
        self.bundles[bundle_id] = zone
        return bundle_id

    def status(self, bundle_id: str) -> dict[str, Any]:
        polls = self.polls[bundle_id] = self.polls.get(bundle_id, 0) + 1
        final = polls > self.polls_until_sealed
        return {
            "metadata": self.metadata(self.bundles[bundle_id], bundle_id),
            "state": self.final_state if final else "sealing",
            "bytes_total": BYTES,
            "bytes_sealed": BYTES if final else BYTES // 2,
            "size": 100 if final else 0,
            "steps": [
                {"name": "ptree", "outcome": "success", "start": 0.0, "seconds": 0.002},
                {"name": "pstack", "outcome": "timeout", "start": 0.002, "seconds": 0.01, "detail": "\x1b[31mkilled"},
            ],
            "gaps": self.gaps,
            "hold_seconds": 0.012,
            "graceful_seconds": 0.5,
            "seal_seconds": 0.2 if final else None,
            **({"reason": "no space left on device"} if final and self.final_state == "failed" else {}),
        }


class _Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class FakeServer:
    """A server at a socket that many fake agents use, one after another: uvicorn takes its time to end."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._app: FastAPI | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert self._app is not None, "there is no agent"
        await self._app(scope, receive, send)

    @contextlib.contextmanager
    def answering(self) -> Iterator[FakeAgent]:
        """A new agent, which answers until the context ends."""
        agent = FakeAgent(self.socket)
        self._app = _app(agent)
        try:
            yield agent
        finally:
            self._app = None
            for waiting in (agent.release, agent.stalled_download):
                if waiting is not None:
                    waiting.set()


@contextlib.contextmanager
def fake_server(socket: Path) -> Iterator[FakeServer]:
    """Serve at `socket` from a thread until the context ends."""
    fake = FakeServer(socket)
    config = uvicorn.Config(
        fake,
        uds=str(socket),
        # uvloop keeps a pipe for good, which would count as a leak.
        loop="asyncio",
        log_config=None,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="fake agent")
    thread.start()
    try:
        until(lambda: server.started, what="the fake agent listens")
        yield fake
    finally:
        server.should_exit = True
        thread.join()


def _app(agent: FakeAgent) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(_Refusal)
    async def _refuse(_request: Request, refusal: _Refusal) -> Response:
        body = {"error_code": "Fake", "message": refusal.message, "request_id": "1"}
        return JSONResponse(body, refusal.status)

    def take(request: Request, *names: str) -> None:
        target = f"{request.method} {request.url.path}"
        agent.requests.append(target + (f"?{request.url.query}" if request.url.query else ""))
        for name in names:
            if name in agent.fails:
                raise _Refusal(*agent.fails[name])

    def known(bundle_id: str, zone: str) -> None:
        if agent.bundles.get(bundle_id) != zone:
            raise _Refusal(404, f"No zone bundle for zone '{zone}' with ID '{bundle_id}'")

    @app.get("/zones")
    async def zones(request: Request, all: bool = False) -> list[Any]:
        take(request, "list")
        if all:
            return [{"name": name, "runtime": "process", "state": state} for name, state in agent.zones.items()]
        return sorted(name for name, state in agent.zones.items() if state == "running")

    @app.post("/zones/{zone}/start")
    async def start(request: Request, zone: str) -> dict[str, Any]:
        take(request, zone)
        agent.zones[zone] = "running"
        return {"name": zone, "runtime": "process", "state": "running"}

    @app.post("/zones/{zone}/stop")
    async def stop(request: Request, zone: str, bundle: bool = True) -> dict[str, Any]:
        take(request, zone)
        if zone not in agent.zones:
            raise _Refusal(404, f"no zone named '{zone}'")
        agent.stops_begun += 1
        if agent.release is not None:
            await until_async(agent.release.is_set, PATIENCE)
        made = agent.metadata(zone, agent.add_bundle(zone)) if bundle and agent.zones[zone] == "running" else None
        agent.zones[zone] = "stopped"
        answer = {"zone": zone, "state": "stopped", "bundle": made, "hold_seconds": 0.0041, "stop_seconds": 0.0301}
        return answer | {"gaps": len(agent.gaps) if made else 0}

    @app.get("/zones/bundles")
    async def bundles(request: Request, filter: str = "") -> list[dict[str, Any]]:
        take(request, "bundles")
        more = {"state": "sealed", "bytes": 1234, "gaps": len(agent.gaps)}
        return [agent.metadata(zone, id_) | more for id_, zone in agent.bundles.items() if filter in zone]

    @app.post("/zones/bundles/{zone}", status_code=201)
    async def create(request: Request, zone: str) -> dict[str, Any]:
        take(request, zone)
        made = agent.metadata(zone, agent.add_bundle(zone), "explicit_request")
        return made | {"state": "sealing", "gaps": len(agent.gaps)}

    @app.get("/zones/bundles/{zone}/{bundle_id}/status")
    async def status(request: Request, zone: str, bundle_id: str) -> dict[str, Any]:
        take(request, zone)
        known(bundle_id, zone)
        return agent.status(bundle_id)

    @app.get("/zones/bundles/{zone}/{bundle_id}")
    async def get(request: Request, zone: str, bundle_id: str) -> Response:
        take(request, zone)
        known(bundle_id, zone)

        async def body() -> AsyncIterator[bytes]:
            half = len(agent.download) // 2
            yield agent.download[:half]
            if agent.stalled_download is not None:
                await until_async(agent.stalled_download.is_set, PATIENCE)
            if agent.broken_download:
                raise ConnectionError("on cue")
            yield agent.download[half:]

        headers = {"Content-Length": str(len(agent.download))}
        return StreamingResponse(body(), media_type="application/gzip", headers=headers)

    @app.delete("/zones/bundles/{zone}/{bundle_id}", status_code=204)
    async def delete(request: Request, zone: str, bundle_id: str) -> None:
        take(request, zone)
        known(bundle_id, zone)
        del agent.bundles[bundle_id]

    return app
