from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agents import AgentProcess
from support.containers import RuncBundle
from support.talking import TALKS, settings
from support.zones import MakeBundle


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent that is configured and started by the test; ended with its zones afterwards."""
    with AgentProcess(tmp_path) as made:
        yield made


@pytest.fixture
def container(runc_bundle: MakeBundle, agent: AgentProcess) -> RuncBundle:
    """One that talks, configured in an agent that has not started; it runs when `run` is called."""
    bundle = runc_bundle("sh", "-c", TALKS)
    agent.settings = settings(bundle.state_dir)
    return bundle
