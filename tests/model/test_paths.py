import json
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.model.paths import path_from_json, path_to_json, printable


@given(st.binary(), st.sampled_from(["path", "host_path"]))
def test_a_path_of_any_bytes_comes_back_from_json(path: bytes, key: str) -> None:
    assert path_from_json(json.loads(json.dumps(path_to_json(path, key))), key) == path


@given(st.text())
def test_a_path_of_text_is_readable_in_json(text: str) -> None:
    try:
        path = text.encode()
    except UnicodeEncodeError:
        return
    assert path_to_json(path) == {"path": text}


@given(st.one_of(st.text(), st.binary()))
def test_nothing_that_is_printed_drives_a_terminal_or_forges_a_line(path: str | bytes) -> None:
    shown = printable(path)
    assert len(shown.splitlines()) <= 1
    assert not [char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp", "Cs")]
    shown.encode()


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cf", "Zl", "Zp", "Cs"])))
def test_what_is_harmless_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (b"a\nb", r"a\x0ab"),
        (b"\x1b[31m", r"\x1b[31m"),
        (b"\xff\x80", r"\xff\x80"),
        ("left\u202eright", r"left\u202eright"),
        ("line\u2028end", r"line\u2028end"),
        ("tag\U000e0041", r"tag\U000e0041"),
        (os.fsdecode(b"\xc3("), r"\xc3("),
        ("plain é 漢 🙂", "plain é 漢 🙂"),
    ],
)
def test_escapes(path: bytes | str, shown: str) -> None:
    assert printable(path) == shown


def test_the_table_of_escapes_does_not_grow_with_what_strangers_write() -> None:
    everything = "\n".join(chr(code) for code in range(0x20, 0x30000, 3) if not 0xD800 <= code < 0xE000)
    printable(everything)
    from zonebundle.model import paths

    assert len(paths._ESCAPES) <= 4096
