"""Families of logs: which file is the current one, which were rotated from it, and how long ago.

Rotation moves lines from the current log to ever older names, or copies them there and truncates. Whoever reads along
that flow, the current file first and then by ascending age, meets every line at least once. Names understood, each also
with a suffix of compression: `app.log.1` and `app.1.log`; `app.log.old`; `app.log-20260101`, `app-2026-01-01.log`,
`app.log-2026010112`, `app.log-20260101-1767225600` (logrotate's dateext and its formats); `app.log.1767225600` (an
archive named by Unix time); `app.2026-01-01.3.log` (logback: the index grows with time).

A name that is not understood makes a family of its own, whose current file it is. That costs speed (it is not hard
linked), not lines: whether a file moved is told by its inode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from zonebundle.snapshots.listing import Key, Listed

# How old a file of a family is: sorts ascending by age. The parts are rank, age, index, and whether it is compressed:
# a rotated file is compressed into a new one, so that one comes after it in the flow.
Age = tuple[int, int, int, int]

CURRENT: Final[Age] = (0, 0, 0, 0)
_NUMBERED = 1
_DATED = 2
_TIMED = 3

_NAME = re.compile(
    r"(?P<base>.+?)"
    r"(?:[-._](?P<date>(?:19|20)\d\d-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])"
    r"(?:[-_T.]?\d\d(?:[-:.]?\d\d){0,2})?)(?:-(?P<second>\d{10}))?"
    r"|[-._](?P<time>\d{10}(?:\d{3})?))?"
    r"(?:\.(?P<number>\d{1,3}|old))?"
    r"(?P<extension>\.(?:log|txt|out|err|json|csv))?"
    r"(?P<compression>\.(?:gz|xz|zst|bz2|lz4|lzma|Z|zip))?",
    re.DOTALL,
)
_SEPARATORS = str.maketrans("", "", "-_T.:")


# The same names come again in every hold of a zone, and mostly in those of its like.
@lru_cache(maxsize=8192)
def parse(name: str) -> tuple[str, Age]:
    """The family of a file's name and its age in it; CURRENT if nothing in the name says that it was rotated."""
    match = _NAME.fullmatch(name)
    # The extension before the last dot of a hidden or odd name may leave nothing to match.
    if match is None:
        return name, CURRENT
    base, date, second, time, number, extension, compression = match.groups()
    family = base + (extension or "")
    compressed = 1 if compression else 0
    if date:
        # 20260101 and 2026010112 compare as if both had hours, minutes and seconds; the newest is the youngest.
        stamp = int(date.translate(_SEPARATORS).ljust(14, "0"))
        return family, (_DATED, -stamp, -int(second or (number if number != "old" else 0) or 0), compressed)
    if time:
        return family, (_TIMED, -int(time[:10]), -int(time[10:] or 0), compressed)
    if number:
        return family, (_NUMBERED, 1 if number == "old" else int(number), 0, compressed)
    if compressed:
        return family, (_NUMBERED, 0, 0, compressed)
    return family, CURRENT


# A family: the number of its tree, its directory, its name.
Name = tuple[int, str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """The files of one family, the current one first, then by ascending age. `ages` go with `files`.

    `current` is the key of the file that is (or may be) still written: the one without a mark of rotation, or else the
    youngest, as where each day's log has the day in its name. None if all are compressed.
    """

    name: Name
    files: list[Listed]
    ages: list[Age]
    current: Key | None

    @property
    def has_compressed(self) -> bool:
        """Whether a file of it is compressed: such a file is another one than that of which it was made."""
        return any(age[3] for age in self.ages)


def arrange(files: Iterable[Listed]) -> dict[Name, Family]:
    """Sort files into their families."""
    members: dict[Name, list[tuple[Age, str, Listed]]] = {}
    for file in files:
        directory, _, name = file.path.rpartition("/")
        family, age = parse(name)
        members.setdefault((file.tree, directory, family), []).append((age, name, file))
    return {name: _family(name, found) for name, found in members.items()}


def family_name(tree: int, path: str) -> Name:
    """The name of the family that a file belongs to."""
    directory, _, name = path.rpartition("/")
    return tree, directory, parse(name)[0]


def _family(name: Name, members: list[tuple[Age, str, Listed]]) -> Family:
    # By name where ages are equal: files are never compared.
    members.sort(key=lambda member: member[:2])
    current = next((file.key for age, _, file in members if not age[3]), None)
    return Family(name, [file for _, _, file in members], [age for age, _, _ in members], current)


def newest_first(families: Iterable[Family], mtime_of: Callable[[Listed], int]) -> list[Listed]:
    """All files, the newest first, but within a family in its order: a file is as old as its youngest successor."""
    stamped: list[tuple[int, Listed]] = []
    for family in families:
        newest = mtime_of(family.files[0])
        for file in family.files:
            newest = min(newest, mtime_of(file))
            stamped.append((-newest, file))
    # Stable: files of a family with the same stamp stay in their order.
    stamped.sort(key=lambda pair: pair[0])
    return [file for _, file in stamped]
