"""Containers that write logs, in the configuration of an agent, and what their bundles hold."""

from pathlib import Path

from support import wait
from support.containers import RuncBundle

# Relative paths would do as well: a container's first process starts in its root.
TALKS = (
    "trap 'echo last words >> /var/log/app.log; exit 0' TERM; "
    "echo first words >> /var/log/app.log; while :; do sleep 0.05; done"
)
STUBBORN = "trap '' TERM; echo first words >> /var/log/app.log; while :; do sleep 0.05; done"
APP_LOG = "logs/zone/var/log/app.log"
LOGS = ["first words", "last words"]


def settings(runc_root: Path, more: str = "", *, command: str = "runc", enabled: str = '"oci"') -> str:
    """The tables of an agent's configuration for containers whose state is in `runc_root`; `more` is of `evidence`."""
    return (
        f"[runtimes]\nenabled = [{enabled}]\n"
        f'[runtimes.oci]\ncommand = "{command}"\nroot = "{runc_root}"\n'
        f'[evidence]\nstacks = "kernel"\n{more}\n'
    )


def run(container: RuncBundle, log: str = "var/log/app.log") -> int:
    """Run it until it writes; the PID of its first process on the host."""
    pid = container.run()
    wait.until(lambda: "first words" in container.exec("cat", f"/{log}", check=False), what="the container writes")
    return pid


def lines(data: bytes) -> list[str]:
    return data.decode().splitlines()


def bundle_of(told: dict[str, object]) -> str:
    """The ID of the bundle that a stop was answered with."""
    bundle = told["bundle"]
    assert isinstance(bundle, dict)
    return str(bundle["id"]["bundle_id"])
