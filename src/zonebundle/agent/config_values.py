"""The kinds of values in the configuration file, each with an error that says how to write it."""

from __future__ import annotations

import os
import re
from math import inf
from pathlib import Path
from typing import Annotated, Final

from pydantic import BeforeValidator, StrictStr

from zonebundle.model.paths import printable
from zonebundle.model.quantities import parse_duration, parse_size

# unix(7): sun_path has 108 bytes, the last of them for a null byte.
MAX_SOCKET_PATH: Final = 107

_TCP = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):\d{1,5}")


def _duration(value: object) -> float:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < inf:
        return float(value)
    raise ValueError(f"{show(value)} is not a duration: write it like 500ms, 2s, 10m or 1h30m")


def _size(value: object) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{show(value)} is not a size: write it like 512, 64MiB or 1.5GB")


def check_absolute(value: object) -> Path:
    """An absolute path, normalised; raises ValueError."""
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f'{show(value)} is not an absolute path: write it like "/srv/web"')
    return Path(os.path.normpath(value))


def _pattern(value: object) -> str:
    if not isinstance(value, str) or not value or value.startswith("/") or ".." in value.split("/"):
        raise ValueError(f'{show(value)} is not a pattern below the root: write it like "var/log/**", without ..')
    return value


def _argv(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) for item in value):
        raise ValueError(f'{show(value)} is not a command: write it as a list of texts, like ["netstat", "-an"]')
    if not value[0] or any("\0" in item for item in value):
        raise ValueError(f"{show(value)} is not a command: its program's name is empty, or it holds a null byte")
    return tuple(value)


Duration = Annotated[float, BeforeValidator(_duration)]
Size = Annotated[int, BeforeValidator(_size)]
AbsolutePath = Annotated[Path, BeforeValidator(check_absolute)]
Pattern = Annotated[StrictStr, BeforeValidator(_pattern)]
Argv = Annotated[tuple[str, ...], BeforeValidator(_argv)]


def check_address(address: str) -> None:
    """Raise ValueError unless the agent can listen at `address`."""
    path = address.removeprefix("unix:")
    if path != address:
        if not path.startswith("/") or "\0" in path:
            raise ValueError(f"{show(address)} names no absolute path: write it like unix:/run/zone-bundle/agent.sock")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise ValueError(
                f"{show(address)} has a path of {len(os.fsencode(path))} bytes; a socket's can have {MAX_SOCKET_PATH}"
            )
    elif _TCP.fullmatch(address):
        raise ValueError(f"{show(address)}: listening on TCP comes with a later version; use unix:/PATH for now")
    else:
        raise ValueError(f"{show(address)} is not an address: write it like unix:/run/zone-bundle/agent.sock")


def show(value: object) -> str:
    """A value of the file, short and safe on a terminal."""
    text = printable(repr(value) if not isinstance(value, str) else f"'{value}'")
    return text if len(text) <= 120 else text[:117] + "…"
