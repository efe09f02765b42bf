"""A sealer that is killed again and again, wherever it is, with several store dirs that come and go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zonebundle

# So many schedules are played; as many as one likes by ZONE_BUNDLE_SCHEDULES, and those from a seed on by
# ZONE_BUNDLE_SCHEDULES_FROM: a seed that failed is printed, and can be played again alone.
_COUNT = int(os.environ.get("ZONE_BUNDLE_SCHEDULES", "400"))
_FIRST = int(os.environ.get("ZONE_BUNDLE_SCHEDULES_FROM", "1"))


@pytest.mark.slow
@pytest.mark.timeout(60 + _COUNT)
def test_schedules_of_steps_that_are_killed(tmpfs_dir: Path) -> None:
    """What they check is in support.schedules, which is a process of its own: it is forked for every step."""
    done = subprocess.run(
        [sys.executable, "-m", "support.schedules", tmpfs_dir, str(_FIRST), str(_FIRST + _COUNT - 1)],
        env={"PYTHONPATH": os.pathsep.join(str(Path(file).parents[1]) for file in (zonebundle.__file__, __file__))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    *_, last = done.stdout.splitlines()
    kills = int(last.split()[2])
    assert last == f"{_COUNT} schedules, {kills} kills, 0 failed"
    # Schedules in which nobody dies would prove nothing.
    assert kills >= _COUNT
