from collections.abc import Callable

import pytest

from support import wait
from support.containers import RuncBundle


def test_a_container_runs_and_ends(runc_bundle: Callable[..., RuncBundle]) -> None:
    bundle = runc_bundle("sh", "-c", "echo started; echo line >/var/log/messages; exec sleep 3600", env=["COLOUR=red"])
    pid = bundle.run()
    assert bundle.state()["pid"] == pid
    wait.until(lambda: (bundle.rootfs / "var/log/messages").exists(), what="the log")
    assert bundle.console.read_text() == "started\n"
    assert bundle.state()["status"] == "running"
    assert bundle.exec("sh", "-c", "hostname; echo $COLOUR") == f"{bundle.id}\nred\n"
    bundle.kill()
    wait.until(lambda: bundle.state()["status"] == "stopped", what="the container's end")
    bundle.delete()
    assert bundle.runc("state", bundle.id, check=False).returncode != 0
    assert bundle.rootfs.exists()


def test_two_containers_live_beside_each_other(runc_bundle: Callable[..., RuncBundle]) -> None:
    first, second = runc_bundle(), runc_bundle()
    assert first.run() != second.run()
    (first.rootfs / "var/log/mine").write_text("")
    assert not (second.rootfs / "var/log/mine").exists()


def test_a_failing_start_says_why(runc_bundle: Callable[..., RuncBundle]) -> None:
    with pytest.raises(AssertionError, match="no-such-program"):
        runc_bundle("no-such-program").run()
