"""Random schedules: a sealer with several store dirs that is killed again and again, and what must be true then.

`python -m support.schedules DIRECTORY SEED [SEED]` plays the schedules of these seeds, one after another, and prints
what went wrong with the seed that plays it again. The process has one thread and no database open, so it can be forked
for every step: what the kernel knows of files and locks then ends with the step, as it does with a killed sealer.
"""

import contextlib
import gc
import os
import random
import shutil
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import power
from support.sealing import Sealing, sealing
from support.spooled import Draft, SpoolDir
from support.stored import check_clean, check_whole, content, download
from zonebundle.errors import NoSuchBundleError, StoreError
from zonebundle.host import syscalls, trace
from zonebundle.seal.storage import INDEX
from zonebundle.store import store as store_module
from zonebundle.store.bundle import FRAME, MANIFEST
from zonebundle.store.check import Kind, check_store
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import prepare
from zonebundle.store.tombstones import TOMBSTONES

SMALL_RESERVE = 4096
_NEVER = threading.Event()
# What is written is rather small, and some of it is in many bundles.
_CONTENTS = [content(seed, size) for seed, size in enumerate([90, 700, 3000, 9000, 9001, 20_000, 300_000, 400_000])]


@dataclass
class Bundle:
    """What is known of a bundle. `downloads` are those that were seen; `is_deleted`: it must not come back.

    `kills`: how often its seal may have been.
    """

    zone: str
    bundle_id: str
    logs: dict[bytes, bytes]
    downloads: set[bytes] = field(default_factory=set)
    is_deleted: bool = False
    is_spooled: bool = True
    kills: int = 0


