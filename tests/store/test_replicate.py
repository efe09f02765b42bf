"""A bundle is brought into another store dir as it is, whole or not at all."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from support import leaks, power
from support.flipping import Sample, bits, flip
from support.power import LOSSES, Crash, Failing, Loss, Place, Report
from support.stored import File, check_clean, check_whole, content, download, metadata, put, seal
from zonebundle.errors import DamagedError, NoSuchBundleError, StoreError
from zonebundle.model.metadata import Metadata
from zonebundle.store import replicate
from zonebundle.store.bundle import StoredBundle, segments_in
from zonebundle.store.check import check_store
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader
from zonebundle.store.replicate import copy_bundle
from zonebundle.store.store import Store

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Store]:
    """An empty store dir to copy to."""
    with Store.open(tmp_path / "target") as store:
        yield store


def find(sample: Sample, number: int) -> StoredBundle:
    made = sample.bundles[number]
    return StoreReader.open(sample.directory).find(made.zone, made.bundle_id)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return Sample(directory, ()).bytes()


def test_every_byte_is_the_same(sample: Sample, target: Store) -> None:
    written = [copy_bundle(find(sample, number), target) for number in range(3)]
    assert bytes_of(target.directory) == sample.bytes()
    assert sum(written) == sum(map(len, sample.bytes().values()))
    check_clean(target.directory)
    for made in sample.bundles[:2]:
        check_whole(target.find(made.zone, made.bundle_id))
    assert download(target.find("web", sample.bundles[0].bundle_id)) == download(find(sample, 0))
    assert list(check_store(target, deep=True)) == []
    # And there are no leases left.
    for made in sample.bundles:
        target.delete(made.zone, made.bundle_id)
    assert bytes_of(target.directory) == {}


def test_segments_that_are_there_are_not_brought_again(sample: Sample, target: Store) -> None:
    with Store.open(sample.directory) as store:
        again = seal(store, [File(b"logs/again", content(50, 2 * CHUNK + 77)), File(b"ptree", b"1", own=True)]).metadata
        bundle = store.find(again.zone, again.bundle_id)
        copy_bundle(find(sample, 0), target)
        with mock.patch.object(replicate, "read_segment", side_effect=AssertionError):
            assert copy_bundle(bundle, target) == sum(path.stat().st_size for path in bundle.directory.iterdir())
        check_whole(target.find(again.zone, again.bundle_id))


def test_one_that_is_there_is_left_alone(sample: Sample, target: Store) -> None:
    copy_bundle(find(sample, 0), target)
    before = {path: path.stat() for path in target.directory.rglob("*")}
    assert copy_bundle(find(sample, 0), target) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == {path: s.st_mtime_ns for path, s in before.items()}


@pytest.mark.parametrize("name", ["frame", "manifest.jsonl", "segment"])
def test_one_that_is_there_and_damaged_is_told(sample: Sample, target: Store, name: str) -> None:
    copy_bundle(find(sample, 0), target)
    made = sample.bundles[0]
    there = target.find(made.zone, made.bundle_id)
    if name == "segment":
        Path(target.segments.path(next(iter(segments_in(there.manifest))))).unlink()
    else:
        path = there.directory / name
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=f"target/bundles/web/{made.bundle_id} is damaged, .*verify --repair"):
        copy_bundle(find(sample, 0), target)


@pytest.mark.slow
def test_a_damaged_source_leaves_no_trace(sample: Sample, target: Store) -> None:
    kept = seal(target, [File(b"logs/a", content(1, 1000))]).metadata
    before = bytes_of(target.directory)
    bundle = find(sample, 0)
    used = {f"{digest}.gz" for digest in segments_in(bundle.manifest)}
    paths = [path for path in sample.segments() if path.name in used]
    for path in [*paths, bundle.manifest, bundle.directory / "frame"]:
        for bit in list(bits(path, 4, 1))[2:]:
            flip(path, bit)
            if path.name != "frame" or list(check_store(StoreReader.open(sample.directory))):
                with leaks.no_leaks(), pytest.raises(DamagedError) as caught:
                    copy_bundle(bundle, target)
                assert str(path) in str(caught.value)
                assert bytes_of(target.directory) == before
            flip(path, bit)
    for path in [*paths, bundle.directory / "frame"]:
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(DamagedError, match="is missing; restore"):
            copy_bundle(bundle, target)
        path.write_bytes(data)
    assert bytes_of(target.directory) == before
    assert [header.metadata for header in target.bundles()] == [kept]
    assert copy_bundle(bundle, target) > 0


def test_a_bundle_deleted_meanwhile_leaves_no_trace(sample: Sample, target: Store) -> None:
    """Deleted at each place where the copy reads something."""
    made = sample.bundles[0]
    reached = 0
    for name in ("read_segment", "copy_file", "find_faults"):
        source = sample.copy(sample.directory.with_name(f"before-{name}"))
        real = getattr(replicate, name)

        def late(
            *arguments: object, real: Callable[..., object] = real, source: Sample = source, **options: object
        ) -> object:
            nonlocal reached
            reached += 1
            with Store.open(source.directory) as store:
                try:
                    store.delete(made.zone, made.bundle_id)
                except NoSuchBundleError:
                    pass
            return real(*arguments, **options)

        with mock.patch.object(replicate, name, late), pytest.raises(NoSuchBundleError):
            copy_bundle(find(source, 0), target)
        assert bytes_of(target.directory) == {}
        check_clean(target.directory)
    assert reached >= 3


def test_what_the_target_had_before_stays_when_a_copy_fails(sample: Sample, target: Store) -> None:
    """Segments that no bundle uses yet may be those of a seal, or of a living zone."""
    bundle = find(sample, 0)
    put(target, "a seal", content(50, 2 * CHUNK + 77))
    target.segments.flush()
    target.segments.release("a seal")
    before = bytes_of(target.directory)
    assert {Path(name).stem for name in before} & set(segments_in(bundle.manifest))
    (bundle.directory / "frame").write_bytes(b"")
    with pytest.raises(DamagedError):
        copy_bundle(bundle, target)
    assert bytes_of(target.directory) == before


@dataclass(frozen=True)
class Scene(Place):
    """Two stores: the second gets the first one's bundle, of which it has a log already."""

    source: Path
    copied: Metadata
    kept: Metadata

    KEPT = (File(b"logs/shared", content(2, 300_000)), File(b"ptree", b"1", own=True))
    COPIED = (*KEPT, File(b"logs/new", content(4, 300_000)), File(b"logs/small", content(5, 1000)))

    @classmethod
    def make(cls, base: Path) -> "Scene":
        (base / "graveyard").mkdir(parents=True)
        scene = cls(base / "target", base / "graveyard", base / "source", metadata("other"), metadata())
        with Store.open(scene.source) as store:
            seal(store, cls.COPIED, scene.copied)
        with Store.open(scene.directory) as store:
            seal(store, cls.KEPT, scene.kept)
        return scene

    def play(self, report: Report) -> None:
        """What the sealer does until it crashes."""
        with Store.open(self.directory) as store:
            report("opened")
            self.copy(store)
            report("copied")

    def copy(self, store: Store) -> int:
        return copy_bundle(StoreReader.open(self.source).find("other", self.copied.bundle_id), store)

    def check(self, crash: Crash) -> None:
        """Right after the crash, and when the next one has ended the work."""
        self.check_read(crash)
        with Store.open(self.directory) as store:
            self.check_read(crash)
            was_there = bool(list((self.directory / "bundles/other").glob("*/manifest.jsonl")))
            assert (self.copy(store) == 0) == was_there
            store.sweep()
        self.check_read(Crash(False, ["copied"]))
        check_clean(self.directory)
        source, target = bytes_of(self.source), bytes_of(self.directory)
        assert {name: target[name] for name in source} == source

    def check_read(self, crash: Crash) -> None:
        reader = StoreReader.open(self.directory)
        seen = {header.metadata for header in reader.bundles()}
        assert seen in ({self.kept, self.copied}, {self.kept})
        assert self.copied in seen or "copied" not in crash.reports
        for made in seen:
            expected = self.KEPT if made == self.kept else self.COPIED
            assert check_whole(reader.find(made.zone, made.bundle_id)) == {file.path: file.data for file in expected}


@pytest.mark.parametrize(
    "point", ["replicate.segments-durable", "replicate.frame-written", "replicate.committed", "seal.segment-written"]
)
def test_a_crash_at_every_trace_point(tmp_path: Path, point: str) -> None:
    scene = Scene.make(tmp_path / "scene")
    scene.check(power.crash_at(point, scene.play))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_crash_before_every_change(tmp_path: Path, loss: Loss) -> None:
    crashes = power.crash_before_every_change(tmp_path, loss, Scene.make, Scene.play, Scene.check)
    assert len(crashes) > 15
    assert {len(crash.reports) for crash in crashes} == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_of_every_change(tmp_path: Path, number: int) -> None:
    """The n-th change fails, once: a StoreError, no trace, and the next try succeeds."""

    def play(scene: Scene, failing: Failing) -> None:
        with leaks.no_leaks(), Store.open(scene.directory) as store:
            with failing(), contextlib.suppress(StoreError):
                scene.copy(store)
            scene.check_read(Crash(False, []))
            scene.copy(store)
            scene.check_read(Crash(False, ["copied"]))
        scene.check(Crash(False, ["copied"]))

    assert power.fail_every_change(tmp_path, number, Scene.make, play) > 15
