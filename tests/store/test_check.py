"""A check of a store finds every damage and names the file, and finds none where there is none."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import leaks
from support.flipping import Sample, bits, flip
from support.stored import CREATED, File, content, metadata, put, seal
from zonebundle.errors import DamagedError, StoreError
from zonebundle.store.check import Kind, Problem, check_store
from zonebundle.store.draft import BundleDraft
from zonebundle.store.pieces import CHUNK, SMALL, deflate
from zonebundle.store.reader import StoreReader
from zonebundle.store.segment import build_segment
from zonebundle.store.splice import splice
from zonebundle.store.store import Store

pytestmark = pytest.mark.usefixtures("leak_check")

SIZES = [0, 1, 511, 512, 513, SMALL - 1, SMALL, CHUNK, CHUNK + 1]
NAMES = st.binary(min_size=1, max_size=120).filter(
    lambda name: not {b"\0"[0], b"/"[0]} & set(name) and name.strip(b".")
)


def check(directory: Path, *, deep: bool = False) -> list[Problem]:
    return list(check_store(StoreReader.open(directory), deep=deep))


@pytest.mark.parametrize("deep", [False, True])
def test_a_clean_store_has_no_problem(sample: Sample, deep: bool) -> None:
    before = sample.bytes()
    seen: list[tuple[int, int]] = []
    reader = StoreReader.open(sample.directory)
    assert list(check_store(reader, deep=deep, progress=lambda *counts: seen.append(counts))) == []
    assert seen[-1] == (len(sample.segments()), 3)
    assert sample.bytes() == before


def test_a_store_that_was_not_written_yet_has_no_problem(tmp_path: Path) -> None:
    assert check(tmp_path / "nowhere") == []
    Store.open(tmp_path / "new").close()
    assert check(tmp_path / "new") == []


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.builds(
                File,
                path=st.lists(NAMES, min_size=1, max_size=3).map(b"/".join),
                data=st.tuples(st.integers(0, 3), st.sampled_from(SIZES) | st.integers(0, 3000)).map(
                    lambda x: content(*x)
                ),
                mode=st.integers(0, 0o777),
                mtime_ns=st.integers(-(2**40), 2**62),
                own=st.booleans(),
            ),
            max_size=5,
        ),
        max_size=3,
    )
)
def test_whatever_is_sealed_has_no_problem(tmp_path_factory: pytest.TempPathFactory, bundles: list[list[File]]) -> None:
    directory = tmp_path_factory.mktemp("stores") / "store"
    with Store.open(directory) as store:
        for files in bundles:
            seal(store, files)
    assert check(directory, deep=True) == []
    shutil.rmtree(directory)


def test_every_flipped_bit_of_a_segment_is_found(sample: Sample) -> None:
    users = users_of(sample)
    for path in sample.segments():
        for bit in bits(path, 3, 1):
            flip(path, bit)
            damaged, *affected = check(sample.directory)
            assert (damaged.kind, damaged.path, damaged.is_damage) == (Kind.SEGMENT, path, True)
            assert "does not have the bytes that its name says" in damaged.what
            assert {(problem.kind, problem.path.name) for problem in affected} == {
                (Kind.AFFECTED, bundle_id) for bundle_id in users[path.stem]
            }
            flip(path, bit)


def users_of(sample: Sample) -> dict[str, set[str]]:
    """The IDs of the bundles that use each segment."""
    users: dict[str, set[str]] = {path.stem: set() for path in sample.segments()}
    for bundle in StoreReader.open(sample.directory).stored():
        for entry in bundle.entries():
            for piece in entry.pieces:
                users[piece.segment].add(bundle.header.metadata.bundle_id)
    assert all(users.values())
    return users


def is_of_bundle_file(problem: Problem) -> bool:
    return problem.kind in (Kind.MANIFEST, Kind.FRAME)


def test_every_truncation_is_found(sample: Sample) -> None:
    for path in sample.files():
        data = path.read_bytes()
        chance = random.Random(4)
        for size in {0, 5, len(data) - 1, len(data) - 10, chance.randrange(len(data))} - {len(data)}:
            path.write_bytes(data[: max(size, 0)])
            problems = check(sample.directory)
            assert path in {problem.path for problem in problems if problem.is_damage}
            assert {problem.path for problem in problems if is_of_bundle_file(problem)} <= {path}
        path.write_bytes(data + b"\n")
        assert path in {problem.path for problem in check(sample.directory) if problem.is_damage}
        path.write_bytes(data)


def test_missing_segments_are_told_once_a_bundle(sample: Sample) -> None:
    users = users_of(sample)
    for path in sample.segments():
        path.unlink()
    found = check(sample.directory)
    assert {problem.kind for problem in found} == {Kind.MISSING}
    assert sorted(problem.bundle[1] for problem in found if problem.bundle) == sorted(set().union(*users.values()))
    assert all(not problem.path.exists() and problem.path.stem in users for problem in found)


def test_a_piece_that_is_not_in_its_segment(tmp_path: Path) -> None:
    """Manifest, frame and segments agree with what they say of themselves: the writer was wrong."""
    made = metadata()
    with Store.open(tmp_path / "store") as store, BundleDraft(store, made, CREATED) as draft:
        (piece,) = put(store, made.bundle_id, content(1, 5000))
        wrongs: list[dict[str, Any]] = [{"offset": 11}, {"packed": piece.packed - 1}, {"packed": 10**6}]
        for number, changes in enumerate(wrongs):
            wrong = replace(piece, **changes)
            draft.add_log(b"logs/%d" % number, 5000, mode=0o600, mtime_ns=0, pieces=[wrong])
        draft.commit(hold_seconds=0, graceful_seconds=0, gaps=0)
    (found,) = check(tmp_path / "store")
    assert (found.kind, found.path.name) == (Kind.PIECE, "manifest.jsonl")
    assert "3 pieces of logs" in found.what
    assert "logs/0" in found.what


@pytest.mark.parametrize("change", [{"raw": 4999}, {"crc32": 1}, {"blake3": "0" * 64}])
def test_deep_inflates_every_piece(tmp_path: Path, change: dict[str, Any]) -> None:
    made = metadata()
    with Store.open(tmp_path / "store") as store, BundleDraft(store, made, CREATED) as draft:
        (piece,) = put(store, made.bundle_id, content(1, 5000))
        wrong = replace(piece, **change)
        draft.add_log(b"logs/a", wrong.raw, mode=0o600, mtime_ns=0, pieces=[wrong])
        draft.commit(hold_seconds=0, graceful_seconds=0, gaps=0)
    assert check(tmp_path / "store") == []
    (found,) = check(tmp_path / "store", deep=True)
    assert found.kind == Kind.PIECE


def test_a_segment_that_is_no_gzip_file(sample: Sample) -> None:
    data = b"not what it should be"
    digest, _, _ = build_segment([deflate(b"x")])
    path = sample.directory / "segments" / digest[:2] / f"{digest}.gz"
    with mock.patch("zonebundle.store.check_segments.blake3") as fake:
        fake.return_value.hexdigest.return_value = digest
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        (found,) = [problem for problem in check(sample.directory) if problem.path == path]
    assert found.what == "is no gzip file of runs"


def test_unused_segments_are_no_damage(sample: Sample) -> None:
    with Store.open(sample.directory) as store:
        pieces = put(store, "nobody", content(7, 3 * CHUNK))
        store.segments.flush()
    found = check(sample.directory)
    assert {problem.path.stem for problem in found} == {piece.segment for piece in pieces}
    assert {(problem.kind, problem.is_damage) for problem in found} == {(Kind.UNUSED, False)}


def test_what_a_damaged_manifest_still_names_is_not_unused(sample: Sample) -> None:
    manifest = sample.bundle(0) / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes().replace(b'"crc32"', b'"crc33"'))
    assert [problem.kind for problem in check(sample.directory)] == [Kind.MANIFEST]


def test_debris_and_foreign_files_are_told(sample: Sample) -> None:
    root = sample.directory
    first = next(path.name for path in (root / "segments").iterdir() if len(path.name) == 2)
    foreign = [
        root / "segments/README",
        root / "segments/lost+found",
        root / f"segments/{first}/x\n.gz",
        root / f"segments/{first}" / f"{'g' * 64}.gz",
        root / "bundles/file",
        root / "bundles/a%2Fb%zz",
        root / "bundles/web/not-a-bundle",
        sample.bundle(0) / "core",
    ]
    for path in foreign:
        path.write_bytes(b"")
    (root / "bundles/link").symlink_to("web")
    found = check(root)
    assert {problem.path for problem in found if problem.kind == Kind.FOREIGN} == {*foreign, root / "bundles/link"}
    assert not any(problem.is_damage for problem in found)
    assert not any("\n" in str(problem) for problem in found)


def test_a_segment_in_another_directory_or_behind_a_link_is_damage(sample: Sample, tmp_path: Path) -> None:
    one, two, three, *_ = sample.segments()
    one.rename(tmp_path / "elsewhere.gz")
    one.symlink_to(tmp_path / "elsewhere.gz")
    two.unlink()
    two.mkdir()
    three.unlink()
    os.mkfifo(three)
    found = {problem.path: problem.what for problem in check(sample.directory) if problem.kind == Kind.SEGMENT}
    assert found == {one: "is a symbolic link", two: "is a directory", three: "is a FIFO"}


def test_drafts_and_deletions_that_have_not_ended(sample: Sample) -> None:
    draft = sample.directory / "bundles/web" / metadata().bundle_id
    draft.mkdir()
    (draft / "frame").write_bytes(b"half")
    manifest = sample.bundle(2) / "manifest.jsonl"
    manifest.rename(manifest.with_name("manifest.deleted"))
    found = check(sample.directory)
    assert {problem.path for problem in found if problem.kind == Kind.UNFINISHED} == {draft, sample.bundle(2)}
    assert not any(problem.is_damage for problem in found)


def test_segments_set_aside_by_a_clean_up_are_no_damage(sample: Sample) -> None:
    (sample.directory / "segments/pruned").mkdir(exist_ok=True)
    for path in sample.segments():
        path.rename(sample.directory / "segments/pruned" / path.name)
    found = check(sample.directory)
    assert {(problem.kind, problem.is_damage) for problem in found} == {(Kind.UNFINISHED, False)}


def test_a_disk_that_cannot_be_read(sample: Sample) -> None:
    paths = [sample.segments()[0], sample.bundle(0) / "frame", sample.bundle(1) / "manifest.jsonl"]
    real_read, real_pread = os.read, os.pread

    def is_bad(descriptor: int) -> bool:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")) in paths

    def read(descriptor: int, size: int) -> bytes:
        if is_bad(descriptor):
            raise OSError(5, "Input/output error")
        return real_read(descriptor, size)

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if is_bad(descriptor):
            raise OSError(5, "Input/output error")
        return real_pread(descriptor, size, offset)

    with mock.patch("os.read", read), mock.patch("os.pread", pread):
        found = [problem for problem in check(sample.directory) if problem.kind != Kind.AFFECTED]
    assert {(problem.path, problem.what) for problem in found} == {
        (path, "cannot be read: input/output error") for path in paths[:2]
    }


def test_what_cannot_be_listed_is_an_error(sample: Sample) -> None:
    segments = sample.directory / "segments"
    shutil.rmtree(segments)
    segments.write_bytes(b"")
    with leaks.no_leaks(), pytest.raises(StoreError, match=r"listing .*segments failed"):
        check(sample.directory)


def test_what_a_check_calls_whole_can_be_downloaded(sample: Sample) -> None:
    """And where a download stumbles, the check has told of it."""
    for path in sample.segments():
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        stumbled = set()
        for bundle in StoreReader.open(sample.directory).stored():
            try:
                for _ in splice(bundle):
                    pass
            except DamagedError:
                stumbled.add(bundle.header.metadata.bundle_id)
        told = {problem.path.name for problem in check(sample.directory) if problem.kind == Kind.AFFECTED}
        assert stumbled
        assert stumbled <= told
        path.write_bytes(data)
