"""Rotation at the worst moment, one step after the other: after a listing, or just before a file is taken."""

import gzip
import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest

from support.staging import Kept, keep
from zonebundle.snapshots import staged
from zonebundle.snapshots.base import Kind
from zonebundle.snapshots.listing import Key, Listed, Listing, TreeListing

Action = Callable[[], object]


class Script:
    """Does things at given moments of a staging of `log`, whose directory is `directory`."""

    def __init__(self, directory: Path, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.staging = staging
        self._after_listing: dict[int, Action] = {}
        self._before: dict[str, Action] = {}
        self.listings = 0
        look, stage = TreeListing.look, staged._Staging._stage

        def scripted_look(listing: TreeListing, known: Container[Key], is_over: Callable[[], bool]) -> Listing:
            found = look(listing, known, is_over)
            self.listings += 1
            self._after_listing.pop(self.listings, lambda: None)()
            return found

        def scripted_stage(staging: Any, file: Listed, **options: Any) -> None:
            self._before.pop(file.path, lambda: None)()
            stage(staging, file, **options)

        monkeypatch.setattr(TreeListing, "look", scripted_look)
        monkeypatch.setattr(staged._Staging, "_stage", scripted_stage)

    def after_listing(self, number: int, action: Action) -> None:
        self._after_listing[number] = action

    def before(self, path: str, action: Action) -> None:
        """Before what is found under `path` is taken for the first time."""
        self._before[path] = action

    def keep(self, kind: Kind = Kind.COPY, **options: Any) -> Kept:
        kept = keep(self.directory, self.staging, kind, **options)
        assert not self._after_listing, "not all moments came"
        assert not self._before, "not all moments came"
        return kept

    # What writers and rotation do.

    def path(self, name: str) -> Path:
        return self.directory / name

    def write(self, name: str, lines: str) -> None:
        with self.path(name).open("a") as file:
            file.write("".join(f"{line}\n" for line in lines.split()))

    def rename(self, name: str, to: str) -> None:
        self.path(name).rename(self.path(to))

    def copy_and_truncate(self, name: str, to: str) -> None:
        content = self.path(name).read_bytes()
        self.path(to).write_bytes(content)
        os.truncate(self.path(name), 0)

    def compress(self, name: str, to: str) -> None:
        self.path(to).write_bytes(gzip.compress(self.path(name).read_bytes()))
        self.path(name).unlink()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    (tmp_path / "zone").mkdir()
    return Script(tmp_path / "zone", tmp_path / "staging", monkeypatch)


def _lines(kept: Kept) -> list[str]:
    """Every line, in the order of the numbers, each as often as it is there."""
    texts = [
        gzip.decompress(kept.content(log)) if log.path.endswith(b".gz") else kept.content(log) for log in kept.logs
    ]
    return sorted(b"".join(texts).decode().split(), key=int)


def _all_of(*actions: Action) -> Action:
    return lambda: [action() for action in actions]


@pytest.mark.parametrize("to", ["app.log.1", "app.log-20260101", "app.log~"])
def test_renamed_after_the_listing(script: Script, to: str) -> None:
    script.write("app.log", "1 2")
    script.after_listing(
        1,
        _all_of(
            lambda: script.rename("app.log", to),
            # The writer goes on in the old file until it is told to open the new one.
            lambda: script.write(to, "3"),
            lambda: script.write("app.log", "4"),
        ),
    )
    kept = script.keep()
    assert _lines(kept) == ["1", "2", "3", "4"]
    assert kept.gaps == []
    assert set(kept.paths) == {"app.log", to}


@pytest.mark.parametrize("to", ["app.log.1", "app.log-20260101", "app.log~"])
def test_renamed_after_it_was_taken(script: Script, to: str) -> None:
    script.write("app.log", "2 3")
    script.write("app.log.5", "1")
    script.before("app.log.5", _all_of(lambda: script.rename("app.log", to), lambda: script.write("app.log", "5 6")))
    # Only then, when both are there already, the last line comes into the old one.
    script.after_listing(2, lambda: script.write(to, "4"))
    kept = script.keep()
    assert _lines(kept) == ["1", "2", "3", "4", "5", "6"]
    assert kept.contents[to] == b"2\n3\n4\n"
    assert kept.gaps == []


@pytest.mark.parametrize("to", ["app.log.1", "app.log-20260101", "app.log~"])
def test_taken_between_the_renaming_and_the_reopening(script: Script, to: str) -> None:
    script.write(to, "1 2")
    # Already renamed, and the writer has not opened a new one yet: it does after the old one was taken.
    script.write("trigger", "0")
    os.utime(script.path("trigger"), (1, 1))
    script.before("trigger", _all_of(lambda: script.write(to, "3"), lambda: script.write("app.log", "4")))
    kept = script.keep()
    assert _lines(kept) == ["0", "1", "2", "3", "4"]
    assert kept.gaps == []


@pytest.mark.parametrize("copy", ["app.log.1", "backup"])
def test_truncated_after_the_listing(script: Script, copy: str) -> None:
    script.write("app.log", "1 2")
    script.after_listing(
        1, _all_of(lambda: script.copy_and_truncate("app.log", copy), lambda: script.write("app.log", "3"))
    )
    kept = script.keep()
    assert _lines(kept) == ["1", "2", "3"]
    assert kept.gaps == []


@pytest.mark.parametrize("copy", ["app.log.1", "backup"])
def test_truncated_while_the_copy_was_incomplete(script: Script, copy: str) -> None:
    script.write("app.log", "1 2 3")
    script.write(copy, "1")
    # Taken before the log, or after: the copy is complete only when the log is cut.
    order = ["app.log", copy] if copy == "app.log.1" else [copy, "app.log"]
    for age, name in enumerate(order):
        os.utime(script.path(name), (2_000_000_000 - age,) * 2)
    script.before(
        "app.log",
        _all_of(
            lambda: script.write(copy, "2 3"),
            lambda: os.truncate(script.path("app.log"), 0),
            lambda: script.write("app.log", "4"),
        ),
    )
    kept = script.keep()
    assert set(_lines(kept)) == {"1", "2", "3", "4"}
    assert kept.gaps == []


def test_truncated_while_the_empty_copy_was_listed(script: Script) -> None:
    script.write("app.log", "1 2 3")
    script.write("app.log.1", "")
    script.before(
        "app.log",
        _all_of(lambda: script.copy_and_truncate("app.log", "app.log.1"), lambda: script.write("app.log", "4")),
    )
    kept = script.keep()
    assert _lines(kept) == ["1", "2", "3", "4"]


def test_truncated_after_it_was_taken_and_looked_at_again(script: Script) -> None:
    script.write("app.log", "1 2")
    script.write("other.log", "0")
    os.utime(script.path("other.log"), (1, 1))
    # Something new makes everything be looked at again, and meanwhile the log was cut without a copy.
    script.before("other.log", lambda: script.write("new.log", "9"))
    script.after_listing(
        2, _all_of(lambda: os.truncate(script.path("app.log"), 0), lambda: script.write("app.log", "3"))
    )
    kept = script.keep()
    assert _lines(kept) == ["0", "1", "2", "3", "9"]
    assert kept.paths.count("app.log") == 2


def test_shifted_under_its_hands(script: Script) -> None:
    for age in range(5):
        script.write(f"app.log.{age}" if age else "app.log", str(5 - age))

    def shift() -> None:
        for age in range(8, 0, -1):
            if script.path(f"app.log.{age}").exists():
                script.rename(f"app.log.{age}", f"app.log.{age + 1}")
        script.rename("app.log", "app.log.1")
        script.write("app.log.1", "6")
        script.write("app.log", "7")

    script.before("app.log.2", shift)
    kept = script.keep()
    assert _lines(kept) == [str(number) for number in range(1, 8)]
    assert kept.gaps == []
    assert kept.paths == ["app.log", *(f"app.log.{age}" for age in range(1, 6))]


def test_compressed_under_its_hands(script: Script) -> None:
    script.write("app.log", "3")
    script.write("app.log.1", "2")
    script.write("app.log.2", "1")
    script.compress("app.log.2", "app.log.2.gz")
    script.before("app.log.1", lambda: script.compress("app.log.1", "app.log.1.gz"))
    kept = script.keep()
    assert _lines(kept) == ["1", "2", "3"]
    assert kept.gaps == []


def test_an_inode_number_that_is_used_again_is_another_file(script: Script) -> None:
    script.write("app.log", "2")
    script.write("app.log.1", "1")
    inode = script.path("app.log.1").stat().st_ino

    def reuse() -> None:
        script.path("app.log.1").unlink()
        for number in range(100):
            script.write(f"app.log.{number + 2}", "3")
            if script.path(f"app.log.{number + 2}").stat().st_ino == inode:
                return
        pytest.skip("this file system does not use inode numbers again")

    script.after_listing(2, reuse)
    script.before("app.log.1", lambda: script.write("trigger", "9"))
    kept = script.keep()
    assert {"1", "2", "3", "9"} == set(_lines(kept))


def test_moved_to_another_directory(script: Script) -> None:
    script.path("archive").mkdir()
    script.write("app.log", "2")
    script.write("app.log.1", "1")
    script.before("app.log.1", lambda: script.rename("app.log.1", "archive/app.log.1767225600"))
    kept = script.keep()
    assert kept.contents == {"app.log": b"2\n", "archive/app.log.1767225600": b"1\n"}


def test_removed_from_the_end_is_no_gap(script: Script) -> None:
    script.write("app.log", "3")
    script.write("app.log.1", "2")
    script.write("app.log.2", "1")
    script.before("app.log.2", lambda: script.path("app.log.2").unlink())
    kept = script.keep()
    assert _lines(kept) == ["2", "3"]
    assert kept.gaps == []


def test_removed_from_the_middle_is_a_gap(script: Script) -> None:
    script.write("app.log", "3")
    script.write("app.log.1", "2")
    script.write("app.log.2", "1")
    script.before("app.log.1", lambda: script.path("app.log.1").unlink())
    kept = script.keep()
    assert _lines(kept) == ["1", "3"]
    assert [gap.what for gap in kept.gaps] == ["logs/zone/app.log.1"]


def test_removed_after_it_was_taken_is_kept(script: Script) -> None:
    script.write("app.log", "2")
    script.write("app.log.1", "1")
    script.before("app.log.1", lambda: script.path("app.log").unlink())
    assert script.keep().contents == {"app.log": b"2\n", "app.log.1": b"1\n"}


def test_what_never_rests_is_told(script: Script) -> None:
    script.write("app.log", "0")
    for number in range(1, 7):
        script.after_listing(number, lambda number=number: script.write(f"app.log.{number}", "1"))  # type: ignore[misc]
    kept = script.keep()
    assert script.listings == 6
    (gap,) = kept.gaps
    assert gap.what == "logs/zone"
    assert "6 listings" in gap.reason


def test_growth_alone_is_no_reason_to_look_again(script: Script) -> None:
    script.write("app.log", "1")
    script.write("app.log.1", "0")
    script.before("app.log.1", lambda: script.write("app.log", "2"))
    kept = script.keep()
    assert script.listings == 2
    assert _lines(kept) == ["0", "1"]


def test_what_grew_when_time_was_up_is_read_behind(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write("app.log", "1")

    def rotate_late() -> None:
        monkeypatch.setattr(staged._Staging, "_is_late", lambda _: True)
        script.rename("app.log", "app.log.1")
        script.write("app.log.1", "2")
        script.write("app.log", "3")

    script.write("other.log", "0")
    os.utime(script.path("other.log"), (1, 1))
    script.before("other.log", rotate_late)
    kept = script.keep()
    assert kept.origins("app.log.1") == ["staged", "live"]
    assert kept.contents == {"app.log": b"3\n", "app.log.1": b"1\n2\n", "other.log": b"0\n"}
    assert kept.gaps == []


@pytest.mark.parametrize("kind", [Kind.REFLINK, Kind.HARDLINK])
def test_the_other_kinds_follow_too(xfs_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    (xfs_dir / "zone").mkdir()
    script = Script(xfs_dir / "zone", xfs_dir / "staging", monkeypatch)
    script.write("app.log", "2 3")
    script.write("app.log.1", "1")

    def rotate() -> None:
        script.rename("app.log.1", "app.log.2")
        script.rename("app.log", "app.log.1")
        script.write("app.log.1", "4")
        script.write("app.log", "5")

    script.before("app.log.1", rotate)
    kept = script.keep(kind)
    assert kept.contents == {"app.log": b"5\n", "app.log.1": b"2\n3\n4\n", "app.log.2": b"1\n"}
    assert kept.gaps == []
