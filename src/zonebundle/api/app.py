"""The routes: Omicron's paths and shapes, and ours. Handlers ask the agent and shape its answers."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from zonebundle import __version__
from zonebundle.agent.agent import Agent
from zonebundle.api.downloads import download
from zonebundle.api.maintenance import add_maintenance
from zonebundle.errors import UsageError, ZoneBundleError
from zonebundle.model.ids import check_bundle_id, check_zone_name
from zonebundle.model.paths import printable
from zonebundle.model.quantities import parse_duration
from zonebundle.model.zone import Zone

_log = structlog.get_logger()

DEFAULT_GRACE = "10s"


def make_app(agent: Agent) -> FastAPI:
    """The application on one agent that has started."""
    app = FastAPI(title="zonebundle", version=__version__, docs_url=None, redoc_url=None)
    app.exception_handler(ZoneBundleError)(_on_error)
    app.exception_handler(RequestValidationError)(_on_bad_request)
    app.exception_handler(HTTPException)(_on_http_error)
    # First: /zones/bundles and /zones/bundle-cleanup would match /zones/{zone} as well.
    add_maintenance(app, agent)
    _add_bundles(app, agent)
    _add_zones(app, agent)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "installation": agent.installation, "pids": agent.pids}

    return app


def _add_zones(app: FastAPI, agent: Agent) -> None:
    @app.get("/zones")
    async def list_zones(all: bool = False) -> list[Any]:
        zones = await agent.zones()
        if all:
            return [_zone_json(zone, stopping) for zone, stopping in zones]
        return [zone.name for zone, _ in zones if zone.state == "running"]

    @app.get("/zones/{zone}")
    async def get_zone(zone: str) -> dict[str, Any]:
        runner = await agent.runner(check_zone_name(zone))
        return _zone_json(await runner.find(), runner.is_stopping)

    @app.post("/zones/{zone}/start")
    async def start_zone(zone: str) -> dict[str, Any]:
        runner = await agent.runner(check_zone_name(zone))
        return _zone_json(await runner.start(), False)

    @app.post("/zones/{zone}/stop")
    async def stop_zone(
        zone: str,
        grace: Annotated[str, Query(description="how long the zone may take by itself: 10s, 500ms")] = DEFAULT_GRACE,
        remove: bool = False,
        bundle: bool = True,
    ) -> dict[str, Any]:
        try:
            seconds = parse_duration(grace)
        except ValueError as error:
            raise UsageError(f"grace: {error}") from None
        runner = await agent.runner(check_zone_name(zone))
        result = await runner.stop(seconds, remove=remove, bundle=bundle)
        return {
            "zone": zone,
            "state": "stopped",
            "bundle": result.bundle.to_json() if result.bundle else None,
            "hold_seconds": round(result.hold_seconds, 6),
            "stop_seconds": round(result.stop_seconds, 6),
            "gaps": result.gap_count,
            "reasons": [gap.to_json() for gap in result.gaps],
        }


def _add_bundles(app: FastAPI, agent: Agent) -> None:
    @app.get("/zones/bundles")
    async def list_bundles(filter: str = "") -> list[dict[str, Any]]:
        return [entry.to_json() for entry in agent.bundles.list(containing=filter)]

    @app.get("/zones/bundles/{zone}")
    async def list_zone_bundles(zone: str) -> list[dict[str, Any]]:
        name = check_zone_name(zone)
        entries = agent.bundles.list(zone=name)
        if not entries:
            await agent.runner(name)
        return [entry.to_json() for entry in entries]

    @app.post("/zones/bundles/{zone}", status_code=201)
    async def create_bundle(zone: str) -> dict[str, Any]:
        runner = await agent.runner(check_zone_name(zone))
        return (await runner.create()).to_json()

    @app.get("/zones/bundles/{zone}/{bundle_id}")
    async def get_bundle(zone: str, bundle_id: str, request: Request) -> Response:
        return await download(agent, check_zone_name(zone), check_bundle_id(bundle_id), request)

    @app.get("/zones/bundles/{zone}/{bundle_id}/status")
    async def get_status(zone: str, bundle_id: str) -> dict[str, Any]:
        return await agent.bundles.status(check_zone_name(zone), check_bundle_id(bundle_id))

    @app.delete("/zones/bundles/{zone}/{bundle_id}", status_code=204)
    async def delete_bundle(zone: str, bundle_id: str) -> Response:
        await agent.bundles.delete(check_zone_name(zone), check_bundle_id(bundle_id))
        return Response(status_code=204)


def _zone_json(zone: Zone, stopping: bool) -> dict[str, Any]:
    state = "stopping" if stopping and zone.state == "running" else zone.state
    init = zone.incarnation.init if zone.incarnation else None
    return {"name": zone.name, "runtime": zone.runtime, "state": state, "pid": init.pid if init else None}


def _error(request: Request, status: int, code: str, message: str) -> JSONResponse:
    request_id = request.headers.get("x-request-id") or str(uuid.uuid4())
    # It quotes what was asked for: one line, and nothing that drives a terminal.
    message = printable(message)
    if status >= 500:
        _log.error("request failed", path=request.url.path, reason=message, request_id=request_id)
    body = {"error_code": code, "message": message, "request_id": request_id}
    return JSONResponse(body, status, {"x-request-id": request_id})


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ZoneBundleError)
    return _error(request, error.status, error.code, str(error))


async def _on_bad_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(
        f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg'].lower()}" for one in error.errors()
    )
    return _error(request, 400, "InvalidRequest", told)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(request, error.status_code, "NotFound" if error.status_code == 404 else "Http", str(error.detail))
