import json
import os
import uuid
from pathlib import Path

import pytest

from support.command import Command
from support.fake_agent import CREATED, FakeAgent
from zonebundle.cli.main import run

pytestmark = pytest.mark.usefixtures("leak_check")

GAP = {"what": "logs/zone/\x1b[2Ja.log", "reason": "changed\nwhile it was read"}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_create_names_the_bundle(zone_bundle: Command, agent: FakeAgent) -> None:
    ran = zone_bundle("create", "web-01")
    (bundle_id,) = agent.bundles
    assert (ran.code, ran.lines, ran.err) == (0, [f"Created zone bundle: web-01/{bundle_id}"], "")
    assert not agent.polls


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--strict",), 3), (("--wait",), 3)])
def test_create_tells_of_gaps(zone_bundle: Command, agent: FakeAgent, options: tuple[str, ...], code: int) -> None:
    agent.gaps = [GAP]
    ran = zone_bundle("create", "web-01", *options)
    (bundle_id,) = agent.bundles
    assert ran.code == code
    assert ran.err == f"zone-bundle: the bundle has 1 gap: see `zone-bundle show web-01 {bundle_id}`\n"


def test_create_wait_waits_and_fails_with_the_seal(zone_bundle: Command, agent: FakeAgent) -> None:
    assert zone_bundle("create", "web-01", "--wait").code == 0
    assert list(agent.polls.values()) == [3]
    agent.final_state = "failed"
    ran = zone_bundle("create", "web-01", "--wait")
    assert ran.code == 1
    assert "could not be sealed: see `zone-bundle show web-01 " in ran.err


def test_list_has_omicrons_three_columns(zone_bundle: Command, agent: FakeAgent) -> None:
    first, second = agent.add_bundle("web-01"), agent.add_bundle("db-01")
    for verb in ("list", "ls"):
        ran = zone_bundle(verb)
        assert ran.lines == [
            f"Zone    {'Bundle ID':36}  Created",
            f"web-01  {first}  2026-01-02 03:04:05 UTC",
            f"db-01   {second}  2026-01-02 03:04:05 UTC",
        ]
    assert len(zone_bundle("ls", "db").lines) == 2
    assert agent.requests[-1] == "GET /zones/bundles?filter=db"


def test_list_parseable(zone_bundle: Command, agent: FakeAgent) -> None:
    bundle_id = agent.add_bundle("web-01")
    assert zone_bundle("ls", "-p").lines == [f"web-01,{bundle_id},{CREATED}"]
    fields = "cause,version,zone-name,state,bytes,gaps"
    assert zone_bundle("ls", "-p", "-o", fields).lines == ["terminated_instance,0,web-01,sealed,1234,0"]


def test_list_of_nothing_prints_nothing(zone_bundle: Command) -> None:
    for options in ((), ("-p",)):
        ran = zone_bundle("list", *options)
        assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_list_names_the_fields_there_are(zone_bundle: Command) -> None:
    ran = zone_bundle("list", "-o", "zone,cause")
    assert ran.code == 2
    assert "--fields: 'zone' is no field; there are zone-name, bundle-id," in ran.err


def test_get_writes_the_bundle_under_its_id(zone_bundle: Command, agent: FakeAgent, directory: Path) -> None:
    agent.download = os.urandom(3_000_000)
    bundle_id = agent.add_bundle("web-01")
    ran = zone_bundle("get", "web-01", "--bundle-id", bundle_id)
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert os.listdir(directory) == [f"{bundle_id}.tar.gz"]
    assert (directory / f"{bundle_id}.tar.gz").read_bytes() == agent.download
    assert (directory / f"{bundle_id}.tar.gz").stat().st_mode & 0o777 == 0o600


def test_get_create_makes_one_first(zone_bundle: Command, agent: FakeAgent, directory: Path) -> None:
    assert zone_bundle("get", "--create", "web-01", "-o", "mine.tar.gz").code == 0
    assert (directory / "mine.tar.gz").read_bytes() == agent.download
    assert agent.requests[0] == "POST /zones/bundles/web-01"


