"""Everything that is written as JSON comes back equal, through the very bytes that go to disk."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zonebundle.errors import FormatError
from zonebundle.model.identity import FileIdentity
from zonebundle.model.manifest import Entry, Header, Piece, digest_from_text, digest_to_text, encode_line
from zonebundle.model.metadata import Cause, Metadata
from zonebundle.model.record import (
    Area,
    Intent,
    Limits,
    LogFile,
    Output,
    Part,
    RecordHeader,
    SnapshotTree,
    metadata_for,
)
from zonebundle.model.report import Gap, Outcome, Step, trace_events
from zonebundle.model.zone import Incarnation, LogTree, Membership, ProcessRef, Zone

# Paths of the host come from os.fsdecode: any bytes, as surrogates.
_host_paths = st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
_raw_paths = st.binary(max_size=20)
_counts = st.integers(0, 1 << 62)
_seconds = st.floats(0, 1e9).map(lambda value: round(value, 6))
_hex = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)

pieces = st.builds(Piece, _hex, _counts, _counts, _counts, st.integers(0, 2**32 - 1), _hex, st.integers(1, 1000))
entries = st.builds(
    Entry,
    path=_raw_paths,
    size=_counts,
    crc32=st.integers(0, 2**32 - 1),
    mode=st.integers(0, 0o7777),
    mtime_ns=st.integers(-(1 << 62), 1 << 62),
    pieces=st.just(()),
    inode=_counts,
    host_path=_raw_paths,
) | st.builds(
    Entry,
    path=_raw_paths,
    size=_counts,
    crc32=_counts,
    pieces=st.lists(pieces, min_size=1, max_size=3).map(tuple),
    cut=_counts,
)
metadata = st.builds(Metadata, st.text(), st.uuids().map(str), st.text(), st.sampled_from(Cause))
headers = st.builds(
    Header, metadata, _seconds, _seconds, _counts, _counts, _counts, st.dictionaries(st.text(), _host_paths, max_size=3)
)
references = st.builds(ProcessRef, st.integers(1, 1 << 22), _counts)
trees = st.builds(
    LogTree,
    _host_paths,
    _host_paths,
    st.lists(st.text(), max_size=3).map(tuple),
    _host_paths,
    st.none() | references,
)
zones = st.builds(
    Zone,
    name=st.text(),
    runtime=st.text(),
    state=st.sampled_from(["running", "stopped"]),
    incarnation=st.none() | st.builds(Incarnation, st.text(), st.none() | references, st.text()),
    membership=st.builds(
        Membership, st.lists(references, max_size=3).map(tuple), st.none() | st.integers(1, 99), st.none() | _host_paths
    ),
    logs=st.lists(trees, max_size=3).map(tuple),
    command_prefix=st.lists(st.text(), max_size=3).map(tuple),
    directory=_host_paths,
)
intents = st.builds(
    Intent, metadata, st.sampled_from(["stop", "create"]), zones, st.text(), grace=_seconds, remove=st.booleans()
)
parts = st.builds(Part, _counts, _counts, st.sampled_from(["staged", "live"]), st.integers(0, 9), st.text(), _counts)


def _identify(log: LogFile, told: tuple[int, int, int] | None) -> LogFile:
    """With the identity, of which the log tells a part."""
    if told is None:
        return log
    filesystem, born, ctime = told
    return log._replace(identity=FileIdentity(filesystem, log.inode, born, log.size, log.mtime_ns, ctime))


plain_logs = st.builds(
    LogFile,
    source=st.text(),
    path=_raw_paths,
    host_root=_host_paths,
    host_path=_raw_paths,
    size=_counts,
    mode=st.integers(0, 0o7777),
    mtime_ns=st.integers(-(1 << 62), 1 << 62),
    inode=_counts,
    parts=st.lists(parts, max_size=3).map(tuple),
    identity=st.none(),
    pieces=st.lists(pieces, max_size=3).map(tuple),
)
log_files = st.builds(_identify, plain_logs, st.none() | st.tuples(_counts, _counts, _counts))
snapshot_trees = st.builds(
    SnapshotTree,
    st.integers(0, 9),
    _host_paths,
    st.text(),
    st.text(),
    st.lists(st.text(), max_size=3).map(tuple),
    _host_paths,
)
record_headers = st.builds(
    RecordHeader,
    metadata,
    st.sampled_from(["stop", "create"]),
    _seconds,
    _seconds,
    _counts,
    st.builds(Limits, _counts, _counts, _counts),
    st.booleans(),
)
steps = st.builds(Step, st.text(), st.sampled_from(Outcome), _seconds, _seconds, st.text(), st.text(), st.text())
gaps = st.builds(Gap, st.text(), st.text())

CASES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Any]]] = {
    "entry": (entries, Entry.from_json),
    "header": (headers, Header.from_json),
    "metadata": (metadata, Metadata.from_json),
    "zone": (zones, Zone.from_json),
    "intent": (intents, Intent.from_json),
    "log file": (log_files, LogFile.from_json),
    "snapshot tree": (snapshot_trees, SnapshotTree.from_json),
    "record header": (record_headers, RecordHeader.from_json),
    "step": (steps, Step.from_json),
    "gap": (gaps, Gap.from_json),
    "area": (st.builds(Area, st.sampled_from(["btrfs", "staged"]), _host_paths, st.text()), lambda data: Area(**data)),
    "output": (st.builds(Output, st.text(), _counts, _counts), lambda data: Output(**data)),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str) -> None:
    strategy, read = CASES[case]

    @given(strategy)
    def check(value: Any) -> None:
        line = encode_line(value.to_json())
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        line.decode("utf-8")
        assert read(json.loads(line)) == value

    check()


@pytest.mark.parametrize("read", [Header.from_json, Intent.from_json, RecordHeader.from_json])
@pytest.mark.parametrize("data", [{}, {"manifest": 3, "intent": 2, "record": 2}, {"manifest": "1", "intent": None}])
def test_another_format_is_refused_with_a_line_that_says_what_to_do(
    read: Callable[[dict[str, Any]], Any], data: dict[str, Any]
) -> None:
    with pytest.raises(FormatError, match=r"format .* is not [12]: .*use (a newer zonebundle|that one)"):
        read(data)


@given(log_files)
def test_the_first_byte_kept_is_that_of_the_first_part(file: LogFile) -> None:
    assert file.first == (file.parts[0].start if file.parts else file.size)


@example([Step("thread_name", Outcome.SUCCESS)])
@given(st.lists(steps, max_size=5))
def test_a_trace_has_an_event_for_every_step_in_whole_microseconds(made: list[Step]) -> None:
    trace = json.loads(json.dumps(trace_events("web", made)))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    names = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert [event["name"] for event in events] == [step.name for step in made]
    assert all(isinstance(event["ts"], int) and event["dur"] >= 0 for event in events)
    lanes = {event["tid"]: event["args"]["name"] for event in names if event["name"] == "thread_name"}
    assert [lanes[event["tid"]] for event in events] == [step.lane for step in made]


def test_a_stop_and_a_create_have_their_causes() -> None:
    assert metadata_for("web", "id", "now", "stop").cause is Cause.TERMINATED_INSTANCE
    assert metadata_for("web", "id", "now", "create").cause is Cause.EXPLICIT_REQUEST


@given(_hex)
def test_a_digest_has_43_characters(digest: str) -> None:
    text = digest_to_text(digest)
    assert len(text) == 43
    assert digest_from_text(text) == digest_from_text(text.encode()) == digest


@pytest.mark.parametrize("text", ["", "A" * 42, "A" * 44, "A" * 40 + "../", "A" * 42 + "é", "a" * 64, "A" * 42 + "="])
def test_what_is_no_digest(text: str) -> None:
    with pytest.raises(ValueError):
        digest_from_text(text)
