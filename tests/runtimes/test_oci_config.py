import json
from pathlib import Path
from typing import Any

import pytest

from zonebundle.errors import RuntimeFailedError
from zonebundle.model.globs import matches_any
from zonebundle.model.zone import LogTree, ProcessRef
from zonebundle.runtimes.oci_config import log_trees, read_config

INIT = ProcessRef(4711, 12)
LOGS = ("var/log/**", "var/svc/log/**")


def bind(destination: str, source: str, **more: Any) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind"], **more}


def trees(
    directory: Path, *mounts: dict[str, Any], patterns: tuple[str, ...] = LOGS, init: ProcessRef | None = INIT
) -> list[LogTree]:
    (directory / "config.json").write_text(json.dumps({"root": {"path": "rootfs"}, "mounts": mounts}))
    return list(log_trees(read_config(str(directory)), patterns, init))


def test_the_root_is_relative_to_the_bundle(tmp_path: Path) -> None:
    assert trees(tmp_path) == [LogTree("zone", f"{tmp_path}/rootfs", LOGS)]
    (tmp_path / "config.json").write_text(json.dumps({"root": {"path": "/srv/root"}}))
    assert read_config(str(tmp_path)).root == "/srv/root"


def test_a_mount_below_a_log_directory_is_one_more_tree(tmp_path: Path) -> None:
    assert trees(tmp_path, bind("/var/log/nginx", "/host/nginx")) == [
        LogTree("zone", f"{tmp_path}/rootfs", LOGS),
        LogTree("zone", "/host/nginx", ("var/log/**",), prefix="var/log/nginx"),
    ]


@pytest.mark.parametrize("destination", ["/var/log", "/var/log/", "var/log", "/var/./log", "/x/../var/log"])
def test_a_mount_at_a_log_directory_hides_what_is_below_it(tmp_path: Path, destination: str) -> None:
    assert trees(tmp_path, bind(destination, "host")) == [
        LogTree("zone", f"{tmp_path}/rootfs", ("var/svc/log/**",)),
        LogTree("zone", f"{tmp_path}/host", ("var/log/**",), prefix="var/log"),
    ]


def test_a_mount_above_all_log_directories_replaces_the_root(tmp_path: Path) -> None:
    assert trees(tmp_path, bind("/var", "/host")) == [LogTree("zone", "/host", LOGS, prefix="var")]


def test_of_mounts_over_each_other_the_later_counts(tmp_path: Path) -> None:
    found = trees(tmp_path, bind("/var/log/a", "/one"), bind("/var", "/two"), bind("/var/log", "/three"))
    assert found == [
        LogTree("zone", "/two", ("var/svc/log/**",), prefix="var"),
        LogTree("zone", "/three", ("var/log/**",), prefix="var/log"),
    ]


def test_mounts_elsewhere_and_of_the_kernel_are_none(tmp_path: Path) -> None:
    mounts = [
        bind("/srv/data", "/host"),
        bind("/var/logs", "/host"),
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"},
    ]
    assert [tree.prefix for tree in trees(tmp_path, *mounts)] == [""]
    everywhere = trees(tmp_path, *mounts, patterns=("**/*.log",))
    assert [tree.prefix for tree in everywhere] == ["", "srv/data", "var/logs"]


def test_other_file_systems_are_entered_through_the_first_process(tmp_path: Path) -> None:
    tmpfs = {"destination": "/var/log", "type": "tmpfs", "source": "tmpfs"}
    (tree,) = trees(tmp_path, tmpfs, patterns=("var/log/**",))
    assert tree == LogTree("zone", "var/log", ("var/log/**",), prefix="var/log", via=INIT)
    assert trees(tmp_path, tmpfs, patterns=("var/log/**",), init=None) == []


def test_a_bind_may_be_told_by_its_options_alone(tmp_path: Path) -> None:
    mount = {"destination": "/var/log", "type": "none", "source": "/host", "options": ["ro", "bind"]}
    assert trees(tmp_path, mount, patterns=("var/log/**",)) == [
        LogTree("zone", "/host", ("var/log/**",), prefix="var/log")
    ]


def test_a_single_file_that_is_mounted_is_taken_from_its_directory(tmp_path: Path) -> None:
    (tmp_path / "a[1].log").write_text("")
    _, tree = trees(tmp_path, bind("/var/log/a[1].log", "a[1].log"))
    assert (tree.path, tree.prefix) == (str(tmp_path), "var/log")
    assert matches_any("var/log/a[1].log", tree.patterns)
    assert not matches_any("var/log/a1.log", tree.patterns)
    assert len(trees(tmp_path, bind("/var/log/a[1].log", "a[1].log"), patterns=("var/log/*.txt",))) == 1


def test_a_single_file_under_another_name_is_not_lost_in_silence(tmp_path: Path) -> None:
    (tmp_path / "real.log").write_text("")
    _, tree = trees(tmp_path, bind("/var/log/shown.log", "real.log"))
    with pytest.raises(NotADirectoryError):
        list(Path(tree.path).iterdir())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "the whole is not an object"),
        ("{}", "'root' is not an object"),
        ('{"root": {}}', "'path' is not a text"),
        ('{"root": {"path": 1}}', "'path' is not a text"),
        ('{"root": {"path": "a\\u0000"}}', "'path' is not a text"),
        ('{"root": {"path": "r"}, "mounts": {"a": 1}}', "'mounts' is not a list"),
        ('{"root": {"path": "r"}, "mounts": [1]}', "a mount is not an object"),
        ('{"root": {"path": "r"}, "mounts": [{}]}', "'destination' is not a text"),
        ('{"root": {"path": "r"}, "linux": 1}', "'linux' is not an object"),
        ('{"root": {"path": "r"}, "mounts": [' + ",".join(["{}"] * 5000) + "]}", "not a list of at most 4096"),
        ("[" * 100_000, "recursion"),
        (" " * (5 << 20), "larger than"),
    ],
)
def test_what_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RuntimeFailedError, match=f"{tmp_path}/config.json cannot be used: .*{reason}"):
        read_config(str(tmp_path))


def test_a_configuration_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailedError, match=f"{tmp_path}/config.json cannot be used: .*No such file"):
        read_config(str(tmp_path))
