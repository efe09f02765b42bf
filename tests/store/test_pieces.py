import shutil
import subprocess
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from support.stored import content
from zonebundle.store.pieces import CHUNK, Run, append_crc32, deflate, is_compressed, store_uncompressed

RAW = [b"", b"x", bytes(CHUNK), content(1, CHUNK - 1), content(2, CHUNK), content(3, CHUNK + 1)]


def inflate(*runs: Run) -> bytes:
    """What the runs in a row are, after the final empty block."""
    inflater = zlib.decompressobj(-15)
    raw = inflater.decompress(b"".join(run.data for run in runs) + b"\x03\x00")
    assert inflater.eof
    assert inflater.unused_data == b""
    return raw


@pytest.mark.parametrize("make", [deflate, store_uncompressed])
@pytest.mark.parametrize("raw", RAW, ids=len)
def test_a_run_tells_its_raw_bytes(make: Callable[[bytes | memoryview], Run], raw: bytes) -> None:
    run = make(raw)
    assert inflate(run) == raw
    assert (run.raw, run.crc32, run.blake3) == (len(raw), zlib.crc32(raw), blake3(raw).hexdigest())
    assert make(memoryview(raw)) == run


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=2000), st.booleans()), max_size=8))
def test_runs_of_both_kinds_follow_each_other_in_any_order(parts: list[tuple[bytes, bool]]) -> None:
    runs = [store_uncompressed(raw) if stored else deflate(raw) for raw, stored in parts]
    assert inflate(*runs) == b"".join(raw for raw, _ in parts)
    for run in runs:
        assert run.data.endswith(b"\x00\x00\xff\xff")


def test_a_run_does_not_refer_to_what_is_before_it() -> None:
    # The same content twice: a compressor that keeps its window would write the second as one reference.
    run = deflate(content(4, 30_000))
    assert inflate(deflate(b"something else"), run) == b"something else" + content(4, 30_000)


def test_equal_input_gives_equal_output_in_all_threads() -> None:
    raw = content(5, CHUNK)
    with ThreadPoolExecutor(4) as threads:
        assert len({run.data for run in threads.map(deflate, [raw] * 32)}) == 1


def test_compressed_input_hardly_grows() -> None:
    raw = blake3(b"seed").digest(length=CHUNK)
    assert len(store_uncompressed(raw).data) <= CHUNK + 100
    assert len(deflate(raw).data) <= CHUNK + 1000


COMPRESSORS = {
    "gz": ["gzip", "-c"],
    "bz2": ["bzip2", "-c"],
    "xz": ["xz", "-c"],
    "zst": ["zstd", "-qc"],
    "lz4": ["lz4", "-qc"],
}


@pytest.mark.parametrize("raw", [b"", content(6, 5000)], ids=["empty", "full"])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_files_are_known_by_their_first_bytes(kind: str, raw: bytes) -> None:
    command = COMPRESSORS[kind]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    head = subprocess.run(command, input=raw, stdout=subprocess.PIPE, check=True).stdout[:12]
    assert is_compressed(head)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"\x28\xb5\x2f\xfd", id="zstd"),
        pytest.param(b"\x50\x2a\x4d\x18\x04\x00\x00\x00", id="skippable frame"),
        pytest.param(b"\x5f\x2a\x4d\x18\x04\x00\x00\x00", id="last skippable frame"),
        pytest.param(b"\x04\x22\x4d\x18\x64\x40", id="lz4"),
    ],
)
def test_their_magic_numbers_too(head: bytes) -> None:
    assert is_compressed(head)


@pytest.mark.parametrize(
    "head", [b"", b"\x1f", b"\x1f\x8b", b"BZh", b"BZhello 1AY", b"P*M", b"\x60\x2a\x4d\x18", b"{}"]
)
def test_other_files_are_not(head: bytes) -> None:
    assert not is_compressed(head)
    assert not is_compressed(Path(__file__).read_bytes()[:12])


@settings(deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 20))
def test_crc32_of_repetitions(first: bytes, other: bytes, times: int) -> None:
    joined = append_crc32(zlib.crc32(first), zlib.crc32(other), len(other), times)
    assert joined == zlib.crc32(first + other * times)


def test_crc32_over_more_than_4_gib() -> None:
    # Lengths beyond 32 bits: halves that were combined from smaller ones must agree with the whole.
    piece = zlib.crc32(bytes(CHUNK))
    half = append_crc32(0, piece, CHUNK, 5000)
    assert append_crc32(half, half, 5000 * CHUNK) == append_crc32(0, piece, CHUNK, 10_000)
    one_by_one = 0
    for _ in range(10_000):
        one_by_one = append_crc32(one_by_one, piece, CHUNK)
    assert one_by_one == append_crc32(0, piece, CHUNK, 10_000)
