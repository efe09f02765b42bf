"""Seals, copies, downloads, deletions, clean-ups, removals and checks beside each other."""

import contextlib
import os
import random
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from support import leaks
from support.sealing import Sealing, sealing
from support.spooled import Draft, SpoolDir
from support.stored import check_clean, check_whole, content, download
from zonebundle.errors import DamagedError, NoSuchBundleError, StoreError
from zonebundle.store import open_stores
from zonebundle.store import store as store_module
from zonebundle.store.check import check_store
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import prepare

# Minutes show more than seconds.
_SECONDS = float(os.environ.get("ZONE_BUNDLE_CONCURRENCY_SECONDS", "5"))
_CONTENTS = [content(seed, size) for seed, size in enumerate([90, 700, 3000, 9000, 9001, 20_000, 300_000, 400_000])]


class Storm:
    """Threads that do what they do until the time is over, or one of them has failed."""

    def __init__(self, at: SpoolDir, directories: list[Path], opened: Sealing) -> None:
        self.at = at
        self.directories = directories
        self.opened = opened
        self.end = time.monotonic() + _SECONDS
        self.failures: list[str] = []
        self.counts: dict[str, int] = {}
        self.logs: dict[str, dict[bytes, bytes]] = {}
        self.lock = threading.Lock()
        self.there: set[str] = set()
        # Whoever wants a bundle gone waits for its seal, as the service does.
        self.sealing: set[str] = set()

    def run(self, work: dict[str, Callable[[random.Random], None]]) -> None:
        threads = [threading.Thread(target=self._repeat, args=pair, name=pair[0]) for pair in work.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_SECONDS + 60)
            assert not thread.is_alive(), f"{thread.name} hangs"
        assert not self.failures, "\n".join(self.failures)

    def _repeat(self, name: str, step: Callable[[random.Random], None]) -> None:
        chance = random.Random(name)
        self.counts[name] = 0
        while time.monotonic() < self.end and not self.failures:
            try:
                step(chance)
            except BaseException:
                self.failures.append(f"{name}: {traceback.format_exc()}")
            self.counts[name] += 1

    def some(self, chance: random.Random) -> str:
        with self.lock:
            return chance.choice([*sorted(self.there), str(uuid.UUID(int=0, version=4))])

    def seal(self, chance: random.Random) -> None:
        draft = Draft(self.at)
        for number in range(chance.randint(1, 3)):
            draft.add_log(b"%d.log" % number, chance.choice(_CONTENTS))
        draft.write()
        os.utime(draft.entry / "capture.jsonl", (0, 0))
        with self.lock:
            self.sealing.add(draft.bundle_id)
            self.there.add(draft.bundle_id)
            self.logs[draft.bundle_id] = {b"logs/" + path: data for path, data in draft.expected.items()}
        while draft.entry.exists():
            # A directory may be away just now.
            with contextlib.suppress(StoreError):
                self.opened.seal_again(draft.bundle_id)
        with self.lock:
            self.sealing.discard(draft.bundle_id)

    def read(self, chance: random.Random) -> None:
        bundle_id = self.some(chance)
        reader = StoreReader.open(chance.choice(self.directories))
        try:
            bundle = reader.find("web", bundle_id)
            one, other = download(bundle), download(bundle)
            assert one == other
            files = check_whole(bundle)
            assert {path: data for path, data in files.items() if path.startswith(b"logs/")} == self.logs[bundle_id]
        except NoSuchBundleError:
            return
        except (DamagedError, FileNotFoundError):
            # An end with an error is right for what was deleted, and for nothing else.
            with pytest.raises(NoSuchBundleError):
                reader.find("web", bundle_id)

    def delete(self, chance: random.Random) -> None:
        bundle_id = self.some(chance)
        if bundle_id in self.sealing:
            return
        with contextlib.suppress(NoSuchBundleError):
            self.opened.sealer.delete("web", bundle_id)
        for directory in self.directories:
            with pytest.raises(NoSuchBundleError):
                self._find_undrained(directory, bundle_id)
        with self.lock:
            self.there.discard(bundle_id)

    def _find_undrained(self, directory: Path, bundle_id: str) -> None:
        # What was away has it until it is caught up; a tombstone says so.
        tombstones = self.opened.storage.stores.tombstones
        assert tombstones is not None
        if tombstones.has(bundle_id):
            raise NoSuchBundleError("web", bundle_id)
        StoreReader.open(directory).find("web", bundle_id)

    def clean_up(self, chance: random.Random) -> None:
        time.sleep(chance.random() / 10)
        self.opened.upkeep.clean_up(chance.choice([1, 20, 50]), ("cause", "time"), ())

    def prune(self, chance: random.Random) -> None:
        chance.choice([self.opened.upkeep.prune, self.opened.sealer.settle])()

    def hold(self, chance: random.Random) -> None:
        """A hold begins, and goes without a record: segments that are aside wait for it."""
        entry = self.at.spool / str(uuid.UUID(int=chance.getrandbits(128), version=4))
        entry.mkdir()
        (entry / "intent.json").write_text("{}")
        time.sleep(chance.random() / 20)
        (entry / "intent.json").unlink()
        entry.rmdir()

    def catch_up(self, chance: random.Random) -> None:
        time.sleep(chance.random() / 50)
        self.opened.upkeep._not_before = 0.0
        chance.choice([self.opened.upkeep.catch_up, self.opened.upkeep.repair])()

    def drain(self, chance: random.Random) -> None:
        path = str(self.directories[1])
        self.opened.upkeep.drain(path)
        while self.opened.storage.stores.is_in_use(path):
            time.sleep(0.001)
        time.sleep(chance.random() / 20)
        self.opened.upkeep.undrain(path)
        time.sleep(chance.random() / 5)

    def check(self, chance: random.Random) -> None:
        directory = chance.choice(self.directories)
        problems = list(check_store(StoreReader.open(directory), deep=chance.random() < 0.3))
        assert [str(found) for found in problems if found.is_damage] == []


@pytest.mark.slow
@pytest.mark.timeout(int(_SECONDS) + 200)
def test_everything_beside_everything(tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_RESERVE_BYTES", 4096)
    monkeypatch.setattr(open_stores, "_PAUSE", 0.0)
    at = SpoolDir(tmpfs_dir).make()
    directories = [at.store, at.base / "store-2"]
    prepare(directories[1])
    with leaks.no_leaks(), sealing(at.state, directories, quota=6_000_000) as opened:
        storm = Storm(at, directories, opened)
        storm.run(
            {
                "seal 1": storm.seal,
                "seal 2": storm.seal,
                "read 1": storm.read,
                "read 2": storm.read,
                "delete": storm.delete,
                "clean up": storm.clean_up,
                "prune": storm.prune,
                "hold": storm.hold,
                "catch up": storm.catch_up,
                "drain": storm.drain,
                "check": storm.check,
            }
        )
        print(storm.counts)
        assert min(storm.counts.values()) >= 3, storm.counts
        opened.upkeep.repair()
        opened.upkeep.prune()
        opened.sealer.settle()
        found = []
        for directory in directories:
            check_clean(directory)
            assert list(check_store(StoreReader.open(directory), deep=True)) == []
            assert list(directory.glob("tombstones/*")) == []
            bundles = {bundle.header.metadata.bundle_id: bundle for bundle in StoreReader.open(directory).stored()}
            for bundle in bundles.values():
                check_whole(bundle)
            found.append({bundle_id: download(bundle) for bundle_id, bundle in bundles.items()})
        assert found[0] == found[1]
        assert at.left() == []
