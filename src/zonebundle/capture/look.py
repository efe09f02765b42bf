"""The look at a living zone: probes of its processes, commands inside it, all at once and under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from zonebundle.capture.commands import CONCURRENT_STACKS, CommandResult, run_command, run_stack
from zonebundle.capture.evidence import Evidence
from zonebundle.capture.order import HoldOrder
from zonebundle.capture.probes import MAX_PROCESSES, Probe, ProbeResult, probe_groups, stack_command
from zonebundle.host import proc
from zonebundle.model.report import Outcome, Step
from zonebundle.model.zone import ProcessRef

T = TypeVar("T")

PROBE_THREADS = 4
# A zone's probes take some milliseconds: after so many seconds, one of them hangs.
_STALL = 0.1

# Shares of the look's time after which the less important gives way first.
_STACKS_SHARE = 0.75
_COMMANDS_SHARE = 0.9


class InThread(Protocol):
    """Runs a call in a thread of the hold; cancelling abandons it there."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


class Look:
    """Probes and commands of one hold; what they find goes into the evidence."""

    def __init__(
        self, order: HoldOrder, evidence: Evidence, in_thread: InThread, started: Callable[[ProcessRef], None]
    ) -> None:
        self._order = order
        self._evidence = evidence
        self._in_thread = in_thread
        self._started = started
        self._stacks: dict[int, CommandResult] = {}
        self.ran_commands = False

    async def run(self, go: asyncio.Event, deadline: float) -> None:
        """Do all of it until `deadline` (monotonic): what is not done then is dropped, with a gap each."""
        zone = self._order.intent.zone
        begin = time.monotonic()
        try:
            async with asyncio.timeout_at(self._loop_time(deadline)):
                processes = await self._in_thread(lambda: proc.members(zone.membership))
        except TimeoutError:
            self._evidence.gap("processes", "the zone's processes could not be listed within the budget")
            self._evidence.step("processes", Outcome.TIMEOUT, begin)
            return
        self._evidence.step("processes", Outcome.SUCCESS, begin, f"{len(processes)} processes")
        if len(processes) > MAX_PROCESSES:
            self._evidence.gap("processes", f"{len(processes) - MAX_PROCESSES} of {len(processes)} were not looked at")
            processes = processes[:MAX_PROCESSES]
        commands = asyncio.ensure_future(self._run_commands(go, processes, deadline))
        results = await self._run_probes(processes, deadline)
        await commands
        for result in results:
            self._keep_probe(result)

    async def _run_probes(self, processes: Sequence[ProcessRef], deadline: float) -> list[tuple[float, ProbeResult]]:
        """Take the probes in one thread; where it hangs in one of them, others take what is left.

        Several from the start would not be quicker: they would take the interpreter's lock from each other at each
        read of /proc, for twice the CPU.
        """
        groups = probe_groups(self._order.intent.zone, processes)
        waiting = deque(groups)
        results: list[tuple[float, ProbeResult]] = []

        def run_waiting() -> None:
            while waiting and time.monotonic() < deadline:
                with contextlib.suppress(IndexError):
                    # A generator: each result is there as soon as its probe is through.
                    results.extend(_run(probe) for probe in waiting.popleft())

        running: set[asyncio.Future[None]] = set()
        started = 0
        while (left := deadline - time.monotonic()) > 0 and (running or waiting):
            if waiting and started < PROBE_THREADS:
                running.add(asyncio.ensure_future(self._in_thread(run_waiting)))
                started += 1
            patience = min(_STALL, left) if waiting and started < PROBE_THREADS else left
            done, running = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()
            if not running and started == PROBE_THREADS:
                break
        for job in running:
            job.cancel()
        finished = {result.name for _, result in results}
        for probe in itertools.chain.from_iterable(groups):
            if probe.name not in finished:
                self._evidence.gap(probe.name, "the probe did not finish within the budget")
                self._evidence.step(probe.name, Outcome.TIMEOUT, deadline, lane="probes")
        return list(results)

    def _keep_probe(self, timed: tuple[float, ProbeResult]) -> None:
        begin, result = timed
        text = result.text
        pid = result.name.removeprefix("pstack.")
        if pid.isdigit() and (stack := self._stacks.get(int(pid))) is not None:
            text += b"\nUser stacks:\n" + stack.text
            if stack.is_cut:
                self._evidence.gap(result.name, f"user stacks: {stack.detail}")
        if text:
            self._evidence.output(result.name, text)
        if result.outcome in (Outcome.FAIL, Outcome.TIMEOUT, Outcome.UNKNOWN):
            self._evidence.gap(result.name, result.detail or "the probe failed")
        self._note(result.name, result.outcome, begin, result.seconds, result.detail, bool(text), "probes")

    async def _run_commands(self, go: asyncio.Event, processes: Sequence[ProcessRef], deadline: float) -> None:
        """Whatever changes or stops a process waits for `go`: until then no trace of us may be left."""
        settings, zone = self._order.settings, self._order.intent.zone
        slots = asyncio.Semaphore(CONCURRENT_STACKS)
        span = max(0.0, deadline - time.monotonic())
        stacks = {
            process: argv
            for process in processes
            if settings.stacks == "user" and (argv := stack_command(process)) is not None
        }
        if not stacks and not settings.commands:
            return
        try:
            async with asyncio.timeout_at(self._loop_time(deadline)):
                await go.wait()
        except TimeoutError:
            self._evidence.gap("commands", "the intent was not durable within the budget")
            return
        self.ran_commands = True
        commands = [
            run_command(
                argv,
                prefix=zone.command_prefix,
                directory=zone.directory,
                deadline=deadline - span * (1 - _COMMANDS_SHARE),
                started=self._started,
            )
            for argv in settings.commands
        ]
        looks = [
            run_stack(
                process,
                argv,
                slots=slots,
                deadline=deadline - span * (1 - _STACKS_SHARE),
                started=self._started,
            )
            for process, argv in stacks.items()
        ]
        done = await asyncio.gather(*commands, *looks)
        for result in done[: len(commands)]:
            self._evidence.output(result.name, result.text)
            if result.is_cut:
                self._evidence.gap(result.name, result.detail)
            self._note(result.name, result.outcome, result.begin, result.seconds, result.detail, True, "commands")
        for process, result in zip(stacks, done[len(commands) :], strict=True):
            self._stacks[process.pid] = result
            self._note(
                f"user stacks {process.pid}",
                result.outcome,
                result.begin,
                result.seconds,
                result.detail,
                True,
                "commands",
            )

    def _note(
        self, name: str, outcome: Outcome, begin: float, seconds: float, detail: str, has_entry: bool, lane: str
    ) -> None:
        entry = name if has_entry else ""
        self._evidence.add(Step(name, outcome, begin - self._evidence.began, seconds, detail, entry, lane))

    @staticmethod
    def _loop_time(deadline: float) -> float:
        return asyncio.get_running_loop().time() + max(0.0, deadline - time.monotonic())


def _run(probe: Probe) -> tuple[float, ProbeResult]:
    begin = time.monotonic()
    try:
        return begin, probe.run()
    except Exception as error:
        # One probe that meets what it did not expect must not cost the others.
        reason = f"{type(error).__name__}: {error}"
        return begin, ProbeResult(probe.name, Outcome.FAIL, b"", reason, time.monotonic() - begin)
