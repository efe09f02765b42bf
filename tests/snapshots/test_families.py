import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zonebundle.snapshots.families import CURRENT, arrange, newest_first, parse
from zonebundle.snapshots.listing import Listed


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("app.log", ["app.log", "app.log.0", "app.log.1", "app.log.1.gz", "app.log.2.gz", "app.log.10.zst"]),
        ("app.log", ["app.log", "app.1.log", "app.2.log.gz", "app.11.log"]),
        ("app.log", ["app.log", "app.log-20260102", "app.log-20260101.gz", "app.log-20251231.xz"]),
        ("app.log", ["app.log", "app-2026-01-02.log", "app-2026-01-01.log.gz"]),
        ("app.log", ["app.log", "app.log.2026-01-02", "app.log.2026-01-01"]),
        ("app.log", ["app.log", "app.log-20260102-1767312000", "app.log-20260102-1767308400"]),
        ("app.log", ["app.log", "app.log-2026010210", "app.log-2026010209", "app.log-20260102"]),
        ("app.log", ["app.log", "app.log.1767312000", "app.log.1767308400", "app.log.1767308399.gz"]),
        ("app.log", ["app.log", "app.log.1", "app.log.2", "app.log.1767308399"]),
        ("app.log", ["app.log", "app.2026-01-02.1.log", "app.2026-01-02.0.log.gz", "app.2026-01-01.7.log.gz"]),
        ("app.log", ["app.log", "app.log.old"]),
        ("app.log", ["app.log", "app.log.gz", "app.log.1.gz"]),
        ("messages", ["messages", "messages.1", "messages.2.bz2"]),
        ("system-nexus:default.log", [f"system-nexus:default.log{end}" for end in ("", ".0", ".1", ".1700000000")]),
        ("Xorg.0.log", ["Xorg.0.log.old"]),
        (" odd\nname.log", [" odd\nname.log", " odd\nname.log.1"]),
    ],
)
def test_a_family_is_in_the_order_of_its_flow(family: str, names: list[str]) -> None:
    shuffled = random.sample(names, len(names))
    if names != ["Xorg.0.log.old"]:
        assert {parse(name)[0] for name in names} == {family}
        assert sorted(shuffled, key=lambda name: parse(name)[1]) == names
    assert [parse(name)[1] == CURRENT for name in names] == [name == family for name in names]


@pytest.mark.parametrize(
    "name",
    [
        "app.log",
        "app",
        "app-web.log",
        "worker-1.log",
        "2026.txt",
        "app.log~",
        ".log",
        "log.",
        "x.12345",
        "é.log",
        "a b",
    ],
)
def test_other_names_are_current(name: str) -> None:
    assert parse(name) == (name, CURRENT)


@given(st.text(max_size=255).filter(bool))
def test_any_name_has_a_family(name: str) -> None:
    family, age = parse(name)
    assert family
    assert (age == CURRENT) == (family == name)


def _listed(*names: str, directory: str = "log") -> list[Listed]:
    return [Listed(0, f"{directory}/{name}", (1, number), None) for number, name in enumerate(names, start=1)]


def test_the_current_file_is_the_one_without_a_mark_or_the_youngest() -> None:
    (family,) = arrange(_listed("app.log.1", "app.log", "app.log.2.gz")).values()
    assert family.current == (1, 2)
    (family,) = arrange(_listed("app-20260101.log", "app-20260103.log", "app-20260102.log")).values()
    assert family.current == (1, 2)
    (family,) = arrange(_listed("app.log.1.gz", "app.log.2.gz")).values()
    assert family.current is None


def test_families_are_kept_apart_by_tree_and_directory() -> None:
    files = [*_listed("app.log"), *_listed("app.log", directory="other"), Listed(1, "log/app.log", (1, 9), None)]
    assert len(arrange(files)) == 3


def test_the_newest_comes_first_but_no_file_before_its_successor() -> None:
    files = _listed("a.log", "a.log.1", "a.log.2", "b.log", "b.log.1")
    # a.log.2 was touched: it still comes after a.log.1, and so after b.log.
    stamps = {"a.log": 50, "a.log.1": 20, "a.log.2": 90, "b.log": 40, "b.log.1": 30}
    families = arrange(files).values()
    ordered = newest_first(families, lambda file: stamps[file.path.removeprefix("log/")])
    assert [file.path.removeprefix("log/") for file in ordered] == ["a.log", "b.log", "b.log.1", "a.log.1", "a.log.2"]
