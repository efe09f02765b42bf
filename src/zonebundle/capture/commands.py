"""Commands: what the operator wants run inside the zone, and host tools that ptrace its processes."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zonebundle.capture.probe_stacks import is_stopped, resume, stack_text
from zonebundle.host.process import run
from zonebundle.model.report import Outcome
from zonebundle.model.zone import ProcessRef

# A tool that stops the processes it looks at: only so many at once.
CONCURRENT_STACKS = 4


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command printed, with the line that names it in front, ready to be an entry of the bundle."""

    name: str
    outcome: Outcome
    text: bytes
    detail: str
    begin: float
    seconds: float

    @property
    def is_cut(self) -> bool:
        """Whether output that was wanted is missing."""
        return self.outcome in (Outcome.TIMEOUT, Outcome.UNKNOWN)


async def run_command(
    argv: Sequence[str],
    *,
    prefix: Sequence[str],
    directory: str,
    deadline: float,
    started: Callable[[ProcessRef], None],
) -> CommandResult:
    """Run one command inside the zone until `deadline` (monotonic seconds). Never raises for what it does."""
    begin = time.monotonic()
    done = await run(
        [*prefix, *argv],
        timeout=max(0.0, deadline - begin),
        directory=directory,
        started=started,
    )
    text = f"Command: {json.dumps(list(argv))}\n".encode() + done.output
    if done.detail:
        text += f"\n[{done.detail}]\n".encode()
    return CommandResult(entry_name(argv), done.outcome, text, done.detail, begin, done.seconds)


def entry_name(argv: Sequence[str]) -> str:
    """The entry of a command: the last part of argv[0], as Omicron names them."""
    name = os.path.basename(argv[0]).strip(".")
    return name if name and "\0" not in name else "command"


async def run_stack(
    process: ProcessRef,
    argv: Sequence[str],
    *,
    slots: asyncio.Semaphore,
    deadline: float,
    started: Callable[[ProcessRef], None],
) -> CommandResult:
    """Take the user stacks of one process with a host tool, when one of the `slots` is free.

    A process that the tool left stopped, because it was killed or cancelled while attaching, is continued.
    """
    async with slots:
        begin = time.monotonic()
        was_stopped = is_stopped(process)
        finished = False
        try:
            done = await run(argv, timeout=max(0.0, deadline - begin), limit=256 << 10, started=started)
            finished = done.outcome is Outcome.SUCCESS
        finally:
            if not finished and not was_stopped:
                resume(process)
    return CommandResult(
        f"pstack.{process.pid}", done.outcome, stack_text(done.output), done.detail, begin, done.seconds
    )
