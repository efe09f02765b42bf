"""`zone-bundle demo`: 24 zones with real logs, stopped all at once by a real agent, as an ordinary user."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from zonebundle.cli import output
from zonebundle.cli.client import AsyncAgentClient, run_async, zone_path
from zonebundle.cli.demo_baseline import measure_baseline
from zonebundle.cli.demo_check import check_bundle, download_bundle
from zonebundle.cli.demo_report import ZoneResult, baseline_note, comparison_table, results_table
from zonebundle.cli.demo_stage import DemoAgent, Stage, count_workers, performed, set_stage
from zonebundle.cli.sealing import FINAL_STATES, Status
from zonebundle.cli.stopping import StopOptions, Stopped, stop_zones, worst_exit_code
from zonebundle.errors import ZoneBundleError
from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_seconds, format_size

_MEASURED_THE_OLD_WAY = 3
_WRITE_TIMEOUT = 180.0
_STOP_TIMEOUT = 180.0
_WIDTH_OF_A_PIPE = 100
_PROBLEMS_SHOWN = 10


def run_demo(*, keep: bool) -> int:
    """Run the demo on this terminal or pipe; the exit code.

    Everything it makes is gone afterwards, also when it is interrupted or fails; with `keep`, the agent and what it has
    made stay, unless it is interrupted or the agent has ended.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
    stage = set_stage()
    try:
        with performed(stage) as (agent, cleanup):
            try:
                code = _perform(stage, agent, console)
            except ZoneBundleError as error:
                if not keep or not agent.is_running:
                    raise
                output.print_error(str(error))
                code = output.EXIT_FAILED
            if keep:
                cleanup.pop_all()
                agent.let_go()
                _print_farewell(stage, agent, console)
    except KeyboardInterrupt:
        output.print_note(f"interrupted; everything in {stage.directory} has been ended and removed")
        return output.EXIT_INTERRUPTED
    if not keep:
        _say(console, f"{stage.directory} is gone, and all that ran there. `zone-bundle demo --keep` leaves it to you.")
    return code


def _perform(stage: Stage, agent: DemoAgent, console: Console) -> int:
    _say(console, f"24 zones of real processes and an agent, without root, all in {stage.directory}")
    begin = time.monotonic()
    agent.wait_until_ready()
    _say(console, f"The agent answers after {format_seconds(time.monotonic() - begin)}.")
    run_async(_start_zones(stage))
    _watch_the_writing(stage, console)
    results, code = run_async(_stop_zones(stage, agent, console))
    console.print(results_table(results))
    if code == output.EXIT_FAILED:
        return code
    with console.status("The same the old way, with a few of the zones …"):
        logs = {zone: stage.logs(zone) for zone in stage.zones}
        baseline = measure_baseline(logs, _MEASURED_THE_OLD_WAY, stage.directory)
    console.print(comparison_table(results, baseline))
    _say(console, baseline_note(results, baseline))
    _check(stage, console, results[0])
    return code


async def _start_zones(stage: Stage) -> None:
    async with AsyncAgentClient(stage.socket) as client, asyncio.TaskGroup() as group:
        for zone in stage.zones:
            group.create_task(client.call("POST", f"{zone_path(zone)}/start"))


def _watch_the_writing(stage: Stage, console: Console) -> None:
    begin = time.monotonic()
    with _bars(console) as progress:
        task = progress.add_task("writing logs", total=stage.expected_bytes, note="")
        waiting = set(stage.zones)
        while True:
            sizes = [size for zone in stage.zones for size in _sizes(stage, zone)]
            progress.update(
                task, completed=sum(sizes), note=f"{format_size(sum(sizes))} in {len(sizes):,} files, rotated by rename"
            )
            waiting = {zone for zone in waiting if not stage.is_ready(zone)}
            if not waiting:
                break
            if time.monotonic() - begin > _WRITE_TIMEOUT:
                raise ZoneBundleError(f"{min(waiting)} has not written its logs within {_WRITE_TIMEOUT:.0f} s")
            time.sleep(0.1)
    workers = sum(count_workers(zone) for zone in stage.zones)
    written = f"{format_size(sum(sizes))} of JSON logs in {len(sizes):,} files"
    took = format_seconds(time.monotonic() - begin)
    _say(console, f"{len(stage.zones)} zones with {workers} workers wrote {written} in {took}, and go on logging.")
    with console.status("Letting the disk catch up: logs of some hours would have been written out long ago …"):
        stage.write_out()


def _sizes(stage: Stage, zone: str) -> list[int]:
    sizes = []
    for log in stage.logs(zone):
        # It may have been rotated since it was listed.
        with contextlib.suppress(FileNotFoundError):
            sizes.append(log.stat().st_size)
    return sizes


