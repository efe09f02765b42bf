"""A bundle is read by everything that reads a tar.gz, and gives back every byte."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.agents import AgentProcess

CHUNK = 1 << 20
NAMES = {
    b"plain.log": b"plain\n" * 1000,
    b"empty.log": b"",
    b"one-byte.log": b"x",
    b"exactly-a-chunk.log": b"0123456789abcde\n" * (CHUNK // 16),
    b"a-chunk-less-one.log": b"y" * (CHUNK - 1),
    b"a-chunk-and-one.log": b"z" * (CHUNK + 1),
    b"packed.log": os.urandom(1 << 18),
    b"random.log": os.urandom(3 * CHUNK + 17),
    b"with space.log": b"space",
    b"new\nline.log": b"newline",
    b"\xff\xfe\x80.log": b"not UTF-8",
    "schön.log".encode(): "schön".encode(),
    b"n" * 255: b"the longest name",
    b"d" * 200 + b"/" + b"e" * 200 + b"/long.log": b"a long path",
}


def write_logs(logs: Path) -> None:
    for name, data in NAMES.items():
        path = os.path.join(os.fsencode(logs), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, 0o640)
        os.utime(path, ns=(1_600_000_000_000_000_000, 1_600_000_000_000_000_000))


@pytest.fixture
def bundle(agent: AgentProcess, tmp_path: Path) -> Path:
    """The bundle of a zone with all those logs, as a file."""
    write_logs(agent.add_zone("web") / "logs")
    agent.start().start_zones()
    told = agent.stop_zone("web")
    assert told["gaps"] == 0
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(agent.download("web", told["bundle"]["id"]["bundle_id"]))
    return path


def check_extracted(directory: Path) -> None:
    logs = os.path.join(os.fsencode(directory), b"logs/zone/logs")
    for name, data in NAMES.items():
        path = os.path.join(logs, name)
        with open(path, "rb") as file:
            assert file.read() == data, name
        status = os.stat(path)
        assert status.st_mode & 0o777 == 0o640
        assert int(status.st_mtime) == 1_600_000_000
    assert sum(len(files) for _, _, files in os.walk(logs)) == len(NAMES)


def run(*command: str | Path) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b"", "it complains"
    return done


@pytest.mark.slow
def test_every_reader_reads_it(bundle: Path, tmp_path: Path) -> None:
    run("gzip", "-t", bundle)
    run("tar", "tzf", bundle)
    tars = ["tar"] + (["bsdtar"] if shutil.which("bsdtar") else [])
    for tar in tars:
        out = tmp_path / tar
        out.mkdir()
        run(tar, "xzpf", bundle, "-C", out)
        check_extracted(out)
    out = tmp_path / "python"
    out.mkdir()
    with tarfile.open(bundle) as archive:
        archive.extractall(out, filter="tar")
    check_extracted(out)
    # Rust's GzDecoder and browsers read one member: there must be nothing after it.
    member = zlib.decompressobj(wbits=31)
    inflated = member.decompress(bundle.read_bytes())
    assert member.eof and not member.unused_data
    assert inflated.endswith(bytes(1024))
    if "bsdtar" not in tars:
        pytest.skip("bsdtar is not installed (libarchive-tools); all other readers read it")


@pytest.mark.slow
def test_ranges_and_etag(agent: AgentProcess) -> None:
    write_logs(agent.add_zone("web") / "logs")
    agent.start().start_zones()
    told = agent.stop_zone("web")
    bundle_id = told["bundle"]["id"]["bundle_id"]
    whole = agent.get(f"/zones/bundles/web/{bundle_id}")
    assert whole.headers["content-type"] == "application/gzip"
    assert int(whole.headers["content-length"]) == len(whole.content)
    etag = whole.headers["etag"]
    with agent.client() as client:
        for asked, start, stop in (
            ("bytes=0-0", 0, 1),
            ("bytes=100-99999", 100, 100_000),
            ("bytes=-500", len(whole.content) - 500, len(whole.content)),
            (f"bytes={CHUNK}-", CHUNK, len(whole.content)),
        ):
            part = client.get(f"/zones/bundles/web/{bundle_id}", headers={"range": asked, "if-range": etag})
            assert part.status_code == 206
            assert part.content == whole.content[start:stop]
            assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole.content)}"
        beyond = client.get(f"/zones/bundles/web/{bundle_id}", headers={"range": f"bytes={len(whole.content)}-"})
        assert beyond.status_code == 416
        same = client.get(f"/zones/bundles/web/{bundle_id}", headers={"if-none-match": etag})
        assert same.status_code == 304


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_file_of_three_gigabytes(agent: AgentProcess, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("less than 12 GB of disk are free")
    log = agent.add_zone("web") / "logs/large.log.1"
    digest = hashlib.sha256()
    with log.open("wb") as file:
        for block in _blocks(3 * 1024):
            digest.update(block)
            file.write(block)
    agent.start().start_zones()
    told = agent.stop_zone("web")
    bundle_id = told["bundle"]["id"]["bundle_id"]
    agent.wait_sealed("web", bundle_id, timeout=120)
    path = tmp_path / "bundle.tar.gz"
    with (
        agent.client(timeout=300) as client,
        path.open("wb") as file,
        client.stream("GET", f"/zones/bundles/web/{bundle_id}") as answer,
    ):
        for chunk in answer.iter_raw():
            file.write(chunk)
    entry = "logs/zone/logs/large.log.1"
    for tar in ("tar", "bsdtar"):
        if shutil.which(tar):
            with subprocess.Popen([tar, "xzOf", path, entry], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                extracted = hashlib.sha256()
                while block := process.stdout.read(CHUNK):
                    extracted.update(block)
                assert extracted.digest() == digest.digest()
            assert process.returncode == 0
    run("gzip", "-t", path)
    with tarfile.open(path) as archive:
        assert archive.getmember(entry).size == 3 << 30


def _blocks(count: int) -> Iterator[bytes]:
    body = b'{"level":"info","msg":"request completed","latency_us":123456}\n' * ((CHUNK - 16) // 63)
    for number in range(count):
        yield (b"%015d\n" % number + body).ljust(CHUNK, b".")
