"""What every runtime has to do, tried on each: with real processes and real containers."""

import asyncio
import dataclasses
import signal
from pathlib import Path

import pytest

from support.wait import until_async
from support.zones import GRACEFUL, STUBBORN, Zones, living, running
from zonebundle.errors import ConflictError, NoSuchZoneError
from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef, Zone
from zonebundle.runtimes.base import Grace


async def test_a_stopped_zone_is_known_and_has_no_process(zones: Zones) -> None:
    name = zones.make(GRACEFUL)
    zone = await zones.find(name)
    assert (zone.name, zone.runtime, zone.state) == (name, zones.runtime.name, "stopped")
    assert proc.members(zone.membership) == []
    assert zone.incarnation is None or zone.incarnation.init is None
    assert zone.logs


async def test_an_unknown_zone_is_not_found_and_not_started(zones: Zones) -> None:
    assert await zones.runtime.find("unknown") is None
    with pytest.raises(NoSuchZoneError):
        await zones.runtime.start("unknown")


async def test_a_started_zone_runs_and_says_which_life_it_is(zones: Zones) -> None:
    name = zones.make(GRACEFUL)
    started = await zones.runtime.start(name)
    assert started.state == "running"
    assert started.incarnation is not None
    assert started.incarnation.boot_id == proc.boot_id()
    assert started.incarnation.init is not None
    assert proc.is_alive(started.incarnation.init)
    assert (await zones.find(name)).incarnation == started.incarnation
    assert Zone.from_json(started.to_json()) == started


async def test_every_zone_is_listed_with_its_state(zones: Zones) -> None:
    one, other = zones.make(GRACEFUL), zones.make(GRACEFUL)
    await zones.runtime.start(other)
    assert {zone.name: zone.state for zone in await zones.runtime.list()} == {one: "stopped", other: "running"}


async def test_a_running_zone_is_not_started_again(zones: Zones) -> None:
    name = zones.make(GRACEFUL)
    zone = await zones.runtime.start(name)
    with pytest.raises(ConflictError, match=name):
        await zones.runtime.start(name)
    assert (await zones.find(name)).incarnation == zone.incarnation


