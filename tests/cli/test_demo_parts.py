import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from zonebundle.agent.config import load_config
from zonebundle.cli import demo_baseline, demo_stage
from zonebundle.cli.demo_baseline import Baseline, bundle_the_old_way, measure_baseline
from zonebundle.cli.demo_check import check_bundle
from zonebundle.cli.demo_report import ZoneResult, baseline_note, comparison_table, results_table
from zonebundle.cli.demo_stage import Stage, set_stage
from zonebundle.errors import ZoneBundleError


def write_logs(directory: Path, *sizes: int) -> list[Path]:
    directory.mkdir(parents=True)
    logs = []
    for number, size in enumerate(sizes):
        log = directory / f"app.log.{number}"
        log.write_bytes(b"0123456789" * (size // 10))
        logs.append(log)
    return logs


def test_the_stage_is_private_and_its_configuration_is_right() -> None:
    stage = set_stage()
    try:
        assert stage.directory.stat().st_mode & 0o777 == 0o700
        config = load_config(stage.config)
        assert list(config.zones) == stage.zones
        assert len(stage.zones) == 24
        assert config.agent.sockets == (stage.socket,)
        assert all(zone.root.is_relative_to(stage.directory) for zone in config.zones.values())
        assert 290e6 < stage.expected_bytes < 310e6
    finally:
        shutil.rmtree(stage.directory)


def test_a_place_with_a_long_name_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    stage = set_stage()
    shutil.rmtree(stage.directory)
    assert not stage.directory.is_relative_to(long)
    assert list(long.iterdir()) == []


def test_without_room_it_says_how_much_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_stage, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(ZoneBundleError, match=r"needs \d+ GiB free .*; set TMPDIR"):
        set_stage()


def test_the_old_way_makes_a_real_archive(tmp_path: Path) -> None:
    logs = write_logs(tmp_path / "logs", 1000, 2000)
    assert bundle_the_old_way(logs, tmp_path / "x.tar.gz") > 0
    with tarfile.open(tmp_path / "x.tar.gz", "r:gz") as archive:
        assert [(member.name, member.size) for member in archive] == [("app.log.0", 1000), ("app.log.1", 2000)]


def test_zones_wait_for_those_before_them_and_the_rest_is_extrapolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = {zone: write_logs(tmp_path / zone, size) for zone, size in (("a", 1000), ("b", 1000), ("c", 4000))}

    def take_a_second(_logs: list[Path], target: Path) -> float:
        target.touch()
        return 1.0

    monkeypatch.setattr(demo_baseline, "bundle_the_old_way", take_a_second)
    baseline = measure_baseline(logs, 2, tmp_path)
    assert baseline == Baseline(2, 2.0, (1.0, 2.0, 6.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of web-01, whose logs lie in tmp_path as on a stage."""
    write_logs(Stage(tmp_path).root("web-01") / "logs", 1000, 500)
    copy = tmp_path / "copy/logs/zone"
    shutil.copytree(Stage(tmp_path).root("web-01"), copy)
    target = tmp_path / "bundle.tar.gz"
    subprocess.run(["tar", "czf", target, "-C", tmp_path / "copy", "logs"], check=True)
    return target


def test_the_check_compares_every_byte(bundle: Path) -> None:
    checked = check_bundle(Stage(bundle.parent), "web-01", bundle)
    assert (checked.logs, checked.bytes) == (2, 1500)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda logs: (logs / "app.log.0").write_bytes(b"9" * 1000), r"differs from the zone in app\.log\.0"),
        (lambda logs: (logs / "app.log.1").unlink(), "has 2 log files, the zone 1"),
    ],
)
def test_the_check_finds_a_difference(bundle: Path, damage: object, message: str) -> None:
    assert callable(damage)
    damage(Stage(bundle.parent).root("web-01") / "logs")
    with pytest.raises(ZoneBundleError, match=message):
        check_bundle(Stage(bundle.parent), "web-01", bundle)


def test_the_check_believes_tar(bundle: Path) -> None:
    bundle.write_bytes(bundle.read_bytes()[:-20])
    with pytest.raises(ZoneBundleError, match="tar tzf"):
        check_bundle(Stage(bundle.parent), "web-01", bundle)


def test_the_report_has_rows_medians_and_totals() -> None:
    results = [
        ZoneResult(f"web-{n:02}", "id", 0.001 * n, 0.01 * n, 0.1 * n, 42, 10 << 20, 1 << 20, n // 3) for n in (1, 2, 3)
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(results_table(results))
        console.print(comparison_table(results, Baseline(1, 2.0, (2.0, 4.0, 6.0))))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert "web-02 2.0 ms 20.0 ms 42 10.0 MiB 1.0 MiB 200.0 ms none" in lines
    assert "median 2.0 ms 20.0 ms 42 10.0 MiB 1.0 MiB 200.0 ms" in lines
    assert "total 126 30.0 MiB 3.0 MiB 1" in lines
    assert "zonebundle (measured) 10.0 ms 20.0 ms 30.0 ms 300.0 ms" in lines
    assert "old way (extrapolated) 2.0 s 4.0 s 6.0 s 6.0 s" in lines
    note = baseline_note(results, Baseline(1, 2.0, (2.0, 4.0, 6.0)))
    assert "1 zone (2.0 s); the other 2 are extrapolated" in note
    assert "200 times sooner" in note
