import os
import re
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from support import leaks
from support.stored import CREATED, File, add, check_clean, check_segments, check_whole, content, metadata, put, seal
from zonebundle.errors import ConflictError, DamagedError, FormatError, NoSuchBundleError, StoreError, UsageError
from zonebundle.model.manifest import digest_to_text
from zonebundle.model.metadata import Metadata
from zonebundle.store.bundle import segments_in
from zonebundle.store.draft import BundleDraft
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import Store

NO_BUNDLE = "11111111-2222-3333-4444-555555555555"


def files(*seeds: int) -> list[File]:
    return [File(b"logs/%d" % seed, content(seed, CHUNK)) for seed in seeds]


def make(store: Store, *seeds: int, zone: str = "web") -> Metadata:
    return seal(store, files(*seeds), metadata(zone)).metadata


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "var/lib/store"


def test_open_makes_a_private_store(directory: Path) -> None:
    with leaks.no_leaks(), Store.open(directory):
        pass
    assert re.fullmatch(r"zonebundle store 2 [0-9a-f-]{36}\n", (directory / "format").read_text())
    assert sorted(os.listdir(directory)) == ["bundles", "format", "reserve", "segments"]
    for name, mode in {"": 0o700, "bundles": 0o700, "segments": 0o700, "segments/tmp": 0o700, "format": 0o600}.items():
        assert stat.S_IMODE((directory / name).stat().st_mode) == mode
    # And an empty directory of the operator's will do, lost+found or not.
    other = directory.parent / "mounted"
    (other / "lost+found").mkdir(parents=True)
    Store.open(other).close()
    Store.open(other).close()


@pytest.mark.parametrize("text", ["zonebundle store 1 x\n", "zonebundle store 3\n", "zonebundle store 999\n"])
def test_a_store_of_another_format_is_refused_and_left_alone(directory: Path, text: str) -> None:
    directory.mkdir(parents=True)
    (directory / "format").write_text(text)
    for opener in (Store.open, StoreReader.open):
        with leaks.no_leaks(), pytest.raises(FormatError, match=r"use (a newer|the older) one"):
            opener(directory)
    assert os.listdir(directory) == ["format"]


def test_what_is_no_store_is_refused_and_left_alone(directory: Path) -> None:
    (directory / f"bundles/web/{NO_BUNDLE}").mkdir(parents=True)
    with pytest.raises(StoreError, match="neither empty nor a store"):
        Store.open(directory)
    assert (directory / f"bundles/web/{NO_BUNDLE}").is_dir()
    (directory / "format").write_text("[format]\n")
    with pytest.raises(FormatError, match="not a store's format file"):
        Store.open(directory)
    (directory / "file").write_text("")
    with pytest.raises(StoreError):
        Store.open(directory / "file")


