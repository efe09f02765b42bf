"""Real OCI containers: a tiny root filesystem and bundles that runc runs."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_numbers = itertools.count(1)
_TIMEOUT = 30.0


class Unavailable(Exception):
    """This machine cannot run containers; the message names what is missing."""


def make_rootfs(directory: Path) -> None:
    """Fill `directory` with a root filesystem of busybox and the usual directories. Raises Unavailable."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise Unavailable("no busybox")
    if b"/ld-linux" in Path(busybox).read_bytes():
        raise Unavailable("busybox is not static (busybox-static)")
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var/log"):
        (directory / name).mkdir(parents=True)
    shutil.copy2(busybox, directory / "bin/busybox")
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (directory / "etc/group").write_text("root:x:0:\n")


@dataclass(frozen=True)
class RuncBundle:
    """One container: its OCI bundle, and runc called on it with a state directory of its own."""

    id: str
    path: Path
    state_dir: Path

    @property
    def rootfs(self) -> Path:
        return self.path / "rootfs"

    @property
    def console(self) -> Path:
        """What the container's first process wrote to its standard output and error."""
        return self.path / "console.log"

    def runc(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Call runc; its output is captured, its failure raised as AssertionError with what it said."""
        done = subprocess.run(
            ["runc", "--root", self.state_dir, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"runc {' '.join(arguments)} gave {done.returncode}: {done.stderr.strip()}")
        return done

    def run(self) -> int:
        """Start the container in the background; the PID of its first process on the host."""
        with self.console.open("ab") as console:
            # Not captured: the container would hold the pipe for as long as it lives.
            done = subprocess.run(
                ["runc", "--root", self.state_dir, "run", "--detach", "--bundle", self.path, self.id],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                timeout=_TIMEOUT,
                check=False,
            )
        if done.returncode != 0:
            raise AssertionError(f"runc run {self.id} gave {done.returncode}: {self.console.read_text().strip()}")
        return int(self.state()["pid"])

    def exec(self, *command: str, check: bool = True) -> str:
        """Run a command inside; what it wrote to its standard output."""
        return self.runc("exec", self.id, *command, check=check).stdout

    def state(self) -> dict[str, Any]:
        """What `runc state` tells: at least id, pid, status, bundle, rootfs."""
        state: dict[str, Any] = json.loads(self.runc("state", self.id).stdout)
        return state

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.runc("kill", self.id, str(int(number)))

    def delete(self) -> None:
        """Remove the container, alive or not, existing or not."""
        self.runc("delete", "--force", self.id)


@contextlib.contextmanager
def runc_bundle(
    rootfs: Path, below: Path, *command: str, env: Sequence[str] = (), mounts: Sequence[dict[str, Any]] = ()
) -> Iterator[RuncBundle]:
    """An OCI bundle in a fresh directory of `below`, with a copy of `rootfs` of its own, that runs `command`.

    It is not started. The container is deleted at the end, whatever its state. `env` is added to PATH; `mounts` are
    OCI mounts added to runc's own. Raises Unavailable.
    """
    if os.geteuid() != 0:
        raise Unavailable("containers need root")
    if shutil.which("runc") is None:
        raise Unavailable("no runc")
    # The name is a cgroup's name too: unique on the machine, not only in this run.
    name = f"zonebundle-test-{os.getpid()}-{next(_numbers)}"
    bundle = RuncBundle(id=name, path=below / name, state_dir=below / "runc")
    bundle.state_dir.mkdir(mode=0o700, exist_ok=True)
    bundle.path.mkdir(mode=0o700)
    shutil.copytree(rootfs, bundle.rootfs, symlinks=True)
    bundle.runc("spec", "--bundle", str(bundle.path))
    config = bundle.path / "config.json"
    config.write_text(json.dumps(_edited(json.loads(config.read_text()), name, command, env, mounts), indent=2))
    try:
        yield bundle
    finally:
        bundle.delete()


def _edited(
    spec: dict[str, Any], name: str, command: Sequence[str], env: Sequence[str], mounts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    process = spec["process"]
    process["terminal"] = False
    process["args"] = list(command or ("sleep", "3600"))
    process["env"] = ["PATH=/bin", *env]
    process["capabilities"] = {kind: ["CAP_KILL"] for kind in ("bounding", "effective", "permitted")}
    # Raising limits and lowering the OOM score need CAP_SYS_RESOURCE, which root lacks inside many containers.
    process.pop("rlimits", None)
    process.pop("oomScoreAdj", None)
    spec["root"]["readonly"] = False
    spec["hostname"] = name
    spec["mounts"].extend(mounts)
    return spec
