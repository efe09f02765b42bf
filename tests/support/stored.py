"""Bundles in a store, made as the sealer makes them, and what their archives have to be."""

import hashlib
import io
import itertools
import tarfile
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from zonebundle.model.manifest import Header, Piece
from zonebundle.model.metadata import Cause, Metadata, format_time
from zonebundle.store.bundle import StoredBundle, segments_in
from zonebundle.store.draft import BundleDraft, Origin
from zonebundle.store.pieces import CHUNK, SMALL, Run, deflate
from zonebundle.store.splice import splice
from zonebundle.store.store import Store

CREATED = 1_767_225_600.25
MTIME_NS = 1_767_000_000_123_456_789


@dataclass(frozen=True)
class File:
    """A file of an archive; `own` is one that is kept in the frame."""

    path: bytes
    data: bytes
    mode: int = 0o640
    mtime_ns: int = MTIME_NS
    own: bool = False


def metadata(zone: str = "web") -> Metadata:
    return Metadata(zone, str(uuid.uuid4()), format_time(CREATED), Cause.TERMINATED_INSTANCE)


def content(seed: int, size: int) -> bytes:
    """Bytes like a log's, the same for the same seed, of which no two seeds share a chunk."""
    lines = b"".join(b'{"seed":%d,"line":%d,"hash":"%s"}\n' % (seed, n, _hash(seed, n)) for n in range(200))
    return (lines * (size // len(lines) + 1))[:size]


def _hash(seed: int, number: int) -> bytes:
    return hashlib.sha256(b"%d %d" % (seed, number)).hexdigest().encode()


def put(store: Store, owner: str, data: bytes, chunk: int = CHUNK) -> list[Piece]:
    """One segment a chunk."""
    runs = [deflate(data[at : at + chunk]) for at in range(0, len(data), chunk)]
    return [piece for run in runs for piece in store.segments.put([run], owner)]


def seal(store: Store, files: Iterable[File], made: Metadata | None = None) -> Header:
    """A committed bundle of the files: small ones are packed, large ones cut."""
    made = made or metadata()
    with BundleDraft(store, made, CREATED) as draft:
        add(store, draft, made.bundle_id, files)
        return draft.commit(hold_seconds=0.004, graceful_seconds=0, gaps=1)


def add(store: Store, draft: BundleDraft, owner: str, files: Iterable[File]) -> None:
    """Put the files' content and add them, in their order."""
    for small, group in itertools.groupby(files, lambda file: not file.own and 0 < len(file.data) < SMALL):
        if small:
            _add_packs(store, draft, owner, list(group))
            continue
        for file in group:
            if file.own:
                draft.add_bytes(file.path, file.data, mode=file.mode, mtime_ns=file.mtime_ns)
            else:
                _add_log(draft, file, put(store, owner, file.data))


def _add_packs(store: Store, draft: BundleDraft, owner: str, files: Sequence[File]) -> None:
    waiting: list[File] = []
    runs: list[Run] = []
    for number, file in enumerate(files, start=1):
        waiting.append(file)
        runs.append(deflate(file.data))
        if number == len(files) or sum(run.raw for run in runs) + SMALL > CHUNK:
            for packed, piece in zip(waiting, store.segments.put(runs, owner), strict=True):
                _add_log(draft, packed, [piece])
            waiting, runs = [], []


def _add_log(draft: BundleDraft, file: File, pieces: list[Piece]) -> None:
    draft.add_log(
        file.path, len(file.data), mode=file.mode, mtime_ns=file.mtime_ns, pieces=pieces, origin=Origin("/srv", b"x", 7)
    )


def archive(files: Iterable[File], manifest: bytes) -> bytes:
    """The tar archive that a bundle of the files is, made by tarfile."""
    last = File(b"manifest.jsonl", manifest, 0o600, round(CREATED * 1e9))
    parts = []
    for file in (*files, last):
        info = tarfile.TarInfo(file.path.decode("utf-8", "surrogateescape"))
        info.size, info.mode, info.mtime = len(file.data), file.mode & 0o777, file.mtime_ns // 10**9
        info.uname = info.gname = "root"
        parts += [info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"), file.data, bytes(-len(file.data) % 512)]
    return b"".join([*parts, bytes(1024)])


def download(bundle: StoredBundle) -> bytes:
    return b"".join(splice(bundle))


def inflate_member(data: bytes) -> bytes:
    """The content of the one gzip member that `data` is; zlib checks CRC-32 and length."""
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    raw = inflater.decompress(data)
    assert inflater.eof
    assert inflater.unused_data == b""
    return raw


def check_whole(bundle: StoredBundle) -> dict[bytes, bytes]:
    """Assert that the bundle's download agrees with its manifest in every byte; returns its files."""
    data = download(bundle)
    assert len(data) == bundle.size
    with tarfile.open(fileobj=io.BytesIO(inflate_member(data)), errors="surrogateescape", encoding="utf-8") as tar:
        files = {}
        for info in tar:
            member = tar.extractfile(info)
            assert member is not None
            files[info.name.encode("utf-8", "surrogateescape")] = member.read()
    assert files.pop(b"manifest.jsonl") == bundle.manifest.read_bytes()
    entries = list(bundle.entries())
    assert {entry.path: (entry.size, entry.crc32) for entry in entries} == {
        path: (len(data), zlib.crc32(data)) for path, data in files.items()
    }
    return files


def check_segments(store: Path) -> set[str]:
    """Assert that every segment has the bytes that its name says; returns their digests."""
    found = set()
    for file in (store / "segments").glob("??/*"):
        digest = blake3(file.read_bytes()).hexdigest()
        assert file.name == f"{digest}.gz"
        assert file.parent.name == digest[:2]
        found.add(digest)
    return found


def check_clean(store: Path) -> None:
    """Assert that the store holds nothing but whole segments that are used, and committed bundles."""
    assert list((store / "segments/tmp").iterdir()) == list((store / "segments/pruned").iterdir()) == []
    used: set[str] = set()
    for zone in (store / "bundles").iterdir():
        assert list(zone.iterdir()) != []
        for bundle in zone.iterdir():
            assert sorted(path.name for path in bundle.iterdir()) == ["frame", "manifest.jsonl"]
            used.update(segments_in(bundle / "manifest.jsonl"))
    assert check_segments(store) == used


def is_clean(store: Path) -> bool:
    """Whether it is, also while a sealer works on it."""
    try:
        check_clean(store)
    except (AssertionError, FileNotFoundError):
        return False
    return True
