import contextlib
import gzip
import io
import itertools
import os
import random
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from support import leaks
from support.stored import (
    CREATED,
    MTIME_NS,
    File,
    archive,
    check_whole,
    content,
    download,
    inflate_member,
    metadata,
    put,
    seal,
)
from zonebundle.errors import DamagedError, NoSuchBundleError
from zonebundle.model.manifest import digest_to_text
from zonebundle.store.bundle import StoredBundle
from zonebundle.store.draft import BundleDraft
from zonebundle.store.pieces import CHUNK, SMALL
from zonebundle.store.reader import StoreReader
from zonebundle.store.splice import splice
from zonebundle.store.store import Store

SIZES = [0, 1, 511, 512, 513, SMALL - 1, SMALL, SMALL + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77]
NAMES = st.binary(min_size=1, max_size=120).filter(
    lambda name: not {b"\0"[0], b"/"[0]} & set(name) and name.strip(b".")
)
HOSTILE = [
    b"logs/zone/-rf",
    b"logs/zone/new\nline",
    b"logs/zone/\x1b[2J",
    b"logs/zone/caf\xe9",
    b"logs/zone/\xff\xfe\x80",
    b"logs/zone/caf\xc3\xa9",
    b"logs/zone/back\\slash",
    b"logs/zone/a b;c|d$(e)`f`'g\"h",
    b"logs/zone/" + b"n" * 250,
    b"logs/" + b"/".join([b"d" * 99] * 8) + b"/deep",
    b"logs/zone/...",
    b"logs/zone/*?[x]",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("splice") / "store") as store:
        yield store


@pytest.fixture(scope="module")
def every_size(store: Store) -> tuple[StoredBundle, list[File]]:
    """A bundle with entries of every interesting size, own ones first and last."""
    files = [
        File(b"metadata.toml", b"version = 0\n", 0o600, own=True),
        File(b"netstat", content(90, 3 * CHUNK + 5), 0o600, own=True),
        *(File(b"logs/zone/%d.log" % size, content(number, size)) for number, size in enumerate(SIZES)),
        *(File(name, content(100 + number, 700)) for number, name in enumerate(HOSTILE)),
        File(b"logs/zone/setuid", b"#!/bin/sh\n", 0o7755),
        File(b"logs/zone/before-1970", b"old\n", mtime_ns=-1),
        File(b"report.json", b"{}", 0o600, own=True),
        File(b"empty", b"", 0o600, own=True),
    ]
    return bundle_of(store, files), files


def bundle_of(store: Store, files: list[File]) -> StoredBundle:
    header = seal(store, files)
    return store.find(header.metadata.zone, header.metadata.bundle_id)


def test_it_is_the_tar_of_the_files(every_size: tuple[StoredBundle, list[File]]) -> None:
    bundle, files = every_size
    data = download(bundle)
    assert len(data) == bundle.size
    assert inflate_member(data) == archive(files, bundle.manifest.read_bytes())
    assert check_whole(bundle) == {file.path: file.data for file in files}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            File,
            path=st.lists(NAMES, min_size=1, max_size=3).map(b"/".join),
            data=st.tuples(st.integers(0, 3), st.sampled_from(SIZES) | st.integers(0, 3000)).map(lambda x: content(*x)),
            mode=st.integers(0, 0o777),
            mtime_ns=st.integers(0, 2**62),
            own=st.booleans(),
        ),
        max_size=6,
        unique_by=lambda file: file.path,
    ),
    st.lists(st.tuples(st.floats(0, 1.01), st.none() | st.floats(0, 1.01)), max_size=8),
)
def test_any_files_make_their_tar_and_ranges_are_slices(
    store: Store, files: list[File], ranges: list[tuple[float, float | None]]
) -> None:
    files = [file for file in files if file.path != b"manifest.jsonl"]
    bundle = bundle_of(store, files)
    data = download(bundle)
    assert inflate_member(data) == archive(files, bundle.manifest.read_bytes())
    # As parts of the length, which differs by some bytes from run to run with the bundle's ID.
    for first, last in ranges:
        start = int(first * len(data))
        stop = None if last is None else int(last * len(data))
        assert b"".join(splice(bundle, start=start, stop=stop)) == data[start:stop]
    store.delete("web", bundle.header.metadata.bundle_id)


