"""A record that has changed on the disk is found out, whichever bit it is."""

import json
import random
import threading
from pathlib import Path

import pytest

from support.spooled import Draft, SpoolDir, log_lines
from zonebundle.errors import FormatError, NotFoundError
from zonebundle.seal.sealer import Sealer

FLIPS = 120


def _flip(path: Path, chance: random.Random) -> int:
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    data[at] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return at


def _draft(at: SpoolDir) -> Draft:
    draft = Draft(at)
    draft.add_output("ptree", b"1 init\n" * 20)
    draft.add_log(b"app.log", log_lines(3000))
    draft.add_log(b"app.log.1", log_lines(2000, 1))
    draft.write()
    return draft


def _tells_of_damage(at: SpoolDir, sealer: Sealer, draft: Draft) -> bool:
    try:
        sealed = sealer.seal(draft.bundle_id, lambda total, done: None, threading.Event())
    except (FormatError, NotFoundError) as error:
        return draft.bundle_id in str(error) or "format" in str(error)
    assert sealed is not None
    metadata = sealed.header.metadata
    zone, bundle_id = metadata.zone, metadata.bundle_id
    entries = at.entries(Draft(at, zone, bundle_id)) if bundle_id != draft.bundle_id else at.entries(draft)
    report = json.loads(entries[b"report.json"][1])
    return any("has changed on the disk" in gap["reason"] for gap in report["gaps"])


@pytest.mark.slow
def test_every_flipped_bit_is_told(at: SpoolDir, sealer: Sealer) -> None:
    chance = random.Random(7)
    for number in range(FLIPS):
        draft = _draft(at)
        record = draft.entry / "capture.jsonl"
        padding = record.read_bytes().index(b"\n")
        name = "outputs" if number % 4 == 0 else "capture.jsonl"
        flipped = _flip(draft.entry / name, chance)
        is_padding = name == "capture.jsonl" and len(record.read_bytes().splitlines()[0].rstrip()) < flipped < padding
        if not is_padding:
            assert _tells_of_damage(at, sealer, draft), f"bit flip at {flipped} of {name}"


def test_a_whole_record_is_no_cause_for_doubt(at: SpoolDir, sealer: Sealer) -> None:
    assert not _tells_of_damage(at, sealer, _draft(at))