@dataclass
class Schedule:
    """One schedule below `base`, which has to be fresh. `play` raises AssertionError."""

    base: Path
    seed: int
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.at = SpoolDir(self.base)
        for directory in (self.at.spool, self.at.staging, self.at.zone_root):
            directory.mkdir(parents=True, mode=0o700)
        self.dirs = [self.base / f"store-{number}" for number in range(self.chance.choice([1, 2, 2, 2, 3]))]
        for directory in self.dirs:
            prepare(directory)
        self.away: dict[Path, Path] = {}
        self.bundles: dict[str, Bundle] = {}
        self.holds: list[Path] = []
        # How often a step was killed.
        self.kills = 0

    def play(self) -> None:
        """Some steps, most of them killed, then a recovery."""
        self._seal()
        self._look()
        for _ in range(self.chance.randint(2, 7)):
            self._step()
            self._look()
        self._recover()

    def _step(self) -> None:
        steps = [
            *(self._seal,) * 5,
            *(self._delete,) * 3,
            *(self._clean_up,) * 2,
            self._prune,
            *(self._catch_up,) * 2,
            self._repair,
            self._settle,
            self._hold,
            self._lose_index,
        ]
        if len(self.dirs) > 1:
            steps += [self._swap, self._swap, self._swap, self._replace, self._lose_tombstones]
        self.chance.choice(steps)()

    # Steps of the sealer, each of which may be killed.

    def _seal(self) -> None:
        for _ in range(self.chance.randint(1, 2)):
            self._capture()
        ids = self._spooled()
        # At the third time its seal leaves out what it had been working on.
        spares = any(self.bundles[bundle_id].kills == 2 for bundle_id in ids)
        if self._run("seal", lambda opened: _seal(opened, ids), spares=spares):
            for bundle_id in ids:
                self.bundles[bundle_id].kills += 1

    def _delete(self) -> None:
        if not self.bundles:
            return
        bundle = self.chance.choice(list(self.bundles.values()))

        def delete(opened: Sealing) -> None:
            with contextlib.suppress(NoSuchBundleError):
                opened.sealer.delete(bundle.zone, bundle.bundle_id)

        self._run(f"delete {bundle.bundle_id}", delete, [bundle])

    def _clean_up(self) -> None:
        limit = self.chance.choice([0, 5, 10, 20, 40])
        self._run(
            f"clean up to {limit} %",
            lambda opened: opened.upkeep.clean_up(limit, ("cause", "time"), ()),
            [bundle for bundle in self.bundles.values() if not bundle.is_spooled],
        )

    def _prune(self) -> None:
        self._run("prune", lambda opened: opened.upkeep.prune())

    def _catch_up(self) -> None:
        self._run("catch up", lambda opened: opened.upkeep.catch_up())

    def _repair(self) -> None:
        self._run("repair", lambda opened: opened.upkeep.repair())

    def _settle(self) -> None:
        self._run("settle", lambda opened: opened.sealer.settle())

    # What others do.

    def _capture(self) -> None:
        draft = Draft(self.at, self.chance.choice(["web", "db-1"]), str(uuid.UUID(int=self.chance.getrandbits(128))))
        for number in range(self.chance.randint(1, 4)):
            draft.add_log(b"%d.log" % number, self.chance.choice(_CONTENTS))
        draft.add_output("who", b"nobody")
        draft.write()
        # A seal waits for the stamps of a young record to settle.
        os.utime(draft.entry / "capture.jsonl", (0, 0))
        logs = {b"logs/" + path: data for path, data in draft.expected.items()}
        self.bundles[draft.bundle_id] = Bundle(draft.zone, draft.bundle_id, logs)

    def _hold(self) -> None:
        """A hold begins, or all that there are end without a record."""
        if self.holds and self.chance.random() < 0.5:
            self._end_holds()
        else:
            hold = self.at.spool / str(uuid.UUID(int=self.chance.getrandbits(128)))
            hold.mkdir()
            (hold / "intent.json").write_text("{}")
            self.holds.append(hold)

    def _end_holds(self) -> None:
        for hold in self.holds:
            shutil.rmtree(hold)
        self.holds = []

    def _lose_index(self) -> None:
        self.log.append("the index is lost")
        for path in self.at.state.glob(f"{INDEX}*"):
            path.unlink()

    def _swap(self) -> None:
        """What was away is back, and another directory, or the same, goes away."""
        self._bring_back()
        directory = self.chance.choice(self.dirs)
        self.log.append(f"{directory.name} goes away")
        self.away[directory] = directory.with_name(f"{directory.name}.away")
        directory.rename(self.away[directory])

    def _bring_back(self) -> None:
        for directory, place in self.away.items():
            self.log.append(f"{directory.name} is back")
            place.rename(directory)
        self.away = {}

    def _replace(self) -> None:
        """A disk is replaced by an empty one, if nothing is on it alone."""
        directory = self.chance.choice(self._there())
        others = [other for other in self._places() if other != directory]
        if all(self._has(others, bundle) for bundle in self._having(directory)) and self._buried() <= self._buried(
            others
        ):
            self.log.append(f"{directory.name} is replaced")
            shutil.rmtree(directory)
            prepare(directory)

    def _having(self, directory: Path) -> list[Bundle]:
        return [bundle for bundle in self.bundles.values() if self._has([directory], bundle)]

    def _lose_tombstones(self) -> None:
        if not self.away and self._buried() <= self._buried(self.dirs):
            self.log.append("the tombstones of the state are lost")
            shutil.rmtree(self.at.state / TOMBSTONES, ignore_errors=True)

    # What is true of the directories.

    def _there(self) -> list[Path]:
        return [directory for directory in self.dirs if directory not in self.away]

    def _places(self) -> list[Path]:
        return [self.away.get(directory, directory) for directory in self.dirs]

    def _spooled(self) -> list[str]:
        return [bundle_id for bundle_id in self.bundles if (self.at.spool / bundle_id / "capture.jsonl").exists()]

    def _has(self, places: list[Path], bundle: Bundle) -> list[Path]:
        found = [place / "bundles" / bundle.zone / bundle.bundle_id for place in places]
        return [directory for directory in found if (directory / MANIFEST).exists()]

    def _buried(self, roots: list[Path] | None = None) -> set[str]:
        roots = roots or [self.at.state, *self._places()]
        return {path.name for root in roots for path in root.glob(f"{TOMBSTONES}/*")}

    def _look(self) -> None:
        """What has to be true after each step, killed or not, before anything is recovered."""
        for bundle in self.bundles.values():
            found = self._has(self._places(), bundle)
            bundle.is_spooled = (self.at.spool / bundle.bundle_id / "capture.jsonl").exists()
            if bundle.is_deleted:
                assert len(self.dirs) > 1 or not found, f"deleted, and back: {found}"
            elif not found:
                assert bundle.is_spooled, f"bundle {bundle.bundle_id} is lost"
            for directory in found:
                self._check(bundle, directory)

    def _check(self, bundle: Bundle, directory: Path) -> None:
        reader = StoreReader.open(directory.parents[2])
        stored = reader.find(bundle.zone, bundle.bundle_id)
        data = download(stored)
        if data not in bundle.downloads:
            # While the directory that has it is away it may be sealed once more: then there are two, for a while.
            assert self.away or not bundle.downloads, f"{directory} has other bytes than it had"
            files = check_whole(stored)
            assert {path: data for path, data in files.items() if path.startswith(b"logs/")} == bundle.logs
            bundle.downloads.add(data)

    def _run(
        self, name: str, work: Callable[[Sealing], Any], to_go: list[Bundle] | None = None, *, spares: bool = False
    ) -> bool:
        """Run a step in a child, which may be killed; whether it was. The bundles `to_go` may be deleted by it."""
        passage = self.chance.choice([0, *[self.chance.randint(1, 12), -self.chance.randint(1, 80)] * 2])
        killed = self._in_child(name, 0 if spares else passage, work)
        buried = self._buried()
        for bundle in to_go or ():
            recorded = self.at.spool / bundle.bundle_id / "capture.jsonl"
            is_there = self._has(self._places(), bundle)
            is_sealed = (recorded.parent / "sealed").exists()
            if bundle.bundle_id in buried or (not is_there and (is_sealed or not recorded.exists())):
                bundle.is_deleted = True
        return killed

    def _in_child(self, name: str, passage: int, work: Callable[[Sealing], Any]) -> bool:
        def run(report: Callable[[str], None]) -> None:
            _kill_at(passage)
            with sealing(self.at.state, self.dirs, quota=2_000_000, workers=1) as opened:
                opened.sealer.recover()
                work(opened)

        # In the child every object that is only looked at by the collector would be copied.
        gc.freeze()
        crash = power.in_child(run)
        self.kills += crash.killed
        self.log.append(f"{name}, killed at {passage}" if crash.killed else name)
        return crash.killed

    def _recover(self) -> None:
        """Everything is back, nothing is killed: in the end, nothing is left of all that happened."""
        self._bring_back()
        self._end_holds()

        def recover(opened: Sealing) -> None:
            opened.upkeep.catch_up()
            _seal(opened, self._spooled(), is_all=True)
            report = opened.upkeep.repair()
            assert report["problems"] == [], report
            assert opened.storage.index is not None
            assert not opened.storage.index.is_broken

        self._in_child("recovery", 0, recover)
        self._look()
        self._check_stores({Kind.UNUSED})
        self._in_child("prune", 0, _prune)
        self._look()
        self._check_stores(set())
        assert self.at.left() == []
        assert self._buried() == set()
        for bundle in self.bundles.values():
            found = self._has(self.dirs, bundle)
            assert len(found) == (0 if bundle.is_deleted else len(self.dirs)), f"{bundle.bundle_id} is in {found}"
            for directory in found[1:]:
                for file in (FRAME, MANIFEST):
                    assert (directory / file).read_bytes() == (found[0] / file).read_bytes()
            if found:
                assert check_whole(StoreReader.open(self.dirs[0]).find(bundle.zone, bundle.bundle_id))
        for directory in self.dirs:
            check_clean(directory)

    def _check_stores(self, allowed: set[Kind]) -> None:
        for directory in self.dirs:
            problems = [found for found in check_store(StoreReader.open(directory)) if found.kind not in allowed]
            assert problems == [], "\n".join(map(str, problems))


