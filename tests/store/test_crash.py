"""The store after a crash at every change that it makes, and after an error of every one of them."""

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from support import leaks, power
from support.power import LOSSES, Changes, Crash, Loss
from support.stored import File, check_clean, check_segments, check_whole, content, metadata, seal
from zonebundle.errors import NoSuchBundleError, StoreError
from zonebundle.host import trace
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
class Scene:
    """A store with two bundles; a sealer is to make a third, and to delete the second, which shares a log with it."""

    directory: Path
    graveyard: Path
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

    def play(self, report: Callable[[str], None]) -> None:
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
    number = 0
    killed = True
    reached = set()
    while killed:
        number += 1
        scene = Scene.make(tmp_path / str(number))
        crash = power.crash(scene.play, scene.directory, scene.graveyard, number, loss)
        scene.check_read(crash)
        scene.check_recovered(crash)
        reached.add(len(crash.reports))
        killed = crash.killed
    assert number > 30
    assert reached == {0, 1, 2, 3}


def _open(directory: Path, _: Callable[[str], None]) -> None:
    Store.open(directory).close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_before_every_change_of_the_recovery(tmp_path: Path, loss: Loss) -> None:
    killed = True
    number = 0
    while killed:
        number += 1
        scene = Scene.make(tmp_path / str(number))
        # The first crash is in the middle of the deletion, with a draft beside it.
        bundle = scene.directory / "bundles/web" / scene.deleted.bundle_id
        (bundle / "manifest.jsonl").rename(bundle / "manifest.deleted")
        draft = scene.directory / "bundles/other" / scene.sealed.bundle_id
        draft.mkdir(parents=True)
        (draft / "frame").write_bytes(b"half")
        (scene.directory / "segments/tmp/5").write_bytes(b"half")
        crash = power.crash(partial(_open, scene.directory), scene.directory, scene.graveyard, number, loss)
        crash = Crash(crash.killed, ["sealed"])
        with Store.open(scene.directory) as store:
            assert [header.metadata for header in store.bundles()] == [scene.kept]
            scene.finish(store)
        killed = crash.killed
    assert number > 8


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_every_trace_point(tmp_path: Path, point: str) -> None:
    scene = Scene.make(tmp_path / "scene")

    def play(report: Callable[[str], None]) -> None:
        name, _, count = point.partition(":")
        trace._name, trace._left = name, int(count or 1)
        scene.play(report)

    crash = power.in_child(play)
    assert crash.killed
    scene.check_read(crash)
    scene.check_recovered(crash)


def test_a_crash_while_the_store_is_made(tmp_path: Path) -> None:
    killed = True
    number = 0
    while killed:
        number += 1
        base = tmp_path / str(number)
        (base / "graveyard").mkdir(parents=True)
        directory = base / "store"
        crash = power.crash(partial(_open, directory), directory, base / "graveyard", number, "bytes")
        killed = crash.killed
        with Store.open(directory) as store:
            seal(store, [File(b"logs/a", b"a")])
        check_clean(directory)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_every_change(tmp_path: Path, number: int) -> None:
    """The n-th change fails, once: the sealer gets a StoreError, and the store goes on with what it has."""

    def fail(count: int) -> None:
        if count == at:
            raise OSError(number, os.strerror(number))

    at = 0
    while True:
        at += 1
        scene = Scene.make(tmp_path / str(at))
        reports: list[str] = []
        changes = Changes(scene.directory, scene.graveyard, fail)
        with leaks.no_leaks(), power.watched(changes):
            try:
                scene.play(reports.append)
            except StoreError:
                pass
            except OSError as error:
                raise AssertionError(f"the error of change {at} came through as it is") from error
        scene.check_read(Crash(False, reports))
        scene.check_recovered(Crash(False, reports))
        if changes.count < at:
            break
    assert at > 30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_of_every_change_and_the_same_sealer_goes_on(tmp_path: Path) -> None:
    def fail(count: int) -> None:
        if count == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at = 0
    while True:
        at += 1
        scene = Scene.make(tmp_path / str(at))
        changes = Changes(scene.directory, scene.graveyard, fail)
        with leaks.no_leaks(), Store.open(scene.directory) as store:
            with power.watched(changes):
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
        if changes.count < at:
            break
    assert at > 30
