"""A bundle as a download: an ordinary tar.gz with length, strong ETag and ranges."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from zonebundle.agent.agent import Agent
from zonebundle.store.splice import splice

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


async def download(agent: Agent, zone: str, bundle_id: str, request: Request) -> Response:
    """Stream a sealed bundle, waiting for the seal first. A failing stream is aborted, never ended cleanly."""
    bundles = agent.bundles
    bundle = await bundles.sealed(zone, bundle_id, agent.drains.covers)
    agent.drains.check_download(bundle_id, [bundles.store_dir_of(bundle)])
    # A manifest may have hundreds of megabytes, and lie on a disk that hangs: not in the loop that answers all.
    etag = f'"{await bundles.in_thread(lambda: bundle.etag)}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "content-disposition": f'attachment; filename="{bundle_id}.tar.gz"',
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    start, stop, status = 0, bundle.size, 200
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    if asked and request.headers.get("if-range", etag) == etag and asked.group() != "bytes=-":
        start, stop = _resolve(asked[1], asked[2], bundle.size)
        if start >= stop:
            return Response(status_code=416, headers=headers | {"content-range": f"bytes */{bundle.size}"})
        status = 206
        headers["content-range"] = f"bytes {start}-{stop - 1}/{bundle.size}"
    headers["content-length"] = str(stop - start)

    async def body() -> AsyncIterator[bytes]:
        async with bundles.reading(bundle):
            # Again: a drain that began since has not seen this download.
            agent.drains.check_download(bundle_id, [bundles.store_dir_of(bundle)])
            async for chunk in bundles.iterate(splice(bundle, start=start, stop=stop)):
                yield chunk

    return StreamingResponse(body(), status, headers, media_type="application/gzip")


def _resolve(first: str, last: str, size: int) -> tuple[int, int]:
    """The half-open byte range that a Range header means (RFC 9110, section 14.1.2)."""
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
