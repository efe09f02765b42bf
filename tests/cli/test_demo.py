"""The demo, for real: as an ordinary user, with all that it starts and leaves."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import zonebundle
from support import leaks
from support.users import OrdinaryUser
from support.wait import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("demo")]

PATIENCE = 240.0


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """A Python that an ordinary user can run too, with what this one has: its own may lie in root's home."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    directory = Path(tempfile.mkdtemp(prefix="zonebundle-test-venv-"))
    directory.chmod(0o755)
    for base in (sys.executable, f"/usr/bin/{version}"):
        real = Path(base).resolve()
        if real.exists() and all(parent.stat().st_mode & 0o001 for parent in real.parents):
            break
    else:
        pytest.skip(f"an ordinary user cannot run {sys.executable}, and there is no /usr/bin/{version}")
    subprocess.run([real, "-m", "venv", "--without-pip", directory], check=True)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    source = Path(zonebundle.__file__).parents[1]
    (directory / f"lib/{version}/site-packages/all.pth").write_text("\n".join([*packages, str(source)]) + "\n")
    yield directory / "bin/python"
    shutil.rmtree(directory)


@pytest.fixture
def user(ordinary_user: OrdinaryUser, python: Path) -> OrdinaryUser:
    """Who runs the demo."""
    if ordinary_user.run(python, "-c", "import zonebundle.cli.demo").returncode:
        pytest.skip("an ordinary user cannot read this checkout")
    if shutil.disk_usage(ordinary_user.home).free < 2 << 30:
        pytest.skip("less than 2 GiB free for temporary files")
    return ordinary_user


def start_demo(python: Path, user: OrdinaryUser, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-m", "zonebundle.cli.main", "demo", *options],
        cwd=user.home,
        env={"PATH": os.environ["PATH"], "TMPDIR": str(user.home), "HOME": str(user.home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **user.popen_arguments,
    )


def test_it_tells_of_24_zones_and_leaves_nothing(python: Path, user: OrdinaryUser) -> None:
    with leaks.no_leaks(timeout=10, orphans=True), start_demo(python, user) as demo:
        out, err = demo.communicate(timeout=PATIENCE)
        assert (demo.returncode, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if re.match(r" (web|api|db|cache|queue|auth|mail)-\d\d ", line)]
    assert len(rows) == 24
    assert {row[-1] for row in rows} == {"none"}
    assert re.search(r"24 zones with 72 workers wrote \d+\.\d MiB of JSON logs in 1,0\d\d files", out)
    assert re.search(r"web-01's bundle is an ordinary tar\.gz: tar reads \d+ entries, and its 42 logs", out)
    assert "old way (extrapolated)" in out
    assert os.listdir(user.home) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["agent.log", "agent.sock", "zones/web-01/logs", "zones/mail-02/ready"])
def test_interrupted_at_any_moment_it_leaves_nothing(
    python: Path, user: OrdinaryUser, moment: str, number: signal.Signals
) -> None:
    with leaks.no_leaks(timeout=10, orphans=True), start_demo(python, user) as demo:
        until(lambda: list(user.home.glob(f"zone-bundle-demo-*/{moment}")), timeout=60)
        demo.send_signal(number)
        out, err = demo.communicate(timeout=60)
        assert demo.returncode == 130
        assert re.fullmatch(r"zone-bundle: interrupted; everything in \S+ has been ended and removed\n", err), err
        assert "is gone" not in out
    assert os.listdir(user.home) == []


def test_when_the_agent_dies_it_fails_and_leaves_nothing(python: Path, user: OrdinaryUser) -> None:
    with leaks.no_leaks(timeout=10, orphans=True), start_demo(python, user) as demo:
        until(lambda: list(user.home.glob("zone-bundle-demo-*/zones/mail-02/ready")), timeout=60)
        (log,) = user.home.glob("zone-bundle-demo-*/agent.log")
        found = re.search(r"\bpid=(\d+)", log.read_text())
        assert found
        os.kill(int(found[1]), signal.SIGKILL)
        _, err = demo.communicate(timeout=60)
        assert demo.returncode == 1
        assert err.startswith("zone-bundle: error: ")
    assert os.listdir(user.home) == []


def test_kept_it_says_how_to_talk_to_it_and_how_to_end_it(python: Path, user: OrdinaryUser) -> None:
    with leaks.no_leaks(timeout=10, orphans=True):
        with start_demo(python, user, "--keep") as demo:
            out, err = demo.communicate(timeout=PATIENCE)
        found = re.search(r"The agent goes on \(process (\d+)\)", out)
        assert found, err
        agent = int(found[1])
        commands = [line.strip() for line in out.splitlines() if re.match(r" {4}\S", line)]
        program = {"cwd": user.home, "env": {"PATH": os.environ["PATH"], "HOME": str(user.home)}, "timeout": 60.0}

        def shell(export: str, *lines: str) -> subprocess.CompletedProcess[str]:
            return user.run("sh", "-e", "-c", "\n".join([export, *lines]), **program)

        try:
            assert (demo.returncode, err) == (0, "")
            export, listing, start, create, get, stop, end = commands
            assert len(shell(export, listing).stdout.splitlines()) == 25
            (ready,) = user.home.glob("zone-bundle-demo-*/zones/web-01/ready")
            ready.unlink()
            assert shell(export, start).stdout == "Started zone: web-01\n"
            # While it writes the logs of hours within a second, they may change faster than they can be listed.
            until(ready.exists, timeout=60)
            done = shell(export, create, get, stop)
            assert (done.returncode, done.stderr) == (0, "")
            assert (user.home / "web-01.tar.gz").stat().st_size > 100_000
            ended = shell(export, end)
            assert (ended.returncode, ended.stderr) == (0, "")
        finally:
            # Its own children end with it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)
        assert os.listdir(user.home) == ["web-01.tar.gz"]
