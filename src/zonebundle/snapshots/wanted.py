"""Which paths of a log tree its patterns choose, and where below it there is no need to look."""

from __future__ import annotations

from zonebundle.model.globs import compile_glob, static_prefix
from zonebundle.model.zone import LogTree

_ANY = "**"


class Wanted:
    """The patterns of a tree, which are matched on paths with the tree's prefix before them.

    All paths given here are relative to the tree's directory; the empty one is that directory.
    """

    def __init__(self, tree: LogTree) -> None:
        self._prefix = f"{tree.prefix}/" if tree.prefix else ""
        self._patterns = [compile_glob(pattern) for pattern in tree.patterns]
        self._parts = [_parts(pattern) for pattern in tree.patterns]
        prefixes = [static_prefix(pattern) for pattern in tree.patterns]
        # Of `var/log/**` everything below var/log is wanted: no need to match each path.
        self._wholes = [
            f"{prefix}/" if prefix else ""
            for prefix, parts in zip(prefixes, self._parts, strict=True)
            if parts[prefix.count("/") + 1 if prefix else 0 :] == [_ANY]
        ]
        self.tops = self._outermost(prefixes)

    def matches(self, path: str) -> bool:
        """Whether the file `path` is wanted."""
        joined = self._prefix + path
        return any(pattern.fullmatch(joined) for pattern in self._patterns)

    def covers(self, directory: str) -> bool:
        """Whether every file below `directory` is wanted."""
        joined = f"{self._prefix}{directory}/" if directory else self._prefix
        return any(joined.startswith(whole) for whole in self._wholes)

    def reaches(self, directory: str) -> bool:
        """Whether a file below `directory` can be wanted at all."""
        names = [name for name in (self._prefix + directory).split("/") if name]
        return any(_reaches(names, parts) for parts in self._parts)

    def _outermost(self, prefixes: list[str]) -> list[str]:
        """The directories from which to look: none of them is below another one."""
        tops: list[str] = []
        below = self._prefix.rstrip("/")
        for prefix in sorted(set(prefixes), key=len):
            if not prefix or f"{below}/".startswith(f"{prefix}/"):
                return [""]
            if prefix.startswith(self._prefix):
                top = prefix.removeprefix(self._prefix)
                if not any(top == other or top.startswith(f"{other}/") for other in tops):
                    tops.append(top)
        return tops


def _parts(pattern: str) -> list[str]:
    return [part for part in pattern.split("/") if part not in ("", ".")]


def _reaches(names: list[str], parts: list[str]) -> bool:
    for name, part in zip(names, parts, strict=False):
        if part == _ANY:
            return True
        if not compile_glob(part).fullmatch(name):
            return False
    return len(names) < len(parts)
