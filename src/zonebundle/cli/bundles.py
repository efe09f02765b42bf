"""The verbs for bundles: create, list, get, show, delete."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from zonebundle.cli import output
from zonebundle.cli.files import written
from zonebundle.errors import UsageError, ZoneBundleError
from zonebundle.model.paths import printable

_FIELDS = {
    "zone-name": "Zone",
    "bundle-id": "Bundle ID",
    "time-created": "Created",
    "cause": "Cause",
    "version": "Version",
    "state": "State",
    "bytes": "Bytes",
    "gaps": "Gaps",
}
_DEFAULT_FIELDS = "zone-name,bundle-id,time-created"

_strict = click.option("--strict", is_flag=True, help="Exit with 3 if the bundle has gaps.")


@click.command("create")
@click.argument("zone")
@click.option("--wait", is_flag=True, help="Wait until it is sealed; exit with 3 if it has gaps.")
@_strict
@click.pass_obj
def create(socket: Path, zone: str, wait: bool, strict: bool) -> int:
    """Create a bundle of a zone, which goes on running."""
    bundle_id, gaps = _create(socket, zone)
    output.print_line(f"Created zone bundle: {zone}/{bundle_id}")
    if wait:
        gaps = _wait_until_sealed(socket, zone, bundle_id)
    return _report_gaps(zone, bundle_id, gaps, strict=strict or wait)


@click.command("list")
@click.argument("text", metavar="[FILTER]", required=False)
@click.option("--parseable", "-p", is_flag=True, help="Fields joined by commas, without headers.")
@click.option(
    "--fields", "-o", metavar="FIELD,...", default=_DEFAULT_FIELDS, help=f"Which fields: {', '.join(_FIELDS)}."
)
@click.pass_obj
def list_bundles(socket: Path, text: str | None, parseable: bool, fields: str) -> None:
    """List bundles, of zones with FILTER in their name (also: ls)."""
    chosen = [field.strip() for field in fields.split(",")]
    for field in chosen:
        if field not in _FIELDS:
            raise UsageError(f"--fields: '{printable(field)}' is no field; there are {', '.join(_FIELDS)}")
    from zonebundle.cli.client import AgentClient

    with AgentClient(socket) as client:
        bundles = client.call("GET", "/zones/bundles", {"filter": text} if text else None)
    rows = [[_field(bundle, field, parseable=parseable) for field in chosen] for bundle in bundles]
    if parseable:
        for row in rows:
            output.print_line(printable(",".join(row)))
    else:
        for line in output.format_table([_FIELDS[field] for field in chosen], rows):
            output.print_line(line)


@click.command("get")
@click.argument("zone")
@click.option("--bundle-id", metavar="ID", help="The bundle's ID.")
@click.option("--create", "create_first", is_flag=True, help="Create a bundle first, then get it.")
@click.option("--output", "-o", "target", metavar="FILE", help="Where to write it, else ID.tar.gz; - is stdout.")
@_strict
@click.pass_obj
def get(socket: Path, zone: str, bundle_id: str | None, create_first: bool, target: str | None, strict: bool) -> int:
    """Get a bundle as a .tar.gz file."""
    if (bundle_id is None) != create_first:
        raise UsageError("name the bundle with --bundle-id, or make one with --create")
    if target == "-" and sys.stdout.isatty():
        raise UsageError("a bundle is binary: redirect stdout, or name a file with --output")
    from zonebundle.cli.client import AgentClient, bundle_path
    from zonebundle.cli.sealing import byte_progress

    if bundle_id is None:
        bundle_id, _ = _create(socket, zone)
        _wait_until_sealed(socket, zone, bundle_id)
    path = bundle_path(zone, bundle_id)
    name = f"{bundle_id}.tar.gz" if target is None else target
    with AgentClient(socket) as client:
        with (
            client.download(path) as (length, chunks),
            written(name) as file,
            byte_progress(name, shown=sys.stderr.isatty(), to_stderr=True) as progress,
        ):
            task = progress.add_task(name, total=length) if progress else None
            for chunk in chunks:
                file.write(chunk)
                if progress is not None and task is not None:
                    progress.advance(task, len(chunk))
        status = client.call("GET", f"{path}/status")
    return _report_gaps(zone, bundle_id, len(status.get("gaps", ())), strict=strict)


@click.command("show")
@click.argument("zone")
@click.argument("bundle_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print the agent's answer.")
@click.pass_obj
def show(socket: Path, zone: str, bundle_id: str, as_json: bool) -> int:
    """Show a bundle's state, its gaps, and what was done when.

    Exits with 3 if it has gaps.
    """
    from zonebundle.cli.client import AgentClient, bundle_path

    with AgentClient(socket) as client:
        status = client.call("GET", f"{bundle_path(zone, bundle_id)}/status")
    if as_json:
        output.print_json(status)
    else:
        from zonebundle.cli.timeline import describe_bundle

        for line in describe_bundle(zone, bundle_id, status):
            output.print_line(line)
    if status["state"] == "failed":
        return output.EXIT_FAILED
    return output.EXIT_GAPS if status.get("gaps") else 0


@click.command("delete")
@click.argument("zone")
@click.argument("bundle_id", metavar="ID")
@click.pass_obj
def delete(socket: Path, zone: str, bundle_id: str) -> None:
    """Delete a bundle (also: del, rm)."""
    from zonebundle.cli.client import AgentClient, bundle_path

    with AgentClient(socket) as client:
        client.call("DELETE", bundle_path(zone, bundle_id))


def _create(socket: Path, zone: str) -> tuple[str, int]:
    from zonebundle.cli.client import AgentClient, bundles_path

    with AgentClient(socket) as client:
        metadata = client.call("POST", bundles_path(zone))
    gaps = metadata.get("gaps")
    return metadata["id"]["bundle_id"], gaps if isinstance(gaps, int) else 0


def _wait_until_sealed(socket: Path, zone: str, bundle_id: str) -> int:
    """The number of the sealed bundle's gaps; raises ZoneBundleError if it could not be sealed."""
    from zonebundle.cli.client import AsyncAgentClient, run_async
    from zonebundle.cli.sealing import SealProgress, Status, byte_progress, follow_until_sealed

    async def wait() -> Status:
        with byte_progress("sealing", shown=sys.stderr.isatty(), to_stderr=True) as display:
            progress = SealProgress(display)
            async with AsyncAgentClient(socket) as client:
                return await follow_until_sealed(
                    client, zone, bundle_id, lambda status: progress.update(bundle_id, status)
                )

    status = run_async(wait())
    if status["state"] == "failed":
        raise ZoneBundleError(
            f"the bundle {zone}/{bundle_id} could not be sealed: see `zone-bundle show {zone} {bundle_id}`"
        )
    return len(status.get("gaps", ()))


def _report_gaps(zone: str, bundle_id: str, gaps: int, *, strict: bool) -> int:
    """Tell of gaps; the exit code."""
    if not gaps:
        return 0
    output.print_note(f"the bundle has {output.count_of(gaps, 'gap')}: see `zone-bundle show {zone} {bundle_id}`")
    return output.EXIT_GAPS if strict else 0


def _field(bundle: dict[str, Any], field: str, *, parseable: bool) -> str:
    if field in ("zone-name", "bundle-id"):
        return str(bundle["id"][field.replace("-", "_")])
    if field == "time-created":
        created = str(bundle["time_created"])
        return created if parseable else _readable_time(created)
    value = bundle.get(field)
    return "" if value is None else str(value)


def _readable_time(text: str) -> str:
    from datetime import UTC, datetime

    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return text