def test_get_to_stdout(agent: FakeAgent, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    agent.download = b"\x1f\x8b\xff\x00"
    bundle_id = agent.add_bundle("web-01")
    assert run(["--host", f"unix:{agent.socket}", "get", "web-01", "--bundle-id", bundle_id, "--output", "-"]) == 0
    assert capsysbinary.readouterr().out == agent.download


def test_a_broken_download_leaves_the_old_file_and_no_other(
    zone_bundle: Command, agent: FakeAgent, directory: Path
) -> None:
    (directory / "mine.tar.gz").write_text("old")
    agent.broken_download = True
    ran = zone_bundle("get", "web-01", "--bundle-id", agent.add_bundle("web-01"), "-o", "mine.tar.gz")
    assert ran.code == 1
    assert "broke off before it had answered" in ran.err
    assert os.listdir(directory) == ["mine.tar.gz"]
    assert (directory / "mine.tar.gz").read_text() == "old"


def test_get_writes_through_links_and_into_pipes(zone_bundle: Command, agent: FakeAgent, directory: Path) -> None:
    bundle_id = agent.add_bundle("web-01")
    (directory / "link").symlink_to("target")
    assert zone_bundle("get", "web-01", "--bundle-id", bundle_id, "-o", "link").code == 0
    assert (directory / "link").is_symlink()
    assert (directory / "target").read_bytes() == agent.download
    os.mkfifo(directory / "fifo")
    reader = os.open(directory / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert zone_bundle("get", "web-01", "--bundle-id", bundle_id, "-o", "fifo").code == 0
    assert os.read(reader, 100) == agent.download
    os.close(reader)
    assert (directory / "fifo").is_fifo()


@pytest.mark.parametrize(
    ("target", "message"),
    [("no/such/file", "cannot write no/such/file: No such file or directory"), ("here", "here is a directory")],
)
def test_get_says_why_it_cannot_write(
    zone_bundle: Command, agent: FakeAgent, directory: Path, target: str, message: str
) -> None:
    (directory / "here").mkdir()
    ran = zone_bundle("get", "web-01", "--bundle-id", agent.add_bundle("web-01"), "-o", target)
    assert ran.code != 0
    assert message in ran.err


def test_get_tells_of_gaps(zone_bundle: Command, agent: FakeAgent, directory: Path) -> None:
    agent.gaps = [GAP]
    bundle_id = agent.add_bundle("web-01")
    assert zone_bundle("get", "web-01", "--bundle-id", bundle_id).code == 0
    assert zone_bundle("get", "web-01", "--bundle-id", bundle_id, "--strict").code == 3
    assert os.listdir(directory) == [f"{bundle_id}.tar.gz"]


def test_get_of_an_unknown_bundle_writes_nothing(zone_bundle: Command, directory: Path) -> None:
    bundle_id = str(uuid.uuid4())
    ran = zone_bundle("get", "web-01", "--bundle-id", bundle_id)
    assert ran.code == 1
    assert ran.err == f"zone-bundle: error: No zone bundle for zone 'web-01' with ID '{bundle_id}'\n"
    assert os.listdir(directory) == []


@pytest.mark.parametrize("options", [(), ("--create", "--bundle-id", "x"), ("--bundle-id", "x")])
def test_get_needs_one_bundle(zone_bundle: Command, agent: FakeAgent, options: tuple[str, ...]) -> None:
    assert zone_bundle("get", "web-01", *options).code == 2
    assert not agent.requests


def test_show_tells_state_timeline_and_gaps(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.polls_until_sealed = 0
    agent.gaps = [GAP]
    bundle_id = agent.add_bundle("web-01")
    ran = zone_bundle("show", "web-01", bundle_id)
    assert ran.code == 3
    assert ran.lines == [
        f"web-01/{bundle_id}",
        "  State    sealed",
        "  Cause    terminated_instance",
        f"  Created  {CREATED}",
        "  Held     12.0 ms, and 500.0 ms for the graceful stop",
        "  Sealed   in 200.0 ms",
        "  Size     100 B (1000 B of logs)",
        "",
        "Timeline (since the hold began)",
        "  Step    Outcome  Start   Took                               Detail",
        "  ptree   success  0.0 ms  2.0 ms   ━━━━",
        "  pstack  timeout  2.0 ms  10.0 ms      ━━━━━━━━━━━━━━━━━━━━  \\x1b[31mkilled",
        "",
        "1 gap:",
        "  logs/zone/\\x1b[2Ja.log: changed\\x0awhile it was read",
    ]


def test_show_without_gaps_and_while_sealing(zone_bundle: Command, agent: FakeAgent) -> None:
    ran = zone_bundle("show", "web-01", agent.add_bundle("web-01"))
    assert ran.code == 0
    assert "  Sealed   500 B of 1000 B so far" in ran.lines
    assert ran.lines[-1] == "No gaps: everything that was wanted is in the bundle."


def test_show_of_a_failed_bundle_fails(zone_bundle: Command, agent: FakeAgent) -> None:
    agent.polls_until_sealed, agent.final_state = 0, "failed"
    ran = zone_bundle("show", "web-01", agent.add_bundle("web-01"))
    assert ran.code == 1
    assert "  State    failed: no space left on device" in ran.lines


def test_show_json_is_the_agents_answer(zone_bundle: Command, agent: FakeAgent) -> None:

    answer = json.loads(zone_bundle("show", "web-01", agent.add_bundle("web-01"), "--json").out)
    assert (answer["state"], answer["bytes_total"]) == ("sealing", 1000)


@pytest.mark.parametrize("verb", ["delete", "del", "rm"])
def test_delete(zone_bundle: Command, agent: FakeAgent, verb: str) -> None:
    bundle_id = agent.add_bundle("web-01")
    ran = zone_bundle(verb, "web-01", bundle_id)
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert not agent.bundles
    assert zone_bundle(verb, "web-01", bundle_id).code == 1


def test_delete_takes_only_a_uuid(zone_bundle: Command, agent: FakeAgent) -> None:
    ran = zone_bundle("rm", "web-01", "../../zones")
    assert ran.code == 2
    assert "'../../zones' is not a bundle ID: it must be a UUID" in ran.err
    assert not agent.requests
