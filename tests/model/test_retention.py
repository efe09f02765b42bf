import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.errors import UsageError
from zonebundle.model.metadata import Cause
from zonebundle.model.retention import Candidate, CleanupContext, Plan, parse_period, plan_removals

CAUSE_FIRST = ("cause", "time")
TIME_FIRST = ("time", "cause")
ORDERS = [CAUSE_FIRST, TIME_FIRST]


def bundle(
    name: str, *segments: int, cause: Cause = Cause.TERMINATED_INSTANCE, created: float = 0.0, own: int = 0
) -> Candidate:
    return Candidate(name, "web", cause, created, own, segments)


def plan(
    candidates: Sequence[Candidate],
    used: int,
    limit: int = 0,
    *,
    sizes: Mapping[int, int] | None = None,
    ahead: Collection[int] = (),
    priority: Sequence[str] = CAUSE_FIRST,
    pinned: Collection[str] = (),
) -> Plan:
    every = {number: 10 for candidate in candidates for number in candidate.segments}
    return plan_removals(candidates, every if sizes is None else sizes, ahead, used, limit, priority, pinned)


def names(made: Plan) -> list[str]:
    return [removal.bundle_id for removal in made.removals]


# The plan again, as slow and as plain as the rule reads.


def rank(candidate: Candidate, priority: Sequence[str]) -> tuple[float, float, str]:
    values = {"cause": candidate.cause.priority, "time": candidate.created}
    return values[priority[0]], values[priority[1]], candidate.bundle_id


def segment_bytes_freed(
    gone: Collection[str], candidates: Collection[Candidate], sizes: Mapping[int, int], already: Collection[str] = ()
) -> int:
    """What the removal of `gone` frees of segments, where those of `already` are gone before."""
    stay = {s for c in candidates if c.bundle_id not in gone and c.bundle_id not in already for s in c.segments}
    before = {s for c in candidates if c.bundle_id not in already for s in c.segments}
    return sum(sizes.get(segment, 0) for segment in before - stay)


def slow_plan(
    candidates: Sequence[Candidate],
    sizes: Mapping[int, int],
    ahead: Sequence[int],
    used: int,
    limit: int,
    priority: Sequence[str],
    pinned: Collection[str],
) -> tuple[list[str], list[int], int]:
    in_use = {segment for candidate in candidates for segment in candidate.segments}
    dropped: list[int] = []
    for segment in ahead:
        if used > limit and segment not in in_use and segment not in dropped and sizes.get(segment, 0):
            dropped.append(segment)
            used -= sizes[segment]
    gone: list[str] = []
    while used > limit:
        left = [c for c in candidates if c.bundle_id not in gone and c.bundle_id not in pinned]
        left.sort(key=lambda candidate: rank(candidate, priority))
        if not left:
            break
        frees = {c.bundle_id: segment_bytes_freed([c.bundle_id], candidates, sizes, gone) for c in left}
        first = next((c for c in left if frees[c.bundle_id]), left[0])
        gone.append(first.bundle_id)
        used -= first.own + frees[first.bundle_id]
    return gone, dropped, used


@st.composite
def stores(draw: st.DrawFn) -> dict[str, Any]:
    """A small store, with much shared and many ties, and a place in it to get to."""
    # One segment without bytes, and one that bundles use and no size is known of.
    sizes = dict(enumerate(draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))))
    numbers = st.integers(0, len(sizes))
    count = draw(st.integers(0, 7))
    candidates = [
        Candidate(
            bundle_id=f"b{index}",
            zone=draw(st.sampled_from(["web", "db"])),
            cause=draw(st.sampled_from(Cause)),
            created=draw(st.sampled_from([1.0, 2.0, 3.0])),
            own=draw(st.integers(0, 5)),
            segments=draw(st.lists(numbers, max_size=6)),
        )
        for index in draw(st.permutations(range(count)))
    ]
    used = sum(sizes.values()) + sum(candidate.own for candidate in candidates) + draw(st.integers(0, 10))
    return {
        "candidates": candidates,
        "sizes": sizes,
        "ahead": draw(st.lists(st.sampled_from(sorted(sizes)), max_size=5)),
        "used": used,
        "limit": draw(st.integers(0, used + 2)),
        "priority": draw(st.sampled_from(ORDERS)),
        "pinned": draw(st.sets(st.sampled_from([f"b{index}" for index in range(8)]), max_size=4)),
    }


