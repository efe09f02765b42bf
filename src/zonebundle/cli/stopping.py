"""Stopping many zones at once: every request is under way before the first answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zonebundle.cli.client import AsyncAgentClient, Query, zone_path
from zonebundle.cli.output import EXIT_FAILED, EXIT_GAPS
from zonebundle.cli.sealing import Status, follow_until_sealed
from zonebundle.errors import ZoneBundleError


@dataclass(frozen=True, slots=True)
class StopOptions:
    """`grace` is seconds, None: what the agent takes. `wait`: until the bundles are sealed."""

    grace: float | None = None
    remove: bool = False
    bundle: bool = True
    wait: bool = False

    def query(self) -> Query:
        query: dict[str, str] = {}
        if self.grace is not None:
            query["grace"] = f"{self.grace:.3f}"
        if self.remove:
            query["remove"] = "true"
        if not self.bundle:
            query["bundle"] = "false"
        return query


@dataclass(slots=True)
class Stopped:
    """How the stop of one zone went: `reply` is the agent's answer, `status` the bundle's last one with `wait`."""

    zone: str
    reply: dict[str, Any] = field(default_factory=dict)
    status: Status = field(default_factory=dict)
    error: ZoneBundleError | None = None

    @property
    def bundle_id(self) -> str:
        """Empty where no bundle was made: the zone was stopped already, or none was wanted."""
        return self.reply["bundle"]["id"]["bundle_id"] if self.reply.get("bundle") else ""

    @property
    def gaps(self) -> int:
        """How many are known by now: the seal may find more."""
        if "gaps" in self.status:
            return len(self.status["gaps"])
        return int(self.reply.get("gaps") or 0)

    @property
    def failed(self) -> bool:
        return self.error is not None or self.status.get("state") == "failed"

    def to_json(self) -> dict[str, Any]:
        """The agent's answer, with what is known of the bundle since."""
        if not self.status:
            return self.reply
        later: dict[str, Any] = {key: self.status[key] for key in ("size", "seal_seconds") if key in self.status}
        return {**self.reply, "gaps": self.gaps, "bundle_state": self.status["state"], **later}


def worst_exit_code(results: Sequence[Stopped]) -> int:
    """Of several zones the worst: one failed, one complete with gaps, all well."""
    if any(result.failed for result in results):
        return EXIT_FAILED
    return EXIT_GAPS if any(result.gaps for result in results) else 0


async def stop_zones(
    client: AsyncAgentClient,
    zones: Sequence[str],
    options: StopOptions,
    *,
    on_stopped: Callable[[Stopped], None],
    on_status: Callable[[str, Status], None] = lambda _id, _status: None,
) -> list[Stopped]:
    """Stop all `zones` concurrently; the results in their order.

    `on_stopped` is told each result as it comes, failures included; with `options.wait`, `on_status` then gets the
    bundle's ID and every status. One zone's failure costs the others nothing. Cancelling it cancels no stop.
    """
    query = options.query()

    async def stop(zone: str) -> Stopped:
        result = Stopped(zone)
        try:
            result.reply = await client.call("POST", f"{zone_path(zone)}/stop", query)
        except ZoneBundleError as error:
            result.error = error
        on_stopped(result)
        if options.wait and result.bundle_id:
            try:
                result.status = await follow_until_sealed(
                    client, zone, result.bundle_id, lambda status: on_status(result.bundle_id, status)
                )
            except ZoneBundleError as error:
                result.error = error
        return result

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stop(zone)) for zone in zones]
    return [task.result() for task in tasks]
