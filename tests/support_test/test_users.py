import os
from pathlib import Path

import pytest

from support.users import OrdinaryUser


def test_a_child_runs_without_privileges(ordinary_user: OrdinaryUser) -> None:
    assert ordinary_user.run("id", "-u").stdout.strip() == str(ordinary_user.uid) != "0"
    assert ordinary_user.run("touch", "mine").returncode == 0
    assert (ordinary_user.home / "mine").stat().st_uid == ordinary_user.uid


@pytest.mark.skipif(os.geteuid() != 0, reason="without root the tests' files are the user's own")
def test_it_cannot_read_what_is_closed(ordinary_user: OrdinaryUser, tmp_path: Path) -> None:
    assert not ordinary_user.can_read(tmp_path)
    assert ordinary_user.can_read(Path("/etc/passwd"))
