"""The verbs for zones: list-zones, start, stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zonebundle.cli import output
from zonebundle.errors import UsageError, ZoneBundleError
from zonebundle.model.ids import check_zone_name
from zonebundle.model.paths import printable
from zonebundle.model.quantities import parse_duration

if TYPE_CHECKING:
    from zonebundle.cli.stopping import StopOptions, Stopped

_STOP_HEADERS = ("Zone", "Bundle ID", "Hold", "Stop", "Gaps")
_UUID_WIDTH = 36
_SPAN_WIDTH = 8


def parse_host(text: str) -> Path:
    """The socket that `--host` or ZONE_BUNDLE_HOST names as `unix:PATH`; raises UsageError."""
    path = text.removeprefix("unix:")
    if path == text and not path.startswith("/"):
        raise UsageError(f"--host '{printable(text)}': TCP comes with a later version; use unix:PATH for now")
    if not path:
        raise UsageError("--host names no socket: write it like unix:/run/zone-bundle/agent.sock")
    return Path(path)


@click.command("list-zones")
@click.option("--all", "every", is_flag=True, help="Stopped zones too, with runtime and state.")
@click.pass_obj
def list_zones(socket: Path, every: bool) -> None:
    """List the running zones, one a line."""
    from zonebundle.cli.client import AgentClient

    with AgentClient(socket) as client:
        if every:
            zones = client.call("GET", "/zones", {"all": True})
            rows = [(zone["name"], zone["runtime"], zone["state"]) for zone in zones]
            for line in output.format_table(("Zone", "Runtime", "State"), rows):
                output.print_line(line)
        else:
            for name in client.call("GET", "/zones"):
                output.print_line(printable(name))


@click.command("start")
@click.argument("zones", metavar="ZONE...", nargs=-1, required=True)
@click.pass_obj
def start(socket: Path, zones: tuple[str, ...]) -> int:
    """Start zones."""
    from zonebundle.cli.client import AgentClient, zone_path

    paths = {zone: f"{zone_path(zone)}/start" for zone in zones}
    failed = False
    with AgentClient(socket) as client:
        for zone, path in paths.items():
            try:
                client.call("POST", path)
            except ZoneBundleError as error:
                _print_failures([(zone, error)])
                failed = True
            else:
                output.print_line(f"Started zone: {zone}")
    return output.EXIT_FAILED if failed else 0


@click.command("stop")
@click.argument("zones", metavar="[ZONE...]", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every running zone.")
@click.option("--grace", metavar="DURATION", help="How long zones may take to end by themselves, like 10s.")
@click.option("--remove", is_flag=True, help="Remove the zones once they are stopped.")
@click.option("--no-bundle", is_flag=True, help="Make no bundles.")
@click.option("--wait", is_flag=True, help="Wait until the bundles are sealed.")
@click.option("--json", "as_json", is_flag=True, help="Print the agent's answers as a JSON list.")
@click.pass_obj
def stop(
    socket: Path,
    zones: tuple[str, ...],
    every: bool,
    grace: str | None,
    remove: bool,
    no_bundle: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Stop zones, all at once; each one's bundle is made on the way.

    Exits with 3 if a bundle has gaps.
    """
    if bool(zones) == every:
        raise UsageError("name the zones to stop, or all of them with --all")
    from zonebundle.cli.client import run_async
    from zonebundle.cli.stopping import StopOptions, worst_exit_code

    options = StopOptions(grace=_seconds("--grace", grace), remove=remove, bundle=not no_bundle, wait=wait)
    names = [check_zone_name(zone) for zone in dict.fromkeys(zones)]
    results = run_async(_stop(socket, names, options, every=every, as_json=as_json))
    if as_json:
        output.print_json([result.to_json() for result in results if result.reply])
    _print_failures([(result.zone, result.error) for result in results if result.error])
    for result in results:
        if result.status.get("state") == "failed":
            reason = printable(result.status.get("reason", "")) or "look at the agent's log"
            output.print_error(f"the bundle {result.zone}/{result.bundle_id} could not be sealed: {reason}")
    _note_gaps([result for result in results if result.gaps])
    return worst_exit_code(results)


async def _stop(
    socket: Path, zones: Sequence[str], options: StopOptions, *, every: bool, as_json: bool
) -> list[Stopped]:
    from zonebundle.cli.client import AsyncAgentClient
    from zonebundle.cli.sealing import SealProgress, byte_progress
    from zonebundle.cli.stopping import stop_zones

    async with AsyncAgentClient(socket) as client:
        if every:
            zones = await client.call("GET", "/zones")
        shown = output.is_terminal() and not as_json
        with byte_progress("sealing", shown=shown and options.wait and bool(zones)) as display:
            progress = SealProgress(display)
            widths = [max([len(zone) for zone in [*zones, _STOP_HEADERS[0]]]), _UUID_WIDTH, _SPAN_WIDTH, _SPAN_WIDTH, 4]
            if shown and zones:
                progress.print(output.format_row(_STOP_HEADERS, widths))

            def print_stopped(result: Stopped) -> None:
                if not as_json and result.error is None:
                    progress.print(output.format_row(_cells(result), widths) if shown else _sentence(result))

            return await stop_zones(client, zones, options, on_stopped=print_stopped, on_status=progress.update)


def _cells(result: Stopped) -> tuple[str, ...]:
    if not result.bundle_id:
        return (result.zone, "no bundle", "-", output.format_span(result.reply.get("stop_seconds")), "-")
    reply = result.reply
    hold, stopped = output.format_span(reply.get("hold_seconds")), output.format_span(reply.get("stop_seconds"))
    return (result.zone, result.bundle_id, hold, stopped, str(result.gaps))


def _sentence(result: Stopped) -> str:
    zone, bundle, hold, stopped, gaps = _cells(result)
    if not result.bundle_id:
        return f"Stopped zone: {zone} (no bundle)"
    return f"Stopped zone: {zone}, bundle {bundle}, hold {hold}, stop {stopped}, gaps {gaps}"


def _seconds(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None


def _print_failures(failures: Sequence[tuple[str, ZoneBundleError]]) -> None:
    """One line for each failure; zones that failed for the same reason share one."""
    reasons: dict[str, list[str]] = {}
    for zone, error in failures:
        reasons.setdefault(str(error), []).append(zone)
    for reason, zones in reasons.items():
        if len(zones) == 1:
            output.print_error(reason if zones[0] in reason else f"{zones[0]}: {reason}")
        else:
            others = f" and {len(zones) - 3} more" if len(zones) > 3 else ""
            output.print_error(f"{', '.join(zones[:3])}{others}: {reason}")


def _note_gaps(results: Sequence[Stopped]) -> None:
    if results:
        number = output.count_of(len(results), "bundle")
        verb = "has gaps" if len(results) == 1 else "have gaps"
        example = f"{results[0].zone} {results[0].bundle_id}"
        output.print_note(f"{number} {verb}: see `zone-bundle show {example}`")
