"""When the clean-up runs, and with which context; and, with a real agent, what the interface says of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from support import wait
from zonebundle.agent.cleanup import CONTEXT_FILE, Cleanup
from zonebundle.errors import StoreError, UnavailableError, UsageError
from zonebundle.model.retention import CleanupContext

DIR = "/var/lib/store"


class FakeSealer:
    """Answers when its gate is open; fails on cue."""

    def __init__(self) -> None:
        self.pid: int | None = 1
        self.asked: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.removed: list[list[str]] = []
        self.error: Exception | None = None
        self.running = 0

    async def ask(self, do: str, **arguments: Any) -> Any:
        if do == "utilization":
            return {DIR: {"dataset_quota": 1000, "bytes_available": 1, "bytes_used": 300}}
        if do == "plan_clean_up":
            return self.removed
        assert do == "clean_up"
        assert arguments.pop("among") == sorted(bundle_id for _, bundle_id in self.removed)
        self.running += 1
        assert self.running == 1, "two clean-ups at a time"
        self.asked.append(arguments)
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        if self.error:
            raise self.error
        return {"dirs": {DIR: {"bundles": len(self.removed), "bytes": 7}}, "removed": self.removed}


class FakeBundles:
    def __init__(self) -> None:
        self.pins: set[str] = set()
        self.forgotten: list[str] = []
        self.comparisons = 0
        self.condemned: set[str] = set()

    def pinned(self) -> set[str]:
        return self.pins

    def condemn(self, bundle_ids: Iterable[str]) -> set[str]:
        self.condemned = set(bundle_ids)
        return set(self.condemned)

    def reprieve(self, bundle_ids: Iterable[str]) -> None:
        assert set(bundle_ids) == self.condemned
        self.condemned = set()

    def forget(self, bundle_ids: Iterable[str]) -> None:
        self.forgotten += bundle_ids

    async def compare_with_store(self) -> None:
        self.comparisons += 1


class Made:
    """A clean-up in `directory`, with what it works on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealer = FakeSealer()
        self.bundles = FakeBundles()
        self.threads = ThreadPoolExecutor(1)
        self.cleanup = self.again()

    def again(self) -> Cleanup:
        """Another one on the same state, as after a restart."""
        return Cleanup(self.directory, CleanupContext(600.0, 25), self.sealer, self.bundles, self.threads)

    @property
    def file(self) -> Path:
        return self.directory / CONTEXT_FILE

    async def wait_for_runs(self, number: int) -> None:
        await wait.until_async(lambda: len(self.sealer.asked) >= number)
        assert len(self.sealer.asked) == number


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Made]:
    made = Made(tmp_path)
    await made.cleanup.start()
    yield made
    await made.cleanup.close()
    made.threads.shutdown()
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Skips:
    """Lets the loop's clock jump: periods are a minute at least."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seconds = 0.0
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self._seconds)

    def skip(self, seconds: float) -> None:
        self._seconds += seconds


async def _turns() -> None:
    """Let everything that is ready run."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_it_runs_once_a_period(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Skips(monkeypatch)
    clock.skip(590)
    await _turns()
    assert made.sealer.asked == []
    clock.skip(10)
    await made.wait_for_runs(1)
    clock.skip(590)
    await _turns()
    assert len(made.sealer.asked) == 1
    clock.skip(10)
    await made.wait_for_runs(2)


