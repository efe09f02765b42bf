import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.model.globs import compile_glob, matches_any, static_prefix


def reference(pattern: str, path: str) -> bool:
    """The meaning of a pattern, component by component, with the standard library's word for each."""

    def matches(parts: list[str], names: list[str]) -> bool:
        if not parts:
            return not names
        if parts[0] == "**":
            if len(parts) == 1:
                return bool(names)
            return any(matches(parts[1:], names[skip:]) for skip in range(len(names) + 1))
        return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and matches(parts[1:], names[1:])

    return matches([part for part in pattern.split("/") if part not in ("", ".")], path.split("/"))


_names = st.text(alphabet="ab-!]\n.^\\", min_size=1, max_size=4)
_paths = st.lists(_names, min_size=1, max_size=4).map("/".join)
_components = st.one_of(
    st.sampled_from(["**", "*", "?", "*a", "a*b", "[ab]", "[!a]", "[]a]", "[!]a]", "[a-b]x", "[!-a]", "[\\]", "[^a]"]),
    _names,
)
_patterns = st.lists(_components, min_size=1, max_size=4).map("/".join)


@given(_patterns, _paths)
def test_a_glob_means_what_the_reference_says(pattern: str, path: str) -> None:
    assert bool(compile_glob(pattern).fullmatch(path)) == reference(pattern, path)


@given(st.text(alphabet="[]!^-&|~#ab*?/\\.é\n", max_size=20), st.text(max_size=20))
def test_no_pattern_fails_to_compile(pattern: str, path: str) -> None:
    matches_any(path, (pattern,))


@given(_patterns, _paths)
def test_whatever_matches_lies_below_the_static_prefix(pattern: str, path: str) -> None:
    prefix = static_prefix(pattern)
    if matches_any(path, (pattern,)):
        assert not prefix or path.startswith(prefix + "/")


@pytest.mark.parametrize(
    ("pattern", "path", "does"),
    [
        ("var/log/**", "var/log/app.log", True),
        ("var/log/**", "var/log/a/b/c", True),
        ("var/log/**", "var/log", False),
        ("var/log/**", "var/logs/a", False),
        ("/var/log/*", "var/log/a", True),
        ("**/*.log", "a.log", True),
        ("**/*.log", "x/y/a.log", True),
        ("logs/*", "logs/a/b", False),
        ("*", "a\nb", True),
        ("**", "\udcff/x", True),
        ("./a//b/", "a/b", True),
        ("[z-a]", "[z-a]", True),
        ("[", "[", True),
    ],
)
def test_examples(pattern: str, path: str, does: bool) -> None:
    assert matches_any(path, (pattern,)) is does


def test_any_of_several_is_enough_and_none_chooses_nothing() -> None:
    assert matches_any("b", ("a", "b"))
    assert not matches_any("b", ())


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [("var/log/**", "var/log"), ("**", ""), ("a/b*/c", "a"), ("a/b", "a"), ("/x/[y]/z", "x"), ("file", "")],
)
def test_static_prefix(pattern: str, prefix: str) -> None:
    assert static_prefix(pattern) == prefix


def test_repeated_stars_do_not_take_for_ever() -> None:
    # A zone chooses the path: this one took seconds when each `**` was tried against each of its directories.
    assert not matches_any("a/" * 1000 + "b", ("/".join(["**"] * 30) + "/x",))
    assert isinstance(compile_glob("**/**/**"), re.Pattern)
