"""Globs that choose logs: `*` and `?` stay within a path component, `**` spans any number of them."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache(maxsize=1024)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """A regular expression that matches the whole relative paths which `pattern` names.

    Besides `*`, `?` and `**` there are sets as in fnmatch(3): `[a-z]`, `[!0-9]`, `[]x]`. What is no whole set, or an
    empty range, stands for itself. A pattern never fails to compile.
    """
    parts: list[str] = []
    for part in _parts(pattern):
        # Repeated, `**` would mean the same and take time that grows with the path's length to the power of them.
        if part != "**" or parts[-1:] != ["**"]:
            parts.append(part)
    expression = ""
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if part == "**":
            expression += r".+" if last else r"(?:[^/]+/)*"
        else:
            expression += _component(part) + ("" if last else "/")
    return re.compile(expression, re.DOTALL)


def _parts(pattern: str) -> list[str]:
    return [part for part in pattern.split("/") if part not in ("", ".")]


def _component(part: str) -> str:
    expression = ""
    index = 0
    while index < len(part):
        char = part[index]
        index += 1
        if char == "*":
            expression += "[^/]*"
        elif char == "?":
            expression += "[^/]"
        elif char == "[":
            # A `]` that comes first, also after `!`, belongs to the set.
            negated = part[index : index + 1] == "!"
            end = part.find("]", index + negated + 1)
            members = _members(part[index + negated : end]) if end >= 0 else ""
            if members:
                expression += f"(?!/)[{'^' if negated else ''}{members}]"
                index = end + 1
            else:
                expression += re.escape(char)
        else:
            expression += re.escape(char)
    return expression


def _members(body: str) -> str:
    """The inside of a regular expression's set for the inside of a glob's; empty if one of its ranges is."""
    members = ""
    index = 0
    while index < len(body):
        if body[index + 1 : index + 2] == "-" and index + 2 < len(body):
            low, high = body[index], body[index + 2]
            if low > high:
                return ""
            members += f"{_literal(low)}-{_literal(high)}"
            index += 3
        else:
            members += _literal(body[index])
            index += 1
    return members


def _literal(char: str) -> str:
    # Inside a set re.escape leaves what newer versions of re may give a meaning (&&, ||, ~~, [).
    return char if char.isalnum() or char == "_" else f"\\{char}" if char.isascii() else char


def static_prefix(pattern: str) -> str:
    """The leading directories of `pattern` that hold no wildcard: `var/log` of `var/log/**`."""
    prefix: list[str] = []
    for part in _parts(pattern)[:-1]:
        if any(char in part for char in "*?["):
            break
        prefix.append(part)
    return "/".join(prefix)


def matches_any(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether the relative `path` is chosen by one of `patterns`."""
    return any(compile_glob(pattern).fullmatch(path) for pattern in patterns)
