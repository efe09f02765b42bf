"""The agent's HTTP interface over its Unix socket, as the command line uses it.

`AgentClient` is for single calls and downloads, `AsyncAgentClient` for many calls at a time. Both raise
AgentUnreachableError if nobody answers at the socket, and otherwise an error with the agent's own message, of the class
that fits the status.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from urllib.parse import quote

from zonebundle.errors import (
    AgentUnreachableError,
    ConflictError,
    NotFoundError,
    TerminatingError,
    UnavailableError,
    ZoneBundleError,
)
from zonebundle.model.ids import check_bundle_id, check_zone_name
from zonebundle.model.paths import printable

# httpx imports a terminal program of its own if rich is installed, which takes longer than all the rest of it; None
# makes that import fail, which httpx is prepared for.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
import httpx  # noqa: E402

if TYPE_CHECKING:
    from types import TracebackType

CONNECT_TIMEOUT: Final = 5.0
ANSWER_TIMEOUT: Final = 60.0
# Below the usual limit of 1024 open files.
MAX_CONNECTIONS: Final = 512

T = TypeVar("T")
Query = Mapping[str, str | int | float | bool]


class _Connection:
    """What both clients share: addresses, time-outs, and what failures mean."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

    def _request_arguments(self, method: str, path: str, query: Query | None, body: Any = None) -> dict[str, Any]:
        # A stop takes as long as its grace, a create as long as its hold: only the connection is bounded there.
        answer = None if method == "POST" else ANSWER_TIMEOUT
        return {
            "method": method,
            "url": f"http://zone-bundle{path}",
            "params": dict(query) if query else None,
            "json": body,
            "timeout": httpx.Timeout(answer, connect=CONNECT_TIMEOUT, pool=None),
        }

    def _explain(self, error: httpx.HTTPError) -> ZoneBundleError:
        number = _errno_of(error)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            if number in (errno.EACCES, errno.EPERM):
                return AgentUnreachableError(
                    f"no permission for the agent's socket {self.socket}: "
                    "ask to be put into its group, or run this as root"
                )
            reason = os.strerror(number).lower() if number else "the connection timed out"
            return AgentUnreachableError(
                f"no agent answers at {self.socket} ({reason}): start it with `zone-bundle agent`, "
                "or name its socket with --host unix:PATH or ZONE_BUNDLE_HOST"
            )
        if isinstance(error, httpx.TimeoutException):
            return AgentUnreachableError(f"the agent at {self.socket} gave no answer within {ANSWER_TIMEOUT:.0f} s")
        return AgentUnreachableError(
            f"the agent at {self.socket} broke off before it had answered ({type(error).__name__}): look at its log"
        )


class AgentClient(_Connection):
    """Calls one at a time."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self._client = httpx.Client(transport=httpx.HTTPTransport(uds=os.fspath(socket), verify=False), trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()

    def call(self, method: str, path: str, query: Query | None = None, body: Any = None) -> Any:
        """The JSON that the agent answers, None where it answers nothing; `body` is sent as JSON.

        Raises ZoneBundleError.
        """
        try:
            response = self._client.request(**self._request_arguments(method, path, query, body))
        except httpx.HTTPError as error:
            raise self._explain(error) from error
        return decode_answer(response)

    @contextlib.contextmanager
    def download(self, path: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
        """Stream an answer: (its length in bytes if that is known, its bytes as they come).

        A stream that ends before its announced end raises, so that half a bundle is never taken for a whole one.
        """
        arguments = self._request_arguments("GET", path, None)
        # A bundle that is still being sealed comes in bursts.
        arguments["timeout"] = httpx.Timeout(10 * ANSWER_TIMEOUT, connect=CONNECT_TIMEOUT)
        try:
            # Not decoded: the bundle is the .tar.gz itself.
            with self._client.stream(**arguments, headers={"Accept-Encoding": "identity"}) as response:
                if response.status_code >= httpx.codes.BAD_REQUEST:
                    response.read()
                    decode_answer(response)
                length = response.headers.get("Content-Length")
                yield (int(length) if length else None, response.iter_raw())
        except httpx.HTTPError as error:
            raise self._explain(error) from error


class AsyncAgentClient(_Connection):
    """Many calls at a time, each on a connection of its own. Cancelling a call does not cancel what it started."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=os.fspath(socket), limits=limits, verify=False), trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def call(self, method: str, path: str, query: Query | None = None) -> Any:
        """As AgentClient.call."""
        try:
            response = await self._client.request(**self._request_arguments(method, path, query))
        except httpx.HTTPError as error:
            raise self._explain(error) from error
        return decode_answer(response)


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run calls in an event loop of their own; Ctrl-C cancels them and then raises KeyboardInterrupt."""

    async def run() -> T:
        asyncio.get_running_loop().set_exception_handler(_on_loop_error)
        return await main

    return asyncio.run(run())


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # anyio's Unix sockets wake a waiting call without asking whether it has just been cancelled.
    if not isinstance(context.get("exception"), asyncio.InvalidStateError):
        loop.default_exception_handler(context)


def decode_answer(response: httpx.Response) -> Any:
    """The JSON of an answer that has been read, or an error with the message in it."""
    if response.status_code < httpx.codes.BAD_REQUEST:
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise ZoneBundleError("the agent's answer is not JSON: is this its socket?") from None
    kinds: dict[int, type[ZoneBundleError]] = {
        404: NotFoundError,
        409: ConflictError,
        410: TerminatingError,
        503: UnavailableError,
    }
    raise kinds.get(response.status_code, ZoneBundleError)(_message_of(response))


def _message_of(response: httpx.Response) -> str:
    try:
        message = response.json()["message"]
    except (ValueError, KeyError, TypeError):
        message = None
    if not isinstance(message, str) or not message:
        return f"the agent answered {response.status_code} without saying why: look at its log"
    # One line, whatever is in it.
    return printable(" ".join(message.split()))


def _errno_of(error: BaseException | None) -> int | None:
    """The number of the system's error behind one of httpx."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def zone_path(zone: str) -> str:
    """The address of a zone; raises UsageError for what cannot be a zone's name."""
    return f"/zones/{quote(check_zone_name(zone), safe='')}"


def bundles_path(zone: str) -> str:
    """The address of a zone's bundles; raises UsageError."""
    return f"/zones/bundles/{quote(check_zone_name(zone), safe='')}"


def bundle_path(zone: str, bundle_id: str) -> str:
    """The address of a bundle; raises UsageError."""
    return f"{bundles_path(zone)}/{check_bundle_id(bundle_id)}"
