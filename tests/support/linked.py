"""A link to a real sealer process, as the agent has it."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from support import leaks, wait
from support.spooled import INSTALLATION, Draft, SpoolDir, log_lines
from zonebundle.seal.link import SealerLink
from zonebundle.store.pieces import CHUNK


class Linked:
    """A link, and what it told."""

    def __init__(self, at: SpoolDir) -> None:
        self.at = at
        self.events: list[dict[str, Any]] = []
        self.link = SealerLink(
            state_dir=at.state,
            store_dirs=[at.store],
            installation=INSTALLATION,
            workers=2,
            on_event=self.events.append,
        )

    def told(self, kind: str, bundle_id: str) -> list[dict[str, Any]]:
        return [event[kind] for event in self.events if event.get(kind, {}).get("id") == bundle_id]

    async def wait_for(self, kind: str, draft: Draft) -> dict[str, Any]:
        await wait.until_async(lambda: self.told(kind, draft.bundle_id), 60, f"{kind}; {self.events[-3:]}")
        return self.told(kind, draft.bundle_id)[-1]

    @property
    def pid(self) -> int:
        assert self.link.pid is not None
        return self.link.pid


@contextlib.asynccontextmanager
async def started(at: SpoolDir) -> AsyncIterator[Linked]:
    """A link that has started; closed, and nothing left of it, at the end."""
    with leaks.no_leaks():
        linked = Linked(at)
        await linked.link.start()
        try:
            yield linked
        finally:
            await linked.link.close()


def small_draft(at: SpoolDir) -> Draft:
    """One that can be sealed at once."""
    draft = Draft(at)
    draft.add_log(b"app.log", log_lines(5000))
    draft.write()
    return draft


def large_draft(at: SpoolDir) -> Draft:
    """One whose seal takes a while."""
    draft = Draft(at)
    draft.add_log(b"big.log", log_lines(120 * CHUNK))
    draft.write()
    return draft
