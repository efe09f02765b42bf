"""The seal and the check of a store, in this process: how near is it to the compressor alone?"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.load import Row, file_sizes, one_lock_gzip, without_sync, work_directory, write_chunks
from support.sealing import sealing
from support.spooled import INSTALLATION, Draft, SpoolDir
from zonebundle.host.collector import collect_seldom
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, LogFile
from zonebundle.model.zone import LogTree
from zonebundle.seal.sealer import Sealed
from zonebundle.snapshots.areas import prepare_area
from zonebundle.snapshots.base import Choice, Kind, OpenTree
from zonebundle.snapshots.staged import stage
from zonebundle.store.check import check_store
from zonebundle.store.pieces import CHUNK, compress
from zonebundle.store.reader import StoreReader

ROUNDS = 3
SMALL_FILES = 20_000
SMALL_MOST = 4 << 10
LOGS = 160
LOG_BYTES = 3_000_000
# gzip's best level is so slow that it is measured on one file of so many.
SHARE = 10
WORKERS = len(os.sched_getaffinity(0))


def small() -> Iterator[Row]:
    """The first seal of 20,000 files of 0 to 4 KiB."""
    with work_directory() as work:
        logs = work / "logs"
        chance = random.Random(1)
        for number in range(SMALL_FILES):
            directory = logs / f"service-{number % 20}"
            directory.mkdir(parents=True, exist_ok=True)
            line = b'{"file":%d,"id":"%016x","msg":"request completed"}\n' % (number, chance.getrandbits(64))
            text = line * (SMALL_MOST // len(line) + 1)
            (directory / f"job-{number}.log.1").write_bytes(text[: chance.randint(0, SMALL_MOST)])
        seconds = statistics.median(_seal_once(logs, work / f"round-{number}").seconds for number in range(ROUNDS))
    rate = SMALL_FILES / seconds
    what = f"first seal of {SMALL_FILES:,} files of 0 to {SMALL_MOST >> 10} KiB, from the record to the commit"
    yield Row(what, ">= 10,000 files/s", f"{rate:,.0f} files/s ({seconds:.2f} s)", rate >= 10_000)


def seal() -> Iterator[Row]:
    """Sealing new logs in the page cache, beside ISA-L alone, gzip -9, pigz -9 and zstd -1."""
    with work_directory() as work:
        logs = work / "logs"
        write_chunks(logs, LOGS, LOG_BYTES)
        files = sorted(logs.iterdir())
        alone, ours, loose, zstd = [], [], [], []
        for number in range(ROUNDS):
            alone.append(_isal_alone(files))
            ours.append(_seal_once(logs, work / f"durable-{number}").seconds)
            with without_sync():
                loose.append(_seal_once(logs, work / f"loose-{number}").seconds)
            if shutil.which("zstd"):
                zstd.append(_pipe(logs, ["zstd", "-q", "-T0", "-1"]))
        best, took, not_durable = (statistics.median(times) for times in (alone, ours, loose))
        volume = LOGS * LOG_BYTES / 1e6
        what = f"sealing {volume:.0f} MB of new logs in the page cache"
        yield Row(
            f"{what}, to the commit / ISA-L alone, {WORKERS} threads",
            ">= 70 %",
            f"{best / took:.0%} ({volume / took:.0f} MB/s / {volume / best:.0f} MB/s)",
            best / took >= 0.7,
        )
        yield Row(
            f"{what}, to the commit; without any fsync",
            "-",
            f"{took:.2f} s; {not_durable:.2f} s (not durable, for comparison)",
        )
        some = files[::SHARE]
        old = one_lock_gzip(some) * len(files) / len(some)
        yield _baseline(
            f"one lock and gzip -9 ({len(some)} of {len(files)} files measured, extrapolated)", old, took, 35
        )
        if shutil.which("pigz"):
            yield _baseline("tar | pigz -9", _pipe(logs, ["pigz", "-9"]), took, 20)
        else:
            yield Row("tar | pigz -9 / sealing", ">= 20", "skipped: pigz is not installed")
        if zstd:
            yield _baseline("tar | zstd -T0 -1", statistics.median(zstd), took, 3)
        else:
            yield Row("tar | zstd -T0 -1 / sealing", ">= 3", "skipped: zstd is not installed")


def verify() -> Iterator[Row]:
    """Checking a store in every byte."""
    with work_directory() as work:
        logs, base = work / "logs", work / "sealed"
        write_chunks(logs, LOGS, LOG_BYTES)
        _seal_once(logs, base)
        volume = sum(file_sizes(base / "store").values()) / 1e6
        for deep in (False, True):
            begin = time.monotonic()
            problems = list(check_store(StoreReader.open(base / "store"), deep=deep))
            took = time.monotonic() - begin
            name = "verify --deep" if deep else "verify"
            what = f"{name} of a store of {volume:.0f} MB, {LOGS * LOG_BYTES / 1e6:.0f} MB of logs"
            reached = f"{volume / took:.0f} MB/s ({took:.2f} s)"
            yield Row(what, "-", f"{len(problems)} problems: {problems[0]}" if problems else reached)


def _baseline(name: str, seconds: float, ours: float, target: int) -> Row:
    return Row(f"{name} / sealing", f">= {target}", f"{seconds / ours:.1f} ({seconds:.1f} s)", seconds / ours >= target)


def _seal_once(logs: Path, base: Path) -> Sealed:
    """Hold and seal the logs into a new store, which stays. Like a stop, it has hard links to them all.

    For some seconds ext4 does not use an inode again that was removed: to create files would be to search for others.
    """
    # As the sealer's own process does.
    collect_seldom()
    at = SpoolDir(base).make()
    with sealing(at.state, [at.store], workers=WORKERS) as sealer:
        # The store is opened when the sealer starts, not in a seal.
        sealer.storage.usable()
        draft = Draft(at)
        _link_all(draft, logs)
        bundle_id = draft.write()
        sealed = sealer.seal_again(bundle_id)
        # Every draft has one, and no log may be missing.
        assert sealed.header.gaps == 1, sealed.header
    # What is left to be written would be written in the next measurement.
    os.sync()
    return sealed


def _link_all(draft: Draft, logs: Path) -> None:
    area = draft.at.staging / snapshot_name(INSTALLATION, draft.bundle_id)
    prepare_area(area, INSTALLATION)
    draft.add_area(Area("staged", str(area), draft.bundle_id))
    descriptor = os.open(logs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        tree = OpenTree(LogTree("zone", str(logs)), descriptor)
        for item in stage(
            [(tree, Choice(Kind.HARDLINK, str(draft.at.staging)))],
            area,
            0,
            deadline=time.monotonic() + 300,
            copy_limit=1 << 30,
            limits=draft.limits,
            living=False,
            durable=False,
        ):
            if isinstance(item, LogFile):
                draft.writer.add("file", item.to_json())
    finally:
        os.close(descriptor)
    # The links are not what is measured: the seal's fsyncs must not have to write them out.
    os.sync()


def _isal_alone(files: list[Path]) -> float:
    """Seconds that ISA-L takes for the chunks in memory, by as many threads as the sealer has."""
    chunks = []
    for path in files:
        data = path.read_bytes()
        chunks += [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    with ThreadPoolExecutor(WORKERS) as threads:
        begin = time.monotonic()
        for _ in threads.map(lambda raw: len(compress(raw)), chunks):
            pass
        return time.monotonic() - begin


def _pipe(logs: Path, command: list[str]) -> float:
    """Seconds of `tar | command`, into a file."""
    with tempfile.TemporaryFile() as file:
        begin = time.monotonic()
        tar = subprocess.Popen(["tar", "-cf", "-", "-C", str(logs), "."], stdout=subprocess.PIPE)
        assert tar.stdout is not None
        with tar.stdout:
            subprocess.run(command, stdin=tar.stdout, stdout=file, check=True)
        assert tar.wait() == 0
        return time.monotonic() - begin