def test_every_place_can_begin_or_end_a_range(store: Store) -> None:
    bundle = bundle_of(
        store, [File(b"metadata.toml", b"x", own=True), File(b"logs/a", b"a" * 50), File(b"logs/b", b"")]
    )
    data = download(bundle)
    for place in range(len(data) + 1):
        assert b"".join(splice(bundle, start=place)) == data[place:]
        assert b"".join(splice(bundle, stop=place)) == data[:place]
        assert b"".join(splice(bundle, start=place, stop=place + 1)) == data[place : place + 1]


def test_ranges_of_a_large_bundle(every_size: tuple[StoredBundle, list[File]]) -> None:
    bundle, _ = every_size
    data = download(bundle)
    chance = random.Random(1)
    for _ in range(60):
        start = chance.randrange(len(data))
        stop = min(len(data), start + chance.choice([1, 100, 70_000, len(data)]))
        assert b"".join(splice(bundle, start=start, stop=stop)) == data[start:stop]
    with pytest.raises(ValueError, match="cannot start"):
        splice(bundle, start=-1)


def test_blocks_are_neither_large_nor_tiny(every_size: tuple[StoredBundle, list[File]]) -> None:
    blocks = [len(block) for block in splice(every_size[0])]
    assert max(blocks) <= 1 << 20
    assert min(blocks[:-1]) >= 128 << 10


def test_the_same_content_is_the_same_download(tmp_path: Path) -> None:
    made = metadata()
    files = [File(b"metadata.toml", made.to_toml(), own=True), File(b"logs/a.log", content(1, CHUNK + 9))]
    seen = set()
    for name in ("one", "two"):
        with Store.open(tmp_path / name) as store:
            seal(store, files, made)
            bundle = store.find(made.zone, made.bundle_id)
            seen.add((bundle.etag, download(bundle)))
    assert len(seen) == 1


def test_the_etag_is_another_one_for_other_content(store: Store) -> None:
    made = metadata()
    etags = set()
    for text in (b"a", b"b"):
        seal(store, [File(b"logs/a.log", text)], made)
        etags.add(store.find(made.zone, made.bundle_id).etag)
        store.delete(made.zone, made.bundle_id)
    assert len(etags) == 2


