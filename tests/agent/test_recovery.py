"""What a start finds in the spool and in the staging directories, and what it makes of it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zonebundle.agent.catalogue import Catalogue
from zonebundle.agent.recovery import Recovery, discard
from zonebundle.agent.state import StateDir
from zonebundle.capture.record_writer import RecordWriter
from zonebundle.capture.spool import Spool
from zonebundle.model.ids import new_bundle_id, snapshot_name
from zonebundle.model.record import Area, Intent, Limits, RecordHeader, metadata_for
from zonebundle.model.zone import Zone
from zonebundle.snapshots.areas import prepare_area

CREATED = "2026-11-22T20:00:00.000000Z"
STRANGER = "0123456789ab"

pytestmark = pytest.mark.usefixtures("leak_check")


class Host:
    """A state directory with its spool, and one staging directory."""

    def __init__(self, directory: Path) -> None:
        self.threads = ThreadPoolExecutor(1)
        self.state = StateDir(directory / "state", self.threads)
        self.state.open()
        self.spool = Spool(directory / "state")
        self.spool.open()
        self.staging = directory / "staging"
        self.staging.mkdir(mode=0o700)

    def add_area(self, bundle_id: str, installation: str = "") -> Path:
        area = self.staging / snapshot_name(installation or self.state.installation, bundle_id)
        prepare_area(area, installation or self.state.installation)
        (area / "files").mkdir()
        (area / "files" / "0").write_text("a log\n")
        return area

    def record(self, bundle_id: str, *areas: Path, leader: str = "") -> None:
        entry = self.spool.entry(bundle_id)
        entry.mkdir()
        writer = RecordWriter(entry)
        for area in areas:
            writer.add("area", Area("staged", str(area), leader or bundle_id).to_json())
        metadata = metadata_for("web", bundle_id, CREATED, "stop")
        writer.commit(RecordHeader(metadata, "stop", 0.0, 0.0, 0, Limits()))

    async def recover(self) -> list[str]:
        """The bundles to be sealed."""
        recovery = Recovery(self.spool, self.state, self.state.installation, self.threads)
        await recovery.run(Catalogue())
        return recovery.recorded

    def intent(self, bundle_id: str) -> Intent:
        zone = Zone(name="web", runtime="process", state="running")
        metadata = metadata_for("web", bundle_id, CREATED, "create")
        return Intent(metadata, "create", zone, snapshot_name(self.state.installation, bundle_id), 0.0, False)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.spool.close()
    host.state.close()
    host.threads.shutdown()


async def test_an_area_that_nothing_refers_to_goes_and_all_others_stay(host: Host) -> None:
    await host.state.remember([str(host.staging), "/nowhere"])
    lost, recorded, leader, follower = (new_bundle_id() for _ in range(4))
    orphan, own, shared = (host.add_area(bundle_id) for bundle_id in (lost, recorded, leader))
    foreign = host.add_area(new_bundle_id(), STRANGER)
    host.record(recorded, own)
    # Its leader's entry is gone.
    host.record(follower, shared, leader=leader)
    assert sorted(await host.recover()) == sorted([recorded, follower])
    assert not orphan.exists()
    for area in (own, shared, foreign):
        assert (area / "files" / "0").exists()


async def test_the_area_of_an_entry_that_was_never_begun_goes_with_it(host: Host) -> None:
    await host.state.remember([str(host.staging)])
    bundle_id = new_bundle_id()
    area = host.add_area(bundle_id)
    host.spool.entry(bundle_id).mkdir()
    assert await host.recover() == []
    assert not area.exists()
    assert not host.spool.entry(bundle_id).exists()


def test_a_failed_hold_is_discarded_unless_its_record_is_there_after_all(host: Host) -> None:
    failed, recorded = new_bundle_id(), new_bundle_id()
    areas = [host.add_area(bundle_id) for bundle_id in (failed, recorded)]
    host.spool.entry(failed).mkdir()
    host.record(recorded, areas[1])
    for bundle_id in (failed, recorded):
        discard(host.spool, [str(host.staging)], host.intent(bundle_id), host.state.installation)
    assert not areas[0].exists()
    assert not host.spool.entry(failed).exists()
    assert (areas[1] / "files" / "0").exists()
    assert host.spool.entry(recorded).exists()
