"""The agent's side of the spool: entries from the intent on, until the sealer has them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from zonebundle.errors import FormatError, UsageError
from zonebundle.host import proc, trace
from zonebundle.host.files import NO_SPACE, make_private_directory, remove_tree, sync_directory, write_durably
from zonebundle.host.reserve import Reserve
from zonebundle.model.ids import check_bundle_id
from zonebundle.model.record import COMMANDS_FILE, INTENT_FILE, RECORD_FILE, Intent
from zonebundle.model.zone import ProcessRef

_log = structlog.get_logger()

_RESERVE = "reserve"
_RESERVE_BYTES = 4 << 20
# Writes of different stops go out together, and the file system commits them together.
_WRITERS = 32


@dataclass(frozen=True, slots=True)
class Pending:
    """An entry found at start-up: `recorded` if its evidence is safe; `intent` is None if that was never whole."""

    bundle_id: str
    path: Path
    intent: Intent | None
    recorded: bool


class Spool:
    """`<state-dir>/spool`. Its threads write intents and do nothing else: they are part of the stop path."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "spool"
        self._reserve = Reserve(state_dir / _RESERVE, _RESERVE_BYTES)
        self._threads = ThreadPoolExecutor(_WRITERS, thread_name_prefix="intent")

    def open(self) -> None:
        """Create the spool and the reserve, a little space that a full disk cannot take away."""
        make_private_directory(self.path)
        self.refill_reserve()

    def entry(self, bundle_id: str) -> Path:
        return self.path / bundle_id

    async def write_intent(self, intent: Intent) -> None:
        """Make the intent durable: from here on the stop will be finished. Raises OSError (the disk is full)."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._write_intent, intent)

    def _write_intent(self, intent: Intent) -> None:
        trace.point("stop.accepted")
        entry = self.entry(intent.metadata.bundle_id)
        data = json.dumps(intent.to_json(), separators=(",", ":")).encode()
        while True:
            try:
                self._write_entry(entry, data)
                break
            except OSError as error:
                # What is given back may be taken by whoever fills the disk: so a share at a time, until there is none.
                if error.errno not in NO_SPACE or not self._reserve.release():
                    raise
                _log.warning("no space for an intent; using the reserve", reason=str(error))
        trace.point("stop.intent-durable")

    def _write_entry(self, entry: Path, data: bytes) -> None:
        entry.mkdir(mode=0o700, exist_ok=True)
        write_durably(entry / INTENT_FILE, data)
        sync_directory(self.path)

    def pending(self) -> Iterator[Pending]:
        """Every entry that is there, oldest name first. What is not an entry of ours is left alone and logged."""
        for path in sorted(self.path.iterdir()):
            if path.name.startswith("."):
                # What the sealer is about to remove.
                continue
            if not _is_entry(path):
                _log.warning("not a spool entry; left alone", path=str(path))
                continue
            recorded = (path / RECORD_FILE).exists()
            try:
                intent = self._read_intent(path)
            except FormatError as error:
                # Other zones have to be served all the same.
                kept = "its record is sealed" if recorded else "left alone"
                _log.error(f"a spool entry is damaged; {kept}", path=str(path), reason=str(error))
                if not recorded:
                    continue
                intent = None
            yield Pending(path.name, path, intent, recorded)

    def _read_intent(self, path: Path) -> Intent | None:
        try:
            return Intent.from_json(json.loads((path / INTENT_FILE).read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path / INTENT_FILE} cannot be read: {type(error).__name__}: {error}") from None

    def remove(self, bundle_id: str) -> None:
        """Remove an entry, with all it holds; a missing one is fine."""
        remove_tree(self.entry(bundle_id))

    def end_commands(self, bundle_id: str) -> int:
        """Kill what the commands of a hold left running (its worker died before it could); returns how many."""
        ended = 0
        with contextlib.suppress(FileNotFoundError):
            for line in (self.entry(bundle_id) / COMMANDS_FILE).read_text(errors="replace").splitlines():
                ended += _end_command(line)
        return ended

    @property
    def is_reserve_spent(self) -> bool:
        return self._reserve.is_spent

    def refill_reserve(self) -> None:
        """Take the reserve again that a full disk has cost, if there is the space by now."""
        try:
            self._reserve.refill()
        except OSError as error:
            _log.warning("no space for the reserve: stops may not be recoverable", reason=str(error))

    def close(self) -> None:
        self._threads.shutdown(wait=True)


def _is_entry(path: Path) -> bool:
    try:
        return check_bundle_id(path.name) == path.name and path.is_dir() and not path.is_symlink()
    except UsageError:
        return False


def _end_command(line: str) -> int:
    try:
        noted = json.loads(line)
        process = ProcessRef(noted["pid"], noted["start_time"])
    except (ValueError, KeyError, TypeError):
        # The last line may be cut where the writer died.
        return 0
    if noted.get("boot_id") != proc.boot_id():
        return 0
    # Commands lead a session of their own: descendants first, while they can still be found, then the session.
    doomed = dict.fromkeys(proc.descendants([process])) | dict.fromkeys(
        member for member in proc.in_session(process.pid) if member.start_time >= process.start_time
    )
    return sum(proc.send_signal(member, signal.SIGKILL) for member in doomed)
