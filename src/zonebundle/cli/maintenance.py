"""The verbs for operators: cleanup-context, set-cleanup-context, utilization, cleanup, drain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from zonebundle.cli import output
from zonebundle.errors import UsageError
from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_size, parse_duration

# Headers and their order are Omicron's.
_FIELDS = {
    "directory": "Directory",
    "bytes-used": "Bytes used",
    "bytes-available": "Bytes available",
    "dataset-quota": "Dataset quota",
    "pct-available": "% of limit",
    "pct-quota": "% of quota",
}
_CLEANUP = "/zones/bundle-cleanup"


@click.command("cleanup-context")
@click.pass_obj
def show_context(socket: Path) -> None:
    """Show how often bundles are cleaned up, and down to what (also: context)."""
    from zonebundle.cli.client import AgentClient

    with AgentClient(socket) as client:
        context = client.call("GET", f"{_CLEANUP}/context")
    period = context["period"]["secs"] + context["period"]["nanos"] / 1e9
    output.print_line(f"Period: {period:g}s")
    # As Omicron prints it: [Cause, Time].
    output.print_line(f"Priority: [{', '.join(name.capitalize() for name in context['priority'])}]")
    output.print_line(f"Storage limit: {context['storage_limit']}%")


@click.command("set-cleanup-context")
@click.option("--period", metavar="S", help="How often to clean up: seconds, or like 10m; 60s to 24h.")
@click.option("--priority", metavar="A,B", help="What counts first: cause,time or time,cause.")
@click.option("--storage-limit", metavar="N", type=int, help="Percent of the quota that bundles may use, 1 to 50.")
@click.pass_obj
def set_context(socket: Path, period: str | None, priority: str | None, storage_limit: int | None) -> None:
    """Change how often bundles are cleaned up, and down to what (also: set-context)."""
    if period is None and priority is None and storage_limit is None:
        raise UsageError("nothing to change: name one of --period, --priority and --storage-limit")
    from zonebundle.model.retention import CleanupContext

    names = None if priority is None else [name.strip() for name in priority.split(",")]
    # Told here what is not allowed, before the agent is asked.
    context = CleanupContext().changed(period=_seconds("--period", period), priority=names, storage_limit=storage_limit)
    whole = context.to_json()
    given = {"period": period, "priority": priority, "storage_limit": storage_limit}
    from zonebundle.cli.client import AgentClient

    with AgentClient(socket) as client:
        changes = {key: whole[key] for key, value in given.items() if value is not None}
        client.call("PUT", f"{_CLEANUP}/context", body=changes)


@click.command("utilization")
@click.option("--parseable", "-p", is_flag=True, help="Fields joined by commas, in bytes, without headers.")
@click.option(
    "--fields", "-o", metavar="FIELD,...", default=",".join(_FIELDS), help=f"Which fields: {', '.join(_FIELDS)}."
)
@click.pass_obj
def utilization(socket: Path, parseable: bool, fields: str) -> None:
    """Show how much of its storage the bundles use."""
    chosen = [field.strip() for field in fields.split(",")]
    for field in chosen:
        if field not in _FIELDS:
            raise UsageError(f"--fields: '{printable(field)}' is no field; there are {', '.join(_FIELDS)}")
    from zonebundle.cli.client import AgentClient

    with AgentClient(socket) as client:
        usages = client.call("GET", f"{_CLEANUP}/utilization")
    rows = [
        [_field(directory, usage, field, parseable=parseable) for field in chosen]
        for directory, usage in sorted(usages.items())
    ]
    if parseable:
        for row in rows:
            output.print_line(printable(",".join(row)))
    else:
        for line in output.format_table([_FIELDS[field] for field in chosen], rows):
            output.print_line(line)


@click.command("cleanup")
@click.pass_obj
def clean_up(socket: Path) -> None:
    """Remove bundles of low priority now, where they use more than the limit."""
    from zonebundle.cli.client import AgentClient

    with AgentClient(socket) as client:
        removed = client.call("POST", _CLEANUP)
    rows = [(directory, str(count["bundles"]), str(count["bytes"])) for directory, count in sorted(removed.items())]
    for line in output.format_table(("Directory", "Count", "Bytes"), rows):
        output.print_line(line)


@click.command("drain")
@click.argument("path", required=False)
@click.option("--end", is_flag=True, help="Use the path again.")
@click.option("--timeout", metavar="DURATION", help="How long to wait, like 5m; else until nothing uses the path.")
@click.option("--list", "shown", is_flag=True, help="Show what is drained, and what still uses it.")
@click.pass_obj
def drain(socket: Path, path: str | None, end: bool, timeout: str | None, shown: bool) -> None:
    """Let nothing new use what is below PATH, and wait until nothing does: its disk can then be removed.

    Stops of zones with logs there are refused meanwhile, except with --no-bundle. It lasts until --end, or until the
    agent is restarted.
    """
    if shown == (path is not None) or (shown and (end or timeout)) or (end and timeout):
        raise UsageError("name a path to drain, or one with --end; or show all with --list")
    seconds = _seconds("--timeout", timeout)
    from zonebundle.cli.client import AgentClient

    with AgentClient(socket) as client:
        if path is None:
            drains = client.call("GET", "/drain")
            rows = [(one["path"], "; ".join(one["used_by"]) or "nothing") for one in drains]
            for line in output.format_table(("Path", "Used by"), rows):
                output.print_line(line)
            return
        # The agent has another working directory. Links are for it to follow: it sees what the zones see.
        query = {"path": _absolute(path)}
        if end:
            client.call("DELETE", "/drain", query)
            output.print_line(f"Ended drain: {printable(query['path'])}")
        else:
            if seconds is not None:
                query["timeout"] = f"{seconds:f}"
            output.print_line(f"Drained: {printable(client.call('POST', '/drain', query)['path'])}")


def _field(directory: str, usage: dict[str, Any], field: str, *, parseable: bool) -> str:
    if field == "directory":
        return directory
    if field.startswith("pct-"):
        whole = usage["bytes_available" if field == "pct-available" else "dataset_quota"]
        # Of nothing, any use is all of it.
        percent = usage["bytes_used"] * 100 // whole if whole else 100 * bool(usage["bytes_used"])
        return str(percent) if parseable else f"{percent}%"
    count = usage[field.replace("-", "_")]
    return str(count) if parseable else format_size(count)


def _absolute(path: str) -> str:
    absolute = os.path.abspath(path)
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{printable(path)} is not UTF-8: name a directory above it") from None
    return absolute


def _seconds(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
