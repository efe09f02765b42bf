"""What a hold takes of a row without taking it apart is what the row says."""

import json

import pytest

from support.indexed import FILESYSTEM, identity, piece
from zonebundle.model.manifest import Piece
from zonebundle.store.index_rows import KnownFile, decode_file, encode_identity, encode_piece, with_check


def row(*pieces: Piece) -> bytes:
    return with_check(encode_identity(identity(7, 3)) + b"".join(map(encode_piece, pieces)))


@pytest.mark.parametrize("pieces", [(piece(1, 1),), (piece(1, 1), piece(2, 2, times=5), piece(3, 0)), ()])
def test_a_row_is_read_as_it_was_written(pieces: tuple[Piece, ...]) -> None:
    file = decode_file(row(*pieces))
    assert file is not None
    assert (file.identity, file.pieces) == (identity(7, 3), pieces)
    assert file.key == (FILESYSTEM, 7)
    assert file.state == (identity(7, 3).size, identity(7, 3).mtime_ns, identity(7, 3).ctime_ns)
    assert json.loads(file.pieces_json) == [one.to_json() for one in pieces]
    assert file == KnownFile(identity(7, 3), pieces)
    assert hash(file) == hash(KnownFile(identity(7, 3), pieces))
    assert file != KnownFile(identity(7, 4), pieces)


@pytest.mark.parametrize("length", [1, 40, 100])
def test_half_a_piece_is_no_row(length: int) -> None:
    assert decode_file(with_check(row(piece(1, 1))[:-4][:-length])) is None


def test_a_row_whose_bytes_changed_is_none() -> None:
    data = bytearray(row(piece(1, 1)))
    data[20] ^= 1
    assert decode_file(bytes(data)) is None
