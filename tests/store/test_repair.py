"""What is damaged or missing in one store dir comes back from another, byte for byte, and what was deleted does not."""

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from support import leaks, power
from support.flipping import Sample, bits, flip
from support.power import LOSSES, Crash, Failing, Loss, Place, Report
from support.stored import File, check_clean, content, metadata, seal
from zonebundle.errors import StoreError
from zonebundle.model.metadata import Metadata
from zonebundle.store import check as check_module
from zonebundle.store import replicate
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.check import Kind, Problem, Repaired, check_store, repair
from zonebundle.store.check_bundle import find_faults
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader
from zonebundle.store.segments import Segments
from zonebundle.store.store import Store
from zonebundle.store.tombstones import Tombstones

pytestmark = pytest.mark.usefixtures("leak_check")


def mend(sample: Sample, *others: Sample, deep: bool = False) -> list[Repaired | Problem]:
    with Store.open(sample.directory) as store:
        readers = [StoreReader.open(other.directory) for other in others]
        tombstones = Tombstones([sample.directory, *(other.directory for other in others)])
        found = list(repair(store, readers, tombstones, deep=deep))
    assert list((sample.directory / "segments/tmp").iterdir()) == []
    return found


def repaired(found: list[Repaired | Problem]) -> set[Path]:
    """The paths of what was mended; nothing may be left."""
    assert [str(each) for each in found if isinstance(each, Problem)] == []
    return {each.path for each in found}


def test_a_whole_store_is_not_touched(sample: Sample, twin: Sample) -> None:
    before = {path: path.stat().st_ino for path in sample.files()}
    assert mend(sample, twin, deep=True) == []
    assert {path: path.stat().st_ino for path in sample.files()} == before


@pytest.mark.slow
def test_every_flipped_file_comes_back(sample: Sample, twin: Sample) -> None:
    """Even where no check of content finds it: the twin differs."""
    for path in sample.files():
        # The first two of the five special ones are in every gzip file's header.
        for bit in list(bits(path, 3, 9))[2:]:
            flip(path, bit)
            damaged = path.stat().st_ino
            found = repaired(mend(sample, twin))
            assert path in found or path.parent in found
            assert path.stat().st_ino != damaged
            assert sample.bytes() == twin.bytes()


@pytest.mark.slow
def test_many_damages_at_once(sample: Sample, twin: Sample) -> None:
    chance = random.Random(11)
    for _ in range(30):
        for path in chance.sample(sample.files(), chance.randrange(1, 9)):
            match chance.choice(["flip", "truncate", "remove", "empty"]):
                case "flip":
                    flip(path, chance.randrange(path.stat().st_size * 8))
                case "truncate":
                    os.truncate(path, chance.randrange(path.stat().st_size))
                case "empty":
                    path.write_bytes(b"")
                case "remove" if path.name != "manifest.jsonl" or chance.random() < 0.5:
                    path.unlink()
        repaired(mend(sample, twin))
        assert sample.bytes() == twin.bytes()
    check_clean(sample.directory)


def test_two_damaged_dirs_mend_each_other(sample: Sample, twin: Sample) -> None:
    """Each has something that only the other has whole, of one bundle even."""
    whole = sample.bytes()
    one, two, three, *_ = sample.segments()
    flip(one, 200)
    flip(sample.bundle(0) / "manifest.jsonl", 3000)
    flip(twin.directory / two.relative_to(sample.directory), 200)
    (twin.directory / three.relative_to(sample.directory)).unlink()
    flip(twin.bundle(1) / "manifest.jsonl", 3000)
    repaired(mend(sample, twin))
    repaired(mend(twin, sample))
    assert sample.bytes() == twin.bytes() == whole


def test_an_empty_dir_gets_everything(twin: Sample, tmp_path: Path) -> None:
    new = Sample(tmp_path / "new", ())
    repaired(mend(new, twin))
    assert new.bytes() == twin.bytes()
    assert list(check_store(StoreReader.open(new.directory), deep=True)) == []


def test_a_bundle_is_brought_from_the_dir_that_has_it_whole(twin: Sample, tmp_path: Path) -> None:
    """Three dirs: the frame is damaged in one, a segment in another, and that is enough to have it whole."""
    other = twin.copy(tmp_path / "other")
    new = Sample(tmp_path / "new", ())
    whole = twin.bytes()
    flip(twin.bundle(0) / "frame", 8 * 500)
    flip(other.segments()[0], 300)
    shutil.rmtree(other.bundle(1))
    repaired(mend(new, twin, other))
    assert new.bytes() == whole


