"""Commands that misbehave, the processes they leave, and what a bundle must hold of them all the same."""

import json
import os
from pathlib import Path

# The hold's, in seconds.
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


def misbehaving(mark: str) -> dict[str, str]:
    """Scripts by the name of their entry, each sleeping a time by which its processes are found again."""
    return {
        "ignores-term": f"trap '' TERM; echo partial; sleep {mark}; sleep {mark}",
        "holds-the-pipe": f"echo parent; sleep {mark} & exit 0",
        "sets-itself-apart": f"echo apart; setsid sh -c 'setsid sleep {mark} & sleep {mark}' & sleep {mark}",
        "prints-without-end": "yes an endless line",
    }


def write_scripts(mark: str, directory: Path) -> list[Path]:
    """The scripts as programs in `directory`."""
    programs = []
    for name, script in misbehaving(mark).items():
        program = directory / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        programs.append(program)
    return programs


def check_misbehaved(contents: dict[str, bytes], *, pipe_holds: bool = False) -> None:
    """Check the entries of the scripts, their outcomes and gaps. `pipe_holds`: `runc exec` waits for the pipe."""
    assert contents["ignores-term"].split(b"\n")[1] == b"partial"
    assert contents["holds-the-pipe"].split(b"\n")[1] == b"parent"
    assert contents["sets-itself-apart"].split(b"\n")[1] == b"apart"
    assert contents["prints-without-end"].count(b"an endless line") > 1000
    report = json.loads(contents["report.json"])
    outcomes = {step["name"]: step["outcome"] for step in report["steps"]}
    assert outcomes["ignores-term"] == "timeout"
    assert outcomes["holds-the-pipe"] == ("timeout" if pipe_holds else "success")
    assert outcomes["sets-itself-apart"] == "timeout"
    assert outcomes["prints-without-end"] == "unknown"
    cut = {name for name, outcome in outcomes.items() if name in misbehaving("") and outcome != "success"}
    assert {gap["what"] for gap in report["gaps"]} == cut
