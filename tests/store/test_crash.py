"""The store after a crash at every change that it makes, and after an error of every one of them."""

import contextlib
import errno
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import leaks, power
from support.power import LOSSES, Crash, Failing, Loss, Place, Report
from support.stored import File, check_clean, check_segments, check_whole, content, metadata, seal
from zonebundle.errors import NoSuchBundleError, StoreError
from zonebundle.model.metadata import Metadata
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import Store

# Where the store itself has to be right; the others are the sealer's and the agent's.
POINTS = [
    "seal.segment-written",
    "seal.segment-written:2",
    "seal.segments-durable",
    "seal.frame-written",
    "seal.manifest-written",
    "seal.committed",
    "delete.uncommitted",
    "delete.frame-removed",
    "delete.segments-removed",
]


@dataclass(frozen=True)
class Scene(Place):
    """A store with two bundles; a sealer is to make a third, and to delete the second, which shares a log with it."""

    kept: Metadata
    deleted: Metadata
    sealed: Metadata

    KEPT = (File(b"logs/kept", content(1, 300_000)), File(b"ptree", b"1", own=True))
    DELETED = (*KEPT, File(b"logs/shared", content(2, 300_000)), File(b"logs/alone", content(3, 9000)))
    SEALED = (
        File(b"metadata.toml", b"x", own=True),
        File(b"logs/shared", content(2, 300_000)),
        File(b"logs/new", content(4, 300_000)),
        File(b"logs/small-1", content(5, 1000)),
        File(b"logs/small-2", content(6, 1000)),
    )

    @classmethod
    def make(cls, base: Path) -> "Scene":
        base.mkdir()
        (base / "graveyard").mkdir()
        scene = cls(base / "store", base / "graveyard", metadata(), metadata(), metadata("other"))
        with Store.open(scene.directory) as store:
            seal(store, cls.KEPT, scene.kept)
            seal(store, cls.DELETED, scene.deleted)
        return scene

    def play(self, report: Report) -> None:
        """What the sealer does until it crashes."""
        with Store.open(self.directory) as store:
            report("opened")
            seal(store, self.SEALED, self.sealed)
            report("sealed")
            store.delete(self.deleted.zone, self.deleted.bundle_id)
            report("deleted")

    def check_read(self, crash: Crash) -> None:
        """What any reader sees right after the crash: whole bundles, and all that was promised."""
        reader = StoreReader.open(self.directory)
        seen = {header.metadata for header in reader.bundles()}
        assert self.kept in seen
        assert (self.sealed in seen) or "sealed" not in crash.reports
        assert (self.deleted in seen) or "sealed" in crash.reports
        assert (self.deleted not in seen) or "deleted" not in crash.reports
        for made in seen:
            bundle = reader.find(made.zone, made.bundle_id)
            expected = {self.kept: self.KEPT, self.deleted: self.DELETED, self.sealed: self.SEALED}[made]
            assert check_whole(bundle) == {file.path: file.data for file in expected}
        check_segments(self.directory)

    def check_recovered(self, crash: Crash) -> None:
        """The next sealer finds a store with nothing half done in it, ends its work, and leaves nothing behind."""
        with Store.open(self.directory) as store:
            self.check_read(crash)
            assert list((self.directory / "segments/tmp").iterdir()) == []
            assert all((path / "manifest.jsonl").exists() for path in store.directories())
            if "sealed" in crash.reports:
                # Only an interrupted seal leaves something for `sweep`: a deletion is finished to its last segment.
                check_clean(self.directory)
            self.finish(store)

    def check(self, crash: Crash) -> None:
        self.check_read(crash)
        self.check_recovered(crash)

    def finish(self, store: Store) -> None:
        """Seal and delete what is not yet; then the store is as if nothing had happened."""
        try:
            store.find(self.sealed.zone, self.sealed.bundle_id)
        except NoSuchBundleError:
            seal(store, self.SEALED, self.sealed)
        with contextlib.suppress(NoSuchBundleError):
            store.delete(self.deleted.zone, self.deleted.bundle_id)
        store.sweep()
        assert {header.metadata for header in store.bundles()} == {self.kept, self.sealed}
        self.check_read(Crash(False, ["sealed", "deleted"]))
        check_clean(self.directory)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_before_every_change(tmp_path: Path, loss: Loss) -> None:
    crashes = power.crash_before_every_change(tmp_path, loss, Scene.make, Scene.play, Scene.check)
    assert len(crashes) > 30
    assert {len(crash.reports) for crash in crashes} == {0, 1, 2, 3}


def _open(place: Place, _: Report) -> None:
    Store.open(place.directory).close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_before_every_change_of_the_recovery(tmp_path: Path, loss: Loss) -> None:
    def make(base: Path) -> Scene:
        scene = Scene.make(base)
        # The first crash is in the middle of the deletion, with a draft beside it.
        bundle = scene.directory / "bundles/web" / scene.deleted.bundle_id
        (bundle / "manifest.jsonl").rename(bundle / "manifest.deleted")
        draft = scene.directory / "bundles/other" / scene.sealed.bundle_id
        draft.mkdir(parents=True)
        (draft / "frame").write_bytes(b"half")
        (scene.directory / "segments/tmp/5").write_bytes(b"half")
        return scene

    def check(scene: Scene, _: Crash) -> None:
        with Store.open(scene.directory) as store:
            assert [header.metadata for header in store.bundles()] == [scene.kept]
            scene.finish(store)

    assert len(power.crash_before_every_change(tmp_path, loss, make, _open, check)) > 8


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_every_trace_point(tmp_path: Path, point: str) -> None:
    scene = Scene.make(tmp_path / "scene")
    scene.check(power.crash_at(point, scene.play))


def test_a_crash_while_the_store_is_made(tmp_path: Path) -> None:
    def make(base: Path) -> Place:
        (base / "graveyard").mkdir(parents=True)
        return Place(base / "store", base / "graveyard")

    def check(place: Place, _: Crash) -> None:
        with Store.open(place.directory) as store:
            seal(store, [File(b"logs/a", b"a")])
        check_clean(place.directory)

    power.crash_before_every_change(tmp_path, "bytes", make, _open, check)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_every_change(tmp_path: Path, number: int) -> None:
    """The n-th change fails, once: the sealer gets a StoreError, and the store goes on with what it has."""

    def play(scene: Scene, failing: Failing) -> None:
        reports: list[str] = []
        with leaks.no_leaks(), failing(), contextlib.suppress(StoreError):
            scene.play(reports.append)
        scene.check(Crash(False, reports))

    assert power.fail_every_change(tmp_path, number, Scene.make, play) > 30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_of_every_change_and_the_same_sealer_goes_on(tmp_path: Path) -> None:
    def play(scene: Scene, failing: Failing) -> None:
        with leaks.no_leaks(), Store.open(scene.directory) as store:
            with failing():
                with contextlib.suppress(StoreError):
                    seal(store, scene.SEALED, scene.sealed)
                with contextlib.suppress(StoreError):
                    store.delete(scene.deleted.zone, scene.deleted.bundle_id)
            # What a failed clean-up left is the next start's to remove; the work itself can be done again right away.
            try:
                store.find(scene.sealed.zone, scene.sealed.bundle_id)
            except NoSuchBundleError:
                seal(store, scene.SEALED, scene.sealed)
            scene.check_read(Crash(False, ["sealed"]))
        with Store.open(scene.directory) as store:
            scene.finish(store)

    assert power.fail_every_change(tmp_path, errno.ENOSPC, Scene.make, play) > 30
