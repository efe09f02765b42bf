"""Every exception of zonebundle, in one tree.

ZoneBundleError                 exit code 1, status 500
├── UsageError                  exit code 2, status 400: the request itself is wrong
│   └── ConfigError             the configuration file is wrong: names file, key and what is allowed
├── NotFoundError               status 404
│   ├── NoSuchZoneError
│   └── NoSuchBundleError
├── ConflictError               status 409: it cannot be done in the present state
├── TerminatingError            status 410: the zone is being stopped
├── UnavailableError            status 503: something that is needed is missing or busy
│   ├── AlreadyRunningError     another agent owns the state directory or the socket
│   ├── RuntimeUnavailableError the tool of a runtime is missing
│   └── AgentUnreachableError   the command line gets no answer from an agent
├── HostError                   the operating system refused
│   ├── NotRegularFileError     what should be a plain file is a link, pipe, socket, device or directory
│   └── OutsideRootError        a path left its root, followed a link or crossed a mount
├── RuntimeFailedError          a runtime's tool failed; carries the command and its output
├── SnapshotError               a snapshot or a staging area failed
├── StoreError                  the store cannot be read or written
│   ├── FullError               its file system, or a quota, has no space left
│   ├── SilentError             its disk does not answer
│   ├── FormatError             a store, spool or manifest of a newer or damaged format
│   └── DamagedError            the bytes are not those that were written
└── SealError                   a bundle could not be sealed
    └── SealCanceledError       it was deleted meanwhile

A message is one line, lower-case, and says what failed, on what, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class ZoneBundleError(Exception):
    """Base of all; `exit_code` is for the command line, `status` and `code` for HTTP."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    code: ClassVar[str] = "Internal"


class UsageError(ZoneBundleError):
    exit_code = 2
    status = 400
    code = "InvalidRequest"


class ConfigError(UsageError):
    code = "InvalidConfig"


class NotFoundError(ZoneBundleError):
    status = 404
    code = "NotFound"


class NoSuchZoneError(NotFoundError):
    def __init__(self, zone: str, known: int | None = None) -> None:
        hint = "" if known is None else f" ({known} zones are known; list them with `zone-bundle list-zones --all`)"
        super().__init__(f"no zone named '{zone}'{hint}")


class NoSuchBundleError(NotFoundError):
    def __init__(self, zone: str, bundle_id: str) -> None:
        # The wording is Omicron's: scripts written for it look for this line.
        super().__init__(f"No zone bundle for zone '{zone}' with ID '{bundle_id}'")


class ConflictError(ZoneBundleError):
    status = 409
    code = "Conflict"


class TerminatingError(ZoneBundleError):
    status = 410
    code = "Gone"


class UnavailableError(ZoneBundleError):
    status = 503
    code = "ServiceUnavailable"


class AlreadyRunningError(UnavailableError):
    pass


class RuntimeUnavailableError(UnavailableError):
    pass


class AgentUnreachableError(UnavailableError):
    pass


class HostError(ZoneBundleError):
    pass


class NotRegularFileError(HostError):
    pass


class OutsideRootError(HostError):
    pass


class RuntimeFailedError(ZoneBundleError):
    pass


class SnapshotError(ZoneBundleError):
    pass


class StoreError(ZoneBundleError):
    pass


class FullError(StoreError):
    pass


class SilentError(StoreError):
    pass


class FormatError(StoreError):
    pass


class DamagedError(StoreError):
    pass


class SealError(ZoneBundleError):
    pass


class SealCanceledError(SealError):
    pass