async def test_of_two_starts_at_once_one_is_refused(zones: Zones) -> None:
    name = zones.make(GRACEFUL)
    results = await asyncio.gather(*(zones.runtime.start(name) for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in sorted(results, key=str)].count(ConflictError) == 1
    assert (await zones.find(name)).state == "running"


async def test_a_cancelled_caller_does_not_cancel_the_start(zones: Zones) -> None:
    name = zones.make(GRACEFUL)
    start = asyncio.create_task(zones.runtime.start(name))
    await asyncio.sleep(0)
    start.cancel()
    await asyncio.wait({start})
    assert start.cancelled()

    async def runs() -> bool:
        return (await zones.find(name)).state == "running"

    await until_async(runs)


async def test_a_zone_that_ends_at_term_is_stopped_long_before_its_grace_ends(zones: Zones) -> None:
    name = zones.make(GRACEFUL)
    zone, processes = await running(zones, name)
    async with asyncio.timeout(30):
        await zones.runtime.stop(zone, Grace(3600))
    assert living(processes) == []
    assert (await zones.find(name)).state == "stopped"


async def test_a_zone_that_ignores_term_is_killed_when_its_grace_ends(zones: Zones) -> None:
    name = zones.make(STUBBORN)
    zone, processes = await running(zones, name)
    await zones.runtime.stop(zone, Grace(0.1))
    assert living(processes) == []
    assert (await zones.find(name)).state == "stopped"


async def test_a_grace_that_is_shortened_ends_the_wait(zones: Zones) -> None:
    name = zones.make(STUBBORN)
    zone, processes = await running(zones, name)
    grace = Grace(3600)
    stop = asyncio.create_task(zones.runtime.stop(zone, grace))
    done, _ = await asyncio.wait({stop}, timeout=0.2)
    assert not done
    assert living(processes)
    grace.shorten(0)
    async with asyncio.timeout(30):
        await stop
    assert living(processes) == []


async def test_a_stop_without_grace_kills_at_once(zones: Zones) -> None:
    zone, processes = await running(zones, zones.make(STUBBORN))
    await zones.runtime.stop(zone, Grace(0))
    assert living(processes) == []


async def test_stopping_twice_at_once_and_again_is_fine(zones: Zones) -> None:
    zone, processes = await running(zones, zones.make(STUBBORN))
    await asyncio.gather(*(zones.runtime.stop(zone, Grace(0.05)) for _ in range(2)))
    await zones.runtime.stop(zone, Grace(3600))
    await zones.runtime.stop(await zones.find(zone.name), Grace(3600))
    assert living(processes) == []


@pytest.mark.slow
async def test_a_stop_that_is_cancelled_can_be_done_again(zones: Zones) -> None:
    zone, processes = await running(zones, zones.make(STUBBORN))
    stop = asyncio.create_task(zones.runtime.stop(zone, Grace(3600)))
    await asyncio.wait({stop}, timeout=0.2)
    stop.cancel()
    await asyncio.wait({stop})
    assert stop.cancelled()
    assert (await zones.find(zone.name)).incarnation == zone.incarnation
    await zones.runtime.stop(zone, Grace(0))
    assert living(processes) == []


async def test_a_stopped_process_of_a_zone_still_gets_the_term(zones: Zones) -> None:
    zone, processes = await running(zones, zones.make(GRACEFUL))
    for process in processes:
        proc.send_signal(process, signal.SIGSTOP)
    async with asyncio.timeout(30):
        await zones.runtime.stop(zone, Grace(3600))
    assert living(processes) == []


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["init", "boot", "instance"])
async def test_another_incarnation_is_never_stopped(zones: Zones, difference: str) -> None:
    zone, processes = await running(zones, zones.make(GRACEFUL))
    life = zone.incarnation
    assert life is not None
    assert life.init is not None
    other = {
        "init": dataclasses.replace(life, init=ProcessRef(life.init.pid, life.init.start_time - 1)),
        "boot": dataclasses.replace(life, boot_id="11111111-2222-3333-4444-555555555555"),
        "instance": dataclasses.replace(life, instance="another", init=ProcessRef(life.init.pid, 1)),
    }[difference]
    await zones.runtime.stop(dataclasses.replace(zone, incarnation=other), Grace(0))
    assert living(processes) == processes
    assert (await zones.find(zone.name)).incarnation == life


async def test_the_next_life_is_not_stopped_for_the_one_before(zones: Zones) -> None:
    name = zones.make(GRACEFUL)
    before, _ = await running(zones, name)
    await zones.runtime.stop(before, Grace(0))
    after, processes = await running(zones, name)
    assert after.incarnation != before.incarnation
    await zones.runtime.stop(before, Grace(0))
    assert living(processes) == processes


async def test_zones_go_on_when_the_runtime_closes_and_are_found_by_the_next(zones: Zones) -> None:
    zone, processes = await running(zones, zones.make(GRACEFUL))
    await zones.runtime.close()
    zones.reopen()
    assert living(processes) == processes
    found = await zones.find(zone.name)
    assert found.incarnation == zone.incarnation
    assert set(proc.members(found.membership)) == set(processes)
    async with asyncio.timeout(30):
        await zones.runtime.stop(found, Grace(3600))
    assert living(processes) == []


async def test_a_running_zone_is_not_removed(zones: Zones) -> None:
    zone, processes = await running(zones, zones.make(GRACEFUL))
    with pytest.raises(ConflictError, match=zone.name):
        await zones.runtime.remove(zone)
    assert living(processes) == processes


async def test_removing_twice_is_fine(zones: Zones) -> None:
    zone, _ = await running(zones, zones.make(GRACEFUL))
    await zones.runtime.stop(zone, Grace(0))
    await zones.runtime.remove(zone)
    await zones.runtime.remove(zone)
    found = await zones.runtime.find(zone.name)
    assert found is None or found.state == "stopped"


@pytest.mark.slow
async def test_what_a_zone_says_is_among_its_logs_also_its_last_words(zones: Zones) -> None:
    zone, _ = await running(zones, zones.make(GRACEFUL))
    async with asyncio.timeout(30):
        await zones.runtime.stop(zone, Grace(3600))
    (console,) = [tree for tree in (await zones.find(zone.name)).logs if tree.source == "console"]
    assert console.patterns == ("console.log*",)
    assert Path(console.path, "console.log").read_text().splitlines() == ["ready", "last words"]
