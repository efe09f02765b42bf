"""Logs that live as logs do, and their bundles, against a model of both: what each file held when it was taken."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from support.sealing import Sealing, sealing
from support.spooled import Draft, SpoolDir
from support.stored import check_clean, check_whole, content
from zonebundle.errors import NoSuchBundleError
from zonebundle.model.ids import snapshot_name
from zonebundle.model.record import Area, LogFile
from zonebundle.model.zone import LogTree
from zonebundle.seal.storage import INDEX
from zonebundle.snapshots.areas import prepare_area
from zonebundle.snapshots.base import Choice, Kind, OpenTree
from zonebundle.snapshots.staged import stage
from zonebundle.store.check import check_store
from zonebundle.store.pieces import CHUNK, SMALL
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import prepare
from zonebundle.store.usage import bytes_used

NAMES = ["app.log", "db.log", "who am i"]
# Of each size class: packed, a chunk of its own, many chunks; and what lies at the borders.
SIZES = st.one_of(
    st.integers(0, 5000), st.sampled_from([SMALL - 1, SMALL, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 12345])
)
INSTALLATION = "0123456789ab"


class World(RuleBasedStateMachine):
    """Two store dirs, one zone. `files` is what its logs hold, `taken` what each bundle has to."""

    made = Bundle("made")

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="model-", dir=_base))
        self.at = SpoolDir(self.base).make()
        self.dirs = [self.at.store, self.base / "store-2"]
        prepare(self.dirs[1])
        self.logs = self.at.zone_root / "logs"
        self.logs.mkdir()
        self.files: dict[str, bytes] = {}
        self.taken: dict[str, dict[bytes, bytes]] = {}
        self.seed = 0
        self.stack = contextlib.ExitStack()
        self.opened = self._open()

    def _open(self) -> Sealing:
        opened = self.stack.enter_context(sealing(self.at.state, self.dirs, quota=1 << 40))
        # As the service does at its start.
        opened.sealer.recover()
        opened.upkeep.catch_up()
        return opened

    def teardown(self) -> None:
        self.stack.close()
        shutil.rmtree(self.base)

    def _fresh(self, size: int) -> bytes:
        """Bytes that no other log has, each chunk of them."""
        self.seed += 1
        return b"".join(content(self.seed * 10 + number, min(CHUNK, size - at)) for number, at in _chunks(size))

    # The life of logs.

    @rule(name=st.sampled_from(NAMES), size=SIZES)
    def append(self, name: str, size: int) -> None:
        data = self._fresh(size)
        with (self.logs / name).open("ab") as file:
            file.write(data)
        self.files[name] = self.files.get(name, b"") + data

    @rule(name=st.sampled_from(NAMES))
    def rotate(self, name: str) -> None:
        for number in range(3, -1, -1):
            old, new = (name if n == 0 else f"{name}.{n}" for n in (number, number + 1))
            if old in self.files:
                (self.logs / old).rename(self.logs / new)
                self.files[new] = self.files.pop(old)

    @rule(name=st.sampled_from(NAMES))
    def copy_and_truncate(self, name: str) -> None:
        if name in self.files:
            shutil.copyfile(self.logs / name, self.logs / f"{name}.copied")
            os.truncate(self.logs / name, 0)
            self.files[f"{name}.copied"] = self.files[name]
            self.files[name] = b""

    @rule(name=st.sampled_from(NAMES))
    def move_to_an_archive(self, name: str) -> None:
        if f"{name}.1" in self.files:
            (self.logs / "old").mkdir(exist_ok=True)
            (self.logs / f"{name}.1").rename(self.logs / "old" / name)
            self.files[f"old/{name}"] = self.files.pop(f"{name}.1")

    @rule(name=st.sampled_from(NAMES))
    def write_over(self, name: str) -> None:
        """Same name, same inode, same size, and in the end the same time of change: only the bytes are others."""
        if self.files.get(name):
            status = (self.logs / name).stat()
            data = self._fresh(len(self.files[name]))
            with (self.logs / name).open("r+b") as file:
                file.write(data)
            os.utime(self.logs / name, ns=(status.st_atime_ns, status.st_mtime_ns))
            self.files[name] = data

    # Bundles.

    @rule(target=made)
    def seal(self) -> str:
        draft = Draft(self.at)
        _age(self.logs)
        for log in _staged(self.logs, self.at, draft):
            draft.writer.add("file", log.to_json())
        sealed = self.opened.seal(draft)
        assert (sealed.left, sealed.header.gaps) == ("", 1)
        self.taken[draft.bundle_id] = {b"logs/zone/" + os.fsencode(path): data for path, data in self.files.items()}
        return draft.bundle_id

    @rule(bundle_id=made)
    def delete(self, bundle_id: str) -> None:
        if self.taken.pop(bundle_id, None) is None:
            with contextlib.suppress(NoSuchBundleError):
                self.opened.sealer.delete("web", bundle_id)
                raise AssertionError("it was deleted twice")
        else:
            self.opened.sealer.delete("web", bundle_id)

    @precondition(lambda self: self.taken)
    @rule(share=st.integers(1, 100))
    def clean_up(self, share: int) -> None:
        limit = bytes_used(self.at.store) * share // 100
        self.opened.upkeep._quota = limit * 2
        removed = [bundle_id for _, bundle_id in self.opened.upkeep.clean_up(50, ("cause", "time"), ())["removed"]]
        for bundle_id in removed:
            del self.taken[bundle_id]
        assert bytes_used(self.at.store) <= limit or not self.taken

    # The sealer.

    @rule(is_lost=st.booleans())
    def restart(self, is_lost: bool) -> None:
        self.stack.close()
        if is_lost:
            for path in self.at.state.glob(f"{INDEX}*"):
                path.unlink()
        self.opened = self._open()

    @rule(number=st.integers(0, 1))
    def replace_a_disk(self, number: int) -> None:
        shutil.rmtree(self.dirs[number])
        prepare(self.dirs[number])
        self.opened.upkeep.catch_up()

    # What is always true.

    @invariant()
    def every_bundle_has_what_the_logs_had(self) -> None:
        for directory in self.dirs:
            found = {}
            for bundle in StoreReader.open(directory).stored():
                files = check_whole(bundle)
                logs = {path: data for path, data in files.items() if path.startswith(b"logs/")}
                found[bundle.header.metadata.bundle_id] = logs
            assert found == self.taken
        assert self.at.left() == []

    @invariant()
    def nothing_is_stored_twice_or_in_vain(self) -> None:
        self.opened.upkeep.prune()
        for directory in self.dirs:
            check_clean(directory)
            assert list(check_store(StoreReader.open(directory))) == []
            places: dict[str, set[tuple[str, int]]] = {}
            for bundle in StoreReader.open(directory).stored():
                for piece in (piece for entry in bundle.entries() for piece in entry.pieces):
                    places.setdefault(piece.blake3, set()).add((piece.segment, piece.offset))
            assert {content: found for content, found in places.items() if len(found) > 1} == {}


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    return enumerate(range(0, size, CHUNK))


def _age(logs: Path) -> None:
    """Let the stamps of the logs become old enough to be trusted: what is waited for is the clock."""
    youngest = max((path.stat().st_ctime_ns for path in logs.rglob("*")), default=0)
    while time.time_ns() < youngest + 25_000_000:
        time.sleep(0.005)


def _staged(logs: Path, at: SpoolDir, draft: Draft) -> Iterator[LogFile]:
    """Stage as a stop does."""
    area = at.staging / snapshot_name(INSTALLATION, draft.bundle_id)
    prepare_area(area, INSTALLATION)
    draft.add_area(Area("staged", str(area), draft.bundle_id))
    descriptor = os.open(logs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        tree = OpenTree(LogTree("zone", str(logs)), descriptor)
        staged = stage(
            [(tree, Choice(Kind.HARDLINK, str(at.staging)))],
            area,
            0,
            deadline=time.monotonic() + 60,
            copy_limit=1 << 30,
            limits=draft.limits,
            living=False,
            durable=False,
        )
        yield from (item for item in staged if isinstance(item, LogFile))
    finally:
        os.close(descriptor)


_base: Path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_store_against_a_model(ext4_dir: Path) -> None:
    global _base
    _base = ext4_dir
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=int(os.environ.get("ZONE_BUNDLE_MODELS", "15")),
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