def test_what_nobody_has_whole_stays_a_problem(sample: Sample, twin: Sample) -> None:
    for each in (sample, twin):
        flip(each.segments()[0], 300)
        flip(each.bundle(2) / "manifest.jsonl", 700)
        flip(each.bundle(1) / "frame", 8 * 40)
    before = sample.bytes()
    for others in ([twin], []):
        left = [found for found in mend(sample, *others) if isinstance(found, Problem)]
        assert {found.path for found in left if found.kind != Kind.AFFECTED} == {
            sample.segments()[0],
            sample.bundle(2) / "manifest.jsonl",
            sample.bundle(1) / "frame",
        }
        assert all(found.is_damage for found in left)
        assert sample.bytes() == before
    absent = [
        found for found in mend(Sample(sample.directory.with_name("new"), ()), twin) if isinstance(found, Problem)
    ]
    assert [found.kind for found in absent] == [Kind.ABSENT] * len(absent)
    assert absent
    assert "is missing here, and could not be copied: " in absent[0].what


def test_deleted_bundles_do_not_come_back(sample: Sample, twin: Sample) -> None:
    gone, other = sample.bundles[0], sample.bundles[2]
    with Store.open(sample.directory) as store:
        store.delete(gone.zone, gone.bundle_id)
        store.delete(other.zone, other.bundle_id)
    # The tombstone is in this dir, the bundle in the other one, or both in the other one.
    Tombstones([sample.directory]).write(gone.bundle_id)
    Tombstones([twin.directory]).write(other.bundle_id)
    assert repaired(mend(sample, twin)) == set()
    assert repaired(mend(twin, sample)) == {twin.bundle(0), twin.bundle(2)}
    assert sample.bytes() == twin.bytes()
    assert [header.metadata for header in StoreReader.open(twin.directory).bundles()] == [sample.bundles[1]]
    check_clean(twin.directory)


def test_a_bundle_deleted_while_it_is_copied_does_not_come_back(twin: Sample, tmp_path: Path) -> None:
    new = Sample(tmp_path / "new", ())
    real = replicate.copy_with

    def late(bundle: StoredBundle, target: Store, sources: Sequence[Segments]) -> int:
        written = real(bundle, target, sources)
        if bundle.header.metadata == twin.bundles[0]:
            Tombstones([twin.directory]).write(twin.bundles[0].bundle_id)
        return written

    with mock.patch.object(check_module, "copy_with", late):
        mend(new, twin)
    assert not list(new.directory.glob(f"bundles/*/{twin.bundles[0].bundle_id}"))


def test_debris_is_told_and_left(sample: Sample, twin: Sample) -> None:
    debris = [sample.directory / "bundles/web/not-a-bundle", sample.directory / "segments/README"]
    for path in debris:
        path.write_bytes(b"")
    found = mend(sample, twin)
    assert {each.path for each in found} == set(debris)
    assert all(isinstance(each, Problem) and not each.is_damage for each in found)


def test_a_damaged_file_is_never_written_to(sample: Sample, twin: Sample) -> None:
    """Whoever reads the damaged file goes on reading it."""
    paths = [sample.segments()[0], sample.bundle(0) / "frame", sample.bundle(1) / "manifest.jsonl"]
    for path in paths:
        flip(path, 400)
    before = [path.read_bytes() for path in paths]
    files = [path.open("rb") for path in paths]
    repaired(mend(sample, twin))
    for file, data in zip(files, before, strict=True):
        with file:
            assert file.read() == data
    assert sample.bytes() == twin.bytes()


def test_a_full_disk_leaves_the_problems(sample: Sample, twin: Sample) -> None:
    segment = sample.segments()[0]
    flip(segment, 300)
    flip(sample.bundle(1) / "frame", 8 * 40)
    shutil.rmtree(sample.bundle(2))
    before = sample.bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        mock.patch.object(check_module, "write_all", full),
        mock.patch("zonebundle.store.replicate.write_all", full),
        mock.patch("zonebundle.store.objects.write_all", full),
    ):
        left = mend(sample, twin)
    assert {(each.kind if isinstance(each, Problem) else "repaired") for each in left} == {
        Kind.SEGMENT,
        Kind.AFFECTED,
        Kind.FRAME,
        Kind.ABSENT,
    }
    assert all("no space left" in each.what for each in left if isinstance(each, Problem) and each.kind != "affected")
    assert sample.bytes() == before
    repaired(mend(sample, twin))
    assert sample.bytes() == twin.bytes()


