"""A zone's runner, and what becomes of a bundle that could not be recorded."""

from pathlib import Path
from typing import Any

import pytest

from zonebundle.agent.zone_runner import ZoneRunner
from zonebundle.capture.capture import Captured
from zonebundle.errors import ZoneBundleError
from zonebundle.model.ids import new_bundle_id
from zonebundle.model.record import Intent
from zonebundle.model.report import Gap
from zonebundle.model.zone import Zone
from zonebundle.runtimes.process import ProcessRuntime, ProcessZone


class Failing:
    """Evidence of which no record can be made."""

    installation = "0123456789ab"

    def __init__(self, followers: tuple[str, ...]) -> None:
        self.followers = followers
        self.forgotten: list[str] = []
        self.sealed: list[str] = []

    async def admit(self, intent: Intent) -> None:
        pass

    async def hold(self, intent: Intent, **_: Any) -> Captured:
        reasons = (Gap("record", "no space left on device"),)
        bundle_id = intent.metadata.bundle_id
        return Captured(bundle_id, False, 0.0, 0.0, 1, reasons=reasons, followers=self.followers)

    async def forget(self, intent: Intent) -> None:
        self.forgotten.append(intent.metadata.bundle_id)

    def with_archives(self, zone: Zone) -> Zone:
        return zone

    def seal(self, bundle_id: str, captured: Captured) -> None:
        assert not captured.recorded
        self.sealed.append(bundle_id)


@pytest.mark.parametrize("shares_its_snapshot", [False, True])
async def test_a_create_that_failed_is_forgotten_unless_others_read_its_snapshot(
    shares_its_snapshot: bool, tmp_path: Path
) -> None:
    evidence = Failing((new_bundle_id(),) if shares_its_snapshot else ())
    runtime = ProcessRuntime({"web": ProcessZone(command=("true",))}, tmp_path)
    runner = ZoneRunner("web", "web", runtime, evidence)
    with pytest.raises(ZoneBundleError, match="no bundle of zone 'web' could be made: no space left"):
        await runner.create()
    assert len(evidence.sealed) == 1
    assert evidence.forgotten == ([] if shares_its_snapshot else evidence.sealed)
    await runtime.close()
