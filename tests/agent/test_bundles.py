"""What the agent lists of its store: what is pinned, what is gone, and debris."""

import os
import shutil
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import stored
from support.agents import AgentProcess
from support.wait import until_async
from zonebundle.agent.bundles import Bundles
from zonebundle.agent.catalogue import BundleEntry, BundleState, Catalogue
from zonebundle.agent.store_dirs import StoreDirs
from zonebundle.capture.spool import Spool
from zonebundle.errors import ConflictError
from zonebundle.model.metadata import Cause, format_time
from zonebundle.store.store import Store


class FakeLink:
    """A sealer that does what it is asked."""

    def __init__(self) -> None:
        self.deleted: list[tuple[str, str]] = []

    async def delete(self, zone: str, bundle_id: str) -> int:
        self.deleted.append((zone, bundle_id))
        return 0


class Listed:
    """The agent's bundles over a real store in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.store = Store.open(directory / "store")
        self.threads = ThreadPoolExecutor(1)
        self.link = FakeLink()
        self.directory = directory
        self.deletions = directory / "deletions"
        self.bundles = self.restarted()

    def restarted(self) -> Bundles:
        """As the next agent has them."""
        self.catalogue = Catalogue()
        link: Any = self.link
        stores = StoreDirs([self.directory / "store"])
        self.bundles = Bundles(self.catalogue, stores, Spool(self.directory), link, self.threads)
        return self.bundles

    def listed(self) -> set[str]:
        return {entry.metadata.bundle_id for entry in self.bundles.list()}


@pytest.fixture
async def listed(tmp_path: Path) -> AsyncIterator[Listed]:
    listed = Listed(tmp_path)
    yield listed
    listed.threads.shutdown()
    listed.store.close()


def some_bundle(listed: Listed, zone: str = "web") -> str:
    return stored.seal(listed.store, [], stored.metadata(zone)).metadata.bundle_id


async def test_what_is_read_or_not_sealed_yet_is_pinned(listed: Listed) -> None:
    read, idle = some_bundle(listed), some_bundle(listed)
    await listed.bundles.load()
    states = [BundleState.CAPTURING, BundleState.SEALING, BundleState.FAILED]
    entries = [BundleEntry(stored.metadata(), state) for state in states]
    debris = BundleEntry(stored.metadata(), BundleState.FAILED, is_debris=True)
    for entry in [*entries, debris]:
        listed.catalogue.put(entry)
    assert listed.bundles.pinned() == {entry.metadata.bundle_id for entry in entries}
    async with listed.bundles.reading(listed.store.find("web", read)):
        assert listed.bundles.pinned() == {read, *(entry.metadata.bundle_id for entry in entries)}
        [[what, directories]] = listed.bundles.downloads()
        assert (what, list(directories)) == (f"bundle {read}", [str(listed.store.directory)])
    assert idle not in listed.bundles.pinned()
    assert list(listed.bundles.downloads()) == []


async def test_what_the_store_has_lost_is_unlisted(listed: Listed) -> None:
    kept, lost = some_bundle(listed), some_bundle(listed)
    await listed.bundles.load()
    sealing = BundleEntry(stored.metadata(), BundleState.SEALING)
    listed.catalogue.put(sealing)
    listed.store.delete("web", lost)
    await listed.bundles.compare_with_store()
    assert listed.listed() == {kept, sealing.metadata.bundle_id}
    # What cannot be read now is not gone.
    (listed.store.directory / "bundles/web" / kept / "manifest.jsonl").write_text("{")
    await listed.bundles.compare_with_store()
    assert kept in listed.listed()


async def test_debris_is_listed_as_failed(listed: Listed) -> None:
    whole, damaged = some_bundle(listed), some_bundle(listed)
    directory = listed.store.directory / "bundles/web" / damaged
    (directory / "manifest.jsonl").write_text("{")
    os.utime(directory, (stored.CREATED, stored.CREATED))
    foreign = listed.store.directory / "bundles/bad%20name" / str(uuid.uuid4())
    shutil.copytree(directory, foreign)
    await listed.bundles.load()
    assert listed.listed() == {whole, damaged}
    entry = listed.catalogue.find("web", damaged)
    assert (entry.state, entry.is_debris, entry.metadata.cause) == (BundleState.FAILED, True, Cause.OTHER)
    assert entry.metadata.time_created == format_time(stored.CREATED)
    status = await listed.bundles.status("web", damaged)
    assert status["state"] == "failed"
    assert damaged in status["reason"]
    with pytest.raises(ConflictError, match="is damaged"):
        await listed.bundles.sealed("web", damaged)


@pytest.mark.slow
def test_debris_is_deleted_like_a_bundle(agent: AgentProcess) -> None:
    agent.add_zone("web")
    agent.start()
    bundle_id = agent.post("/zones/bundles/web").json()["id"]["bundle_id"]
    agent.wait_sealed("web", bundle_id)
    agent.terminate()
    (agent.state / "store/bundles/web" / bundle_id / "manifest.jsonl").write_text("{")
    agent.start()
    assert [(one["id"]["bundle_id"], one["state"]) for one in agent.bundles("web")] == [(bundle_id, "failed")]
    path = f"/zones/bundles/web/{bundle_id}"
    assert agent.get(path).status_code == 409
    assert agent.delete(path).status_code == 204
    assert agent.get(path).status_code == 404
    agent.kill()
    agent.start()
    assert agent.bundles("web") == []


async def test_a_deletion_that_was_answered_is_done_by_the_next_start(listed: Listed) -> None:
    read = some_bundle(listed)
    await listed.bundles.load()
    link = listed.link
    async with listed.bundles.reading(listed.store.find("web", read)):
        await listed.bundles.delete("web", read)
        assert listed.listed() == set()
        # The agent ends here, before the reader does.
        again = listed.restarted()
        await again.load()
        assert listed.listed() == set()
        await until_async(lambda: link.deleted == [("web", read)])
    await until_async(lambda: not list(listed.deletions.iterdir()))
