from pathlib import Path

import pytest

from zonebundle.host.pressure import read_pressure


def test_the_share_of_the_last_ten_seconds_is_read(tmp_path: Path) -> None:
    (tmp_path / "io").write_text(
        "some avg10=41.53 avg60=0.87 avg300=0.35 total=1157622\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    assert read_pressure("io", tmp_path) == 41.53


@pytest.mark.parametrize("text", ["", "full avg10=99.00 total=0\n", "some total=1\n"])
def test_where_the_kernel_does_not_tell_there_is_none(tmp_path: Path, text: str) -> None:
    assert read_pressure("cpu", tmp_path) == 0.0
    (tmp_path / "cpu").write_text(text)
    assert read_pressure("cpu", tmp_path) == 0.0


def test_this_host_tells_something_or_nothing() -> None:
    assert 0.0 <= read_pressure("cpu") <= 100.0
