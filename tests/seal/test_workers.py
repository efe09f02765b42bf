import contextlib
import threading
from collections.abc import Iterator

import pytest

from support import leaks, wait
from zonebundle.seal.workers import GROUP, Group, Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    with leaks.no_leaks():
        workers = Workers(2)
        yield workers
        workers.close()


def test_only_two_jobs_a_worker_are_in_flight(workers: Workers) -> None:
    go = threading.Event()
    submitted: list[int] = []

    def submit() -> None:
        for number in range(10):
            workers.submit(lambda slot: go.wait(30))
            submitted.append(number)

    thread = threading.Thread(target=submit)
    thread.start()
    wait.until(lambda: len(submitted) == 4)
    # The fifth waits for a turn.
    thread.join(0.1)
    assert len(submitted) == 4
    go.set()
    thread.join(30)
    assert len(submitted) == 10


def test_turns_are_taken_in_the_order_of_asking(workers: Workers) -> None:
    """A small bundle's one job comes up after one job of each other bundle, not after all of them."""
    steps = threading.Semaphore(0)
    had_turns: list[str] = []

    def bundle(name: str, jobs: int) -> None:
        for _ in range(jobs):
            workers.submit(lambda slot: steps.acquire(timeout=30))
            had_turns.append(name)

    big = [threading.Thread(target=bundle, args=(f"big{number}", 20)) for number in range(3)]
    for thread in big:
        thread.start()
    wait.until(lambda: len(had_turns) == 4 and workers.waiting == 3)
    small = threading.Thread(target=bundle, args=("small", 1))
    small.start()
    wait.until(lambda: workers.waiting == 4)
    # Four jobs are in flight; each that ends lets the one go on that has waited longest.
    for ended in range(1, 5):
        steps.release()
        wait.until(lambda turns=4 + ended: len(had_turns) == turns)  # type: ignore[misc]
        wait.until(lambda still=3 if ended == 4 else 4: workers.waiting >= still)  # type: ignore[misc]
    assert had_turns[7] == "small"
    assert sorted(had_turns[4:7]) == ["big0", "big1", "big2"]
    for _ in range(57):
        steps.release()
    for thread in [*big, small]:
        thread.join(30)


def test_alone_means_alone(workers: Workers) -> None:
    running: set[int] = set()
    seen: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        with lock:
            running.add(number)
            seen.append(len(running) if number % 5 == 0 else 0)
        with lock:
            running.discard(number)

    futures = [workers.submit(lambda slot, n=number: work(n), alone=number % 5 == 0) for number in range(200)]  # type: ignore[misc]
    for future in futures:
        future.result(30)
    assert set(seen) == {0, 1}


def test_by_itself_is_one_at_a_time_but_beside_workers(workers: Workers) -> None:
    with workers.by_itself():
        assert workers.run_here(lambda slot: slot) == 2
        assert workers.submit(lambda slot: slot).result(30) in (0, 1)
        inside = threading.Event()

        def enter() -> None:
            with workers.by_itself():
                inside.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not inside.wait(0.05)
    thread.join(30)
    assert inside.is_set()


def test_an_error_gives_its_turn_back(workers: Workers) -> None:
    def fail(slot: int) -> None:
        raise ValueError("no")

    for _ in range(20):
        with pytest.raises(ValueError, match="no"):
            workers.submit(fail).result(30)


def test_a_group_has_room_for_four_chunks(workers: Workers) -> None:
    with workers.group() as group:
        for _ in range(2):
            for _ in range(GROUP):
                assert group.make_room()
                group.chunks.append(b"chunk")
            assert not group.make_room()
            group.clear()
            assert group.chunks == []


def test_groups_of_all_bundles_share_the_memory_beyond_their_first_chunks(workers: Workers) -> None:
    def gather(group: Group) -> int:
        while group.make_room():
            group.chunks.append(b"chunk")
        return len(group.chunks)

    with contextlib.ExitStack() as stack:
        groups = [stack.enter_context(workers.group()) for _ in range(20)]
        # Four jobs may be in flight, each of a group.
        assert [gather(group) for group in groups] == [4] * 4 + [1] * 16
        groups[0].clear()
        assert [gather(group) for group in groups[1:3]] == [4, 4]
        assert gather(groups[10]) == 4
    with workers.group() as group:
        assert gather(group) == 4
