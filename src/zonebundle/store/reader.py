"""Reading a store directory, in any process, beside the one that writes.

format                        `zonebundle store 2 <ID>`: the mark that the directory is ours, its format, its random ID
segments/ab/<digest>.gz
segments/tmp/                 being written
segments/pruned/              to be removed, see prune
bundles/<zone, encoded>/<bundle-id>/{manifest.jsonl, frame}
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from zonebundle.errors import FormatError, NoSuchBundleError, StoreError, UsageError
from zonebundle.model.ids import check_bundle_id, decode_zone_name, encode_zone_name
from zonebundle.model.manifest import Header
from zonebundle.store.bundle import StoredBundle, load_bundle
from zonebundle.store.failure import store_errors
from zonebundle.store.segments import Segments

# 1: digests in hex, ":" encoded in zones' directories; never released.
STORE_FORMAT = 2
FORMAT = "format"
BUNDLES = "bundles"
SEGMENTS = "segments"

_FORMAT_LINE = re.compile(r"zonebundle store (\d{1,9}) ([0-9a-f-]{36})\n")
_FORMAT_NUMBER = re.compile(r"zonebundle store (\d{1,9})\b")
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Debris:
    """What lies in a bundle's place and is none that can be read. `created` is seconds, the directory's own time."""

    zone: str
    bundle_id: str
    reason: str
    created: float


class StoreReader:
    """The bundles of one store directory, read-only. One that was not written yet has none."""

    def __init__(self, directory: Path, segments: Segments) -> None:
        self.directory = directory
        self.segments = segments

    @classmethod
    def open(cls, directory: Path) -> StoreReader:
        """Look at a store without changing anything. Raises FormatError if it is a newer one, StoreError."""
        read_format(directory)
        return cls(directory, Segments(directory / SEGMENTS))

    def bundles(self) -> Iterator[Header]:
        """The header of every bundle, in no order."""
        return (bundle.header for bundle in self.stored())

    def stored(self) -> Iterator[StoredBundle]:
        """Every bundle, in no order. One that is damaged is left out and logged; it can still be deleted."""
        for directory in self.directories():
            try:
                bundle = load_bundle(directory, self.segments)
            except StoreError as error:
                _log.error("a bundle cannot be listed", directory=str(directory), reason=str(error))
                continue
            # None: a draft, or deleted since the directory was listed.
            if bundle is not None:
                yield bundle

    def debris(self) -> Iterator[Debris]:
        """What cannot be read as a bundle, but can be deleted like one."""
        for directory in self.directories():
            try:
                load_bundle(directory, self.segments)
            except StoreError as error:
                with contextlib.suppress(FileNotFoundError):
                    created = os.stat(directory).st_mtime
                    yield Debris(decode_zone_name(directory.parent.name), directory.name, str(error), created)

    def find(self, zone: str, bundle_id: str) -> StoredBundle:
        """The committed bundle. Raises NoSuchBundleError, UsageError (no UUID), StoreError (also of its kinds)."""
        bundle = load_bundle(self.bundle_directory(zone, bundle_id), self.segments)
        if bundle is None:
            raise NoSuchBundleError(zone, bundle_id)
        return bundle

    def bundle_directory(self, zone: str, bundle_id: str) -> Path:
        """Where the bundle is, or would be. Raises UsageError if the ID is none."""
        return self.directory / BUNDLES / encode_zone_name(zone) / check_bundle_id(bundle_id)

    def directories(self) -> Iterator[Path]:
        """The directory of every bundle, draft and deletion that is not finished."""
        for zone in self.zones():
            for bundle in _list(zone):
                if is_bundle_id(bundle.name):
                    yield bundle

    def zones(self) -> list[Path]:
        """The directory of every zone that has, or had, bundles."""
        return _list(self.directory / BUNDLES)


def is_bundle_id(name: str) -> bool:
    """Whether a directory's name is a bundle ID as we write it: nothing else is ever removed."""
    try:
        return check_bundle_id(name) == name
    except UsageError:
        return False


def read_format(directory: Path) -> str | None:
    """The ID of the store in `directory`, None if none is there yet.

    Raises FormatError if it is no store of the one format that is known, StoreError.
    """
    path = directory / FORMAT
    with store_errors(f"reading {path}"):
        try:
            with path.open("rb") as file:
                text = file.read(100).decode("ascii", "replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
    number = _FORMAT_NUMBER.match(text)
    if number and int(number[1]) != STORE_FORMAT:
        raise FormatError(
            f"store {directory} has format {number[1]}, this zonebundle knows {STORE_FORMAT}; "
            f"use {'a newer' if int(number[1]) > STORE_FORMAT else 'the older'} one, or another directory"
        )
    match = _FORMAT_LINE.fullmatch(text)
    if not match:
        raise FormatError(f"{path} is not a store's format file; name another directory in [store] dirs")
    return match[2]


def _list(directory: Path) -> list[Path]:
    with store_errors(f"listing {directory}"):
        try:
            return [directory / name for name in os.listdir(directory)]
        except (FileNotFoundError, NotADirectoryError):
            return []
