import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from support import fake_agent as fakes
from support.command import Command
from support.fake_agent import FakeAgent, FakeServer

pytestmark = pytest.mark.usefixtures("leak_check")

CONTEXT = {"period": {"secs": 600, "nanos": 0}, "storage_limit": 25, "priority": ["cause", "time"]}
GIB = 1 << 30


@dataclass
class Answers:
    """What the fake agent answers to `METHOD path` (status, JSON), and what it was asked (with query and body)."""

    to: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


@pytest.fixture
def answers(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Has fake agents of this test answer for clean-up and drain too."""
    answers = Answers()
    plain = fakes._app

    async def answer(request: Request) -> Response:
        target = f"{request.method} {request.url.path}"
        body = await request.body()
        answers.asked.append((target, dict(request.query_params), json.loads(body) if body else None))
        status, told = answers.to[target]
        return Response(status_code=status) if told is None else JSONResponse(told, status)

    def app(agent: FakeAgent) -> FastAPI:
        made = plain(agent)
        for path in ("/zones/bundle-cleanup", "/zones/bundle-cleanup/{rest}", "/drain"):
            made.add_api_route(path, answer, methods=["GET", "PUT", "POST", "DELETE"])
        return made

    monkeypatch.setattr(fakes, "_app", app)
    return answers


@pytest.fixture
def run(answers: Answers, request: pytest.FixtureRequest) -> Command:
    """Runs a command line against the fake agent; after `answers`, which the agent must know when it starts."""
    command: Command = request.getfixturevalue("zone_bundle")
    return command


def refusal(status: int, message: str) -> tuple[int, Any]:
    return status, {"error_code": "Fake", "message": message, "request_id": "1"}


@pytest.mark.parametrize("verb", ["cleanup-context", "context"])
def test_context(run: Command, answers: Answers, verb: str) -> None:
    answers.to["GET /zones/bundle-cleanup/context"] = (200, CONTEXT)
    ran = run(verb)
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines == ["Period: 600s", "Priority: [Cause, Time]", "Storage limit: 25%"]


def test_context_with_a_fraction_of_a_second(run: Command, answers: Answers) -> None:
    period = {"secs": 61, "nanos": 500_000_000}
    answers.to["GET /zones/bundle-cleanup/context"] = (200, CONTEXT | {"period": period})
    assert run("context").lines[0] == "Period: 61.5s"


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["set-cleanup-context", "set-context"])
@pytest.mark.parametrize(
    ("options", "body"),
    [
        (("--period", "300"), {"period": {"secs": 300, "nanos": 0}}),
        (("--period", "10m"), {"period": {"secs": 600, "nanos": 0}}),
        (("--priority", "time,cause"), {"priority": ["time", "cause"]}),
        (("--storage-limit", "7"), {"storage_limit": 7}),
        (
            ("--storage-limit", "50", "--priority", "cause, time", "--period", "86400"),
            {"storage_limit": 50, "priority": ["cause", "time"], "period": {"secs": 86400, "nanos": 0}},
        ),
    ],
)
def test_set_context_sends_what_is_given(
    run: Command, answers: Answers, verb: str, options: tuple[str, ...], body: dict[str, Any]
) -> None:
    answers.to["PUT /zones/bundle-cleanup/context"] = (204, None)
    ran = run(verb, *options)
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert answers.asked == [("PUT /zones/bundle-cleanup/context", {}, body)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to change: name one of --period, --priority and --storage-limit"),
        (("--period", "59"), "60 to 86400 seconds"),
        (("--period", "soon"), "--period: 'soon' is not a duration"),
        (("--priority", "time"), "cause,time or time,cause"),
        (("--priority", "time,cause,time"), "cause,time or time,cause"),
        (("--priority", ""), "cause,time or time,cause"),
        (("--storage-limit", "0"), "1 to 50"),
        (("--storage-limit", "51"), "1 to 50"),
        (("--storage-limit", "x"), "is not a valid integer"),
    ],
)
def test_set_context_refuses_what_is_not_allowed(
    run: Command, answers: Answers, options: tuple[str, ...], message: str
) -> None:
    ran = run("set-context", *options)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert answers.asked == []


USAGE = {
    "/b\n": {"dataset_quota": 100 * GIB, "bytes_available": 25 * GIB, "bytes_used": 3 * GIB},
    "/a": {"dataset_quota": 0, "bytes_available": 0, "bytes_used": 0},
}


def test_utilization(run: Command, answers: Answers) -> None:
    answers.to["GET /zones/bundle-cleanup/utilization"] = (200, USAGE)
    ran = run("utilization")
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines == [
        "Directory  Bytes used  Bytes available  Dataset quota  % of limit  % of quota",
        "/a         0 B         0 B              0 B            0%          0%",
        "/b\\x0a     3.0 GiB     25.0 GiB         100.0 GiB      12%         3%",
    ]


def test_utilization_parseable(run: Command, answers: Answers) -> None:
    answers.to["GET /zones/bundle-cleanup/utilization"] = (200, {"/s": USAGE["/b\n"]})
    assert run("utilization", "-p").lines == [f"/s,{3 * GIB},{25 * GIB},{100 * GIB},12,3"]
    assert run("utilization", "--parseable", "-o", "pct-quota, directory").lines == ["3,/s"]
    full = {"dataset_quota": 1, "bytes_available": 0, "bytes_used": 5}
    answers.to["GET /zones/bundle-cleanup/utilization"] = (200, {"/s": full})
    assert run("utilization", "-p", "--fields", "pct-available").lines == ["100"]


def test_utilization_names_the_fields_there_are(run: Command, answers: Answers) -> None:
    ran = run("utilization", "-o", "directory,quota")
    assert ran.code == 2
    assert "--fields: 'quota' is no field; there are directory, bytes-used," in ran.err
    assert answers.asked == []


def test_cleanup(run: Command, answers: Answers) -> None:
    removed = {"/b": {"bundles": 12, "bytes": 3456}, "/a": {"bundles": 0, "bytes": 0}}
    answers.to["POST /zones/bundle-cleanup"] = (200, removed)
    ran = run("cleanup")
    assert (ran.code, ran.err) == (0, "")
    assert ran.lines == ["Directory  Count  Bytes", "/a         0      0", "/b         12     3456"]


def test_without_store_dirs_nothing_is_printed(run: Command, answers: Answers) -> None:
    for target in ("POST /zones/bundle-cleanup", "GET /zones/bundle-cleanup/utilization"):
        answers.to[target] = (200, {})
    for verb in ("cleanup", "utilization"):
        ran = run(verb)
        assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_a_failed_cleanup_is_told(run: Command, answers: Answers) -> None:
    answers.to["POST /zones/bundle-cleanup"] = refusal(503, "no store can be written")
    ran = run("cleanup")
    assert (ran.code, ran.out, ran.err) == (1, "", "zone-bundle: error: no store can be written\n")


def test_drain_waits_and_says_what_is_drained(run: Command, answers: Answers) -> None:
    answers.to["POST /drain"] = (200, {"path": "/real/disk", "drained": True})
    ran = run("drain", "/disk/", "--timeout", "1m30s")
    assert (ran.code, ran.out, ran.err) == (0, "Drained: /real/disk\n", "")
    run("drain", "/disk")
    assert answers.asked == [
        ("POST /drain", {"path": "/disk", "timeout": "90.000000"}, None),
        ("POST /drain", {"path": "/disk"}, None),
    ]


def test_drain_of_a_relative_path(
    run: Command, answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answers.to["POST /drain"] = (200, {"path": "/x", "drained": True})
    run("drain", "disk/../other")
    assert answers.asked[0][1] == {"path": str(tmp_path / "other")}


def test_a_drain_that_times_out_fails(run: Command, answers: Answers) -> None:
    answers.to["POST /drain"] = refusal(503, "/disk is still used after 1.0 s: download of bundle x")
    ran = run("drain", "/disk", "--timeout", "1s")
    assert ran.code == 1
    assert ran.err == "zone-bundle: error: /disk is still used after 1.0 s: download of bundle x\n"


def test_drain_end(run: Command, answers: Answers) -> None:
    answers.to["DELETE /drain"] = (204, None)
    ran = run("drain", "--end", "/disk")
    assert (ran.code, ran.out, ran.err) == (0, "Ended drain: /disk\n", "")
    assert answers.asked == [("DELETE /drain", {"path": "/disk"}, None)]
    answers.to["DELETE /drain"] = refusal(404, "/disk is not being drained")
    assert run("drain", "/disk", "--end").code == 1


def test_drain_list(run: Command, answers: Answers) -> None:
    answers.to["GET /drain"] = (
        200,
        [
            {"path": "/a", "drained": True, "used_by": []},
            {"path": "/b", "drained": False, "used_by": ["capture of zone web (x)", "seal\x1b[31m"]},
        ],
    )
    ran = run("drain", "--list")
    assert ran.code == 0
    assert ran.lines == [
        "Path  Used by",
        "/a    nothing",
        "/b    capture of zone web (x); seal\\x1b[31m",
    ]
    answers.to["GET /drain"] = (200, [])
    assert run("drain", "--list").out == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--end",),
        ("--timeout", "1s"),
        ("/a", "--list"),
        ("--list", "--end"),
        ("--list", "--timeout", "1s"),
        ("/a", "--end", "--timeout", "1s"),
        ("/a", "--timeout", "soon"),
        ("/a", "/b"),
        (os.fsdecode(b"/\xff"),),
    ],
)
def test_wrong_usage_of_drain(run: Command, answers: Answers, arguments: tuple[str, ...]) -> None:
    ran = run("drain", *arguments)
    assert ran.code == 2
    assert ran.err.startswith("zone-bundle: error: ")
    assert answers.asked == []