async def test_the_period_counts_from_the_last_run(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Skips(monkeypatch)
    clock.skip(400)
    await made.cleanup.run()
    clock.skip(400)
    await _turns()
    assert len(made.sealer.asked) == 1
    clock.skip(200)
    await made.wait_for_runs(2)


async def test_a_new_period_counts_at_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Skips(monkeypatch)
    clock.skip(100)
    await made.cleanup.change(period=200.0)
    await _turns()
    assert made.sealer.asked == []
    await made.cleanup.change(period=90.0)
    await made.wait_for_runs(1)


@pytest.mark.parametrize("change", [{"storage_limit": 10}, {"priority": ["time", "cause"]}])
async def test_a_new_limit_or_priority_acts_at_once(made: Made, change: dict[str, Any]) -> None:
    made.bundles.pins = {"b", "a"}
    await made.cleanup.change(**change)
    await made.wait_for_runs(1)
    expected = {"storage_limit": 25, "priority": ["cause", "time"]} | change
    assert made.sealer.asked == [expected | {"pinned": ["a", "b"]}]


async def test_what_stays_the_same_runs_nothing(made: Made) -> None:
    await made.cleanup.change(period=700.0, storage_limit=25, priority=["cause", "time"])
    await _turns()
    assert made.sealer.asked == []


async def test_a_failed_run_is_told_and_tried_again_in_the_next_period(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Skips(monkeypatch)
    made.sealer.error = StoreError("disk on fire")
    with capture_logs() as logs:
        with pytest.raises(StoreError, match="disk on fire"):
            await made.cleanup.run()
        clock.skip(600)
        await made.wait_for_runs(2)
        await _turns()
    assert [line["reason"] for line in logs] == ["disk on fire"] * 2
    # Something may have been removed before it failed.
    assert made.bundles.comparisons == 2
    made.sealer.error = None
    clock.skip(600)
    await made.wait_for_runs(3)


async def test_who_asks_during_a_run_gets_one_that_began_later(made: Made) -> None:
    made.sealer.gate.clear()
    first = asyncio.create_task(made.cleanup.run())
    await made.wait_for_runs(1)
    made.sealer.removed = [["web", "a"]]
    later = [asyncio.create_task(made.cleanup.run()) for _ in range(3)]
    await _turns()
    assert len(made.sealer.asked) == 1
    made.sealer.gate.set()
    await asyncio.gather(first, *later)
    # They share it.
    assert len(made.sealer.asked) == 2


async def test_a_vanished_client_cancels_no_run(made: Made) -> None:
    made.sealer.gate.clear()
    made.sealer.removed = [["web", "a"]]
    asked = asyncio.create_task(made.cleanup.run())
    await made.wait_for_runs(1)
    asked.cancel()
    await asyncio.wait([asked])
    made.sealer.gate.set()
    await wait.until_async(lambda: made.bundles.forgotten == ["a"])


async def test_what_was_removed_is_unlisted(made: Made) -> None:
    made.sealer.removed = [["web", "a"], ["db", "b"]]
    assert await made.cleanup.run() == {DIR: {"bundles": 2, "bytes": 7}}
    assert made.bundles.forgotten == ["a", "b"]
    assert made.bundles.comparisons == 0


async def test_after_a_sealer_that_died_the_store_is_asked(made: Made) -> None:
    made.sealer.gate.clear()
    run = asyncio.create_task(made.cleanup.run())
    await made.wait_for_runs(1)
    made.sealer.pid = 2
    made.sealer.gate.set()
    await run
    assert made.bundles.comparisons == 1


async def test_closing_waits_for_no_sealer(tmp_path: Path) -> None:
    made = Made(tmp_path)
    await made.cleanup.start()
    made.sealer.gate.clear()
    runs = [asyncio.create_task(made.cleanup.run()) for _ in range(2)]
    await made.wait_for_runs(1)
    await made.cleanup.close()
    await asyncio.wait(runs)
    made.threads.shutdown()


async def test_what_bundles_may_use_is_the_limit(made: Made) -> None:
    expected = {"dataset_quota": 1000, "bytes_available": 250, "bytes_used": 300}
    assert await made.cleanup.utilization() == {DIR: expected}
    await made.cleanup.change(storage_limit=50)
    assert (await made.cleanup.utilization())[DIR]["bytes_available"] == 500


async def test_the_context_survives_a_restart(made: Made) -> None:
    assert not made.file.exists()
    await made.cleanup.change(period=61.5, storage_limit=3, priority=["time", "cause"])
    again = made.again()
    await again.start()
    assert again.context == made.cleanup.context == CleanupContext(61.5, 3, ("time", "cause"))
    assert made.file.stat().st_mode & 0o777 == 0o600
    await again.close()


async def test_changes_at_the_same_time_are_all_kept(made: Made) -> None:
    await asyncio.gather(made.cleanup.change(period=100.0), made.cleanup.change(storage_limit=7))
    assert made.cleanup.context == CleanupContext(100.0, 7)
    assert CleanupContext.from_json(json.loads(made.file.read_bytes())) == made.cleanup.context


@pytest.mark.parametrize("change", [{"period": 59.0}, {"storage_limit": 51}, {"priority": ["time"]}])
async def test_what_is_not_allowed_changes_nothing(made: Made, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        await made.cleanup.change(**{"period": 100.0} | change)
    assert made.cleanup.context == CleanupContext()
    assert not made.file.exists()


async def test_a_context_that_cannot_be_written_does_not_count(made: Made) -> None:
    made.file.mkdir()
    with pytest.raises(UnavailableError, match=r"context\.json.*nothing is changed"):
        await made.cleanup.change(storage_limit=5)
    assert made.cleanup.context == CleanupContext()
    await _turns()
    assert made.sealer.asked == []


@pytest.mark.slow
@settings(deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=40),
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["period", "storage_limit", "priority", "secs", "nanos"]), inner, max_size=5
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_a_damaged_context_is_set_aside(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("state")

    async def look() -> None:
        made = Made(directory)
        made.file.write_bytes(data)
        with capture_logs() as logs:
            await made.cleanup.start()
        assert made.cleanup.context == CleanupContext()
        assert [line["log_level"] for line in logs] == ["error"]
        assert not made.file.exists()
        assert (directory / "context.json.damaged").read_bytes() == data
        await made.cleanup.close()
        made.threads.shutdown()

    asyncio.run(look())
