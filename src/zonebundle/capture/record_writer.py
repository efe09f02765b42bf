"""Writes the capture record and the outputs into a spool entry, and makes them durable."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from blake3 import blake3

from zonebundle.host import trace
from zonebundle.host.files import sync_directory, write_all
from zonebundle.model.manifest import encode_line
from zonebundle.model.record import OUTPUTS_FILE, RECORD_FILE, RecordHeader, record_digest

# The header is written last, over this many spaces: its times are known only then, its size must be known before.
_HEADER_SPACE = 2048
_BUFFER = 256 << 10


class RecordWriter:
    """capture.jsonl and outputs of one bundle. Lines may come from several threads.

    Until `commit` the record has a temporary name, so that a reader sees all of it or nothing. After `commit` or
    `close`, lines from a thread that was abandoned at its deadline are dropped.
    """

    def __init__(self, entry: Path) -> None:
        self._entry = entry
        self._temporary = entry / f".{RECORD_FILE}.tmp"
        self._lock = threading.Lock()
        self._outputs = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self._record = os.open(self._temporary, flags, 0o600)
        try:
            self._outputs = os.open(entry / OUTPUTS_FILE, flags, 0o600)
        except BaseException:
            self.close()
            raise
        self._buffer = bytearray(b" " * (_HEADER_SPACE - 1) + b"\n")
        self._texts = bytearray()
        self._lines_digest, self._outputs_digest = blake3(), blake3()
        self._written = 0
        self.output_bytes = 0

    def add(self, kind: str, value: Any) -> None:
        """Append a line `{kind: value}`."""
        line = encode_line({kind: value})
        with self._lock:
            if self._record < 0:
                return
            self._buffer += line
            if len(self._buffer) >= _BUFFER:
                self._write_buffer()

    def _write_buffer(self) -> None:
        self._lines_digest.update(memoryview(self._buffer)[0 if self._written else _HEADER_SPACE :])
        self._written += len(self._buffer)
        write_all(self._record, self._buffer)
        self._buffer = bytearray()

    def add_output(self, text: bytes) -> tuple[int, int]:
        """Append to the outputs file; returns (offset, length)."""
        self._texts += text
        if len(self._texts) >= _BUFFER:
            self._write_texts()
        offset = self.output_bytes
        self.output_bytes += len(text)
        return offset, len(text)

    def _write_texts(self) -> None:
        self._outputs_digest.update(self._texts)
        write_all(self._outputs, self._texts)
        self._texts = bytearray()

    def commit(self, header: RecordHeader) -> None:
        """Make record and outputs durable, and the record visible. Raises OSError (a full disk)."""
        with self._lock:
            self._write_buffer()
            self._write_texts()
            digest = record_digest(header, self._lines_digest.digest(), self._outputs_digest.digest())
            first = encode_line(header.to_json() | {"digest": digest})
            if len(first) > _HEADER_SPACE:
                raise ValueError(f"the record's header of {len(first)} bytes is longer than its space")
            os.pwrite(self._record, first[:-1].ljust(_HEADER_SPACE - 1) + b"\n", 0)
            os.fsync(self._outputs)
            os.fsync(self._record)
            trace.point("capture.record-written")
            self._temporary.rename(self._entry / RECORD_FILE)
        sync_directory(self._entry)
        self.close()

    def close(self) -> None:
        """Close the files; without a commit before, the record stays invisible."""
        with self._lock:
            for descriptor in (self._record, self._outputs):
                if descriptor >= 0:
                    os.close(descriptor)
            self._record = self._outputs = -1
