"""What the clean-up removes: its context, and the plan. No I/O: the sealer measures, plans and carries out.

Omicron's rule is: while a directory is over its limit, delete the bundle of lowest priority. Segments are shared here,
so a bundle may go without freeing any log; the plan counts what the removed set frees, not what a bundle looks like.
"""

from __future__ import annotations

import dataclasses
import heapq
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from zonebundle.errors import UsageError
from zonebundle.model.metadata import Cause, format_time
from zonebundle.model.paths import printable
from zonebundle.model.quantities import format_size

SHORTEST_PERIOD: Final = 60.0
LONGEST_PERIOD: Final = 86400.0
HIGHEST_LIMIT: Final = 50
_PRIORITIES: Final = (("cause", "time"), ("time", "cause"))
_NANOS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class CleanupContext:
    """How often to clean up (`period`, seconds), to how much of the quota (`storage_limit`, percent), in which order.

    Bounds and first values are Omicron's. Raises UsageError where a value is out of them.
    """

    period: float = 600.0
    storage_limit: int = 25
    priority: tuple[str, ...] = _PRIORITIES[0]

    def __post_init__(self) -> None:
        if not _is_number(self.period) or not SHORTEST_PERIOD <= self.period <= LONGEST_PERIOD:
            raise UsageError(f"a clean-up period of {_show(self.period)} is not allowed: use 60 to 86400 seconds")
        if not _is_whole(self.storage_limit) or not 1 <= self.storage_limit <= HIGHEST_LIMIT:
            raise UsageError(
                f"a storage limit of {_show(self.storage_limit)} is not allowed: use 1 to 50, whole percent"
            )
        if self.priority not in _PRIORITIES:
            raise UsageError(f"the priority {_show(self.priority)} is not known: use cause,time or time,cause")

    def changed(
        self, *, period: float | None = None, storage_limit: int | None = None, priority: Sequence[str] | None = None
    ) -> Self:
        """The context with what is given put in its place. Raises UsageError, naming what is allowed."""
        changes: dict[str, Any] = {}
        if period is not None:
            changes["period"] = period
        if storage_limit is not None:
            changes["storage_limit"] = storage_limit
        if priority is not None:
            changes["priority"] = _frozen(priority)
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        secs, nanos = divmod(round(self.period * _NANOS), _NANOS)
        return {
            "period": {"secs": secs, "nanos": nanos},
            "storage_limit": self.storage_limit,
            "priority": list(self.priority),
        }

    @classmethod
    def from_json(cls, data: object) -> Self:
        """The context that `to_json` wrote. Raises UsageError, also where something is missing."""
        if not isinstance(data, dict) or not {"period", "storage_limit", "priority"} <= data.keys():
            raise UsageError("the clean-up context is incomplete: it needs period, storage_limit and priority")
        return cls(parse_period(data["period"]), data["storage_limit"], _frozen(data["priority"]))


