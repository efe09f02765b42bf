"""The verb `agent`: run the agent in the foreground."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("agent")
@click.option(
    "--config",
    "-c",
    "path",
    metavar="FILE",
    envvar="ZONE_BUNDLE_CONFIG",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="The configuration file, else /etc/zone-bundle/config.toml.",
)
@click.pass_context
def run_agent(context: click.Context, path: Path | None) -> None:
    """Run the agent, in the foreground, until it gets SIGTERM."""
    from zonebundle.agent.config import load_config

    config = load_config(path)
    from zonebundle.api.serve import serve

    serve(config, log_level=context.find_root().params["log_level"])
