"""End a tree of processes: ask, be patient, then leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterable

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
        request = _Request(tree)
        await (request.ask_tree() if ask is None else request.ask(ask))
        reminding = asyncio.ensure_future(request.remind())
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


class _Request:
    """The TERM that a tree is asked to end with: who has been asked, and who would end well by a handler."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._asks_all = False
        self._asked: dict[int, ProcessRef] = {}
        self._catching: set[int] = set()

    async def ask(self, processes: Iterable[ProcessRef]) -> None:
        """Ask these, and nobody else."""
        self._asked = {process.pid: process for process in processes}
        await _send(self._asked.values(), *_ASK)

    async def ask_tree(self) -> None:
        """Ask all of the tree."""
        self._asks_all = True
        first = await self._tree.scan()
        for process in first:
            await give_way()
            if proc.catches(process, signal.SIGTERM):
                self._catching.add(process.pid)
        await self.ask(first)
        await self._ask_late()

    async def _ask_late(self) -> None:
        """Ask those who were forked between a look and its signal, or changed their parent while it was taken."""
        late = [process for process in await self._tree.scan() if self._asked.get(process.pid) != process]
        late = [process for process in late if not self._may_be_of_a_handler(process)]
        await _send(late, *_ASK)
        self._asked |= {process.pid: process for process in late}

    def _may_be_of_a_handler(self, process: ProcessRef) -> bool:
        """Whether a new process may have been started by somebody's TERM handler, to end well: that one is let be."""
        fields = proc.read_stat(process.pid)
        if fields is not None and (parent := int(fields[proc.PARENT])) in self._asked:
            return parent in self._catching
        # Its parent has ended meanwhile, by a default action or a handler's exit.
        return bool(self._catching)

    async def remind(self) -> None:
        """Ask those again by whom the TERM was lost, and those who were not seen when the others were asked.

        Between fork and exec a child still has its parent's handler, and forgets with the exec what that has noted:
        stopped shortly after their start, shells with a trap often leave such children. Who lives with TERM at its
        default action cannot have got it. A look at a tree that is ending can miss a process whose parent ends in that
        moment. What a handler starts now was never asked and is let be.
        """
        pause = _FIRST_PAUSE
        waiting = list(self._asked.values())
        while waiting or self._asks_all:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_REMINDER)
            if self._asks_all:
                await self._ask_late()
            waiting = [process for process in self._asked.values() if proc.is_alive(process)]
            lost = []
            for process in waiting:
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
