"""The state directory: its format, its lock, the installation's ID, and the staging directories ever used."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from zonebundle.errors import AlreadyRunningError, FormatError, UnavailableError
from zonebundle.host.files import make_private_directory, remove_temporaries, write_durably
from zonebundle.model.ids import is_installation_id, new_installation_id

STATE_FORMAT = 1
_STATE_FILE = "state.json"
_LOCK_FILE = "agent.lock"


class StateDir:
    """`<state-dir>`, owned by one agent at a time.

    state.json: {"state": format, "installation": ID, "staging": [directories], "stores": {directory: mount point}}.
    """

    def __init__(self, path: Path, threads: Executor) -> None:
        self.path = path
        self._threads = threads
        self._lock = -1
        self._state: dict[str, Any] = {}
        self._saving = asyncio.Lock()

    def open(self) -> None:
        """Create or open it, and lock it. Raises AlreadyRunningError, FormatError, UnavailableError."""
        try:
            make_private_directory(self.path)
            self._lock = os.open(self.path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_temporaries(self.path)
            self._read()
        except BlockingIOError:
            self.close()
            raise AlreadyRunningError(
                f"another agent uses the state directory {self.path}: stop it, or set [agent] state-dir"
            ) from None
        except OSError as error:
            self.close()
            raise UnavailableError(
                f"the state directory {self.path} cannot be used: {error.strerror}; "
                "make it writable for this user, or set [agent] state-dir"
            ) from None

    def _read(self) -> None:
        file = self.path / _STATE_FILE
        try:
            self._state = _parse(file.read_bytes(), file)
        except FileNotFoundError:
            state = {"state": STATE_FORMAT, "installation": new_installation_id(), "staging": []}
            self._save(state)
            self._state = state
        except ValueError as error:
            raise FormatError(f"{file} is damaged: {error}; restore it, or move the state directory away") from None

    def _save(self, state: dict[str, Any]) -> None:
        write_durably(self.path / _STATE_FILE, json.dumps(state, indent=1).encode() + b"\n")

    @property
    def installation(self) -> str:
        installation: str = self._state["installation"]
        return installation

    @property
    def staging(self) -> list[str]:
        """Every staging directory that was ever used."""
        return list(self._state["staging"])

    async def remember(self, directories: list[str]) -> None:
        """Make it durable that these staging directories are used, before they are. Known ones cost nothing.

        Raises OSError; they are not known then.
        """
        if set(directories) <= set(self._state["staging"]):
            return
        async with self._saving:
            state = self._state | {"staging": sorted({*self._state["staging"], *directories})}
            await asyncio.get_running_loop().run_in_executor(self._threads, self._save, state)
            self._state = state

    @property
    def stores(self) -> dict[str, str]:
        """Every directory that has ever had a store of ours, and the mount point that it was on."""
        return dict(self._state.get("stores", {}))

    def remember_stores(self, stores: dict[str, str]) -> None:
        """Make it durable where the stores are. Blocks; at start only. Raises OSError."""
        if stores != self.stores:
            state = self._state | {"stores": stores}
            self._save(state)
            self._state = state

    def close(self) -> None:
        """Give up the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _parse(data: bytes, file: Path) -> dict[str, Any]:
    """The state, checked. Raises ValueError, FormatError for another format."""
    state = json.loads(data)
    if not isinstance(state, dict):
        raise ValueError("not an object")  # noqa: TRY004 - one kind of error for all that is wrong
    if state.get("state") != STATE_FORMAT:
        raise FormatError(f"{file} has format {state.get('state')!r}, not {STATE_FORMAT}: use a newer zonebundle")
    staging = state.get("staging")
    if not isinstance(state.get("installation"), str) or not is_installation_id(state["installation"]):
        raise ValueError("no installation ID")
    stores = state.get("stores", {})
    if not isinstance(stores, dict) or not all(isinstance(point, str) for point in stores.values()):
        raise ValueError("'stores' is not a table of mount points")
    if not isinstance(staging, list) or not all(isinstance(one, str) and os.path.isabs(one) for one in staging):
        raise ValueError("'staging' is not a list of absolute paths")
    return state
