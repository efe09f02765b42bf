"""The proof of the demo: a bundle is an ordinary tar.gz, and its logs are the originals, byte for byte."""

from __future__ import annotations

import filecmp
import subprocess
from dataclasses import dataclass
from pathlib import Path

from zonebundle.cli.client import AgentClient, bundle_path
from zonebundle.cli.demo_stage import Stage
from zonebundle.errors import ZoneBundleError


@dataclass(frozen=True, slots=True)
class Checked:
    """What `tar` found: entries of the archive, log files compared with the originals, and their bytes."""

    entries: int
    logs: int
    bytes: int


def download_bundle(socket: Path, zone: str, bundle_id: str, target: Path) -> None:
    """Fetch a bundle as `zone-bundle get` does; raises ZoneBundleError."""
    path = bundle_path(zone, bundle_id)
    with AgentClient(socket) as client, client.download(path) as (_, chunks), target.open("wb") as file:
        file.writelines(chunks)


def check_bundle(stage: Stage, zone: str, bundle: Path) -> Checked:
    """Unpack a zone's bundle with tar and compare all its logs with the zone's; raises ZoneBundleError."""
    unpacked = bundle.with_suffix(".unpacked")
    unpacked.mkdir()
    entries = _tar("tzf", str(bundle)).splitlines()
    _tar("xzf", str(bundle), "-C", str(unpacked))
    logs = stage.logs(zone)
    copies = {path.relative_to(unpacked / "logs/zone/logs") for path in (unpacked / "logs/zone/logs").glob("**/*")}
    if copies != {Path(log.name) for log in logs}:
        raise ZoneBundleError(f"the bundle of {zone} has {len(copies)} log files, the zone {len(logs)}")
    for log in logs:
        if not filecmp.cmp(log, unpacked / "logs/zone/logs" / log.name, shallow=False):
            raise ZoneBundleError(f"the bundle of {zone} differs from the zone in {log.name}")
    return Checked(len(entries), len(logs), sum(log.stat().st_size for log in logs))


def _tar(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["tar", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ZoneBundleError("there is no tar to check the bundle with: install it") from None
    if done.returncode or done.stderr:
        raise ZoneBundleError(f"tar {arguments[0]} {arguments[1]}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout
