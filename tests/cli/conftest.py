import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command import Command, Ran
from support.fake_agent import FakeAgent, fake_agent
from zonebundle.cli.main import run


@pytest.fixture
def agent() -> Iterator[FakeAgent]:
    """A fake agent at its own socket."""
    # pytest's own directories make paths that are too long for a socket.
    directory = Path(tempfile.mkdtemp(prefix="zb-test-"))
    with fake_agent(directory / "agent.sock") as fake:
        yield fake
    shutil.rmtree(directory)


@pytest.fixture
def zone_bundle(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line of zone-bundle in this process, against the fake agent."""

    def call(*arguments: str) -> Ran:
        code = run(["--host", f"unix:{agent.socket}", *arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call
