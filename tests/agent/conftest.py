from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agents import AgentProcess


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent that is configured and started by the test; ended with its zones afterwards."""
    with AgentProcess(tmp_path) as made:
        yield made
