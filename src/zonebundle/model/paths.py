"""Paths of any bytes, in JSON and on a terminal."""

from __future__ import annotations

import base64
import os
import unicodedata
from typing import Any


def path_to_json(path: bytes, key: str = "path") -> dict[str, Any]:
    """`{"path": text}`, and where the bytes are not UTF-8 also `{"path_bytes": base64}`, which then counts."""
    try:
        return {key: path.decode("utf-8")}
    except UnicodeDecodeError:
        return {key: path.decode("utf-8", "replace"), f"{key}_bytes": base64.b64encode(path).decode("ascii")}


def path_from_json(data: dict[str, Any], key: str = "path") -> bytes:
    """The bytes that `path_to_json` wrote."""
    encoded = data.get(f"{key}_bytes")
    if encoded is not None:
        return base64.b64decode(encoded)
    text: str = data[key]
    return text.encode("utf-8")


def printable(path: bytes | str) -> str:
    """A path or a zone's text for people: control characters, line ends and undecodable bytes become escapes.

    Names are written by strangers: a raw newline forges a line, a raw escape sequence drives the terminal.
    """
    text = os.fsdecode(path) if isinstance(path, bytes) else path
    # Nearly all text needs nothing; str.isprintable is stricter than _escape, and a hundred times faster.
    return text if text.isprintable() else text.translate(_ESCAPES)


class _Escapes(dict[int, str]):
    """The table for str.translate, filled as characters are met."""

    def __missing__(self, code: int) -> str:
        escaped = _escape(code)
        # Whoever writes the text must not be able to fill our memory with all of Unicode.
        if len(self) < 4096:
            self[code] = escaped
        return escaped


_ESCAPES = _Escapes()


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    char = chr(code)
    # Cc: control, Cf: direction marks and other invisible ones, Zl and Zp: line ends, Cs: lone surrogates.
    if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return char
