"""One zone's hold inside a worker: look, snapshot, stage, record. Everything that can hang runs in threads.

The main thread touches nothing of the zone, so it always comes back at the deadline and writes the record with what
there is. A thread that is still stuck then makes the worker `is_stuck`: it is replaced, not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from zonebundle.capture.evidence import Evidence
from zonebundle.capture.logs import OpenLogs, open_logs
from zonebundle.capture.look import Look
from zonebundle.capture.order import FinishOrder, HoldOrder, HoldSettings
from zonebundle.capture.record_writer import RecordWriter
from zonebundle.errors import HostError, SnapshotError
from zonebundle.host import proc, trace
from zonebundle.host.files import sync_directory
from zonebundle.host.process import kill_marked, kill_strays
from zonebundle.model.record import COMMANDS_FILE, LIVE, Area, KnownLog, LogFile, RecordHeader, SnapshotTree
from zonebundle.model.report import Gap, Outcome
from zonebundle.model.zone import COMMAND_MARK, LogTree, ProcessRef
from zonebundle.snapshots.areas import prepare_area
from zonebundle.snapshots.base import Choice, KnownFiles, OpenTree, StagingRules
from zonebundle.snapshots.btrfs import take_btrfs
from zonebundle.snapshots.choose import choose
from zonebundle.snapshots.outcome import Told
from zonebundle.snapshots.place import FILES
from zonebundle.snapshots.staged import stage

T = TypeVar("T")

# Of the budget, this share is for probes and commands at most; the snapshot, tried last and always, has the rest.
LOOK_SHARE = 0.75
_OPEN_SHARE = 0.25
# So long the look waits for the logs to be opened; longer, and one of their file systems hangs.
_STALL = 0.05


class Hold:
    """The state of one hold between the agent's messages."""

    def __init__(
        self, order: HoldOrder, threads: Executor, probe_threads: Executor, known: KnownFiles | None = None
    ) -> None:
        """Probes have threads of their own: they wait for processes, which may hang by the hundred."""
        self._order = order
        self._known = known
        self._settings = order.settings
        self._entry = Path(order.entry)
        self._threads = threads
        self._probe_threads = probe_threads
        self._evidence = Evidence(order.began)
        self._logs = OpenLogs([], [])
        self._choices: list[tuple[OpenTree, Choice]] = []
        self._opening: asyncio.Future[None] | None = None
        # Of the budget, by the look. It begins when a worker does: before, the zone is not held up.
        self._spent = 0.0
        self._unfinished: set[asyncio.Future[Any]] = set()
        self._go = asyncio.Event()

    def go(self) -> None:
        """The intent is durable: commands may run."""
        self._go.set()

    @property
    def is_stuck(self) -> bool:
        """Whether a thread of this hold still hangs."""
        return any(not future.done() for future in self._unfinished)

    async def begin(self) -> dict[str, Any]:
        """Open the logs, and look at the zone: probes at once, commands when the intent is durable."""
        begin = time.monotonic()
        deadline = begin + self._settings.budget * LOOK_SHARE
        self._opening = asyncio.ensure_future(self._open_logs())
        # First the one, then the other, as each is done within a millisecond: side by side, two threads would take the
        # interpreter's lock from each other at every system call.
        await asyncio.wait({self._opening}, timeout=min(_STALL, self._settings.budget * _OPEN_SHARE))
        if self._order.probe:
            look = Look(self._order, self._evidence, self._in_probe_thread, self._note_command)
            await look.run(self._go, deadline)
            if look.ran_commands:
                await self._bounded("stray processes", self._kill_strays, time.monotonic() + 1.0)
        # What hangs now is asked for once more before the snapshot: logs are the last thing to be given up.
        patience = max(deadline - time.monotonic(), self._settings.budget * _OPEN_SHARE)
        await asyncio.wait({self._opening}, timeout=patience)
        self._spent = time.monotonic() - begin
        return {
            "groups": sorted({choice.group for _, choice in self._choices if choice.group is not None}),
            "staging": sorted({choice.staging for _, choice in self._choices if choice.staging is not None}),
            "warnings": sorted({choice.warning for _, choice in self._choices if choice.warning}),
        }

    def _kill_strays(self) -> None:
        """End what commands left: on the host it has become this process's, inside a container it is marked."""
        kill_strays()
        if self._order.intent.zone.command_prefix:
            kill_marked(self._order.intent.zone.membership, COMMAND_MARK)

    async def take_snapshot(self, group: str) -> dict[str, Any]:
        """Take the snapshot of one group, that this bundle leads; its area is reported."""
        tree, choice = next((tree, choice) for tree, choice in self._choices if choice.group == group)
        if choice.staging is None:
            raise SnapshotError(f"no staging directory for a snapshot of {tree.tree.path}; name one under [staging]")
        area = Path(choice.staging, self._order.intent.snapshot)

        def take() -> None:
            prepare_area(area, self._settings.installation)
            take_btrfs(tree, area, self._settings.installation)

        begin = time.monotonic()
        await self._within("snapshot", take, time.monotonic() + self._settings.budget)
        trace.point("capture.snapshot-taken")
        self._evidence.step("snapshot", Outcome.SUCCESS, begin, f"btrfs, {area}")
        return {"kind": str(choice.kind), "area": str(area), "leader": self._order.intent.metadata.bundle_id}

    async def finish(self, finish: FinishOrder) -> dict[str, Any]:
        """Stage what no snapshot holds, write the record and make it durable: from here on nothing is lost."""
        writer = RecordWriter(self._entry)
        try:
            for gap in finish.gaps:
                self._evidence.gap(gap.what, gap.reason)
            areas = self._record_snapshots(writer, finish)
            await self._stage(writer, finish, areas)
            trace.point("capture.staged")
            hold_seconds = time.monotonic() - self._order.began - finish.graceful
            self._evidence.write(writer)
            if finish.followers:
                writer.add("followers", list(finish.followers))
            header = RecordHeader(
                metadata=self._order.intent.metadata,
                operation=self._order.intent.operation,
                hold_seconds=hold_seconds,
                graceful_seconds=finish.graceful,
                outputs=writer.output_bytes,
                limits=self._settings.limits,
                remove=finish.remove,
            )
            await asyncio.get_running_loop().run_in_executor(self._threads, writer.commit, header)
            trace.point("capture.record-durable")
        finally:
            writer.close()
        return {"gaps": len(self._evidence.gaps), "files": self._evidence.files, "bytes": self._evidence.log_bytes}

    def close(self) -> None:
        """Let go of the zone's directories, unless a stuck thread still uses them."""
        if not self.is_stuck:
            self._logs.close()

    async def _open_logs(self) -> None:
        begin = time.monotonic()
        work = partial(_open_and_choose, self._order.intent.zone.logs, self._settings)
        try:
            self._logs, self._choices = await self._in_thread(work)
        except (OSError, HostError, SnapshotError) as error:
            self._evidence.gap("logs", f"the log directories cannot be opened: {error}")
            self._evidence.step("open logs", Outcome.FAIL, begin, str(error))
            return
        for gap in self._logs.gaps:
            self._evidence.gap(gap.what, gap.reason)
        kinds = ", ".join(sorted({str(choice.kind) for _, choice in self._choices}))
        self._evidence.step("open logs", Outcome.SUCCESS, begin, f"{len(self._choices)} directories ({kinds})")

    def _record_snapshots(self, writer: RecordWriter, finish: FinishOrder) -> int:
        """Write the trees that lie in snapshots, to be walked behind; returns the number of areas."""
        numbers: dict[str, int] = {}
        for group, shared in finish.snapshots.items():
            numbers[group] = len(numbers)
            writer.add("area", Area("btrfs", shared.area, shared.leader).to_json())
        for open_tree, choice in self._choices:
            if choice.group in numbers:
                tree = open_tree.tree
                writer.add(
                    "tree",
                    SnapshotTree(
                        area=numbers[choice.group],
                        path=choice.subpath,
                        source=tree.source,
                        prefix=tree.prefix,
                        patterns=tree.patterns,
                        host_root=tree.path,
                        filesystem=open_tree.filesystem or 0,
                    ).to_json(),
                )
        return len(numbers)

    async def _stage(self, writer: RecordWriter, finish: FinishOrder, first_area: int) -> None:
        budget = self._settings.budget
        deadline = time.monotonic() + max(budget - self._spent, budget * (1 - LOOK_SHARE))
        if self._opening is not None:
            await asyncio.wait({self._opening}, timeout=deadline - time.monotonic())
            if not self._opening.done():
                self._opening.cancel()
                reason = "the log directories could not be opened within the budget"
                self._read_behind(writer, self._order.intent.zone.logs, finish, reason)
        by_area: dict[Path, list[tuple[OpenTree, Choice]]] = {}
        for open_tree, choice in self._choices:
            if choice.group not in finish.snapshots:
                parent = choice.staging if choice.staging is not None else self._order.entry
                area = Path(parent, self._order.intent.snapshot)
                by_area.setdefault(area, []).append((open_tree, choice.without_snapshot()))
        near = (self._entry, first_area + len(by_area))
        for number, (area, trees) in enumerate(by_area.items(), start=first_area):
            writer.add("area", Area("staged", str(area), self._order.intent.metadata.bundle_id).to_json())
            begin = time.monotonic()
            counted = _Counted(writer, self._evidence, number)

            def work(deadline: float, area: Path = area, trees: list[Any] = trees, counted: _Counted = counted) -> None:
                for item in stage(
                    trees,
                    area,
                    counted.area,
                    deadline=deadline,
                    copy_limit=self._settings.copy_limit,
                    limits=self._settings.limits,
                    living=finish.living,
                    durable=finish.durable,
                    known=self._known,
                    prepare=partial(prepare_area, area, self._settings.installation),
                    near=near,
                ):
                    counted.take(item)
                # The record will name what is staged: the names must outlast a power cut as well as the record does.
                # Where nothing had to be staged, there is no area.
                if (area / FILES).exists():
                    for directory in (area / FILES, area, area.parent):
                        sync_directory(directory)
                if (self._entry / FILES).exists():
                    sync_directory(self._entry / FILES)

            kind = ", ".join(sorted({str(choice.kind) for _, choice in trees}))
            try:
                # The thread stops by itself at the deadline, between two files; longer, and it hangs.
                await self._within("stage", partial(work, deadline), deadline + budget * _OPEN_SHARE)
                outcome = Outcome.SUCCESS
            except Exception as error:
                # A hung, full or broken staging directory, or a defect of ours, must cost neither record nor stop.
                outcome = Outcome.TIMEOUT if isinstance(error, TimeoutError) else Outcome.FAIL
                if outcome is Outcome.FAIL:
                    traceback.print_exc()
                counted.close()
                left = [open_tree.tree for open_tree, _ in trees]
                self._read_behind(writer, left, finish, f"staging in {area.parent} did not finish: {error}")
            self._evidence.step("stage", outcome, begin, f"{counted.files} files ({kind})")
        if (self._entry / FILES).exists():
            writer.add("area", Area("entry", str(self._entry), self._order.intent.metadata.bundle_id).to_json())

    def _read_behind(self, writer: RecordWriter, trees: Iterable[LogTree], finish: FinishOrder, reason: str) -> None:
        """Leave trees to be walked at their place behind the release, as far as they are there then."""
        now = time.monotonic()
        self._evidence.step("read behind", Outcome.TIMEOUT, now, reason)
        for tree in trees:
            what = f"logs/{tree.source}"
            if tree.via is not None:
                self._evidence.gap(what, f"{reason}; they were in a mount of the zone's own")
                continue
            if finish.living:
                self._evidence.gap(what, f"{reason}; what was not staged is read later, while the zone runs on")
            path = os.path.normpath(tree.path)
            live = SnapshotTree(LIVE, "", tree.source, tree.prefix, tree.patterns, path)
            writer.add("tree", live.to_json())

    async def _in_probe_thread(self, work: Callable[[], T]) -> T:
        return await self._in_thread(work, self._probe_threads)

    async def _in_thread(self, work: Callable[[], T], threads: Executor | None = None) -> T:
        future = asyncio.get_running_loop().run_in_executor(threads or self._threads, work)
        self._unfinished.add(future)
        # Shielded: a cancelled wait must not make a running thread look finished.
        try:
            return await asyncio.shield(future)
        finally:
            if future.done():
                self._unfinished.discard(future)

    async def _within(self, what: str, work: Callable[[], T], deadline: float) -> T:
        try:
            return await asyncio.wait_for(self._in_thread(work), max(0.01, deadline - time.monotonic()))
        except TimeoutError:
            raise TimeoutError(f"{what} did not finish within the budget") from None

    async def _bounded(self, what: str, work: Callable[[], Any], deadline: float) -> None:
        try:
            await self._within(what, work, deadline)
        except TimeoutError as error:
            self._evidence.gap(what, str(error))

    def _note_command(self, process: ProcessRef) -> None:
        """Note a process that we started, so that the next start can end it if we cannot."""
        line = json.dumps({"boot_id": proc.boot_id(), "pid": process.pid, "start_time": process.start_time})
        # Without the note (a full disk) the command is still ended by us; only if we are killed first, nobody knows it.
        with contextlib.suppress(OSError), (self._entry / COMMANDS_FILE).open("a") as file:
            file.write(line + "\n")