def parse_period(data: object) -> float:
    """Seconds of a period as the API writes it, `{"secs": 600, "nanos": 0}`. Raises UsageError."""
    if isinstance(data, dict) and data.keys() == {"secs", "nanos"}:
        secs, nanos = data["secs"], data["nanos"]
        # The bound on seconds also keeps what a float cannot hold out of the sum.
        if _is_whole(secs) and _is_whole(nanos) and 0 <= secs <= LONGEST_PERIOD and 0 <= nanos < _NANOS:
            return float(secs + nanos / _NANOS)
    raise UsageError(
        f'{_show(data)} is not a clean-up period: write it like {{"secs": 600, "nanos": 0}}, 60 to 86400 seconds'
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bundle as the plan sees it: `own` are the bytes of its own files, `segments` the numbers of those it uses.

    `created` is seconds since the epoch. Segments are
    numbered from 0 by whoever asks, without large holes: the plan keeps 8 bytes for each number up to the highest.
    """

    bundle_id: str
    zone: str
    cause: Cause
    created: float
    own: int
    segments: Collection[int]


@dataclass(frozen=True, slots=True)
class Removal:
    """A bundle to remove, the bytes that this frees after the removals before it, and why, for people."""

    bundle_id: str
    zone: str
    frees: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to remove, in order: first `segments` (seal-ahead's, which no bundle uses), then the bundles."""

    removals: tuple[Removal, ...]
    segments: tuple[int, ...]
    used_after: int


def plan_removals(
    candidates: Sequence[Candidate],
    sizes: Mapping[int, int],
    ahead: Collection[int],
    used: int,
    limit: int,
    priority: Sequence[str],
    pinned: Collection[str],
) -> Plan:
    """What to remove so that at most `limit` of the `used` bytes stay; nothing if they do already.

    `sizes` are the bytes of segments (one that is missing has none), `ahead` those that only seal-ahead's claims hold,
    `pinned` the IDs of bundles that must stay. Lowest priority goes first, but a bundle that would free no bytes of
    segments stays while another one would. A segment counts as freed with the last bundle that uses it: where a claim
    of seal-ahead holds it as well, carrying out the plan has to end that claim. Where all of it is not enough,
    `used_after` is above the limit, and everything but the pinned goes.
    """
    if used <= limit:
        return Plan((), (), used)
    order = _in_order(candidates, priority)
    users = _Users([candidate.segments for candidate in order], sizes)
    dropped: list[int] = []
    for segment in dict.fromkeys(ahead):
        if used <= limit:
            break
        size = sizes.get(segment, 0)
        if size and not users.has_any(segment):
            dropped.append(segment)
            used -= size
    removals: list[Removal] = []
    queue = _Queue(order, users.alone, frozenset(pinned))
    while used > limit and (turn := queue.pop()) is not None:
        index, standing = turn
        candidate = order[index]
        frees = candidate.own + users.alone[index]
        removals.append(
            Removal(candidate.bundle_id, candidate.zone, frees, _reason(candidate, standing, frees, used, limit))
        )
        used -= frees
        queue.push(users.remove(index))
    return Plan(tuple(removals), tuple(dropped), used)


class _Users:
    """Which bundles use each segment; `alone` has, for each bundle, the bytes of segments that only it uses.

    A segment costs one number: how many use it, times a unit, plus the sum of their indices. So with one user left the
    sum is its index. In an array and not a dict: two million references are counted in half the time, in a fifth of
    the memory.
    """

    def __init__(self, uses: Sequence[Collection[int]], sizes: Mapping[int, int]) -> None:
        self._uses = uses
        self._sizes = sizes
        self._unit = unit = len(uses) ** 2 + 1
        highest = max(max(sizes, default=-1), max((max(segments, default=-1) for segments in uses), default=-1))
        self._state = state = array("q", bytes(8 * (highest + 1)))
        self.alone = [0] * len(uses)
        for index, segments in enumerate(uses):
            mark = unit + index
            for segment in set(segments):
                state[segment] += mark
        for segment, left in enumerate(state):
            if left and left < 2 * unit:
                self.alone[left - unit] += sizes.get(segment, 0)

    def has_any(self, segment: int) -> bool:
        return self._state[segment] > 0

    def remove(self, index: int) -> list[int]:
        """A bundle goes: those that have got segments of their own by it, maybe not for the first time."""
        state, unit = self._state, self._unit
        mark, two = unit + index, 2 * unit
        heirs = []
        for segment in set(self._uses[index]):
            left = state[segment] - mark
            state[segment] = left
            # Nobody left is 0, and one user less than two.
            if left < two and left and (size := self._sizes.get(segment, 0)):
                self.alone[left - unit] += size
                heirs.append(left - unit)
        return heirs


class _Queue:
    """Whose turn it is: the first that frees bytes of segments, else the first."""

    def __init__(self, order: Sequence[Candidate], alone: Sequence[int], pinned: frozenset[str]) -> None:
        self._waiting = [candidate.bundle_id not in pinned for candidate in order]
        self._first = 0
        # What a bundle frees only grows, so none has to leave this heap before its turn. A list in order is a heap.
        self._freeing = [index for index, count in enumerate(alone) if count and self._waiting[index]]
        self._queued = set(self._freeing)

    def push(self, indices: Iterable[int]) -> None:
        for index in indices:
            if self._waiting[index] and index not in self._queued:
                self._queued.add(index)
                heapq.heappush(self._freeing, index)

    def pop(self) -> tuple[int, str] | None:
        """The index of the next one, and where it stands; None when all are gone."""
        while self._first < len(self._waiting) and not self._waiting[self._first]:
            self._first += 1
        if self._first == len(self._waiting):
            return None
        index = heapq.heappop(self._freeing) if self._freeing else self._first
        self._waiting[index] = False
        if index not in self._queued:
            return index, "lowest priority of those that share all their logs"
        return index, "lowest priority" if index == self._first else "lowest priority of those that free logs"


def _in_order(candidates: Iterable[Candidate], priority: Sequence[str]) -> list[Candidate]:
    """Lowest priority first; the ID makes the order of equals the same in every store directory."""

    def rank(candidate: Candidate) -> tuple[float, float, str]:
        cause, time = candidate.cause.priority, candidate.created
        first, second = (cause, time) if priority[0] == "cause" else (time, cause)
        return first, second, candidate.bundle_id

    return sorted(candidates, key=rank)


def _reason(candidate: Candidate, standing: str, frees: int, used: int, limit: int) -> str:
    return (
        f"{standing}: cause {candidate.cause}, created {_when(candidate.created)}; {format_size(frees)} freed; "
        f"{format_size(used)} of {format_size(limit)} used"
    )


def _when(seconds: float) -> str:
    try:
        return format_time(seconds)
    except (ValueError, OverflowError, OSError):
        # The age of debris is a stamp of the file system, which may be set to anything.
        return f"{seconds:.0f} s after 1970"


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: object) -> bool:
    # True is an int too.
    return isinstance(value, int) and not isinstance(value, bool)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _show(value: object) -> str:
    text = printable(repr(list(value) if isinstance(value, tuple) else value))
    return text if len(text) <= 80 else text[:79] + "…"