def test_a_frame_that_only_differs_and_cannot_be_replaced_is_told(sample: Sample, twin: Sample) -> None:
    frame = sample.bundle(0) / "frame"
    for bit in range(8 * 100, frame.stat().st_size * 8):
        flip(frame, bit)
        if not list(find_faults(frame.parent, "web", frame.parent.name, on_entry=lambda _: None)):
            break
        flip(frame, bit)
    with mock.patch.object(check_module, "copy_file", side_effect=StoreError("the disk is full")):
        (found,) = mend(sample, twin)
    assert isinstance(found, Problem)
    assert (found.path, found.is_damage) == (frame, True)
    assert found.what == "differs from another dir's; it could not be mended: the disk is full"
    assert repaired(mend(sample, twin)) == {sample.bundle(0)}
    assert sample.bytes() == twin.bytes()


@dataclass(frozen=True)
class Scene(Place):
    """Two dirs, of which the first lacks a bundle, has a damaged segment, manifest and frame, and one to delete."""

    twin: Path
    deleted: Metadata

    @classmethod
    def make(cls, base: Path) -> "Scene":
        (base / "graveyard").mkdir(parents=True)
        scene = cls(base / "store", base / "graveyard", base / "twin", metadata("gone"))
        made = [metadata(zone) for zone in ("a", "b", "c")]
        with Store.open(scene.twin) as store:
            for number, each in enumerate(made):
                files = [File(b"logs/%d" % number, content(number, 9000)), File(b"logs/same", content(9, 9000))]
                seal(store, [*files, File(b"ptree", content(5, 900), own=True)], each)
        shutil.copytree(scene.twin, scene.directory)
        with Store.open(scene.directory) as store:
            seal(store, [File(b"logs/x", content(30, CHUNK))], scene.deleted)
            store.delete("a", made[0].bundle_id)
        Tombstones([scene.twin]).write(scene.deleted.bundle_id)
        flip(max(scene.directory.glob("segments/??/*.gz"), key=lambda path: path.name), 8 * 300)
        flip(scene.directory / "bundles/b" / made[1].bundle_id / "manifest.jsonl", 8 * 400)
        flip(scene.directory / "bundles/c" / made[2].bundle_id / "frame", 8 * 60)
        return scene

    def play(self, report: Report) -> None:
        """What `verify --repair` does until it crashes."""
        with Store.open(self.directory) as store:
            for found in repair(store, [StoreReader.open(self.twin)], Tombstones([self.twin])):
                report(f"{type(found).__name__} {found.path}")

    def check(self, crash: Crash) -> None:
        """What was reported as mended is whole, whatever happened since; the next one ends the work."""
        mended = {report.removeprefix("Repaired ") for report in crash.reports}
        damaged = {
            str(place)
            for problem in check_store(StoreReader.open(self.directory))
            if problem.is_damage and problem.kind != Kind.AFFECTED
            for place in (problem.path, problem.path.parent)
        }
        assert not mended & damaged
        reports: list[str] = []
        self.play(reports.append)
        assert [report for report in reports if not report.startswith("Repaired")] == []
        with Store.open(self.directory) as store:
            # What a power cut gave back to the segments that were set aside goes with the next clean-up.
            store.sweep()
        check_clean(self.directory)
        assert Sample(self.directory, ()).bytes() == Sample(self.twin, ()).bytes()


@pytest.mark.parametrize(
    "point",
    [
        "repair.segment-replaced",
        "repair.bundle-copied",
        "repair.bundle-copied:2",
        "repair.bundle-copied:3",
        "replicate.segments-durable",
        "replicate.frame-written",
        "replicate.committed",
        "delete.uncommitted",
    ],
)
def test_a_crash_at_every_trace_point(tmp_path: Path, point: str) -> None:
    scene = Scene.make(tmp_path / "scene")
    scene.check(power.crash_at(point, scene.play))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_before_every_change(tmp_path: Path, loss: Loss) -> None:
    assert len(power.crash_before_every_change(tmp_path, loss, Scene.make, Scene.play, Scene.check)) > 40


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_of_every_change(tmp_path: Path) -> None:
    """The n-th change fails, once: what it was for stays a problem, or the repair ends with a StoreError."""

    def play(scene: Scene, failing: Failing) -> None:
        reports: list[str] = []
        with leaks.no_leaks(), failing(), contextlib.suppress(StoreError):
            scene.play(reports.append)
        scene.check(Crash(False, reports))

    assert power.fail_every_change(tmp_path, errno.EIO, Scene.make, play) > 40
