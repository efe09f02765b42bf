import json
import threading

import pytest

from support.command import Command
from support.fake_agent import FakeAgent
from support.wait import until

pytestmark = pytest.mark.usefixtures("leak_check")


def test_list_zones_prints_the_running_ones_one_a_line(zone_bundle: Command) -> None:
    ran = zone_bundle("list-zones")
    assert (ran.code, ran.lines, ran.err) == (0, ["db-01", "web-01"], "")


def test_list_zones_all_prints_runtime_and_state(zone_bundle: Command) -> None:
    assert zone_bundle("list-zones", "--all").lines == [
        "Zone    Runtime  State",
        "db-01   process  running",
        "web-01  process  running",
        "old     process  stopped",
    ]


def test_start_goes_on_after_a_zone_that_cannot_be_started(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.fails["web-01"] = (409, "zone 'web-01' runs already")
    ran = zone_bundle("start", "web-01", "old")
    assert (ran.code, ran.lines) == (1, ["Started zone: old"])
    assert ran.err == "zone-bundle: error: zone 'web-01' runs already\n"


def test_stop_prints_each_zone_with_its_bundle(zone_bundle: Command, agent: FakeAgent) -> None:
    ran = zone_bundle("stop", "web-01", "--grace", "1m", "--remove")
    (bundle_id,) = agent.bundles
    assert ran.lines == [f"Stopped zone: web-01, bundle {bundle_id}, hold 4.1 ms, stop 30.1 ms, gaps 0"]
    assert (ran.code, ran.err) == (0, "")
    assert agent.requests == ["POST /zones/web-01/stop?grace=60.000&remove=true"]


def test_stop_without_a_bundle(zone_bundle: Command, agent: FakeAgent) -> None:
    assert zone_bundle("stop", "web-01", "--no-bundle").lines == ["Stopped zone: web-01 (no bundle)"]
    assert agent.requests == ["POST /zones/web-01/stop?bundle=false"]


def test_stop_all_is_under_way_everywhere_before_the_first_answer(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.zones = {f"zone-{number:03}": "running" for number in range(20)}
    agent.release = threading.Event()

    def release_when_all_have_begun() -> None:
        until(lambda: agent.stops_begun == 20)
        assert agent.release is not None
        agent.release.set()

    watcher = threading.Thread(target=release_when_all_have_begun)
    watcher.start()
    ran = zone_bundle("stop", "--all")
    watcher.join()
    assert ran.code == 0
    assert sorted(line.split(",")[0] for line in ran.lines) == [f"Stopped zone: {zone}" for zone in agent.zones]


def test_stop_all_of_no_zones_is_well(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.zones = {"old": "stopped"}
    ran = zone_bundle("stop", "--all")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_stop_prints_the_answers_as_json(zone_bundle: Command) -> None:
    ran = zone_bundle("stop", "web-01", "old", "--json")
    web, old = json.loads(ran.out)
    assert (web["zone"], web["state"], web["hold_seconds"], web["gaps"]) == ("web-01", "stopped", 0.0041, 0)
    assert web["bundle"]["id"]["zone_name"] == "web-01"
    assert old["bundle"] is None


def test_stop_wait_polls_until_sealed(zone_bundle: Command, agent: FakeAgent) -> None:
    ran = zone_bundle("stop", "web-01", "--wait", "--json")
    (answer,) = json.loads(ran.out)
    assert (answer["bundle_state"], answer["size"], answer["seal_seconds"]) == ("sealed", 100, 0.2)
    assert agent.polls == {answer["bundle"]["id"]["bundle_id"]: 3}


def test_gaps_give_exit_code_3_and_a_note(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.gaps = [{"what": "pstack.7", "reason": "timeout"}]
    ran = zone_bundle("stop", "db-01", "web-01")
    assert ran.code == 3
    assert ran.err.startswith("zone-bundle: 2 bundles have gaps: see `zone-bundle show db-01 ")


def test_gaps_found_while_sealing_count_with_wait(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.polls_until_sealed = 0
    agent.release = threading.Event()

    def find_a_gap_after_the_stop() -> None:
        until(lambda: agent.stops_begun == 1)
        assert agent.release is not None
        agent.release.set()
        until(lambda: agent.bundles)
        agent.gaps = [{"what": "logs/zone/a.log", "reason": "gone"}]

    watcher = threading.Thread(target=find_a_gap_after_the_stop)
    agent.polls_until_sealed = 1
    watcher.start()
    ran = zone_bundle("stop", "web-01", "--wait")
    watcher.join()
    assert ran.code == 3


def test_of_several_zones_the_worst_counts(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.gaps = [{"what": "pstack.7", "reason": "timeout"}]
    agent.fails["web-01"] = (500, "out of order")
    ran = zone_bundle("stop", "db-01", "web-01")
    assert ran.code == 1
    assert len(ran.lines) == 1
    assert "zone-bundle: error: web-01: out of order\n" in ran.err


def test_zones_that_fail_for_the_same_reason_share_a_line(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.fails = dict.fromkeys(("a", "b", "c", "d", "e"), (503, "the runtime is away"))
    ran = zone_bundle("stop", "a", "b", "c", "d", "e")
    assert ran.err == "zone-bundle: error: a, b, c and 2 more: the runtime is away\n"


def test_a_bundle_that_cannot_be_sealed_fails_the_wait(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.final_state = "failed"
    ran = zone_bundle("stop", "web-01", "--wait")
    assert ran.code == 1
    assert "could not be sealed: no space left on device" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stop",), "name the zones to stop, or all of them with --all"),
        (("stop", "web-01", "--all"), "name the zones to stop, or all of them with --all"),
        (("stop", "web-01", "--grace", "long"), "--grace: 'long' is not a duration: write it like 500ms, 2s, 10m"),
        (("stop", "a/b"), "'a/b' cannot be a zone's name: "),
        (("start", ".."), "'..' cannot be a zone's name: "),
        (("start",), "missing argument 'ZONE...'; see `zone-bundle start --help`"),
    ],
)
def test_wrong_usage_asks_nothing_of_the_agent(
    zone_bundle: Command, agent: FakeAgent, arguments: tuple[str, ...], message: str
) -> None:
    ran = zone_bundle(*arguments)
    assert ran.code == 2
    assert ran.err.startswith(f"zone-bundle: error: {message}")
    assert ran.err.count("\n") == 1
    assert not agent.requests


def test_a_message_cannot_drive_the_terminal(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.fails["web-01"] = (500, "bad\n\x1b]0;owned\x07 [red]zone[/red]")
    ran = zone_bundle("stop", "web-01")
    assert ran.err == "zone-bundle: error: web-01: bad \\x1b]0;owned\\x07 [red]zone[/red]\n"
