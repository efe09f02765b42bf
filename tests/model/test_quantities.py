import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.model.quantities import format_seconds, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("0", 0),
        ("64MiB", 64 << 20),
        ("64mib", 64 << 20),
        (" 1.5 GB ", 1_500_000_000),
        ("1K", 1000),
        ("1Ki", 1024),
        ("0.5KiB", 512),
        ("2PiB", 2 << 50),
        ("10B", 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1 2", "1XB", "1.MiB", ".5", "1e3", "1KBB", "١x", "0x10", "MiB", "nan"]
)
def test_what_is_no_size_is_a_value_error_that_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="64MiB"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 80))
def test_a_size_in_bytes_is_exact_whatever_its_length(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}KiB") == size << 10


@given(st.text())
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2s", 2),
        ("500ms", 0.5),
        ("10", 10),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1.5d", 129600),
        ("0s", 0),
        (" 3 m ", 180),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "5x", "5m5", "-1s", "1e3s", "1s,2s", "ms", "1 0", "inf", "nan", "9" * 400, "9" * 400 + "d"]
)
def test_what_is_no_duration_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@given(st.integers(0, 10**9), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_a_duration_is_its_number_times_its_unit(number: int, unit: str) -> None:
    factor = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    assert parse_duration(f"{number}{unit}") == pytest.approx(number * factor)


@given(st.integers(0, 1 << 60))
def test_a_formatted_size_is_near_the_size(size: int) -> None:
    text = format_size(size)
    assert parse_size(text) == pytest.approx(size, rel=0.06, abs=1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0041, "4.1 ms"), (2.34, "2.3 s"), (60, "60.0 s"), (720, "12 min"), (0, "0.0 ms")]
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
