"""End a tree of processes: ask, be patient, then leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Collection, Iterable

import structlog

from zonebundle.errors import RuntimeFailedError
from zonebundle.host import proc
from zonebundle.model.zone import ProcessRef
from zonebundle.runtimes.base import Grace
from zonebundle.runtimes.tree import Tree
from zonebundle.runtimes.waiting import give_way

# How long killed processes may take to be gone; longer are those in an uninterruptible sleep (a hung file system).
PATIENCE = 30.0
# A process that is stopped sees the TERM only when it goes on.
_ASK = (signal.SIGTERM, signal.SIGCONT)
_FREEZE_ROUNDS = 32
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.2
_LONGEST_REMINDER = 1.0

log = structlog.get_logger()


async def end(
    tree: Tree, what: str, grace: Grace, *, ask: Iterable[ProcessRef] | None = None, patience: float = PATIENCE
) -> None:
    """Send TERM to the tree (or to `ask` alone), wait for the grace, kill what is left; returns when all is gone.

    `what` names the tree in messages. Raises RuntimeFailedError if something is still there `patience` seconds after
    the first KILL, naming it.
    """
    gone = asyncio.ensure_future(tree.gone())
    reminding: asyncio.Future[None] | None = None
    try:
        reminding = asyncio.ensure_future(_remind(await _ask_to_end(tree, ask)))
        if not await grace.wait(gone):
            await _kill(tree, what, gone, patience)
    finally:
        await _end_task(gone)
        if reminding is not None and (error := await _end_task(reminding)) is not None:
            log.warning("those of %s that had missed the TERM were not asked again: %s", what, error)


async def _end_task(task: asyncio.Future[None]) -> BaseException | None:
    task.cancel()
    await asyncio.wait({task})
    return None if task.cancelled() else task.exception()


async def _ask_to_end(tree: Tree, ask: Iterable[ProcessRef] | None) -> list[ProcessRef]:
    if ask is not None:
        asked = list(ask)
        await _send(asked, *_ASK)
        return asked
    first = {process.pid: process for process in await tree.scan()}
    catching = set()
    for process in first.values():
        await give_way()
        if proc.catches(process, signal.SIGTERM):
            catching.add(process.pid)
    await _send(first.values(), *_ASK)
    # Who was forked between the look and the signal has not been asked yet.
    late = [process for process in await tree.scan() if first.get(process.pid) != process]
    late = [process for process in late if not _may_be_of_a_handler(process, first.keys(), catching)]
    await _send(late, *_ASK)
    return [*first.values(), *late]


def _may_be_of_a_handler(process: ProcessRef, asked: Collection[int], catching: Collection[int]) -> bool:
    """Whether a new process may have been started by somebody's TERM handler, to end well: that one is let be."""
    fields = proc.read_stat(process.pid)
    if fields is not None and (parent := int(fields[proc.PARENT])) in asked:
        return parent in catching
    # Its parent has ended meanwhile, by a default action or a handler's exit.
    return bool(catching)


async def _remind(asked: list[ProcessRef]) -> None:
    """Ask those again by whom the TERM was lost.

    Between fork and exec a child still has its parent's handler, and forgets with the exec what that has noted: stopped
    shortly after their start, shells with a trap often leave such children. Who lives with TERM at its default action
    cannot have got it. What a handler starts now was never asked and is let be.
    """
    pause = _FIRST_PAUSE
    while asked:
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_REMINDER)
        asked = [process for process in asked if proc.is_alive(process)]
        lost = []
        for process in asked:
            await give_way()
            if proc.has_default_action(process, signal.SIGTERM):
                lost.append(process)
        await _send(lost, signal.SIGTERM)


async def _kill(tree: Tree, what: str, gone: asyncio.Future[None], patience: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    pause = _FIRST_PAUSE
    while not gone.done():
        left = await _freeze(tree)
        await _send(left, signal.SIGKILL)
        await asyncio.wait({gone}, timeout=pause)
        if not gone.done() and loop.time() > deadline:
            raise RuntimeFailedError(
                f"cannot end {what}: {await _describe(tree)} still there {patience:g} s after being killed; "
                "a process that waits for a device or a network file system ends when that answers"
            )
        pause = min(2 * pause, _LONGEST_PAUSE)
    gone.result()


async def _freeze(tree: Tree) -> list[ProcessRef]:
    """Stop every process of the tree, until a look finds nobody new: then nobody is left who could fork."""
    stopped: dict[ProcessRef, None] = {}
    for _ in range(_FREEZE_ROUNDS):
        fresh = [process for process in await tree.scan() if process not in stopped]
        if not fresh:
            break
        # A pending signal makes a fork fail and start again, so whoever has it does not multiply any more.
        await _send(fresh, signal.SIGSTOP)
        stopped |= dict.fromkeys(fresh)
    return list(stopped)


async def _send(processes: Iterable[ProcessRef], *numbers: signal.Signals) -> None:
    for process in processes:
        await give_way()
        # One that we may not signal (a set-user-ID program under an unprivileged agent) is named in the end, if it
        # is still there; the others are not spared for it.
        with contextlib.suppress(PermissionError):
            proc.send_signal(process, *numbers)


async def _describe(tree: Tree) -> str:
    left = await tree.scan()
    if not left:
        return "something is"
    some = ", ".join(f"{process.pid} ({_state(process)})" for process in left[:5])
    return f"{'process' if len(left) == 1 else f'{len(left)} processes,'} {some} {'is' if len(left) == 1 else 'are'}"


def _state(process: ProcessRef) -> str:
    fields = proc.read_stat(process.pid)
    return f"state {fields[proc.STATE]}" if fields else "gone"