def _seal(opened: Sealing, bundle_ids: list[str], *, is_all: bool = False) -> None:
    for bundle_id in bundle_ids:
        with contextlib.suppress(*(() if is_all else (StoreError,))):
            sealed = opened.sealer.seal(bundle_id, lambda total, done: None, _NEVER)
            assert not is_all or sealed is None or sealed.left == "", sealed


def _prune(opened: Sealing) -> None:
    opened.upkeep.prune()
    opened.sealer.settle()


def _kill_at(passage: int) -> None:
    """Die at the n-th trace point that is passed; of a negative number before the n-th change that is made."""
    store_module._RESERVE_BYTES = SMALL_RESERVE
    left = abs(passage)

    def pass_by(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if passage > 0:
        trace.point = pass_by  # type: ignore[assignment]
    # A killed process loses nothing of what the kernel has: a real fsync would only take time.
    os.fsync = os.fdatasync = syscalls.syncfs = lambda descriptor: None  # type: ignore[assignment]
    if passage < 0:
        for name in ("rename", "unlink", "link", "mkdir", "rmdir", "write", "fsync", "fdatasync", "ftruncate"):
            setattr(os, name, _after(pass_by, getattr(os, name)))


def _after(first: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **options: Any) -> Any:
        first()
        return call(*arguments, **options)

    return both


def play(base: Path, seed: int) -> Schedule:
    """Play the schedule of a seed in a directory of its own, which stays if it fails."""
    directory = base / str(seed)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    schedule = Schedule(directory, seed)
    try:
        schedule.play()
    except BaseException:
        print(f"seed {seed} in {directory}:", *schedule.log, sep="\n    ")
        raise
    shutil.rmtree(directory)
    return schedule


def main(arguments: list[str]) -> int:
    base, first, *last = arguments
    failed = kills = 0
    seeds = range(int(first), int(last[0] if last else first) + 1)
    for seed in seeds:
        try:
            kills += play(Path(base), seed).kills
        except Exception:
            failed += 1
            traceback.print_exc(file=sys.stdout)
    print(f"{len(seeds)} schedules, {kills} kills, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