def _open_and_choose(
    trees: Iterable[LogTree], settings: HoldSettings
) -> tuple[OpenLogs, list[tuple[OpenTree, Choice]]]:
    rules = StagingRules(settings.staging, settings.state_dir, settings.zone_roots)
    logs = open_logs(trees)
    known = [replace(tree, filesystem=os.fstatvfs(tree.descriptor).f_fsid) for tree in logs.trees]
    return logs, [(tree, choose(tree.descriptor, tree.tree.path, rules)) for tree in known]


def find_choices(trees: Iterable[LogTree], settings: HoldSettings) -> tuple[list[str], list[str]]:
    """Find out how these trees will be kept, which is then remembered: (warnings, staging directories). Blocks."""
    logs, choices = _open_and_choose(trees, settings)
    logs.close()
    warnings = {choice.warning for _, choice in choices if choice.warning}
    return sorted(warnings), sorted({choice.staging for _, choice in choices if choice.staging is not None})


class _Counted:
    """Takes what the staging yields, in its thread, and hands it to the record."""

    def __init__(self, writer: RecordWriter, evidence: Evidence, area: int) -> None:
        self._writer = writer
        self._evidence = evidence
        self.area = area
        self.files = 0
        self._closed = False

    def close(self) -> None:
        """Take nothing more: the thread was given up, and what it still says would come too late."""
        self._closed = True

    def take(self, item: Told) -> None:
        if self._closed:
            return
        if isinstance(item, (LogFile, KnownLog)):
            self._writer.add("file", item.to_json())
            self.files += 1
            self._evidence.count(item.size - item.first if isinstance(item, LogFile) else item.size)
            if self.files == 2:
                trace.point("capture.staged-half")
        elif isinstance(item, Gap):
            self._evidence.gap(item.what, item.reason)
        else:
            # The staging knows no clock of the hold.
            self._evidence.add(replace(item, start=time.monotonic() - self._evidence.began))
