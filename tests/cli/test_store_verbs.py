import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support.command import Command, Ran
from support.flipping import Sample, flip
from support.stored import File, content, download, put, seal
from zonebundle.cli.main import run
from zonebundle.store.pieces import CHUNK
from zonebundle.store.reader import StoreReader
from zonebundle.store.store import Store
from zonebundle.store.tombstones import Tombstones

pytestmark = pytest.mark.usefixtures("leak_check")


@pytest.fixture
def zone_bundle(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs a command line of zone-bundle in this process, where there is no agent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZONE_BUNDLE_CONFIG", raising=False)

    def call(*arguments: str) -> Ran:
        code = run(["--host", f"unix:{tmp_path}/nobody", *arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


def configure(tmp_path: Path, *dirs: Path) -> Path:
    path = tmp_path / "config.toml"
    listed = ", ".join(f'"{directory}"' for directory in dirs)
    (tmp_path / "state").mkdir(exist_ok=True)
    path.write_text(f'[agent]\nstate-dir = "{tmp_path}/state"\n[store]\ndirs = [{listed}]\n')
    return path


def test_a_whole_store(zone_bundle: Command, sample: Sample) -> None:
    before = sample.bytes()
    for options in ((), ("--deep",)):
        ran = zone_bundle("verify", "--store", str(sample.directory), *options)
        assert (ran.code, ran.err) == (0, "")
        assert ran.lines == [f"3 bundles, {len(sample.segments())} segments: all whole"]
    assert sample.bytes() == before


def test_the_configuration_names_the_dirs(zone_bundle: Command, sample: Sample, tmp_path: Path) -> None:
    config = configure(tmp_path, sample.directory)
    ran = zone_bundle("verify", "--config", str(config))
    assert (ran.code, ran.lines[0][:9]) == (0, "3 bundles")
    ran = zone_bundle("verify", "--config", str(tmp_path / "none.toml"))
    assert ran.code == 2
    assert "none.toml: no such file" in ran.err


def test_damage_is_listed_the_most_important_first(zone_bundle: Command, sample: Sample) -> None:
    foreign = sample.directory / "bundles/web/new\nline"
    foreign.write_bytes(b"")
    segment = sample.segments()[3]
    flip(segment, 500)
    flip(sample.bundle(2) / "manifest.jsonl", 8 * 300)
    ran = zone_bundle("verify", "--store", str(sample.directory))
    assert (ran.code, ran.err) == (1, "")
    paths = [line.split(": ")[0] for line in ran.lines]
    assert paths[0] == str(sample.bundle(2) / "manifest.jsonl")
    assert str(segment) in paths
    assert paths[-2] == str(foreign).replace("\n", "\\x0a")
    assert ran.lines[-1].endswith("damaged, 1 other remark")


def test_unused_segments_alone_are_fine(zone_bundle: Command, sample: Sample) -> None:
    with Store.open(sample.directory) as store:
        put(store, "nobody", content(7, 3 * CHUNK))
        store.segments.flush()
    ran = zone_bundle("verify", "--store", str(sample.directory))
    assert ran.code == 0
    (line,) = ran.lines
    assert line.endswith(": 3 segments used by no bundle (removed by the next clean-up)")


def test_json(zone_bundle: Command, sample: Sample, tmp_path: Path) -> None:
    flip(sample.bundle(0) / "frame", 8 * 600)
    ran = zone_bundle("verify", "--store", str(sample.directory), "--store", str(tmp_path / "none"), "--json")
    assert ran.code == 1
    result = json.loads(ran.out)
    assert not result["is_clean"]
    first, second = result["stores"]
    (problem,) = first["problems"]
    assert problem["kind"] == "frame"
    assert problem["is_damage"] is True
    assert problem["bundle"] == {"zone_name": "web", "bundle_id": sample.bundles[0].bundle_id}
    assert (first["bundles"], first["unused_segments"], first["error"]) == (3, 0, None)
    assert "there is no store in" in second["error"]


@pytest.mark.parametrize("options", [(), ("--repair",)])
def test_what_is_no_store(zone_bundle: Command, sample: Sample, tmp_path: Path, options: tuple[str, ...]) -> None:
    """It is told, and the others are verified all the same."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_bytes(b"")
    ran = zone_bundle("verify", "--store", str(other), "--store", str(sample.directory), *options)
    assert (ran.code, ran.err) == (1, "")
    assert str(other) in ran.lines[0]
    assert ran.lines[-1] == f"3 bundles, {len(sample.segments())} segments: 1 of 2 stores could not be read"
    ran = zone_bundle("verify", "--store", str(tmp_path / "typo"), *options)
    assert ran.code == 1
    assert not (tmp_path / "typo").exists()


def test_repair_mends_each_dir_from_the_others(zone_bundle: Command, sample: Sample, twin: Sample) -> None:
    whole = sample.bytes()
    segment = sample.segments()[0]
    flip(segment, 300)
    flip(twin.bundle(0) / "manifest.jsonl", 800)
    shutil.rmtree(twin.bundle(2))
    stores = ("--store", str(sample.directory), "--store", str(twin.directory))
    assert zone_bundle("verify", *stores).code == 1
    ran = zone_bundle("verify", *stores, "--repair")
    assert (ran.code, ran.err) == (0, "")
    assert f"repaired: {segment}: was damaged, and is replaced" in ran.lines
    assert ran.lines[-1].endswith("repaired")
    assert sample.bytes() == twin.bytes() == whole
    assert zone_bundle("verify", *stores, "--deep").code == 0


def test_repair_of_what_nobody_has(zone_bundle: Command, sample: Sample) -> None:
    flip(sample.segments()[0], 300)
    ran = zone_bundle("verify", "--store", str(sample.directory), "--repair")
    assert ran.code == 1
    assert "it could not be mended: there is no other store dir" in ran.out


def test_repair_obeys_tombstones_and_removes_no_segment(
    zone_bundle: Command, sample: Sample, twin: Sample, tmp_path: Path
) -> None:
    """Records of an agent that is stopped may need a segment that no bundle needs any more."""
    segments = sample.segments()
    gone = sample.bundles[2]
    Tombstones([twin.directory]).write(gone.bundle_id)
    stores = ("--store", str(sample.directory), "--store", str(twin.directory))
    ran = zone_bundle("verify", *stores, "--repair")
    assert ran.code == 0
    assert f"repaired: {sample.bundle(2)}: had been deleted, and is deleted here too" in ran.lines
    assert not sample.bundle(2).exists()
    assert not twin.bundle(2).exists()
    assert sample.segments() == segments


def test_repair_obeys_the_tombstones_of_the_state_directory(
    zone_bundle: Command, sample: Sample, tmp_path: Path
) -> None:
    config = configure(tmp_path, sample.directory)
    Tombstones([tmp_path / "state"]).write(sample.bundles[0].bundle_id)
    assert zone_bundle("verify", "--config", str(config), "--repair").code == 0
    assert not sample.bundle(0).exists()


def test_repair_beside_an_agent_is_refused(zone_bundle: Command, sample: Sample, twin: Sample) -> None:
    flip(sample.segments()[0], 300)
    before = sample.bytes()
    stores = ("--store", str(sample.directory), "--store", str(twin.directory))
    with Store.open(twin.directory):
        ran = zone_bundle("verify", *stores, "--repair")
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == (
            f"zone-bundle: error: store {twin.directory} is in use by an agent: stop it, or let it repair by itself, "
            "which it does when a store dir comes back\n"
        )
        # But looking is fine.
        assert zone_bundle("verify", "--store", str(twin.directory)).code == 0
    assert sample.bytes() == before


def test_export_is_the_download(zone_bundle: Command, sample: Sample, tmp_path: Path) -> None:
    made = sample.bundles[0]
    ran = zone_bundle("export", "--store", str(sample.directory), "web", made.bundle_id)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == "zone-bundle: the bundle has 1 gap: see report.json in it\n"
    written = tmp_path / f"{made.bundle_id}.tar.gz"
    assert written.read_bytes() == download(StoreReader.open(sample.directory).find("web", made.bundle_id))
    listed = subprocess.run(["tar", "tzf", written], capture_output=True, check=True)
    assert listed.stderr == b""
    assert listed.stdout.splitlines()[:2] == [b"metadata.toml", b"netstat"]
    with tarfile.open(written) as tar:
        member = tar.extractfile("logs/zone/large")
        assert member is not None
        assert member.read() == content(50, 2 * CHUNK + 77)
    assert sorted(os.listdir(tmp_path)) == [written.name, "store"]


def test_export_to_a_file_and_to_stdout(zone_bundle: Command, sample: Sample, tmp_path: Path) -> None:
    made = sample.bundles[1]
    arguments = ("export", "--store", str(sample.directory), "web", made.bundle_id)
    (tmp_path / "old.tgz").write_bytes(b"old")
    (tmp_path / "link.tgz").symlink_to("old.tgz")
    assert zone_bundle(*arguments, "--output", "link.tgz").code == 0
    expected = download(StoreReader.open(sample.directory).find("web", made.bundle_id))
    assert (tmp_path / "old.tgz").read_bytes() == expected
    command = [sys.executable, "-m", "zonebundle.cli.main", *arguments, "-o", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == expected


def test_export_into_a_pipe_that_closes(sample: Sample, tmp_path: Path) -> None:
    arguments = ["export", "--store", str(sample.directory), "db-1", sample.bundles[2].bundle_id, "-o", "-"]
    command = [sys.executable, "-m", "zonebundle.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b"zone-bundle: error: cannot write stdout: Broken pipe\n"
    assert process.returncode == 1


def test_export_of_what_is_not_there_or_damaged(zone_bundle: Command, sample: Sample, tmp_path: Path) -> None:
    made = sample.bundles[0]
    cases = {
        ("--store", str(tmp_path / "none"), "web", made.bundle_id): "there is no store in",
        ("--store", str(sample.directory), "db-1", made.bundle_id): "No zone bundle for zone 'db-1'",
    }
    for arguments, message in cases.items():
        ran = zone_bundle("export", *arguments)
        assert ran.code == 1
        assert message in ran.err
        assert ran.err.count("\n") == 1
    assert zone_bundle("export", "--store", str(sample.directory), "web", "x").code == 2
    for segment in sample.segments():
        segment.unlink()
    ran = zone_bundle("export", "--store", str(sample.directory), "web", made.bundle_id)
    assert ran.code == 1
    assert "is missing; restore it from a copy of the store" in ran.err
    assert os.listdir(tmp_path) == ["store"]
    ran = zone_bundle("export", "--store", str(sample.directory), "web", made.bundle_id, "-o", ".")
    assert (ran.code, "is a directory; name a file" in ran.err) == (2, True)


def test_export_beside_a_writer(zone_bundle: Command, sample: Sample, tmp_path: Path) -> None:
    with Store.open(sample.directory) as store:
        made = seal(store, [File(b"logs/a", content(1, 1000))]).metadata
        assert zone_bundle("export", "--store", str(sample.directory), "web", made.bundle_id, "-o", "x.tgz").code == 0
