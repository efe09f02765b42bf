"""The interface for operators: clean-up (Omicron's) and drain."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from zonebundle.agent.agent import Agent
from zonebundle.errors import UsageError
from zonebundle.model.paths import printable
from zonebundle.model.quantities import parse_duration
from zonebundle.model.retention import parse_period

_CONTEXT_KEYS = ("period", "storage_limit", "priority")
_KNOWN = f"there are {', '.join(_CONTEXT_KEYS)}"


def add_maintenance(app: FastAPI, agent: Agent) -> None:
    """Add the routes; before those of `/zones/{zone}`, which would match as well."""

    @app.get("/zones/bundle-cleanup/utilization")
    async def get_utilization() -> dict[str, dict[str, int]]:
        return await agent.cleanup.utilization()

    @app.get("/zones/bundle-cleanup/context")
    async def get_context() -> dict[str, Any]:
        return agent.cleanup.context.to_json()

    @app.put("/zones/bundle-cleanup/context", status_code=204)
    async def put_context(request: Request) -> Response:
        await agent.cleanup.change(**_changes(await request.body()))
        return Response(status_code=204)

    @app.post("/zones/bundle-cleanup")
    async def clean_up() -> dict[str, Any]:
        return await agent.cleanup.run()

    @app.get("/drain")
    async def list_drains() -> list[dict[str, Any]]:
        return await agent.drains.standing()

    @app.post("/drain")
    async def drain(
        path: str,
        timeout: Annotated[str | None, Query(description="how long to wait: 30s, 5m; without it, until done")] = None,
    ) -> dict[str, Any]:
        return {"path": await agent.drains.drain(path, _seconds(timeout)), "drained": True}

    @app.delete("/drain", status_code=204)
    async def end_drain(path: str) -> Response:
        await agent.drains.end(path)
        return Response(status_code=204)


def _changes(body: bytes) -> dict[str, Any]:
    """What a PUT changes of the context; values are checked where they are put in. Raises UsageError."""
    try:
        # Whatever its content type: curl says that JSON is a form.
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("the clean-up context is not JSON") from None
    if not isinstance(data, dict):
        raise UsageError("the clean-up context is not a JSON object")
    for key in data:
        if key not in _CONTEXT_KEYS:
            raise UsageError(f"'{printable(key)}' is not known in a clean-up context; {_KNOWN}")
    # Clients that write every field send null for what is to stay.
    changes = {key: value for key, value in data.items() if value is not None}
    if not changes:
        raise UsageError(f"nothing to change; {_KNOWN}")
    if "period" in changes:
        changes["period"] = parse_period(changes["period"])
    return changes


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"timeout: {error}") from None
