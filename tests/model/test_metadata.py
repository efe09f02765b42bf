import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.model.metadata import Cause, Metadata, format_time, parse_time

_zone_names = st.text(alphabet="abcXYZ019._@:-", min_size=1, max_size=200)


@given(_zone_names, st.uuids(), st.floats(0, 4e9), st.sampled_from(Cause))
def test_the_toml_is_read_by_tomllib_and_has_omicrons_keys(zone: str, bundle: object, now: float, cause: Cause) -> None:
    metadata = Metadata(zone, str(bundle), format_time(now), cause)
    assert tomllib.loads(metadata.to_toml().decode()) == {
        "time_created": metadata.time_created,
        "version": 0,
        "cause": str(cause),
        "id": {"zone_name": zone, "bundle_id": str(bundle)},
    }


@given(st.floats(0, 4e9))
def test_a_time_comes_back_to_the_microsecond(seconds: float) -> None:
    text = format_time(seconds)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)
    assert parse_time(text) == pytest.approx(seconds, abs=1e-6)


@given(st.lists(st.floats(0, 4e9), min_size=2, max_size=5))
def test_times_sort_as_text(moments: list[float]) -> None:
    assert sorted(map(format_time, moments)) == [format_time(moment) for moment in sorted(moments)]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1970-01-01T00:00:00Z", 0), ("1970-01-01T01:00:00+01:00", 0), ("2026-01-02T03:04:05.5Z", 1767323045.5)],
)
def test_times_with_an_offset(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["2026-01-02T03:04:05", "2026-01-02", "", "yesterday"])
def test_a_time_without_an_offset_is_refused_and_not_taken_for_local(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_time(text)


def test_causes_are_ordered_as_omicrons() -> None:
    ordered = sorted(Cause, key=lambda cause: cause.priority)
    assert [str(cause) for cause in ordered] == ["other", "unexpected_zone", "terminated_instance", "explicit_request"]
