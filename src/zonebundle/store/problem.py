"""What a check finds in a store dir, and what a repair has mended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from zonebundle.model.paths import printable


class Kind(StrEnum):
    """What a problem is, the most important first."""

    MANIFEST = "manifest"
    FRAME = "frame"
    MISSING = "missing"
    """Segments that a bundle needs are not there; `path` is that of the first."""
    ABSENT = "absent"
    """A bundle that another dir has could not be brought here."""
    SEGMENT = "segment"
    AFFECTED = "affected"
    """A bundle with pieces in damaged segments."""
    PIECE = "piece"
    """A manifest's pieces are not in their segments, which are whole."""
    FOREIGN = "foreign"
    UNFINISHED = "unfinished"
    """On its way, or left by a crash: the writer's next start ends it."""
    UNUSED = "unused"

    @property
    def is_damage(self) -> bool:
        return self not in (Kind.FOREIGN, Kind.UNFINISHED, Kind.UNUSED)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be. `bundle` is (zone, ID) if it concerns one.

    `what` completes a sentence that begins with the path. With `is_damage` something is lost here.
    """

    kind: str
    path: Path
    what: str
    bundle: tuple[str, str] | None = None
    is_damage: bool = True

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.what}")


@dataclass(frozen=True, slots=True)
class Repaired:
    """Something that a repair has put right; the fields are those of a Problem."""

    path: Path
    what: str
    bundle: tuple[str, str] | None = None

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.what}")


def problem(kind: Kind, path: Path, what: str, bundle: tuple[str, str] | None = None) -> Problem:
    """A problem of this kind."""
    return Problem(kind, path, what, bundle, kind.is_damage)
