"""A writer numbers its lines and is rotated five times a second: no bundle may miss a line in silence."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from support import wait
from support.agents import AgentProcess

# Rotation is done by the writer's own process between two lines, so that copy-truncate itself loses nothing:
# what is then missing, a bundle lost. Eight rotated files are kept, so the oldest lines go.
WRITER = """
import os, shutil, sys, time
mode = sys.argv[1]
number, rotated = 0, time.monotonic()
file = open("logs/app.log", "ab", buffering=0)
while True:
    for _ in range(20):
        file.write(b"line %d\\n" % number)
        number += 1
    time.sleep(0.001)
    if time.monotonic() - rotated >= 0.2:
        rotated = time.monotonic()
        for age in range(7, 0, -1):
            if os.path.exists(f"logs/app.log.{age}"):
                os.rename(f"logs/app.log.{age}", f"logs/app.log.{age + 1}")
        if mode == "rename":
            os.rename("logs/app.log", "logs/app.log.1")
            file.close()
            file = open("logs/app.log", "ab", buffering=0)
        else:
            shutil.copy2("logs/app.log", "logs/app.log.1")
            os.truncate("logs/app.log", 0)
"""
NUMBER = re.compile(rb"line (\d+)\n")
BUNDLES = 12


def check_unbroken(contents: dict[str, bytes]) -> int:
    """The numbers in all logs form one run, or a gap says where not; returns the last."""
    numbers: set[int] = set()
    for name, data in contents.items():
        if name.startswith("logs/zone/logs/app.log"):
            numbers.update(int(number) for number in NUMBER.findall(data))
    assert numbers
    missing = set(range(min(numbers), max(numbers))) - numbers
    gaps = json.loads(contents["report.json"])["gaps"]
    assert not missing or gaps, f"lines {min(missing)} to {max(missing)} are missing in silence"
    return max(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("mode", ["rename", "copytruncate"])
def test_bundles_of_a_rotating_zone(agent: AgentProcess, request: pytest.FixtureRequest, mode: str, kind: str) -> None:
    place: Path = request.getfixturevalue(f"{kind}_dir")
    if kind == "btrfs":
        import subprocess

        place = place / "pool"
        subprocess.run(["btrfs", "-q", "subvolume", "create", place], check=True)
    # A tool for user stacks may be cut on a busy machine; that gap would be none of the logs'.
    agent.settings = '[evidence]\nstacks = "kernel"\n'
    agent.add_zone("writer", [sys.executable, "-c", WRITER, mode], root=place / "zone")
    agent.start().start_zones()
    wait.until((place / "zone/logs/app.log.2").exists, what="the writer has rotated")
    last = -1
    for _ in range(BUNDLES):
        begin = time.monotonic()
        created = agent.post("/zones/bundles/writer")
        assert created.status_code == 201, created.text
        contents = agent.contents("writer", created.json()["id"]["bundle_id"])
        newest = check_unbroken(contents)
        assert newest > last
        last = newest
        assert time.monotonic() - begin < 30
    told = agent.stop_zone("writer")
    contents = agent.contents("writer", told["bundle"]["id"]["bundle_id"])
    assert check_unbroken(contents) > last
    assert told["gaps"] == 0, json.loads(contents["report.json"])["gaps"]