async def _stop_zones(stage: Stage, agent: DemoAgent, console: Console) -> tuple[list[ZoneResult], int]:
    sealed_after: dict[str, float] = {}
    states: dict[str, Status] = {}
    begin = time.monotonic()

    async with AsyncAgentClient(stage.socket) as client:
        with _bars(console) as progress:
            held = progress.add_task("stopping all", total=len(stage.zones), note="")
            sealing = progress.add_task("sealing", total=None, note="")

            def on_stopped(result: Stopped) -> None:
                progress.advance(held)
                progress.update(held, note=f"{result.zone} is free after {format_seconds(time.monotonic() - begin)}")

            def on_status(bundle_id: str, status: Status) -> None:
                states[bundle_id] = status
                if status["state"] in FINAL_STATES:
                    sealed_after.setdefault(bundle_id, time.monotonic() - begin)
                done = sum(one["bytes_sealed"] for one in states.values())
                total = sum(one["bytes_total"] for one in states.values())
                note = f"{len(sealed_after)} of {len(stage.zones)} bundles, {format_size(done)}"
                progress.update(sealing, completed=done, total=total or None, note=note)

            try:
                async with asyncio.timeout(_STOP_TIMEOUT):
                    stopped = await stop_zones(
                        client, stage.zones, StopOptions(wait=True), on_stopped=on_stopped, on_status=on_status
                    )
            except TimeoutError:
                raise ZoneBundleError(
                    f"after {_STOP_TIMEOUT:.0f} s only {len(sealed_after)} of {len(stage.zones)} bundles are sealed; "
                    f"the agent's last words: {agent.last_words()}"
                ) from None
    _report_problems(stopped)
    results = [_result(stage, one, sealed_after) for one in stopped if not one.failed and one.bundle_id]
    if len(results) < len(stage.zones):
        raise ZoneBundleError(f"only {len(results)} of {len(stage.zones)} zones were stopped with a bundle")
    return results, worst_exit_code(stopped)


def _result(stage: Stage, stopped: Stopped, sealed_after: dict[str, float]) -> ZoneResult:
    sizes = _sizes(stage, stopped.zone)
    return ZoneResult(
        zone=stopped.zone,
        bundle_id=stopped.bundle_id,
        hold=stopped.reply["hold_seconds"],
        stop=stopped.reply["stop_seconds"],
        sealed_after=sealed_after[stopped.bundle_id],
        log_files=len(sizes),
        log_bytes=sum(sizes),
        bundle_bytes=stopped.status["size"],
        gaps=stopped.gaps,
    )


def _report_problems(stopped: Sequence[Stopped]) -> None:
    problems = []
    for one in stopped:
        if one.error is not None:
            problems.append(f"{one.zone}: {one.error}")
        elif one.status.get("state") == "failed":
            problems.append(f"{one.zone}: the bundle could not be sealed: {printable(one.status.get('reason', ''))}")
        elif not one.bundle_id:
            problems.append(f"{one.zone}: it had ended before it was stopped, so no bundle was made")
        gaps = one.status.get("gaps", ())
        problems.extend(f"{one.zone}: gap: {printable(gap['what'])}: {printable(gap['reason'])}" for gap in gaps)
    for problem in problems[:_PROBLEMS_SHOWN]:
        output.print_error(problem)
    if len(problems) > _PROBLEMS_SHOWN:
        output.print_error(f"and {len(problems) - _PROBLEMS_SHOWN} more like these")


def _check(stage: Stage, console: Console, result: ZoneResult) -> None:
    bundle = stage.directory / f"{result.bundle_id}.tar.gz"
    with console.status(f"Unpacking the bundle of {result.zone} with tar …"):
        download_bundle(stage.socket, result.zone, result.bundle_id, bundle)
        checked = check_bundle(stage, result.zone, bundle)
    _say(
        console,
        f"✓ {result.zone}'s bundle is an ordinary tar.gz: tar reads {checked.entries} entries, and its {checked.logs} "
        f"logs ({format_size(checked.bytes)}) are byte for byte those of the zone, last words included.",
    )


def _print_farewell(stage: Stage, agent: DemoAgent, console: Console) -> None:
    program = "zone-bundle" if shutil.which("zone-bundle") else f"{shlex.quote(sys.executable)} -m zonebundle.cli.main"
    directory = shlex.quote(str(stage.directory))
    zone = stage.zones[0]
    _say(console, f"The agent goes on (process {agent.pid}); its configuration and log are in {directory}. Talk to it:")
    for line in (
        f"export ZONE_BUNDLE_HOST=unix:{shlex.quote(str(stage.socket))}",
        f"{program} list",
        f"{program} start {zone}",
        f"{program} create {zone} --wait",
        f"{program} get --create {zone} --output {zone}.tar.gz",
        f"{program} stop --all",
    ):
        output.print_line(f"    {line}")
    _say(console, "End it, its zones and its directory:")
    # Its socket is the last thing that the agent removes.
    end = f"kill {agent.pid}; while [ -e {directory}/agent.sock ]; do sleep 0.1; done"
    output.print_line(f"    {program} stop --all --no-bundle; {end}; rm -r {directory}")


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:12}"), BarColumn(), TextColumn("{task.fields[note]}", markup=False))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=not console.is_terminal)
