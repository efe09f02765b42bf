import gzip
import shutil
import subprocess
import zlib

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from support.stored import content
from zonebundle.store.pieces import CHUNK, deflate, store_uncompressed
from zonebundle.store.segment import build_segment


@settings(deadline=None)
@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=10))
def test_a_segment_is_a_gz_file_and_its_pieces_are_runs(parts: list[bytes]) -> None:
    runs = [deflate(part) for part in parts]
    digest, data, pieces = build_segment(runs)
    assert digest == blake3(data).hexdigest()
    assert gzip.decompress(data) == b"".join(parts)
    for part, run, piece in zip(parts, runs, pieces, strict=True):
        packed = data[piece.offset : piece.offset + piece.packed]
        assert packed == run.data
        assert zlib.decompressobj(-15).decompress(packed + b"\x03\x00") == part
        assert (piece.segment, piece.raw, piece.crc32) == (digest, len(part), zlib.crc32(part))
        assert piece.blake3 == blake3(part).hexdigest()
        assert piece.times == 1


def test_zcat_reads_it() -> None:
    if shutil.which("zcat") is None:
        pytest.skip("no zcat")
    parts = [content(1, CHUNK), b"", content(2, 100)]
    _, data, _ = build_segment([deflate(parts[0]), deflate(parts[1]), store_uncompressed(parts[2])])
    done = subprocess.run(["zcat"], input=data, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"".join(parts), b"")


def test_the_same_content_is_the_same_segment() -> None:
    assert build_segment([deflate(content(1, 5000))]) == build_segment([deflate(content(1, 5000))])
    assert build_segment([deflate(b"a")])[0] != build_segment([deflate(b"b")])[0]


def test_a_segment_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        build_segment([])