def unpack(command: list[str], data: bytes, target: Path) -> dict[bytes, bytes]:
    """The files that a tar program makes of a download, about which it must not complain."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    target.mkdir()
    done = subprocess.run(
        [*command, "-C", target], input=data, capture_output=True, check=False, env={"LC_ALL": "C", "PATH": os.defpath}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    paths = [Path(inner, name) for inner, _, names in os.walk(target) for name in names]
    return {os.fsencode(path.relative_to(target)): path.read_bytes() for path in paths}


# GNU tar says of times before 1970 that they are implausibly old, which is true.
@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["tar", "-xzf-", "--warning=no-timestamp"], ["bsdtar", "-xzf-"]], ids=["gnu", "bsd"]
)
def test_tar_programs_unpack_it(
    every_size: tuple[StoredBundle, list[File]], command: list[str], tmp_path: Path
) -> None:
    bundle, files = every_size
    unpacked = unpack(command, download(bundle), tmp_path / "unpacked")
    assert unpacked.pop(b"manifest.jsonl") == bundle.manifest.read_bytes()
    assert unpacked == {file.path: file.data for file in files}
    status = (tmp_path / "unpacked/logs/zone/setuid").stat()
    assert status.st_mode & 0o7000 == 0
    assert (tmp_path / "unpacked/logs/zone/512.log").stat().st_mtime_ns // 10**9 == MTIME_NS // 10**9


def test_gzip_is_content(every_size: tuple[StoredBundle, list[File]]) -> None:
    if shutil.which("gzip") is None:
        pytest.skip("no gzip")
    done = subprocess.run(["gzip", "-t"], input=download(every_size[0]), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_python_reads_it(every_size: tuple[StoredBundle, list[File]]) -> None:
    bundle, files = every_size
    data = download(bundle)
    assert gzip.decompress(data) == inflate_member(data)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|gz", encoding="utf-8", errors="surrogateescape") as tar:
        names = [info.name.encode("utf-8", "surrogateescape") for info in tar]
    assert names == [*(file.path for file in files), b"manifest.jsonl"]


def test_a_reader_of_one_member_reads_all_of_it(every_size: tuple[StoredBundle, list[File]]) -> None:
    # As Rust's GzDecoder and a browser's DecompressionStream: what comes after the first member is lost to them.
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    blocks = list(splice(every_size[0]))
    raw = b"".join(inflater.decompress(block) for block in blocks)
    assert inflater.eof
    assert inflater.unused_data == b""
    assert raw.endswith(bytes(1024))


def hole(store: Store, times: int, tail: bytes) -> StoredBundle:
    """A bundle with a log that begins with `times` chunks of zeros."""
    made = metadata()
    with BundleDraft(store, made, CREATED) as draft:
        pieces = [store.segments.zero_piece(times, made.bundle_id), *put(store, made.bundle_id, tail)]
        size = times * CHUNK + len(tail)
        draft.add_log(b"logs/zone/sparse", size, mode=0o600, mtime_ns=MTIME_NS, pieces=pieces)
        draft.add_bytes(b"report.json", b"{}")
        draft.commit(hold_seconds=0, graceful_seconds=0, gaps=0)
    return store.find(made.zone, made.bundle_id)


def test_a_hole_is_one_piece_many_times(store: Store) -> None:
    bundle = hole(store, 7, b"tail")
    entry = next(bundle.entries())
    assert [piece.times for piece in entry.pieces] == [7, 1]
    assert check_whole(bundle)[b"logs/zone/sparse"] == bytes(7 * CHUNK) + b"tail"
    data = download(bundle)
    for start, stop in itertools.pairwise(range(0, len(data), 613)):
        assert b"".join(splice(bundle, start=start, stop=stop)) == data[start:stop]


def inflated(bundle: StoredBundle) -> Iterator[bytes]:
    """The tar archive, as a stream: ISA-L inflates zeros at some GB/s, and checks CRC-32 and length at the end."""
    inflater = isal_zlib.decompressobj(16 + isal_zlib.MAX_WBITS)
    for block in splice(bundle):
        # A block of zeros is a thousand times as long when inflated.
        part = inflater.decompress(block, 1 << 22)
        while part:
            yield part
            part = inflater.decompress(inflater.unconsumed_tail, 1 << 22)
    assert inflater.eof


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_log_of_more_bytes_than_octal_numbers_can_tell(store: Store) -> None:
    # 8 GiB is where the size field becomes base-256, and where the length in the trailer has wrapped twice.
    times = (8 << 30) // CHUNK
    bundle = hole(store, times, b"the tail")
    assert bundle.size < 16 << 20
    listing = subprocess.Popen(["tar", "-tv"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False)
    assert listing.stdin is not None
    total = 0
    end = b""
    for part in inflated(bundle):
        listing.stdin.write(part)
        total += len(part)
        end = (end + part[-8192:])[-8192:]
    lines, _ = listing.communicate()
    assert listing.returncode == 0
    assert b"the tail" in end
    assert f" {times * CHUNK + 8} ".encode() in lines.splitlines()[0]
    assert total % 512 == 0
    assert total > times * CHUNK


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gzip_is_content_with_more_than_4_gib(store: Store) -> None:
    if shutil.which("gzip") is None:
        pytest.skip("no gzip")
    bundle = hole(store, (4 << 30) // CHUNK, content(1, 12_345))
    gzip_test = subprocess.Popen(["gzip", "-t"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert gzip_test.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        for block in splice(bundle):
            gzip_test.stdin.write(block)
    _, complaints = gzip_test.communicate()
    assert (gzip_test.returncode, complaints) == (0, b"")


def test_a_missing_segment_breaks_the_stream_off(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store, leaks.no_leaks():
        bundle = bundle_of(store, [File(b"logs/a", content(1, 4 * CHUNK)), File(b"logs/b", content(2, CHUNK))])
        whole = download(bundle)
        victim = next(bundle.entries()).pieces[2].segment
        os.unlink(store.segments.path(victim))
        got = b""
        with pytest.raises(DamagedError, match=f"{victim}.gz is missing"):
            for block in splice(bundle):
                got += block
        assert whole.startswith(got)
        assert len(got) < len(whole)


@pytest.mark.parametrize("victim", ["segment", "frame"])
def test_a_short_file_breaks_the_stream_off(tmp_path: Path, victim: str) -> None:
    with Store.open(tmp_path / "store") as store, leaks.no_leaks():
        bundle = bundle_of(store, [File(b"logs/a", content(1, 3 * CHUNK))])
        segment = next(bundle.entries()).pieces[1].segment
        path = Path(store.segments.path(segment)) if victim == "segment" else bundle.directory / "frame"
        os.truncate(path, path.stat().st_size - 30)
        with pytest.raises(DamagedError, match="short"):
            list(splice(bundle))


def test_a_manifest_that_lost_lines_breaks_the_stream_off(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        bundle = bundle_of(store, [File(b"logs/a", content(1, 5000)), File(b"logs/b", content(2, 5000))])
        lines = bundle.manifest.read_bytes().splitlines(keepends=True)
        bundle.manifest.write_bytes(b"".join(lines[:-1]))
        with pytest.raises(DamagedError, match="shorter than its manifest says"):
            list(splice(bundle))
        bundle.manifest.write_bytes(lines[0] + lines[1][:40])
        with pytest.raises(DamagedError, match=r"line 2 of .* is damaged"):
            list(splice(bundle))


def test_a_manifest_cannot_name_other_files(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        bundle = bundle_of(store, [File(b"logs/a", content(1, 5000))])
        text = bundle.manifest.read_text()
        digest = digest_to_text(next(bundle.entries()).pieces[0].segment)
        assert digest in text
        bundle.manifest.write_text(text.replace(digest, "../../../../../etc/passwd\\u0000"))
        with pytest.raises(DamagedError, match=r"line 2 of .* is damaged"):
            list(splice(bundle))


def test_a_bundle_that_was_deleted_since_it_was_found(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        bundle = bundle_of(store, [File(b"logs/a", b"a")])
        reading = splice(bundle)
        store.delete("web", bundle.header.metadata.bundle_id)
        with leaks.no_leaks(), pytest.raises(NoSuchBundleError):
            next(reading)


def test_an_abandoned_download_gives_its_descriptors_back(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        bundle = bundle_of(store, [File(b"logs/a", content(1, 8 * CHUNK))])
        with leaks.no_leaks(timeout=0):
            # Never begun, broken off, and run to its end.
            splice(bundle)
            reading = splice(bundle)
            next(reading)
            reading.close()  # type: ignore[attr-defined]
            list(splice(bundle))


def test_a_reader_of_the_store_needs_no_writer(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        bundle = bundle_of(store, [File(b"logs/a", content(1, CHUNK))])
    reader = StoreReader.open(tmp_path / "store")
    found = reader.find("web", bundle.header.metadata.bundle_id)
    assert replace(found, segments=bundle.segments) == bundle
    assert check_whole(found) == {b"logs/a": content(1, CHUNK)}
