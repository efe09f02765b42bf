"""The probes who and last, against login files that a zone wrote."""

import os
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from zonebundle.capture import probe_logins
from zonebundle.capture.probe_result import ProbeResult
from zonebundle.capture.probes import zone_probes
from zonebundle.host import proc
from zonebundle.model.report import Outcome
from zonebundle.model.zone import ProcessRef, Zone

pytestmark = [
    pytest.mark.usefixtures("leak_check"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a root of its own needs root"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="records are made as on x86_64"),
]

USER, DEAD, BOOT = 7, 8, 2
# 2026-01-02T03:04:05Z
NOON = 1767323045


def record(kind: int, user: bytes, line: bytes = b"pts/0", host: bytes = b"", seconds: int = NOON) -> bytes:
    return struct.pack("=hxxi32s4s32s256shhiii16s20s", kind, 1, line, b"", user, host, 0, 0, 0, seconds, 0, b"", b"")


Begin = Callable[..., ProcessRef]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a zone, with nothing in it but the directories."""
    place = tmp_path / "root"
    for directory in ("run", "var/log"):
        (place / directory).mkdir(parents=True)
    return place


@pytest.fixture
def begin() -> Iterator[Begin]:
    """A function that starts a process whose root is the directory given, or the host's."""
    with ExitStack() as stack:

        def start(root: Path | None = None, *, mounts: str = "") -> ProcessRef:
            script = (
                "import os, subprocess, sys, time\n"
                "if len(sys.argv) > 2: subprocess.run(['sh', '-ec', sys.argv[2]], check=True)\n"
                "if sys.argv[1:]: os.chroot(sys.argv[1]); os.chdir('/')\n"
                "print('up', flush=True)\n"
                "time.sleep(1000)\n"
            )
            argv = [sys.executable, "-c", script, *([str(root)] if root else [])]
            argv = ["unshare", "--mount", *argv, mounts] if mounts else argv
            child = subprocess.Popen(argv, stdout=subprocess.PIPE)
            stack.callback(end, child)
            assert child.stdout is not None
            assert child.stdout.readline() == b"up\n"
            found = proc.identify(child.pid)
            assert found is not None
            return found

        yield start


def end(child: subprocess.Popen[bytes]) -> None:
    with child:
        child.kill()


def look(process: ProcessRef) -> tuple[ProbeResult, ProbeResult]:
    probes = {probe.name: probe for probe in zone_probes(Zone("web", "process", "running"), [process])}
    return probes["who"].run(), probes["last"].run()


def lines(result: ProbeResult) -> list[str]:
    return result.text.decode().splitlines()[2:]


def test_who_tells_the_zones_logins(root: Path, begin: Begin) -> None:
    (root / "run/utmp").write_bytes(
        record(BOOT, b"reboot", b"~")
        + record(USER, b"alice", b"pts/0", b"10.0.0.1")
        + record(DEAD, b"", b"pts/1")
        + record(USER, b"bob", b"tty1")
    )
    result, _ = look(begin(root))
    assert result.outcome is Outcome.SUCCESS
    assert result.text.startswith(b'Probe: ["who"]\nlogins of the zone\n')
    assert [line.split() for line in lines(result)] == [
        ["alice", "pts/0", "2026-01-02T03:04:05Z", "(10.0.0.1)"],
        ["bob", "tty1", "2026-01-02T03:04:05Z"],
    ]


def test_last_pairs_logins_with_their_ends(root: Path, begin: Begin) -> None:
    (root / "var/log/wtmp").write_bytes(
        record(BOOT, b"reboot", b"~", b"6.1", NOON)
        + record(USER, b"alice", b"pts/0", b"h", NOON + 10)
        + record(DEAD, b"", b"pts/0", b"", NOON + 20)
        + record(USER, b"bob", b"pts/0", b"", NOON + 30)
    )
    _, result = look(begin(root))
    assert [re.split(r" {1,}", line) for line in lines(result)] == [
        ["bob", "pts/0", "2026-01-02T03:04:35Z", "-", "not", "told"],
        ["alice", "pts/0", "h", "2026-01-02T03:04:15Z", "-", "2026-01-02T03:04:25Z"],
        ["reboot", "system", "boot", "6.1", "2026-01-02T03:04:05Z"],
    ]


def test_what_is_missing_is_a_skip(root: Path, begin: Begin) -> None:
    for result in look(begin(root)):
        assert result.outcome is Outcome.SKIP
        assert "keeps no" in result.detail


def test_a_zone_that_shares_the_hosts_mounts_is_told_the_hosts_logins(begin: Begin) -> None:
    who, last = look(begin())
    for result, path in ((who, "/run/utmp"), (last, "/var/log/wtmp")):
        assert b"the host (the zone shares its mounts)" in result.text
        assert result.outcome is (Outcome.SUCCESS if Path(path).is_file() else Outcome.SKIP)


def _outside(path: Path) -> None:
    secret = path.parents[2] / "secret" if path.parent.name == "run" else path.parents[3] / "secret"
    secret.write_bytes(record(USER, b"secret"))
    path.symlink_to(secret)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


TRAPS: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "link out": _outside,
    "directory": os.mkdir,
    "device": lambda path: os.mknod(path, 0o020666, os.makedev(1, 5)),
    "empty": Path.touch,
    "shorter than a record": lambda path: _write(path, record(USER, b"secret")[:383]),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_in_its_place_is_not_stepped_into(root: Path, begin: Begin, trap: str) -> None:
    TRAPS[trap](root / "run/utmp")
    TRAPS[trap](root / "var/log/wtmp")
    for result in look(begin(root)):
        assert result.outcome in (Outcome.SKIP, Outcome.SUCCESS)
        assert b"secret" not in result.text
        assert lines(result) == []


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("directory", ["run", "var", "var/log"])
def test_a_link_on_the_way_is_not_followed(
    root: Path, begin: Begin, directory: str, inside: bool, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "log").mkdir(parents=True)
    for path in ("utmp", "wtmp", "log/wtmp"):
        (outside / path).write_bytes(record(USER, b"secret"))
    subprocess.run(["rm", "-r", root / directory], check=True)
    if inside:
        outside = outside.rename(root / "inside")
    link = root / directory
    link.symlink_to(os.path.relpath(outside, link.parent) if inside else outside)
    for result in look(begin(root)):
        assert b"secret" not in result.text


def test_a_mount_of_a_local_kind_is_entered(root: Path, begin: Begin) -> None:
    (root / "var/log/made").write_bytes(record(USER, b"alice"))
    process = begin(root, mounts=f"mount -t tmpfs tmpfs {root}/run; cp {root}/var/log/made {root}/run/utmp")
    result, _ = look(process)
    assert [line.split()[0] for line in lines(result)] == ["alice"]


def test_a_mount_of_another_kind_is_not_read(root: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "var/log/made").write_bytes(record(USER, b"alice"))
    process = begin(root, mounts=f"mount -t tmpfs tmpfs {root}/run; cp {root}/var/log/made {root}/run/utmp")
    # As if its tmpfs were a FUSE mount, whose server may let the reader wait for ever.
    monkeypatch.setattr(probe_logins, "_LOCAL", probe_logins._LOCAL - {b"tmpfs"})
    assert look(process)[0].outcome is Outcome.SKIP


def test_a_huge_file_is_read_from_its_end(root: Path, begin: Begin) -> None:
    with (root / "var/log/wtmp").open("wb") as file:
        file.truncate(1 << 40)
        file.seek((1 << 40) // 384 * 384)
        for number in range(300):
            file.write(record(USER, b"user%d" % number))
        file.write(b"half a record")
    _, result = look(begin(root))
    shown = [line.split()[0] for line in lines(result)]
    assert shown[:100] == [f"user{number}" for number in range(299, 199, -1)]
    assert shown[100:] == ["(the"]


def test_names_are_escaped_and_fields_end_at_their_size(root: Path, begin: Begin) -> None:
    nasty = b"\x1b[2J\nroot\xff"
    (root / "run/utmp").write_bytes(record(USER, nasty, nasty, b"h" * 256) + bytes(range(256)) + bytes(128))
    (root / "var/log/wtmp").write_bytes(os.urandom(384 * 50))
    for result in look(begin(root)):
        assert result.outcome is Outcome.SUCCESS
        assert not re.search(rb"[\x00-\x09\x0b-\x1f]", result.text)
    who = look(begin(root))[0].text
    assert rb"\x1b[2J\x0aroot\xff" in who
    assert b"(" + b"h" * 256 + b")" in who


def test_a_time_beyond_the_calendar_is_a_number() -> None:
    assert probe_logins._time(1 << 62) == str(1 << 62)
