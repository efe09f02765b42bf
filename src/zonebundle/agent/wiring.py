"""From the configuration to the parts: runtimes and the settings of a hold."""

from __future__ import annotations

from zonebundle.agent.config import Config
from zonebundle.capture.order import HoldSettings
from zonebundle.runtimes.base import Runtime
from zonebundle.runtimes.oci import OciRuntime
from zonebundle.runtimes.process import ProcessRuntime, ProcessZone


def make_runtimes(config: Config) -> list[Runtime]:
    """The enabled runtimes, in the order of the configuration."""
    made: list[Runtime] = []
    for name in config.runtimes.enabled:
        if name == "process":
            zones = {
                zone_name: ProcessZone(
                    command=zone.command or (),
                    pid_file=str(zone.pid_file) if zone.pid_file else None,
                    root=str(zone.root),
                    logs=zone.logs,
                    environment=zone.environment,
                )
                for zone_name, zone in config.zones.items()
            }
            made.append(ProcessRuntime(zones, config.agent.state_dir))
        elif name == "oci":
            oci = config.runtimes.oci
            made.append(
                OciRuntime(
                    oci.command,
                    str(oci.root) if oci.root else None,
                    config.evidence.logs,
                    state_dir=config.agent.state_dir,
                )
            )
    return made


def hold_settings(config: Config, installation: str) -> HoldSettings:
    """What the hold workers need to know."""
    return HoldSettings(
        budget=config.hold.budget,
        copy_limit=config.hold.copy_limit,
        commands=tuple(tuple(command) for command in config.evidence.commands),
        stacks=config.evidence.stacks,
        staging=dict(config.staging),
        zone_roots=tuple(str(zone.root) for zone in config.zones.values()),
        state_dir=str(config.agent.state_dir),
        installation=installation,
        limits=config.limits.as_limits(),
    )