@given(stores())
def test_it_agrees_with_the_slow_one(store: dict[str, Any]) -> None:
    made = plan_removals(**store)
    assert (names(made), list(made.segments), made.used_after) == slow_plan(**store)


@given(stores())
def test_what_is_freed_is_what_the_removed_set_frees(store: dict[str, Any]) -> None:
    made = plan_removals(**store)
    candidates, sizes = store["candidates"], store["sizes"]
    own = sum(candidate.own for candidate in candidates if candidate.bundle_id in names(made))
    shared = segment_bytes_freed(names(made), candidates, sizes)
    dropped = sum(sizes[segment] for segment in made.segments)
    assert made.used_after == store["used"] - own - shared - dropped
    assert own + shared == sum(removal.frees for removal in made.removals)


@given(stores())
def test_pinned_bundles_stay_and_nothing_goes_twice(store: dict[str, Any]) -> None:
    made = plan_removals(**store)
    assert not store["pinned"] & set(names(made))
    assert len(set(names(made))) == len(names(made))
    zones = {candidate.bundle_id: candidate.zone for candidate in store["candidates"]}
    assert all(removal.zone == zones[removal.bundle_id] for removal in made.removals)


@given(stores())
def test_above_the_limit_at_the_end_means_that_everything_unpinned_goes(store: dict[str, Any]) -> None:
    made = plan_removals(**store)
    if made.used_after > store["limit"]:
        unpinned = {candidate.bundle_id for candidate in store["candidates"]} - store["pinned"]
        assert set(names(made)) == unpinned


@given(stores())
def test_no_beginning_of_the_plan_is_enough(store: dict[str, Any]) -> None:
    made = plan_removals(**store)
    freed = [store["sizes"][segment] for segment in made.segments] + [removal.frees for removal in made.removals]
    left = store["used"]
    for count in freed:
        assert left > store["limit"]
        left -= count
    assert left == made.used_after


@given(stores())
def test_segments_that_a_bundle_uses_are_not_dropped_ahead_of_it(store: dict[str, Any]) -> None:
    made = plan_removals(**store)
    in_use = {segment for candidate in store["candidates"] for segment in candidate.segments}
    assert not in_use & set(made.segments)
    if made.removals:
        # Bundles go only when all of seal-ahead's that can go have gone.
        unused = {segment for segment in store["ahead"] if store["sizes"][segment]} - in_use
        assert set(made.segments) == unused


@given(stores())
def test_among_those_that_free_logs_the_order_is_kept(store: dict[str, Any]) -> None:
    """Whoever goes has no one before it that frees logs at that moment; if it frees none, nobody does."""
    made = plan_removals(**store)
    candidates, sizes, priority = store["candidates"], store["sizes"], store["priority"]
    known = {candidate.bundle_id: candidate for candidate in candidates}
    gone: list[str] = []
    for removal in made.removals:
        frees = {
            name: segment_bytes_freed([name], candidates, sizes, gone)
            for name in known.keys() - set(gone) - store["pinned"]
        }
        able = [name for name, count in frees.items() if count]
        assert removal.bundle_id == min(able or frees, key=lambda name: rank(known[name], priority))
        gone.append(removal.bundle_id)


@given(stores())
def test_at_or_under_the_limit_nothing_goes(store: dict[str, Any]) -> None:
    store["limit"] = store["used"]
    assert plan_removals(**store) == Plan((), (), store["used"])


@given(stores())
def test_the_order_in_which_bundles_are_listed_does_not_matter(store: dict[str, Any]) -> None:
    made = plan_removals(**store)
    assert plan_removals(**{**store, "candidates": store["candidates"][::-1]}) == made


def test_the_cause_decides_first_then_the_age() -> None:
    candidates = [
        bundle("old request", 0, cause=Cause.EXPLICIT_REQUEST, created=1),
        bundle("new stop", 1, created=9),
        bundle("old stop", 2, created=2),
        bundle("new other", 3, cause=Cause.OTHER, created=10),
        bundle("surprise", 4, cause=Cause.UNEXPECTED_ZONE, created=11),
    ]
    by_cause = ["new other", "surprise", "old stop", "new stop", "old request"]
    by_time = ["old request", "old stop", "new stop", "new other", "surprise"]
    assert names(plan(candidates, 50)) == by_cause
    assert names(plan(candidates, 50, priority=TIME_FIRST)) == by_time


def test_equal_times_are_decided_by_the_cause() -> None:
    request = bundle("request", 0, cause=Cause.EXPLICIT_REQUEST, created=5)
    other = bundle("other", 1, cause=Cause.OTHER, created=5)
    assert names(plan([request, other], 20, 10, priority=TIME_FIRST)) == ["other"]


def test_a_bundle_that_frees_nothing_stays_while_another_frees_some() -> None:
    candidates = [bundle("a", 0, created=1, own=3), bundle("b", 0, created=2, own=3), bundle("c", 1, created=3, own=3)]
    made = plan(candidates, 29, 20)
    assert [(removal.bundle_id, removal.frees) for removal in made.removals] == [("c", 13)]


def test_when_only_such_are_left_the_first_goes_and_may_let_the_next_free_something() -> None:
    candidates = [
        bundle("a", 0, created=1, own=3),
        bundle("b", 0, created=2, own=3),
        bundle("c", 1, 2, created=3, own=3),
        bundle("d", 1, 2, created=4, own=3),
    ]
    made = plan(candidates, 42, 5)
    freed = [(removal.bundle_id, removal.frees) for removal in made.removals]
    assert freed == [("a", 3), ("b", 13), ("c", 3), ("d", 23)]


def test_what_a_pinned_bundle_uses_is_never_freed() -> None:
    candidates = [bundle("a", 0, created=1, own=1), bundle("pinned", 0, created=2)]
    made = plan(candidates, 11, 5, pinned={"pinned"})
    assert [(removal.bundle_id, removal.frees) for removal in made.removals] == [("a", 1)]
    assert made.used_after == 10


def test_a_segment_named_twice_by_a_bundle_counts_once() -> None:
    made = plan([bundle("a", 0, 0, 0)], 10)
    assert [removal.frees for removal in made.removals] == [10]


def test_seal_aheads_segments_go_first_and_only_as_many_as_it_takes() -> None:
    sizes = {0: 10, 1: 10, 2: 10, 3: 10}
    made = plan([bundle("a", 0)], 40, 25, sizes=sizes, ahead=[3, 0, 3, 1, 2])
    assert made == Plan((), (3, 1), 20)


def test_the_reason_is_for_people() -> None:
    candidates = [bundle("a", 0, created=1767323045.5, own=2 << 20)]
    candidates += [bundle(f"shared {number}", 1, created=1767323047 + number) for number in range(2)]
    sizes = {0: 10 << 20, 1: 1 << 20}
    first, second, third = plan(candidates, 40 << 20, 20 << 20, sizes=sizes).removals
    assert first.reason == (
        "lowest priority: cause terminated_instance, created 2026-01-02T03:04:05.500000Z; 12.0 MiB freed; "
        "40.0 MiB of 20.0 MiB used"
    )
    assert second.reason.startswith("lowest priority of those that share all their logs: ")
    assert third.reason.startswith("lowest priority: ")
    assert "; 1.0 MiB freed; 28.0 MiB of 20.0 MiB used" in third.reason


def test_the_reason_tells_that_bundles_before_it_free_nothing() -> None:
    candidates = [bundle("a", 0, created=1), bundle("b", 0, created=2), bundle("c", 1, created=3)]
    (removal,) = plan(candidates, 20, 10).removals
    assert removal.reason.startswith("lowest priority of those that free logs: ")


@pytest.mark.parametrize("created", [-1e18, 1e18])
def test_a_stamp_that_is_no_date_is_no_error(created: float) -> None:
    (removal,) = plan([bundle("debris", created=created, own=5)], 5).removals
    assert f"created {created:.0f} s after 1970" in removal.reason


class Counted(Sequence[int]):
    """References that count how often they are read through."""

    readings = 0

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.numbers[index]

    def __iter__(self) -> Any:
        Counted.readings += 1
        return iter(self.numbers)


def test_the_references_are_read_a_fixed_number_of_times() -> None:
    """Each bundle's a few times, however many bundles go before it: no quadratic restarts."""
    Counted.readings = 0
    count = 300
    # Neighbours share: a removal makes the next one free something.
    candidates = [
        Candidate(f"b{index:03}", "web", Cause.OTHER, 0.0, 1, Counted([index, index + 1])) for index in range(count)
    ]
    made = plan_removals(candidates, dict.fromkeys(range(count + 1), 10), (), 10**6, 0, CAUSE_FIRST, ())
    assert len(made.removals) == count
    assert Counted.readings <= 3 * count


