"""A user without privileges, to run children as."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOBODY = 65534


@dataclass(frozen=True)
class OrdinaryUser:
    """Who children are run as, and a directory that is theirs and that they can reach."""

    uid: int
    gid: int
    home: Path

    @property
    def popen_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `subprocess.Popen` and the like."""
        if self.uid == os.geteuid():
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def run(self, *command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `command` as this user in `home`, output captured, failure not raised."""
        given: dict[str, Any] = {"cwd": self.home, "stdin": subprocess.DEVNULL, "timeout": 60, "check": False}
        return subprocess.run(command, capture_output=True, text=True, **{**given, **self.popen_arguments, **options})

    def can_read(self, path: Path) -> bool:
        """Whether this user gets at `path`; an interpreter in root's home may be out of reach."""
        return self.run("test", "-r", path).returncode == 0
