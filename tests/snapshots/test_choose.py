import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import filesystems
from support.staging import keep
from support.users import OrdinaryUser
from zonebundle.snapshots import choose as module
from zonebundle.snapshots.base import Choice, Kind, StagingRules
from zonebundle.snapshots.choose import choose

_root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    module.forget()
    yield
    module.forget()


def _choose(path: Path, rules: StagingRules) -> Choice:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return choose(descriptor, str(path), rules)
    finally:
        os.close(descriptor)


@contextmanager
def _bound(source: Path, target: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def _mount_of(directory: Path) -> Path:
    return next(path for path in (directory, *directory.parents) if os.path.ismount(path))


def _zone(directory: Path) -> tuple[Path, StagingRules]:
    (directory / "zone" / "log").mkdir(parents=True)
    (directory / "state").mkdir(mode=0o700)
    return directory / "zone", StagingRules(state_dir=str(directory / "state"), zone_roots=(str(directory / "zone"),))


@pytest.mark.parametrize(
    ("filesystem", "kind"),
    [("btrfs", Kind.BTRFS), ("xfs", Kind.REFLINK), ("ext4", Kind.HARDLINK)],
)
def test_the_kind_is_what_the_filesystem_can_do(
    request: pytest.FixtureRequest, filesystem: str, kind: Kind, leak_check: None
) -> None:
    directory: Path = request.getfixturevalue(f"{filesystem}_dir")
    zone, rules = _zone(directory)
    choice = _choose(zone, rules)
    assert (choice.kind, choice.staging, choice.warning) == (kind, str(directory / "state" / "staging"), "")
    assert (directory / "state" / "staging").stat().st_mode & 0o7777 == 0o700
    assert list((directory / "state" / "staging").iterdir()) == [], "trials leave nothing"
    assert (choice.group is not None) == (kind is Kind.BTRFS)


def test_memory_is_copied_into_the_spool(tmpfs_dir: Path, leak_check: None) -> None:
    zone, rules = _zone(tmpfs_dir)
    choice = _choose(zone, rules)
    assert (choice.kind, choice.staging) == (Kind.COPY, None)
    assert "tmpfs does not outlive the zone" in choice.warning
    assert str(zone) in choice.warning


def test_the_roots_of_many_zones_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For each directory of each zone all were: an agent with 300 zones took four times as long to start.
    (tmp_path / "state").mkdir(mode=0o700)
    roots = [tmp_path / f"zone-{number}" for number in range(20)]
    for root in roots:
        root.mkdir()
    rules = StagingRules(state_dir=str(tmp_path / "state"), zone_roots=tuple(map(str, roots)))
    resolved: list[str] = []
    real = os.path.realpath

    def counting(path: str) -> str:
        resolved.append(path)
        return real(path)

    monkeypatch.setattr(os.path, "realpath", counting)
    for root in roots:
        _choose(root, rules)
    assert sorted(path for path in resolved if path in rules.zone_roots) == sorted(rules.zone_roots)


def test_a_root_that_is_moved_is_resolved_again(
    ext4_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY", 0.0)
    zone, _ = _zone(ext4_dir)
    link = tmp_path / "link"
    rules = StagingRules(state_dir=str(ext4_dir / "state"), zone_roots=(str(link),))
    link.symlink_to(zone)
    assert _choose(zone, rules).kind is Kind.HARDLINK
    link.unlink()
    link.symlink_to(_mount_of(ext4_dir))
    assert "inside the root of a zone" in _choose(zone / "log", rules).warning


def test_the_operators_directory_comes_first(ext4_dir: Path) -> None:
    zone, rules = _zone(ext4_dir)
    own = ext4_dir / "own"
    configured = StagingRules({str(_mount_of(ext4_dir)): str(own)}, rules.state_dir, rules.zone_roots)
    assert _choose(zone, configured).staging == str(own)
    elsewhere = StagingRules({"/elsewhere": str(own)}, rules.state_dir, rules.zone_roots)
    assert _choose(zone, elsewhere).staging == str(ext4_dir / "state" / "staging")


def test_without_the_state_directory_it_is_at_the_mount_point(ext4_dir: Path, tmp_path: Path) -> None:
    zone, _ = _zone(ext4_dir)
    point = _mount_of(ext4_dir)
    choice = _choose(zone, StagingRules(state_dir=str(tmp_path), zone_roots=(str(zone),)))
    assert (choice.kind, choice.staging) == (Kind.HARDLINK, str(point / ".zone-bundle"))
    (point / ".zone-bundle").rmdir()
    assert list(tmp_path.iterdir()) == [], "nothing is made on another file system"


def test_inside_a_zones_mount_it_is_the_nearest_directory_outside_every_zone(ext4_dir: Path, tmp_path: Path) -> None:
    zone, _ = _zone(ext4_dir)
    roots = (str(_mount_of(ext4_dir) / ".zone-bundle"), str(zone))
    choice = _choose(zone / "log", StagingRules(state_dir=str(tmp_path), zone_roots=roots))
    assert (choice.kind, choice.staging) == (Kind.HARDLINK, str(ext4_dir / ".zone-bundle"))


def test_nothing_is_put_into_a_zone(ext4_dir: Path, tmp_path: Path) -> None:
    zone, _ = _zone(ext4_dir)
    before = sorted(ext4_dir.rglob("*"))
    root = tmp_path / "link"
    root.symlink_to(_mount_of(ext4_dir))
    choice = _choose(zone, StagingRules(state_dir=str(tmp_path), zone_roots=(str(root),)))
    assert choice.kind is Kind.COPY
    assert "inside the root of a zone" in choice.warning
    assert sorted(ext4_dir.rglob("*")) == before


@_root_only
@pytest.mark.parametrize("trouble", ["other's", "open to others", "a file", "a link"])
def test_a_staging_directory_that_is_not_ours_is_not_used(ext4_dir: Path, trouble: str) -> None:
    zone, rules = _zone(ext4_dir)
    staging = ext4_dir / "state" / "staging"
    if trouble == "a file":
        staging.touch()
    elif trouble == "a link":
        (ext4_dir / "target").mkdir(mode=0o700)
        staging.symlink_to(ext4_dir / "target")
    else:
        staging.mkdir(mode=0o777 if trouble == "open to others" else 0o700)
        staging.chmod(0o777 if trouble == "open to others" else 0o700)
        os.chown(staging, 1000 if trouble == "other's" else 0, 0)
    point = _mount_of(ext4_dir)
    choice = _choose(zone, rules)
    assert choice.staging == str(point / ".zone-bundle")
    (point / ".zone-bundle").rmdir()


@_root_only
def test_a_directory_in_which_others_may_rename_is_no_place(ext4_dir: Path, tmp_path: Path) -> None:
    zone, _ = _zone(ext4_dir)
    rules = StagingRules(state_dir=str(tmp_path), zone_roots=(str(_mount_of(ext4_dir) / ".zone-bundle"), str(zone)))
    ext4_dir.chmod(0o777)
    assert "others may write" in _choose(zone, rules).warning
    os.chown(ext4_dir, 1000, 1000)
    ext4_dir.chmod(0o755)
    module.forget()
    assert "others may write" in _choose(zone, rules).warning
    ext4_dir.chmod(0o1777)
    os.chown(ext4_dir, 0, 0)
    module.forget()
    assert _choose(zone, rules).kind is Kind.HARDLINK


@_root_only
def test_through_a_bind_mount_reflinks_work_and_links_do_not(xfs_dir: Path, ext4_dir: Path, leak_check: None) -> None:
    for directory, kind in ((xfs_dir, Kind.REFLINK), (ext4_dir, Kind.COPY)):
        zone, rules = _zone(directory)
        with _bound(zone, zone):
            choice = _choose(zone, rules)
            assert choice.kind is kind
            if choice.staging is not None:
                (zone / "app.log").write_bytes(b"x")
                kept = keep(zone, Path(choice.staging), kind)
                assert kept.contents == {"app.log": b"x"}
                assert kept.steps == []


def test_an_xfs_without_reflinks_gets_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(filesystems.MAKE, "xfs", ["mkfs.xfs", "-q", "-m", "reflink=0"])
    try:
        with filesystems.mounted("xfs", tmp_path) as point:
            zone, rules = _zone(point)
            assert _choose(zone, rules).kind is Kind.HARDLINK
    except filesystems.Unavailable as error:
        pytest.skip(str(error))


def test_it_is_remembered(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone, rules = _zone(ext4_dir)
    first = _choose(zone, rules)

    def refuse(*_: object) -> None:
        raise AssertionError("it was tried again")

    monkeypatch.setattr(module, "_try", refuse)
    assert _choose(zone, rules) == first
    same = StagingRules(dict(rules.configured), rules.state_dir, tuple(rules.zone_roots))
    assert _choose(zone, same) == first
    # Another directory, other rules: looked up again, but what works in the staging directory is known.
    assert _choose(zone / "log", rules).staging == first.staging
    assert _choose(zone, StagingRules({}, rules.state_dir, (*rules.zone_roots, "/other"))) == first


def test_it_is_remembered_in_a_child(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone, rules = _zone(ext4_dir)
    first = _choose(zone, rules)
    monkeypatch.setattr(module, "_find", None)
    child = os.fork()
    if child == 0:
        os._exit(0 if _choose(zone, rules) == first else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_staging_directory_that_went_is_made_again(ext4_dir: Path) -> None:
    zone, rules = _zone(ext4_dir)
    first = _choose(zone, rules)
    assert first.staging is not None
    Path(first.staging).rmdir()
    assert _choose(zone, rules) == first
    assert Path(first.staging).is_dir()


def test_new_rules_are_obeyed(ext4_dir: Path) -> None:
    zone, rules = _zone(ext4_dir)
    first = _choose(zone, rules)
    inside = StagingRules({}, rules.state_dir, (*rules.zone_roots, rules.state_dir))
    assert _choose(zone, inside).staging != first.staging
    (_mount_of(ext4_dir) / ".zone-bundle").rmdir()


def test_what_did_not_work_is_tried_again_later(ext4_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone, _ = _zone(ext4_dir)
    point = _mount_of(ext4_dir)
    rules = StagingRules({str(point): str(ext4_dir / "missing" / "staging")}, zone_roots=(str(point / ".zone-bundle"),))
    ext4_dir.chmod(0o777)
    assert _choose(zone, rules).kind is Kind.COPY
    (ext4_dir / "missing").mkdir(mode=0o700)
    assert _choose(zone, rules).kind is Kind.COPY
    later = time.monotonic() + 61
    monkeypatch.setattr("zonebundle.snapshots.choose.time.monotonic", lambda: later)
    assert _choose(zone, rules).kind is Kind.HARDLINK


def test_threads_and_processes_may_try_at_once(xfs_dir: Path, leak_check: None) -> None:
    zone, rules = _zone(xfs_dir)
    choices: list[Choice] = []
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            os._exit(0 if _choose(zone, rules).kind is Kind.REFLINK else 1)
        children.append(child)
    threads = [threading.Thread(target=lambda: choices.append(_choose(zone, rules))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {choice.kind for choice in choices} == {Kind.REFLINK}
    assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)


def test_what_a_killed_trial_left_is_removed(btrfs_dir: Path) -> None:
    zone, rules = _zone(btrfs_dir)
    staging = btrfs_dir / "state" / "staging"
    staging.mkdir(mode=0o700)
    (staging / f".try-{2**22 + 1}-abc").write_bytes(b"x")
    subprocess.run(["btrfs", "-q", "subvolume", "create", staging / f".try-{2**22 + 1}-def"], check=True)
    (staging / f".try-{os.getppid()}-abc").write_bytes(b"another process may be trying")
    _choose(zone, rules)
    assert [path.name for path in staging.iterdir()] == [f".try-{os.getppid()}-abc"]


@_root_only
def test_a_private_mount_of_another_namespace(tmp_path: Path, xfs_dir: Path, leak_check: None) -> None:
    """A tree opened through a process: its mount is not in our table, and its path means nothing here."""
    rules = StagingRules(state_dir=str(tmp_path))
    script = f"mount -t tmpfs tmpfs {xfs_dir} && echo ready && exec sleep 60"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            descriptor = os.open(f"/proc/{process.pid}/root{xfs_dir}", os.O_RDONLY | os.O_DIRECTORY)
            try:
                choice = choose(descriptor, str(xfs_dir), rules)
            finally:
                os.close(descriptor)
        finally:
            process.kill()
    assert (choice.kind, choice.staging) == (Kind.COPY, None)


@_root_only
def test_an_ordinary_user_gets_what_he_may_have(
    ordinary_user: OrdinaryUser, as_user: Callable[[OrdinaryUser, Callable[[], str]], str]
) -> None:
    def work(directory: Path) -> str:
        zone, rules = _zone(directory)
        choice = _choose(zone, rules)
        (zone / "app.log").write_bytes(b"x")
        assert choice.staging is not None, choice.warning
        before = os.listdir(choice.staging)
        kept = keep(zone, Path(choice.staging), choice.kind)
        assert kept.contents == {"app.log": b"x"}
        kept.destroy()
        return json.dumps([str(choice.kind), before, os.listdir(choice.staging)])

    kinds = {}
    for name in ("btrfs", "xfs", "ext4"):
        try:
            with filesystems.mounted(name, ordinary_user.home) as point:
                os.chown(point, ordinary_user.uid, ordinary_user.gid)
                kinds[name], *left = json.loads(as_user(ordinary_user, lambda point=point: work(point)))  # type: ignore[misc]
                assert left == [[], []]
        except filesystems.Unavailable as error:
            pytest.skip(str(error))
    # He may make a btrfs subvolume, but not delete it: no snapshots for him.
    assert kinds == {"btrfs": "reflink", "xfs": "reflink", "ext4": "hardlink"}


def test_one_choice_takes_microseconds(ext4_dir: Path) -> None:
    zone, rules = _zone(ext4_dir)
    descriptor = os.open(zone, os.O_RDONLY | os.O_DIRECTORY)
    try:
        choose(descriptor, str(zone), rules)
        best = 1.0
        for _ in range(200):
            began = time.perf_counter()
            choose(descriptor, str(zone), rules)
            best = min(best, time.perf_counter() - began)
    finally:
        os.close(descriptor)
    # Not a timed test: it tells a lookup from a trial, which takes milliseconds.
    assert best < 0.0005
