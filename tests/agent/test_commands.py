"""Commands that misbehave: they cost the budget and no more, are kept as far as they came, and leave no process."""

import json
import os
from pathlib import Path

import pytest

from support import wait
from support.agents import AgentProcess
from support.misbehaving import BUDGET, check_misbehaved, sleepers, write_scripts


def settings(mark: str, directory: Path) -> str:
    commands = [[str(program)] for program in write_scripts(mark, directory)]
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
    check_misbehaved(contents)
    assert contents["logs/zone/logs/app.log"] == b"kept all the same\n"


@pytest.mark.slow
def test_commands_of_a_process_zone(agent: AgentProcess) -> None:
    mark = f"{os.getpid()}1"
    agent.settings = settings(mark, agent.directory)
    root = agent.add_zone("web")
    (root / "logs/app.log").write_text("kept all the same\n")
    agent.start().start_zones()
    check_bundle(agent, agent.stop_zone("web"), "web", mark)


@pytest.mark.slow
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
