"""One attempt to seal a bundle, in one store."""

from __future__ import annotations

import threading

from zonebundle.errors import SealCanceledError


class Attempt(threading.Event):
    """Set when the seal is canceled, or this attempt alone is given up."""

    def __init__(self, canceled: threading.Event) -> None:
        super().__init__()
        self._canceled = canceled

    def is_set(self) -> bool:
        return super().is_set() or self._canceled.is_set()

    def check(self) -> None:
        """Raise SealCanceledError if it is set: by now the bundle may be deleted, or sealed in another store."""
        if self.is_set():
            raise SealCanceledError("the bundle was deleted, or this store was given up, while it was sealed")
