import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.model.globs import matches_any
from zonebundle.model.zone import LogTree
from zonebundle.snapshots.wanted import Wanted


def _wanted(*patterns: str, prefix: str = "") -> Wanted:
    return Wanted(LogTree("zone", "/srv", patterns, prefix))


@pytest.mark.parametrize(
    ("patterns", "prefix", "tops"),
    [
        (["**"], "", [""]),
        (["var/log/**", "var/svc/log/*.log"], "", ["var/log", "var/svc/log"]),
        (["var/log/**", "var/log/nginx/*"], "", ["var/log"]),
        (["var/*/log/**"], "", ["var"]),
        (["var/log/**"], "var/log", [""]),
        (["var/log/**"], "var/log/nginx", [""]),
        (["var/log/nginx/**", "opt/**"], "var/log", ["nginx"]),
        (["opt/**"], "var/log", []),
        (["var/logs/**"], "var/log", []),
        (["console.log*"], "", [""]),
    ],
)
def test_it_is_looked_only_where_something_can_be(patterns: list[str], prefix: str, tops: list[str]) -> None:
    assert sorted(_wanted(*patterns, prefix=prefix).tops) == sorted(tops)


def test_what_is_wholly_wanted_is_known() -> None:
    wanted = _wanted("var/log/**", "opt/*.log")
    assert wanted.covers("var/log")
    assert wanted.covers("var/log/nginx")
    assert not wanted.covers("var")
    assert not wanted.covers("var/logs")
    assert not wanted.covers("opt")
    assert _wanted("**").covers("")
    assert _wanted("var/log/**", prefix="var/log").covers("")


def test_directories_below_which_nothing_matches_are_not_reached() -> None:
    wanted = _wanted("logs/*.log", "deep/**/*.log", "a/*/c/*.log")
    assert wanted.reaches("logs")
    assert not wanted.reaches("logs/archive")
    assert not wanted.reaches("other")
    assert wanted.reaches("deep/er/still")
    assert wanted.reaches("a/b/c")
    assert not wanted.reaches("a/b/d")


_PARTS = st.sampled_from(["a", "b", "log", "*", "**", "a*", "?", "[ab]", "x.log", "*.log"])
_PATTERNS = st.lists(st.lists(_PARTS, min_size=1, max_size=4).map("/".join), min_size=1, max_size=3)
_NAMES = st.sampled_from(["a", "b", "log", "x.log", "ab", "c"])


@given(_PATTERNS, st.lists(_NAMES, max_size=2).map("/".join), st.lists(_NAMES, min_size=1, max_size=4))
def test_a_wanted_file_is_always_found(patterns: list[str], prefix: str, names: list[str]) -> None:
    wanted = _wanted(*patterns, prefix=prefix)
    path = "/".join(names)
    joined = f"{prefix}/{path}" if prefix else path
    assert wanted.matches(path) == matches_any(joined, tuple(patterns))
    above = ["/".join(names[:count]) for count in range(len(names))]
    if wanted.matches(path):
        tops = [directory for directory in above if directory in wanted.tops]
        assert len(tops) == 1, "exactly one walk comes there"
        between = itertools.dropwhile(lambda directory: directory != tops[0], above)
        assert all(wanted.covers(directory) or wanted.reaches(directory) for directory in between)
    if any(wanted.covers(directory) for directory in above):
        assert wanted.matches(path)
