"""What probes and commands printed, from the spool into a bundle."""

from __future__ import annotations

import os

from zonebundle.model.paths import printable
from zonebundle.model.record import Output
from zonebundle.model.report import Gap
from zonebundle.seal.entry import Record, SpoolEntry
from zonebundle.store.draft import BundleDraft

# The names of entries that are ours: an output of that name would hide them.
_RESERVED = frozenset({"metadata.toml", "report.json", "trace.json", "manifest.jsonl", "logs"})
_BLOCK = 1 << 20


def add_outputs(draft: BundleDraft, entry: SpoolEntry, record: Record) -> None:
    """Add every output of a record as an entry; what cannot be one is a gap. Raises StoreError, OSError."""
    if not record.outputs:
        return
    descriptor = entry.open_outputs()
    try:
        for output in record.outputs:
            if _is_own_name(output.name):
                draft.add_bytes(output.name.encode(), _read_output(descriptor, output, record))
            else:
                record.gaps.add(Gap(repr(output.name), "an output cannot have this name; it is left out"))
    finally:
        os.close(descriptor)


def _is_own_name(name: str) -> bool:
    parts = name.split("/")
    return {"", ".", ".."}.isdisjoint(parts) and "\0" not in name and parts[0] not in _RESERVED


def _read_output(descriptor: int, output: Output, record: Record) -> bytes:
    data = bytearray()
    while len(data) < output.length:
        block = os.pread(descriptor, min(_BLOCK, output.length - len(data)), output.offset + len(data))
        if not block:
            missing = output.length - len(data)
            record.gaps.add(Gap(printable(output.name), f"its last {missing} bytes are missing in the spool"))
            break
        data += block
    return bytes(data)
