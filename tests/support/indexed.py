"""Files and pieces for an index: made from numbers, so that a test knows what it put in."""

from collections.abc import Iterable, Iterator

from blake3 import blake3

from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Piece
from zonebundle.store.index import Index

FILESYSTEM = (1 << 64) - 5
STORES = ["store-a"]


def digest(kind: str, number: int) -> str:
    return blake3(f"{kind} {number}".encode()).hexdigest()


def segment(number: int) -> str:
    return digest("segment", number)


def piece(number: int, content: int = 0, *, times: int = 1) -> Piece:
    """The piece of segment `number` that holds that content."""
    raw = 1000 + content
    return Piece(segment(number), 10 + 100 * content, 100, raw, content * 7, digest("content", content), times)


def identity(inode: int, state: int = 0, filesystem: int = FILESYSTEM) -> FileIdentity:
    """One of the states of a file."""
    return FileIdentity(filesystem, inode, 5, 1000 * state, 10**18 + state, 10**18 + 2 * state)


def small_files(numbers: Iterable[int]) -> Iterator[tuple[FileIdentity, list[Piece]]]:
    """File n has inode n and one piece of its own content; ten files share a segment."""
    for number in numbers:
        yield identity(number, 1), [piece(number // 10, number)]


def find_piece(index: Index, content: str, raw: int) -> Piece | None:
    """The one piece that is known by this content, None if there is none."""
    found = index.find_pieces({content: raw})
    assert set(found) <= {content}
    return found.get(content)


def check_nothing_wrong(index: Index, numbers: Iterable[int], forgotten: Iterable[int] = ()) -> int:
    """Whatever is found of `small_files(numbers)` is what was added, and not in a forgotten segment; how many are."""
    gone = {segment(number) for number in forgotten}
    found = 0
    for number, (known_as, pieces) in zip(numbers, small_files(numbers), strict=True):
        file = index.find_file(FILESYSTEM, number)
        single = find_piece(index, pieces[0].blake3, pieces[0].raw)
        assert file is None or (file.identity, list(file.pieces)) == (known_as, pieces)
        assert single is None or single == pieces[0]
        assert (file is None and single is None) or pieces[0].segment not in gone
        found += file is not None
    return found
