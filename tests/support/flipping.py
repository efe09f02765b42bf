"""Stores that are damaged on purpose, and what they were."""

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.stored import CREATED, MTIME_NS, File, content, metadata, put, seal
from zonebundle.model.metadata import Metadata
from zonebundle.store.draft import BundleDraft
from zonebundle.store.pieces import CHUNK
from zonebundle.store.store import Store


@dataclass(frozen=True)
class Sample:
    """A store with bundles of everything that a bundle can hold."""

    directory: Path
    bundles: tuple[Metadata, ...]

    def files(self) -> list[Path]:
        """Its segments, frames and manifests."""
        below = [self.directory / name for name in ("segments", "bundles")]
        return sorted(path for place in below for path in place.rglob("*") if path.is_file())

    def bytes(self) -> dict[str, bytes]:
        """What is in all its files, by their names below it."""
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in self.files()}

    def copy(self, directory: Path) -> "Sample":
        """Another dir with the same bytes."""
        shutil.copytree(self.directory, directory)
        return Sample(directory, self.bundles)

    def bundle(self, number: int) -> Path:
        """The directory of a bundle."""
        made = self.bundles[number]
        return self.directory / "bundles" / made.zone / made.bundle_id

    def segments(self) -> list[Path]:
        """The files of all segments."""
        return sorted(self.directory.glob("segments/??/*.gz"))


LOGS = [
    File(b"metadata.toml", b"version = 0\n", 0o600, own=True),
    File(b"netstat", content(90, CHUNK + 5), 0o600, own=True),
    File(b"ptree", b"", 0o600, own=True),
    *(File(b"logs/zone/small-%d" % number, content(number, 900 + number)) for number in range(20)),
    File(b"logs/zone/empty", b""),
    File(b"logs/zone/large", content(50, 2 * CHUNK + 77)),
    File(b"logs/zone/new\nline \xff", content(51, 700)),
    File(b"logs/zone/" + b"n" * 250, content(52, 300_000)),
    File(b"report.json", b"{}", 0o600, own=True),
]


def make_sample(directory: Path) -> Sample:
    """A store of three bundles, of which two share their logs, and one has a hole."""
    with Store.open(directory) as store:
        made = (seal(store, LOGS).metadata, seal(store, LOGS[2:9]).metadata, _with_hole(store))
    return Sample(directory, made)


def _with_hole(store: Store) -> Metadata:
    made = metadata("db-1")
    with BundleDraft(store, made, CREATED) as draft:
        pieces = [*put(store, made.bundle_id, b"head\n"), store.segments.zero_piece(5000, made.bundle_id)]
        draft.add_log(b"logs/sparse", 5 + 5000 * CHUNK, mode=0o640, mtime_ns=MTIME_NS, pieces=pieces)
        draft.commit(hold_seconds=0.1, graceful_seconds=0, gaps=0)
    return made


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file, in place and without a trace in its times."""
    status = path.stat()
    with path.open("r+b", buffering=0) as file:
        os.lseek(file.fileno(), bit // 8, os.SEEK_SET)
        byte = file.read(1)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def bits(path: Path, count: int, seed: int) -> Iterator[int]:
    """Some bits of a file to flip, those of its first and last bytes among them."""
    size = path.stat().st_size * 8
    chance = random.Random(f"{seed} {size}")
    yield from {0, 77, size - 1, size - 70, size - 90}
    yield from (chance.randrange(size) for _ in range(count))
