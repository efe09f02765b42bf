"""A store's failures, said in one line."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from zonebundle.errors import FullError, StoreError
from zonebundle.host.files import NO_SPACE

_ADVICE = {
    errno.ENOSPC: "free space there, or delete bundles",
    errno.EDQUOT: "raise the quota, or delete bundles",
    errno.EROFS: "mount it writable",
    errno.EACCES: "it must belong to the agent's user, with mode 0700",
    errno.EPERM: "it must belong to the agent's user, with mode 0700",
    errno.EIO: "look at the kernel's log and at the disk",
}


def explain(doing: str, error: OSError) -> StoreError:
    """A StoreError, or FullError, for an OSError; `doing` says what failed, on what."""
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    advice = _ADVICE.get(error.errno or 0)
    kind = FullError if error.errno in NO_SPACE else StoreError
    return kind(f"{doing} failed: {reason}{f'; {advice}' if advice else ''}")


@contextlib.contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn an OSError of the body into a StoreError, with the OSError as its cause."""
    try:
        yield
    except OSError as error:
        raise explain(doing, error) from error
