import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import leaks, power
from support.flipping import Sample
from support.power import Crash, Place, Report
from zonebundle.errors import StoreError, UsageError
from zonebundle.store.store import Store
from zonebundle.store.tombstones import Tombstones

ONE = "11111111-2222-3333-4444-555555555555"
TWO = "aaaaaaaa-2222-3333-4444-555555555555"


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """A state directory and two store dirs."""
    (tmp_path / "state").mkdir()
    for name in ("one", "two"):
        Store.open(tmp_path / name).close()
    return [tmp_path / "state", tmp_path / "one", tmp_path / "two"]


def test_a_tombstone_is_in_every_directory_until_it_is_removed(roots: list[Path]) -> None:
    tombstones = Tombstones(roots)
    assert not tombstones.has(ONE)
    assert tombstones.all() == set()
    with leaks.no_leaks():
        tombstones.write(ONE)
        tombstones.write(ONE.upper())
        tombstones.write(TWO)
        for root in roots:
            alone = Tombstones([root])
            assert alone.has(ONE)
            assert alone.all() == {ONE, TWO}
            assert stat.S_IMODE((root / "tombstones").stat().st_mode) == 0o700
            assert stat.S_IMODE((root / "tombstones" / ONE).stat().st_mode) == 0o600
        tombstones.remove(ONE)
        tombstones.remove(ONE)
    assert not tombstones.has(ONE)
    assert tombstones.all() == {TWO}


def test_one_directory_that_has_it_is_enough(roots: list[Path]) -> None:
    for root in roots:
        Tombstones([root]).write(ONE)
        assert Tombstones(roots).has(ONE)
        assert Tombstones(roots).all() == {ONE}
        Tombstones(roots).remove(ONE)
        assert not Tombstones(roots).has(ONE)


def test_a_store_with_tombstones_can_be_opened(sample: Sample) -> None:
    Tombstones([sample.directory]).write(ONE)
    with Store.open(sample.directory) as store:
        assert len(list(store.bundles())) == 3
    assert Tombstones([sample.directory]).has(ONE)


def test_foreign_names_are_ignored_and_never_removed(roots: list[Path]) -> None:
    tombstones = Tombstones(roots)
    tombstones.write(ONE)
    names = {"README", f".{TWO}.17.tmp", TWO.upper(), TWO.replace("-", "")}
    for name in names:
        (roots[0] / "tombstones" / name).write_bytes(b"")
    assert tombstones.all() == {ONE}
    for bad in ("README", "../one/format", ""):
        for method in (tombstones.write, tombstones.has, tombstones.remove):
            with pytest.raises(UsageError):
                method(bad)
    tombstones.remove(ONE)
    assert set(os.listdir(roots[0] / "tombstones")) == names


def test_a_directory_that_is_away_gets_none(roots: list[Path], tmp_path: Path) -> None:
    """Not mounted, or not made yet: whatever is written there is in the way later."""
    away, empty = tmp_path / "away", tmp_path / "empty"
    empty.mkdir()
    tombstones = Tombstones([*roots, away, empty])
    tombstones.write(ONE)
    assert tombstones.has(ONE)
    assert not away.exists()
    assert list(empty.iterdir()) == []
    Store.open(empty).close()
    tombstones.write(TWO)
    assert Tombstones([empty]).all() == {TWO}


def test_it_takes_only_one_directory_that_can_be_written(roots: list[Path]) -> None:
    tombstones = Tombstones(roots)
    for root in roots[:2]:
        (root / "tombstones").write_bytes(b"a file in the way")
    tombstones.write(ONE)
    assert tombstones.has(ONE)
    assert tombstones.all() == {ONE}
    tombstones.remove(ONE)
    (roots[2] / "tombstones").rmdir()
    (roots[2] / "tombstones").write_bytes(b"")
    with pytest.raises(StoreError, match=f"writing a tombstone of bundle {ONE} failed"):
        tombstones.write(ONE)
    with pytest.raises(StoreError, match="there is no directory for it"):
        Tombstones([]).write(ONE)


def test_what_cannot_be_read_hides_nothing(roots: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tombstones = Tombstones(roots)
    tombstones.write(ONE)
    bad = {str(roots[0])}
    for name in ("stat", "listdir", "unlink"):
        monkeypatch.setattr(os, name, _failing(getattr(os, name), bad))
    assert tombstones.has(ONE)
    assert tombstones.all() == {ONE}
    with pytest.raises(StoreError, match="removing"):
        tombstones.remove(ONE)
    assert not Tombstones(roots[1:]).has(ONE)
    bad.update(map(str, roots))
    for look in (lambda: tombstones.has(ONE), tombstones.all):
        with pytest.raises(StoreError, match=r"reading .*input/output error"):
            look()


def _failing(real: Callable[..., Any], bad: set[str]) -> Callable[..., Any]:
    def call(path: Any, *arguments: Any, **options: Any) -> Any:
        if any(str(path).startswith(f"{root}/tombstones") for root in bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **options)

    return call


def test_a_tombstone_that_was_written_survives_a_power_cut(tmp_path: Path) -> None:
    def make(base: Path) -> Place:
        (base / "root/state").mkdir(parents=True)
        (base / "graveyard").mkdir()
        return Place(base / "root", base / "graveyard")

    def write(place: Place, report: Report) -> None:
        Tombstones([place.directory / "state"]).write(ONE)
        report("written")

    def check(place: Place, crash: Crash) -> None:
        tombstones = Tombstones([place.directory / "state"])
        assert tombstones.has(ONE) or "written" not in crash.reports
        tombstones.write(ONE)
        assert tombstones.all() == {ONE}

    assert len(power.crash_before_every_change(tmp_path, "names", make, write, check)) > 4
