import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.command import Command, Ran
from support.fake_agent import FakeAgent, FakeServer, fake_server
from zonebundle.cli.main import run


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """Where fake agents answer."""
    # pytest's own directories make paths that are too long for a socket.
    with (
        tempfile.TemporaryDirectory(prefix="zb-test-") as directory,
        fake_server(Path(directory, "agent.sock")) as server,
    ):
        yield server


@pytest.fixture
def agent(server: FakeServer) -> Iterator[FakeAgent]:
    """A fake agent, which answers at its socket."""
    with server.answering() as agent:
        yield agent


@pytest.fixture
def zone_bundle(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line of zone-bundle in this process, against the fake agent."""

    def call(*arguments: str) -> Ran:
        code = run(["--host", f"unix:{agent.socket}", *arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call
