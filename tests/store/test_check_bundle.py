"""The files of a bundle prove each other: which of them is damaged is found, and told."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from support.flipping import Sample, bits, flip
from support.stored import metadata, seal
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.check import Kind, Problem, check_store
from zonebundle.store.check_bundle import find_faults
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import Store

pytestmark = pytest.mark.usefixtures("leak_check")


def check(directory: Path, *, deep: bool = False) -> list[Problem]:
    return list(check_store(StoreReader.open(directory), deep=deep))


@pytest.mark.slow
def test_every_flipped_bit_of_a_manifest_is_found(sample: Sample) -> None:
    for number in range(3):
        path = sample.bundle(number) / "manifest.jsonl"
        for bit in bits(path, 60, 2):
            flip(path, bit)
            (found,) = [problem for problem in check(sample.directory) if is_of_bundle_file(problem)]
            assert (found.kind, found.path) == (Kind.MANIFEST, path)
            assert found.bundle == (sample.bundles[number].zone, sample.bundles[number].bundle_id)
            flip(path, bit)


def is_of_bundle_file(problem: Problem) -> bool:
    return problem.kind in (Kind.MANIFEST, Kind.FRAME)


@pytest.mark.slow
def test_every_flipped_bit_of_a_frame_is_found_or_changes_nothing(sample: Sample) -> None:
    unnoticed = flipped = 0
    for number in range(3):
        path = sample.bundle(number) / "frame"
        whole = own_content(path)
        for bit in bits(path, 120, 3):
            flip(path, bit)
            flipped += 1
            problems = check(sample.directory)
            if problems:
                assert [(problem.kind, problem.path) for problem in problems] == [(Kind.FRAME, path)]
            else:
                unnoticed += 1
                assert own_content(path) == whole
            flip(path, bit)
    assert unnoticed < flipped / 10


@pytest.mark.slow
def test_every_bit_before_a_cut_is_found_or_changes_nothing(sample: Sample) -> None:
    """A block's header that is damaged there only shows in the bytes that follow it, in a download."""
    for bundle in StoreReader.open(sample.directory).stored():
        path = bundle.directory / "frame"
        whole = own_content(path)
        cuts = {entry.cut for entry in bundle.entries() if entry.cut} | {path.stat().st_size - 10}
        for cut in [*sorted(cuts)[::5], max(cuts)]:
            for bit in range((cut - 6) * 8, cut * 8):
                flip(path, bit)
                faults = list(find_faults(path.parent, *identity_of(bundle), on_entry=lambda _: None))
                assert [fault.name for fault in faults] == ["frame"] or own_content(path) == whole
                flip(path, bit)


def identity_of(bundle: StoredBundle) -> tuple[str, str]:
    return bundle.header.metadata.zone, bundle.header.metadata.bundle_id


def own_content(frame: Path) -> bytes:
    """What a frame inflates to, with its trailer."""
    data = frame.read_bytes()
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    return inflater.decompress(data[10:]) + inflater.unused_data


def test_both_files_of_a_bundle_damaged(sample: Sample) -> None:
    directory = sample.bundle(0)
    manifest = directory / "manifest.jsonl"
    lines = manifest.read_bytes().split(b"\n")
    lines[3] = lines[3][:-2]
    manifest.write_bytes(b"\n".join(lines))
    flip(directory / "frame", 8 * (directory / "frame").stat().st_size // 2)
    found = check(sample.directory)
    assert [(problem.kind, problem.path.name) for problem in found] == [("frame", "frame"), ("manifest", manifest.name)]
    assert found[1].what == "line 4 is no entry"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda entry: entry | {"path": "../out"}, "line 22: '../out' leads out of the archive"),
        (lambda entry: entry | {"path": "/etc/x"}, "line 22: '/etc/x' leads out of the archive"),
        (lambda entry: entry | {"path": "a\0b"}, "line 22: 'a\\\\x00b' leads out of the archive"),
        (lambda entry: entry | {"path": "manifest.jsonl"}, "line 22: manifest.jsonl is there twice"),
        (lambda entry: entry | {"path": "logs/zone/small-3"}, "line 22: logs/zone/small-3 is there twice"),
        (lambda entry: entry | {"size": entry["size"] + 1}, "are not those of a file like it"),
        (lambda entry: entry | {"size": -1}, "line 22 is no entry"),
        (lambda entry: entry | {"size": str(entry["size"])}, "line 22 is no entry"),
        (lambda entry: entry | {"mode": True}, "line 22 is no entry"),
        (lambda entry: entry | {"mtime": 10**400}, "line 22 is no entry"),
        (lambda entry: entry | {"crc32": entry["crc32"] ^ 1}, "are not those of a file like it"),
        (lambda entry: entry | {"pieces": [[1, 2]]}, "line 22 is no entry"),
        (lambda entry: entry | {"pieces": [["../../x", *entry["pieces"][0][1:]]]}, "line 22 is no entry"),
        (lambda entry: entry | {"mode": entry["mode"] ^ 1}, "is not the same as its copy in the frame"),
        (lambda entry: entry | {"cut": entry["cut"] + 1}, "is not the same as its copy in the frame"),
        (lambda entry: entry | {"cut": 10**30}, "line 22 is no entry"),
        (lambda entry: {}, "line 22 is no entry"),
        (lambda entry: [], "line 22 is no entry"),
    ],
)
def test_what_is_wrong_with_an_entry_is_told(
    sample: Sample, change: Callable[[dict[str, object]], object], what: str
) -> None:
    manifest = sample.bundle(0) / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines()
    lines[21] = json.dumps(change(json.loads(lines[21])), separators=(",", ":")).encode()
    manifest.write_bytes(b"\n".join(lines) + b"\n")
    (found,) = [problem for problem in check(sample.directory) if problem.is_damage]
    assert (found.kind, found.path) == (Kind.MANIFEST, manifest)
    assert what in found.what
    assert "\n" not in str(found)


def test_a_manifest_of_another_bundle(sample: Sample) -> None:
    shutil.rmtree(sample.bundle(1))
    shutil.copytree(sample.bundle(0), sample.bundle(1))
    found = check(sample.directory)
    assert {problem.path.parent for problem in found if is_of_bundle_file(problem)} == {sample.bundle(1)}


def test_a_newer_manifest_says_what_to_do(sample: Sample) -> None:
    """Newer as a whole: the frame has a copy of it."""
    made = metadata()
    with mock.patch("zonebundle.model.manifest.MANIFEST_FORMAT", 3), Store.open(sample.directory) as store:
        seal(store, [], made)
    (found,) = check(sample.directory)
    assert found.kind == Kind.MANIFEST
    assert "written by another version of zonebundle; use that one" in found.what


def test_a_missing_frame(sample: Sample) -> None:
    (sample.bundle(1) / "frame").unlink()
    (found,) = check(sample.directory)
    assert (found.kind, found.what, found.path) == (Kind.FRAME, "is missing", sample.bundle(1) / "frame")
