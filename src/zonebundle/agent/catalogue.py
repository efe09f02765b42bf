"""The bundles that the agent knows: on their way, sealed or failed. Kept in memory, rebuilt from store and spool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from zonebundle.errors import NoSuchBundleError
from zonebundle.model.metadata import Metadata


class BundleState(StrEnum):
    CAPTURING = "capturing"
    SEALING = "sealing"
    SEALED = "sealed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """One bundle. Bytes: `total` is of the log bytes to seal, `sealed` how many are, `size` of the finished tar.gz.

    `is_debris`: the store holds something under this ID that is no readable bundle; it failed for good.
    """

    metadata: Metadata
    state: BundleState
    gaps: int = 0
    size: int = 0
    total: int = 0
    sealed: int = 0
    hold_seconds: float = 0.0
    graceful_seconds: float = 0.0
    seal_seconds: float | None = None
    reason: str = ""
    is_debris: bool = False

    @property
    def is_sealed(self) -> bool:
        return self.state is BundleState.SEALED

    @property
    def is_on_its_way(self) -> bool:
        """Whether it is being captured or sealed, or will be tried again."""
        return not self.is_sealed and not self.is_debris

    def to_json(self) -> dict[str, Any]:
        """As in a list: Omicron's metadata, and more fields."""
        return self.metadata.to_json() | {"state": str(self.state), "bytes": self.size, "gaps": self.gaps}


class Catalogue:
    """All bundles by ID; a listing is in the order of their making."""

    def __init__(self) -> None:
        self._entries: dict[str, BundleEntry] = {}
        self._hidden: set[str] = set()

    def put(self, entry: BundleEntry) -> None:
        """Add a bundle, or replace what is known of it."""
        self._entries[entry.metadata.bundle_id] = entry

    def update(self, bundle_id: str, **changes: Any) -> BundleEntry | None:
        """Change fields of a bundle; None if it is not known (deleted meanwhile)."""
        entry = self._entries.get(bundle_id)
        if entry is None:
            return None
        changed = replace(entry, **changes)
        self._entries[bundle_id] = changed
        return changed

    def get(self, bundle_id: str) -> BundleEntry | None:
        return None if bundle_id in self._hidden else self._entries.get(bundle_id)

    def find(self, zone: str, bundle_id: str) -> BundleEntry:
        """The bundle, if it is of that zone and not deleted; raises NoSuchBundleError."""
        entry = self.get(bundle_id)
        if entry is None or entry.metadata.zone != zone:
            raise NoSuchBundleError(zone, bundle_id)
        return entry

    def known(self, bundle_id: str) -> BundleEntry | None:
        """As `get`, also of a bundle that is being deleted."""
        return self._entries.get(bundle_id)

    def hide(self, bundle_id: str) -> None:
        """Unlist a bundle that is being deleted."""
        self._hidden.add(bundle_id)

    def show(self, bundle_id: str) -> None:
        """List it again: the deletion failed."""
        self._hidden.discard(bundle_id)

    def drop(self, bundle_id: str) -> None:
        self._entries.pop(bundle_id, None)
        self._hidden.discard(bundle_id)

    def all(self) -> Iterable[BundleEntry]:
        """Every bundle, also those that are being deleted, in no order."""
        return list(self._entries.values())

    def list(self, *, zone: str | None = None, containing: str = "") -> Iterable[BundleEntry]:
        """The bundles of one zone, or of the zones whose names contain a text, oldest first."""
        return sorted(self._matching(zone, containing), key=lambda entry: entry.metadata.time_created)

    def _matching(self, zone: str | None, containing: str) -> Iterator[BundleEntry]:
        for bundle_id, entry in self._entries.items():
            name = entry.metadata.zone
            if bundle_id not in self._hidden and (name == zone if zone is not None else containing in name):
                yield entry