def test_there_is_one_writer(directory: Path) -> None:
    with Store.open(directory) as store:
        made = make(store, 1)
        for _ in range(2):
            with leaks.no_leaks(), pytest.raises(StoreError, match="has a writer already"):
                Store.open(directory)
        script = (
            f"from pathlib import Path; from zonebundle.store.store import Store; Store.open(Path({str(directory)!r}))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "has a writer already" in done.stderr
        check_whole(StoreReader.open(directory).find("web", made.bundle_id))
    Store.open(directory).close()


def test_a_reader_of_a_store_that_is_not_there_yet(directory: Path) -> None:
    reader = StoreReader.open(directory)
    assert list(reader.bundles()) == []
    with pytest.raises(NoSuchBundleError):
        reader.find("web", NO_BUNDLE)
    assert not directory.exists()
    with Store.open(directory) as store:
        made = make(store, 1)
    assert [header.metadata for header in reader.bundles()] == [made]


def test_bundles_of_all_zones_are_listed_and_found(directory: Path) -> None:
    with Store.open(directory) as store:
        zones = ["web", "db-1", ".hidden", "pg@2:x", "a.b", "-x"]
        made = [make(store, number % 3, zone=zone) for number, zone in enumerate(zones * 2)]
        assert sorted(header.metadata.bundle_id for header in store.bundles()) == sorted(m.bundle_id for m in made)
        assert {header.metadata for header in store.bundles()} == set(made)
        for metadata in made:
            assert store.find(metadata.zone, metadata.bundle_id.upper()).header.metadata == metadata
        with pytest.raises(NoSuchBundleError, match="No zone bundle for zone 'db-1'"):
            store.find("db-1", made[0].bundle_id)
        with pytest.raises(NoSuchBundleError):
            store.find("web", NO_BUNDLE)
        for bad in ("..", "../../web", "x", ""):
            with pytest.raises(UsageError, match="not a bundle ID"):
                store.find("web", bad)
        with pytest.raises(NoSuchBundleError):
            store.find("../../../etc", NO_BUNDLE)


def test_a_damaged_bundle_does_not_hide_the_others_and_can_be_deleted(directory: Path) -> None:
    with Store.open(directory) as store:
        good = make(store, 1)
        damaged = [make(store, 2 + number) for number in range(4)]
        paths = [store.find("web", made.bundle_id).directory for made in damaged]
        (paths[0] / "manifest.jsonl").write_bytes(b"")
        (paths[1] / "manifest.jsonl").write_bytes(b'{"manifest":2}\n\xff')
        (paths[2] / "manifest.jsonl").write_bytes(b'{"manifest":9}\n')
        (paths[3] / "frame").unlink()
        with structlog.testing.capture_logs() as logs:
            assert [header.metadata for header in store.bundles()] == [good]
        assert len(logs) == 4
        for number, error in enumerate([DamagedError, DamagedError, FormatError, DamagedError]):
            with pytest.raises(error):
                store.find("web", damaged[number].bundle_id)
        for made in damaged:
            store.delete("web", made.bundle_id)
        check_whole(store.find("web", good.bundle_id))
        store.sweep()
    check_clean(directory)


def test_delete_frees_what_nobody_else_uses(directory: Path) -> None:
    with leaks.no_leaks(), Store.open(directory) as store:
        first, second = make(store, 1, 2), make(store, 2, 3)
        before = _bytes(directory)
        assert store.delete("web", first.bundle_id) == before - _bytes(directory)
        assert len(check_segments(directory)) == 2
        check_whole(store.find("web", second.bundle_id))
        check_clean(directory)
        with pytest.raises(NoSuchBundleError):
            store.delete("web", first.bundle_id)
        store.delete("web", second.bundle_id)
        check_clean(directory)
        assert _bytes(directory) == (directory / "format").stat().st_size + (directory / "reserve").stat().st_size
        assert list((directory / "bundles").iterdir()) == []
        # The same bundle, and its zone's directory, can be made again.
        seal(store, files(1), first)
        check_clean(directory)


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_draft_cannot_be_deleted(directory: Path) -> None:
    made = metadata()
    with Store.open(directory) as store, BundleDraft(store, made, CREATED) as draft:
        with pytest.raises(NoSuchBundleError):
            store.delete("web", made.bundle_id)
        draft.commit(hold_seconds=0, graceful_seconds=0, gaps=0)
        store.delete("web", made.bundle_id)
    check_clean(directory)


def test_delete_keeps_what_a_draft_reuses(directory: Path) -> None:
    new = metadata()
    with Store.open(directory) as store:
        old = make(store, 1)
        with BundleDraft(store, new, CREATED) as draft:
            add(store, draft, new.bundle_id, files(1))
            store.delete("web", old.bundle_id)
            draft.commit(hold_seconds=0, graceful_seconds=0, gaps=0)
        check_whole(store.find("web", new.bundle_id))
    check_clean(directory)


def test_delete_keeps_what_a_bundle_uses_that_is_committed_meanwhile(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = metadata()
    with Store.open(directory) as store:
        old = make(store, 1, 2)
        referenced = store._referenced

        def too_early(digests: frozenset[str]) -> set[str]:
            found = referenced(digests)
            # It looked, and found no reference. Now comes one, and the lease that stood for it goes.
            if not (store.directory / "bundles/web" / new.bundle_id).exists():
                seal(store, files(1), new)
            return found

        monkeypatch.setattr(store.pruner, "_referenced", too_early)
        store.delete("web", old.bundle_id)
        check_whole(store.find("web", new.bundle_id))
    check_clean(directory)


def test_a_deletion_that_failed_is_finished_by_the_next(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(directory) as store:
        made = make(store, 1)
        other = make(store, 1, 2)
        path = Path(store.find("web", made.bundle_id).directory)
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="on cue"):
            patch.setattr(store.pruner, "_referenced", _fail)
            store.delete("web", made.bundle_id)
        assert [header.metadata for header in store.bundles()] == [other]
        with pytest.raises(ConflictError):
            seal(store, files(1), made)
        assert path.exists()
        store.delete("web", made.bundle_id)
        check_whole(store.find("web", other.bundle_id))
    check_clean(directory)


def _fail(_: object) -> set[str]:
    raise StoreError("on cue")


def test_recover_ends_what_was_half_done(directory: Path) -> None:
    with Store.open(directory) as store:
        good = make(store, 1)
        gone = make(store, 1, 2)
        draft = metadata()
        put(store, draft.bundle_id, content(3, CHUNK))
        store.segments.flush()
        (directory / "bundles/empty").mkdir()
        half = directory / "bundles/db" / draft.bundle_id
        half.mkdir(parents=True)
        (half / "frame").write_bytes(b"half")
        (directory / "bundles/web" / gone.bundle_id / "manifest.jsonl").rename(
            directory / "bundles/web" / gone.bundle_id / "manifest.deleted"
        )
        foreign = directory / "bundles/web/not-a-bundle"
        foreign.mkdir()
    with leaks.no_leaks(), Store.open(directory) as store:
        assert store.recover() == 0
        assert sorted(os.listdir(directory / "bundles")) == ["web"]
        assert foreign.is_dir()
        foreign.rmdir()
        check_whole(store.find("web", good.bundle_id))
        # The draft's segments wait for the next try, until there is none.
        assert len(check_segments(directory)) == 2
        assert store.sweep() > 0
    check_clean(directory)


def test_a_store_that_cannot_be_written_says_so(directory: Path) -> None:
    with pytest.raises(StoreError, match="preparing store /proc/nowhere failed: no such file"):
        Store.open(Path("/proc/nowhere"))


def test_readers_see_whole_bundles_only(directory: Path) -> None:
    """One thread reads whatever is listed, as another process would, while others seal and delete."""
    stop = threading.Event()

    def read() -> int:
        reader = StoreReader.open(directory)
        count = 0
        while not stop.is_set() or not count:
            for bundle in reader.stored():
                try:
                    assert set(check_whole(bundle)) == {b"logs/%d" % seed for seed in range(3)}
                    count += 1
                except (NoSuchBundleError, DamagedError, FileNotFoundError):
                    # Only because it was deleted meanwhile.
                    assert not (bundle.directory / "manifest.jsonl").exists()
        return count

    def write(number: int) -> None:
        for _ in range(8):
            made = make(store, 0, 1, 2, zone=f"zone-{number % 2}")
            if number:
                store.delete(made.zone, made.bundle_id)

    with Store.open(directory) as store, ThreadPoolExecutor(4) as threads:
        try:
            reading = threads.submit(read)
            for writing in [threads.submit(write, number) for number in range(3)]:
                writing.result()
        finally:
            stop.set()
        assert reading.result() > 0
        assert len(list(store.bundles())) == 8
        check_clean(directory)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["seal", "seal", "abandon", "delete", "reopen"]), st.sets(st.integers(0, 5))),
        max_size=14,
    )
)
def test_every_bundle_stays_whole_whatever_comes_and_goes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, set[int]]]
) -> None:
    directory = tmp_path_factory.mktemp("stores") / "store"
    store = Store.open(directory)
    alive: dict[str, set[int]] = {}
    for step, seeds in steps:
        small = [File(b"logs/%d" % seed, content(seed, 3000)) for seed in seeds]
        match step:
            case "seal":
                alive[seal(store, small).metadata.bundle_id] = seeds
            case "abandon":
                made = metadata()
                with BundleDraft(store, made, CREATED) as draft:
                    add(store, draft, made.bundle_id, small)
            case "delete" if alive:
                bundle_id, _ = alive.popitem()
                store.delete("web", bundle_id)
            case "reopen":
                store.close()
                store = Store.open(directory)
        assert {header.metadata.bundle_id for header in store.bundles()} == set(alive)
    for bundle_id, seeds in alive.items():
        found = check_whole(store.find("web", bundle_id))
        assert found == {b"logs/%d" % seed: content(seed, 3000) for seed in seeds}
    store.close()
    check_clean(directory)


def test_segments_of_a_manifest_of_an_older_format_are_kept(directory: Path) -> None:
    """It cannot be read as a bundle any more; whoever goes back to the older version can."""
    with Store.open(directory) as store:
        made = make(store, 1)
        bundle = store.find("web", made.bundle_id)
        used = set(segments_in(bundle.manifest))
        text = bundle.manifest.read_text().replace('{"manifest":2,', '{"manifest":1,')
        for digest in used:
            text = text.replace(digest_to_text(digest), digest)
        bundle.manifest.write_text(text)
        assert set(segments_in(bundle.manifest)) == used != set()
        with pytest.raises(FormatError, match="another version of zonebundle"):
            store.find("web", made.bundle_id)
        store.sweep()
        assert all(map(store.segments.exists, used))
