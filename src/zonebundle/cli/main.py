"""The command `zone-bundle`.

Start-up is short: a verb imports what it needs when it runs, and nothing else does.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from zonebundle import __version__
from zonebundle.cli import agent, bundles, maintenance, output, store_verbs, zones
from zonebundle.errors import UsageError, ZoneBundleError
from zonebundle.model.paths import printable

PROGRAM = "zone-bundle"
DEFAULT_HOST = "unix:/run/zone-bundle/agent.sock"

_ALIASES = {
    "ls": "list",
    "del": "delete",
    "rm": "delete",
    "context": "cleanup-context",
    "set-context": "set-cleanup-context",
}
# These start an agent, or read a store, instead of talking to an agent.
_WITHOUT_AGENT = ("agent", "demo", "verify", "export")


class _Verbs(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _ALIASES.get(cmd_name, cmd_name))


@click.group(cls=_Verbs, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--host",
    "-H",
    metavar="unix:PATH",
    envvar="ZONE_BUNDLE_HOST",
    default=DEFAULT_HOST,
    show_default=True,
    show_envvar=True,
    help="The agent's socket.",
)
@click.option("--port", metavar="PORT", type=int, help="Accepted for Omicron's scripts; there is no TCP yet.")
@click.option(
    "--log-level",
    "-l",
    type=click.Choice(("debug", "info", "warning", "error"), case_sensitive=False),
    default="info",
    help="How much the agent logs.",
)
@click.version_option(__version__, message=f"{PROGRAM} %(version)s")
@click.pass_context
def app(context: click.Context, host: str, port: int | None, log_level: str) -> None:
    """Stop in milliseconds, keep all the evidence."""
    if context.invoked_subcommand not in _WITHOUT_AGENT:
        context.obj = zones.parse_host(host)


@click.command("demo")
@click.option("--keep", is_flag=True, help="Leave the agent and the bundles to play with.")
def _demo(keep: bool) -> int:
    """Stop 24 zones at once and look at their bundles; needs no root and leaves nothing behind."""
    from zonebundle.cli.demo import run_demo

    return run_demo(keep=keep)


for _verb in (
    agent.run_agent,
    zones.list_zones,
    zones.start,
    zones.stop,
    bundles.create,
    bundles.list_bundles,
    bundles.get,
    bundles.show,
    bundles.delete,
    maintenance.show_context,
    maintenance.set_context,
    maintenance.utilization,
    maintenance.clean_up,
    maintenance.drain,
    store_verbs.verify,
    store_verbs.export,
    _demo,
):
    app.add_command(_verb)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code. Nothing but a bug escapes as an exception."""
    try:
        code = app.main(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        text = printable(error.format_message()).rstrip(".")
        path = context.command_path if context else PROGRAM
        output.print_error(f"{text[:1].lower()}{text[1:]}; see `{path} --help`")
        return error.exit_code
    except ZoneBundleError as error:
        output.print_error(str(error))
        return output.EXIT_USAGE if isinstance(error, UsageError) else output.EXIT_FAILED
    except (KeyboardInterrupt, click.Abort):
        output.print_note("interrupted; what the agent has begun, it finishes")
        return output.EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does at this moment: inside an event loop, that cancels its task instead of raising anywhere."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        # Ignored, as in a shell's background job.
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def main() -> NoReturn:
    """The console script."""
    output.prepare_streams()
    # Asked to end, a verb cleans up as at Ctrl-C. The agent has handlers of its own.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    code = run(sys.argv[1:])
    # An interrupt in exec() or eval() of a string, as importing a dataclass does, makes CPython (`python -m`) end by
    # SIGINT at the very end, although it was handled; another evaluation takes that back (Python/pythonrun.c,
    # run_eval_code_obj).
    eval("0")  # noqa: S307
    sys.exit(code)


if __name__ == "__main__":
    main()
