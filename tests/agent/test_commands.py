"""Commands that misbehave: they cost the budget and no more, are kept as far as they came, and leave no process."""

import json
import os
from pathlib import Path

import pytest

from support import wait
from support.agents import AgentProcess

BUDGET = 1.0


def sleepers(seconds: str) -> list[int]:
    """Every process on this host that sleeps for that (peculiar) time."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                arguments = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if arguments[:1] == [b"sleep"] and seconds.encode() in arguments:
                found.append(int(name))
    return found


def misbehaving(mark: str) -> dict[str, list[str]]:
    """Commands by entry, each sleeping a time by which its processes are found again."""
    return {
        "ignores-term": [f"trap '' TERM; echo partial; sleep {mark}; sleep {mark}"],
        "holds-the-pipe": [f"echo parent; sleep {mark} & exit 0"],
        "sets-itself-apart": [f"echo apart; setsid sh -c 'setsid sleep {mark} & sleep {mark}' & sleep {mark}"],
        "prints-without-end": ["yes an endless line"],
    }


def settings(scripts: dict[str, list[str]], directory: Path) -> str:
    commands = []
    for name, (script,) in scripts.items():
        program = directory / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        commands.append([str(program)])
    return f'[hold]\nbudget = "{BUDGET}s"\n[evidence]\ncommands = {json.dumps(commands)}\nstacks = "kernel"\n'


def check_bundle(agent: AgentProcess, told: dict[str, object], zone: str, mark: str) -> None:
    hold = told["hold_seconds"]
    assert isinstance(hold, float)
    # The budget, and what killing, staging and the record take on a loaded machine.
    assert hold < BUDGET + 1.5
    assert told["gaps"] == 3
    wait.until(lambda: not sleepers(mark), what="no process of a command is left")
    bundle = told["bundle"]
    assert isinstance(bundle, dict)
    contents = agent.contents(zone, bundle["id"]["bundle_id"])
    assert contents["ignores-term"].split(b"\n")[1] == b"partial"
    assert contents["holds-the-pipe"].split(b"\n")[1] == b"parent"
    assert contents["sets-itself-apart"].split(b"\n")[1] == b"apart"
    assert contents["prints-without-end"].count(b"an endless line") > 1000
    report = json.loads(contents["report.json"])
    outcomes = {step["name"]: step["outcome"] for step in report["steps"]}
    assert outcomes["ignores-term"] == "timeout"
    assert outcomes["holds-the-pipe"] == "success"
    assert outcomes["sets-itself-apart"] == "timeout"
    assert outcomes["prints-without-end"] == "unknown"
    assert {gap["what"] for gap in report["gaps"]} == {"ignores-term", "sets-itself-apart", "prints-without-end"}
    assert contents["logs/zone/logs/app.log"] == b"kept all the same\n"


def test_commands_of_a_process_zone(agent: AgentProcess) -> None:
    mark = f"{os.getpid()}1"
    agent.settings = settings(misbehaving(mark), agent.directory)
    root = agent.add_zone("web")
    (root / "logs/app.log").write_text("kept all the same\n")
    agent.start().start_zones()
    check_bundle(agent, agent.stop_zone("web"), "web", mark)


def test_output_of_a_command_is_an_entry(agent: AgentProcess) -> None:
    agent.settings = '[evidence]\ncommands = [["echo", "hello", "zone"], ["false"], ["no-such-program-here"]]\n'
    agent.add_zone("web")
    agent.start().start_zones()
    told = agent.stop_zone("web")
    contents = agent.contents("web", told["bundle"]["id"]["bundle_id"])
    assert contents["echo"] == b'Command: ["echo", "hello", "zone"]\nhello zone\n'
    assert b"exit status 1" in contents["false"]
    assert b"no such program" in contents["no-such-program-here"]
    steps = {step["name"]: step["outcome"] for step in json.loads(contents["report.json"])["steps"]}
    assert (steps["echo"], steps["false"], steps["no-such-program-here"]) == ("success", "fail", "fail")


@pytest.mark.slow
def test_killed_during_a_command_leaves_no_process(agent: AgentProcess) -> None:
    mark = f"{os.getpid()}2"
    agent.settings = (
        f'[hold]\nbudget = "60s"\n[evidence]\nstacks = "kernel"\n'
        f'commands = [["sh", "-c", "trap \'\' TERM; setsid sleep {mark} & sleep {mark}"]]\n'
    )
    agent.add_zone("web")
    agent.start().start_zones()
    with agent.client(timeout=0.5) as client:
        wait.until(lambda: _gives_up(client), what="the stop is on its way")
    wait.until(lambda: len(sleepers(mark)) == 2, what="the command runs")
    agent.kill()
    agent.settings = ""
    agent.start()
    wait.until(lambda: not sleepers(mark), what="the next start ends the command")
    bundle = wait.until(lambda: agent.bundles("web"), what="the bundle is listed")[0]
    agent.wait_sealed("web", bundle["id"]["bundle_id"])
    wait.until(lambda: agent.zone_state("web") == "stopped", what="the stop is finished")


def _gives_up(client: object) -> bool:
    import httpx

    assert isinstance(client, httpx.Client)
    try:
        client.post("/zones/web/stop")
    except httpx.TimeoutException:
        return True
    return False
