from pathlib import Path

from zonebundle.model.zone import ProcessRef
from zonebundle.seal.marks import CrashMarks, forget_marks, were_left

AGENT = ProcessRef(4711, 99)


def crash(entry: Path, *held: tuple[int, int, int], agent: ProcessRef | None = AGENT) -> CrashMarks:
    """A sealer that dies with these logs in its hands: (worker, first, last)."""
    marks = CrashMarks(entry, agent)
    for slot, first, last in held:
        marks.begin(slot, first, last)
    return marks


def look(entry: Path, agent: ProcessRef | None = AGENT) -> CrashMarks:
    with CrashMarks(entry, agent) as marks:
        return marks


def test_three_crashes_skip_a_log(tmp_path: Path) -> None:
    for count in range(3):
        assert not look(tmp_path).skips(7)
        assert look(tmp_path).suspects(7) == (count > 0)
        crash(tmp_path, (1, 7, 7))
    marks = look(tmp_path)
    assert marks.skips(7)
    assert not marks.skips(6)
    assert not marks.suspects(6)


def test_each_log_of_a_pack_is_a_suspect(tmp_path: Path) -> None:
    crash(tmp_path, (0, 10, 12), (3, 40, 40))
    marks = look(tmp_path)
    assert [number for number in range(50) if marks.suspects(number)] == [10, 11, 12, 40]


def test_what_was_finished_is_not_counted(tmp_path: Path) -> None:
    marks = crash(tmp_path, (0, 1, 1), (1, 2, 2))
    marks.end(0)
    assert [number for number in range(5) if look(tmp_path).suspects(number)] == [2]


def test_a_failure_is_no_crash(tmp_path: Path) -> None:
    with crash(tmp_path, (0, 1, 1)):
        pass
    assert not were_left(tmp_path)
    assert not look(tmp_path).suspects(1)


def test_dying_with_the_agent_is_not_counted(tmp_path: Path) -> None:
    for pid in range(5):
        crash(tmp_path, (0, 1, 1), agent=ProcessRef(pid, 99))
    assert were_left(tmp_path)
    assert not look(tmp_path).suspects(1)


def test_damaged_counts_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "crashes.json").write_text('{"7": "many"')
    assert not look(tmp_path).suspects(7)


def test_marks_that_cannot_be_written_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "sealing").mkdir()
    marks = crash(tmp_path, (0, 1, 1))
    assert not marks.skips(1)
    marks.end(0)


def test_a_seal_that_was_left_writes_no_marks_of_the_next(tmp_path: Path) -> None:
    left = crash(tmp_path, (0, 1, 1), (1, 2, 2))
    forget_marks(tmp_path)
    crash(tmp_path, (0, 5, 5))
    left.end(0)
    left.begin(1, 3, 3)
    with left:
        pass
    marks = look(tmp_path)
    assert [number for number in range(10) if marks.suspects(number)] == [5]