contexts = st.builds(CleanupContext, st.floats(60, 86400), st.integers(1, 50), st.sampled_from(ORDERS))


@given(contexts)
def test_a_context_comes_back_to_the_nanosecond(context: CleanupContext) -> None:
    back = CleanupContext.from_json(json.loads(json.dumps(context.to_json())))
    assert back.period == pytest.approx(context.period, abs=1e-9, rel=0)
    assert (back.storage_limit, back.priority) == (context.storage_limit, context.priority)
    assert back.to_json() == context.to_json()


def test_the_shape_is_omicrons() -> None:
    assert CleanupContext().to_json() == {
        "period": {"secs": 600, "nanos": 0},
        "storage_limit": 25,
        "priority": ["cause", "time"],
    }
    assert CleanupContext(period=90.5).to_json()["period"] == {"secs": 90, "nanos": 500_000_000}


def test_what_is_not_given_stays() -> None:
    context = CleanupContext(period=90, storage_limit=7, priority=TIME_FIRST)
    assert context.changed() == context
    assert context.changed(period=120) == CleanupContext(120, 7, TIME_FIRST)
    assert context.changed(storage_limit=50) == CleanupContext(90, 50, TIME_FIRST)
    assert context.changed(priority=["cause", "time"]) == CleanupContext(90, 7, CAUSE_FIRST)


@pytest.mark.parametrize("period", [59.999, 86400.001, 0, -60, float("nan"), float("inf"), 10**400, True, "600", None])
def test_a_period_out_of_bounds_is_told_with_the_bounds(period: Any) -> None:
    with pytest.raises(UsageError, match="use 60 to 86400 seconds"):
        CleanupContext(period=period)


@pytest.mark.parametrize("limit", [0, 51, -1, 25.0, True, "25", None])
def test_a_storage_limit_out_of_bounds_is_told_with_the_bounds(limit: Any) -> None:
    with pytest.raises(UsageError, match="use 1 to 50, whole percent"):
        CleanupContext(storage_limit=limit)


@pytest.mark.parametrize("priority", [(), ("cause",), ("time", "time"), (*CAUSE_FIRST, "cause"), "cause,time", 5, [[]]])
def test_a_priority_that_is_no_permutation_is_told_with_those_allowed(priority: Any) -> None:
    with pytest.raises(UsageError, match="use cause,time or time,cause"):
        CleanupContext().changed(priority=priority)


@pytest.mark.parametrize(("period", "limit"), [(60, 1), (86400, 50)])
def test_bounds_are_allowed_themselves(period: int, limit: int) -> None:
    assert CleanupContext().changed(period=period, storage_limit=limit) == CleanupContext(period, limit)


@pytest.mark.parametrize(
    "period",
    [600, None, {}, {"secs": 600}, {"secs": 600, "nanos": 0, "more": 1}]
    + [{"secs": secs, "nanos": 0} for secs in (-1, 600.0, True, 10**400)]
    + [{"secs": 600, "nanos": nanos} for nanos in (-1, 10**9, 0.5)],
)
def test_a_period_of_another_shape_is_told_with_the_shape(period: object) -> None:
    with pytest.raises(UsageError, match=r'\{"secs": 600, "nanos": 0\}'):
        parse_period(period)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"period": {"secs": 600, "nanos": 0}, "storage_limit": 25},
        {"period": {"secs": 59, "nanos": 0}, "storage_limit": 25, "priority": ["cause", "time"]},
        {"period": {"secs": 600, "nanos": 0}, "storage_limit": None, "priority": ["cause", "time"]},
        {"period": {"secs": 600, "nanos": 0}, "storage_limit": 25, "priority": None},
    ],
)
def test_a_context_that_is_none_is_a_usage_error(data: object) -> None:
    with pytest.raises(UsageError, match=r"60 to 86400|1 to 50|cause,time|it needs period"):
        CleanupContext.from_json(data)


def test_an_error_shows_a_strangers_value_in_one_short_line() -> None:
    with pytest.raises(UsageError) as raised:
        CleanupContext().changed(priority=["\x1b[31m\n" * 100])
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 200
