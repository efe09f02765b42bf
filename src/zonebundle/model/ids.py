"""Names and identities: zones, bundles, installations, snapshots."""

from __future__ import annotations

import re
import uuid
from urllib.parse import quote, unquote

from zonebundle.errors import UsageError

_ZONE_NAME = re.compile(r"[A-Za-z0-9._@:-]{1,200}")
_RESERVED = frozenset({".", "..", "bundles", "bundle-cleanup"})
_SNAPSHOT_NAME = re.compile(r"zb-([0-9a-f]{12})-([0-9a-f-]{36})")


def check_zone_name(name: str) -> str:
    """Return `name` if it can be a zone's name, raise UsageError if not."""
    if not _ZONE_NAME.fullmatch(name) or name in _RESERVED:
        raise UsageError(
            f"'{name[:60]}' cannot be a zone's name: use 1 to 200 of A-Z a-z 0-9 . _ @ : - "
            f"and none of {', '.join(sorted(_RESERVED))}"
        )
    return name


def encode_zone_name(name: str) -> str:
    """The directory name of a zone in the store: percent-encoded where a file system might mind."""
    encoded = quote(name, safe="@_-.:")
    return "%2E" + encoded[1:] if encoded.startswith(".") else encoded


def decode_zone_name(directory: str) -> str:
    """The zone's name behind a directory name of the store."""
    return unquote(directory)


def new_bundle_id() -> str:
    """A fresh bundle ID: a random UUID, as in Omicron."""
    return str(uuid.uuid4())


def check_bundle_id(text: str) -> str:
    """Return the canonical form of a bundle ID, raise UsageError if it is none."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise UsageError(f"'{text[:60]}' is not a bundle ID: it must be a UUID") from None


def new_installation_id() -> str:
    """The ID that marks what this installation made on foreign file systems: 12 hex digits."""
    return uuid.uuid4().hex[:12]


def is_installation_id(text: str) -> bool:
    """Whether it looks as `new_installation_id` makes them."""
    return re.fullmatch(r"[0-9a-f]{12}", text) is not None


def snapshot_name(installation: str, leader_bundle_id: str) -> str:
    """The name of the snapshot or staging area that a bundle leads: `zb-<installation>-<bundle>`."""
    return f"zb-{installation}-{leader_bundle_id}"


def parse_snapshot_name(name: str) -> tuple[str, str] | None:
    """(installation, leader's bundle ID) of a snapshot's name, None if it is not one of ours."""
    match = _SNAPSHOT_NAME.fullmatch(name)
    return (match[1], match[2]) if match else None
