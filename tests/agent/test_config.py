import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from zonebundle.agent.config import Config, ZoneConfig, load_config
from zonebundle.errors import ConfigError
from zonebundle.model.record import Limits

# The example of the documentation, with one listening address and one store.
FULL = """
[agent]
state-dir = "/var/lib/zone-bundle"
listen = ["unix:/run/zone-bundle/agent.sock"]
token-file = "/etc/zone-bundle/token"
[store]
dirs = ["/var/lib/zone-bundle/store"]
quota = "100GiB"
[hold]
budget = "2s"
copy = "64MiB"
must-keep = false
[seal]
workers = 0
ahead = "30s"
[cleanup]
period = "10m"
storage-limit = 25
priority = ["cause", "time"]
[evidence]
commands = [["netstat", "-an"]]
logs = ["var/log/**", "var/svc/log/**"]
archives = []
stacks = "kernel"
[staging]
"/srv" = "/srv/.zone-bundle"
[limits]
file = "32GiB"
bundle = "64GiB"
files = 1000000
[zones.web]
command = ["/usr/bin/python3", "-m", "http.server"]
root = "/srv/web"
logs = ["logs/**"]
environment = { LANG = "C" }
[zones."db@1"]
pid-file = "/run/db.pid"
root = "/srv/db"
[runtimes]
enabled = ["process", "oci"]
[runtimes.oci]
command = "crun"
root = "/run/crun"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def load(file: Path, text: str) -> Config:
    file.write_text(text)
    return load_config(file)


def refusal(file: Path, text: str) -> str:
    """The error without the file's name, which is checked to be in front."""
    with pytest.raises(ConfigError) as caught:
        load(file, text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


def test_every_key_is_read_with_its_type(file: Path) -> None:
    config = load(file, FULL)
    assert config.agent.state_dir == Path("/var/lib/zone-bundle")
    assert config.agent.sockets == (Path("/run/zone-bundle/agent.sock"),)
    assert config.agent.token_file == Path("/etc/zone-bundle/token")
    assert config.store.dirs == (Path("/var/lib/zone-bundle/store"),)
    assert config.store.quota == 100 << 30
    assert (config.hold.budget, config.hold.copy_limit, config.hold.must_keep) == (2.0, 64 << 20, False)
    assert (config.seal.workers, config.seal.ahead) == (0, 30.0)
    assert (config.cleanup.period, config.cleanup.storage_limit) == (600.0, 25)
    assert config.cleanup.priority == ("cause", "time")
    assert config.evidence.commands == (("netstat", "-an"),)
    assert config.evidence.stacks == "kernel"
    assert config.staging == {"/srv": "/srv/.zone-bundle"}
    assert config.limits.as_limits() == Limits(32 << 30, 64 << 30, 1_000_000)
    assert config.zones["web"].command == ("/usr/bin/python3", "-m", "http.server")
    assert config.zones["web"].environment == {"LANG": "C"}
    assert config.zones["db@1"].pid_file == Path("/run/db.pid")
    assert config.zones["db@1"].logs == ("logs/**",)
    assert config.runtimes.enabled == ("process", "oci")
    assert (config.runtimes.oci.command, config.runtimes.oci.root) == ("crun", Path("/run/crun"))


def test_an_empty_file_gives_the_documented_defaults(file: Path) -> None:
    full = load(
        file,
        FULL.replace('quota = "100GiB"\n', "")
        .replace('[["netstat", "-an"]]', "[]")
        .replace('stacks = "kernel"', "")
        .replace('"/srv" = "/srv/.zone-bundle"', ""),
    )
    bare = full.model_copy(update={"zones": {}, "runtimes": Config().runtimes})
    assert load(file, "") == bare == Config()


def test_numbers_are_seconds_and_bytes(file: Path) -> None:
    config = load(file, "hold.budget = 0.5\nhold.copy = 4096\nseal.ahead = 0\n")
    assert (config.hold.budget, config.hold.copy_limit, config.seal.ahead) == (0.5, 4096, 0.0)


def test_code_may_use_the_python_names_but_a_file_may_not(file: Path) -> None:
    zone = ZoneConfig(root=Path("/srv/web"), pid_file=Path("/run/web.pid"))
    assert Config(zones={"web": zone}).zones["web"].pid_file == Path("/run/web.pid")
    assert "agent.state_dir: unknown key; known here: state-dir," in refusal(file, '[agent]\nstate_dir = "/x"')
    assert "hold.copy-limit: unknown key" in refusal(file, "hold.copy-limit = 1")


def test_it_is_frozen(file: Path) -> None:
    config = load(file, FULL)
    with pytest.raises(ValidationError, match="frozen"):
        config.hold.budget = 3.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[hold]\nbudgt = "2s"', "hold.budgt: unknown key; known here: budget, must-keep, copy"),
        ("[hodl]\n", "hodl: unknown key; known here: hold, "),
        ("[zones.web]\nroot='/srv'\ncommand=['x']\nlog=[]", "zones.web.log: unknown key; known here: logs, "),
        ('[runtimes.oci]\ncomand = "runc"', "runtimes.oci.comand: unknown key; known here: command, root"),
        ('"a\\nb" = 1', '"a\\x0ab": unknown key; '),
        ('[hold]\nbudget = "2 parsecs"', "hold.budget: '2 parsecs' is not a duration: write it like 500ms, 2s"),
        ("[hold]\nbudget = true", "hold.budget: True is not a duration: "),
        ("[hold]\nbudget = inf", "hold.budget: inf is not a duration: "),
        ("[hold]\nbudget = -1", "hold.budget: -1 is not a duration: "),
        ('[hold]\nbudget = "0s"', "hold.budget: the hold needs some time: use more than 0s"),
        ('[hold]\ncopy = "many"', "hold.copy: 'many' is not a size: write it like 512, 64MiB or 1.5GB"),
        ('[hold]\nmust-keep = "yes"', "hold.must-keep: 'yes' is neither true nor false"),
        ('[seal]\nworkers = "2"', "seal.workers: '2' is not a whole number"),
        ("[seal]\nworkers = -1", "seal.workers: -1 is too small: use 0 or more"),
        ("[cleanup]\nstorage-limit = 51", "cleanup.storage-limit: 51 is too large: use 50 or less"),
        ('[cleanup]\nperiod = "1s"', "cleanup.period: 1 s is out of bounds: use 60s to 24h"),
        ('[cleanup]\npriority = ["cause"]', 'cleanup.priority: name each of "cause" and "time" once'),
        ('[cleanup]\npriority = ["age"]', "cleanup.priority[0]: 'age' is not one of 'cause' or 'time'"),
        ('[evidence]\ncommands = ["netstat"]', "evidence.commands[0]: 'netstat' is not a command: write it as a list"),
        ("[evidence]\ncommands = [[]]", "evidence.commands[0]: [] is not a command"),
        ('[evidence]\nlogs = ["/var/log/**"]', "evidence.logs[0]: '/var/log/**' is not a pattern below the root"),
        ('[evidence]\nlogs = ["../log"]', "evidence.logs[0]: '../log' is not a pattern below the root"),
        ('[evidence]\nlogs = "logs"', "evidence.logs: 'logs' is not a list: write it in brackets, […]"),
        ('[evidence]\nstacks = "both"', "evidence.stacks: 'both' is not one of 'user' or 'kernel'"),
        ('[agent]\nstate-dir = "lib"', "agent.state-dir: 'lib' is not an absolute path: "),
        ("[agent]\nlisten = []", "agent.listen: nowhere to listen: name at least one socket"),
        ('[agent]\nlisten = ["unix:run.sock"]', "agent.listen: 'unix:run.sock' names no absolute path: "),
        (f'[agent]\nlisten = ["unix:/{"x" * 107}"]', "has a path of 108 bytes; a socket's can have 107"),
        ('[agent]\nlisten = ["127.0.0.1:12345"]', "agent.listen: '127.0.0.1:12345': listening on TCP comes with"),
        ('[agent]\nlisten = ["[::1]:12345"]', "agent.listen: '[::1]:12345': listening on TCP comes with"),
        ('[agent]\nlisten = ["somewhere"]', "agent.listen: 'somewhere' is not an address: write it like unix:/run"),
        ('[agent]\nlisten = ["unix:/a", "unix:/a"]', "agent.listen: an address is there twice"),
        ('[store]\ndirs = ["/a", "/a/b"]', "store.dirs: '/a' and '/a/b' lie in each other: choose others"),
        ("[store]\ndirs = []", "store.dirs: no directory: name one"),
        ("agent = 3", "agent: 3 is not a table"),
        ("[zones]\nweb = 3", "zones.web: 3 is not a table"),
        ("[zones.web]\nroot = '/srv'", "zones.web: a zone has exactly one of command (to be started) and pid-file"),
        (
            "[zones.web]\nroot = '/srv'\ncommand = ['x']\npid-file = '/run/x'",
            "zones.web: a zone has exactly one of command",
        ),
        ("[zones.web]\ncommand = ['x']", "zones.web.root: missing"),
        ("[zones.'a/b']\nroot = '/srv'\ncommand = ['x']", "zones: 'a/b' cannot be a zone's name: "),
        ("[zones.bundles]\nroot = '/srv'\ncommand = ['x']", "zones: 'bundles' cannot be a zone's name: "),
        (
            "[zones.web]\nroot = '/srv'\ncommand = ['x']\nenvironment = { 'a=b' = 'c' }",
            "zones.web.environment: 'a=b' cannot be set",
        ),
        ("[zones.web]\nroot = '/srv'\ncommand = ['x']\n[runtimes]\nenabled = ['oci']", "runtimes.enabled: there are"),
        ("[staging]\n'/srv' = '/var/x'", "staging: '/var/x' does not lie below '/srv'"),
        ("[staging]\n'srv' = '/srv/x'", "staging: 'srv' is not an absolute path"),
        (
            "[zones.web]\nroot = '/srv'\ncommand = ['x']\n[staging]\n'/srv' = '/srv/x'",
            "staging: '/srv/x' lies inside the root /srv of zone web",
        ),
        (
            '[runtimes]\nenabled = ["podman"]',
            "runtimes.enabled: 'podman' comes with a later version; for now there are",
        ),
        ('[runtimes]\nenabled = ["proces"]', "runtimes.enabled: 'proces' is no runtime; there are process and oci"),
        ("[runtimes]\nenabled = []", "runtimes.enabled: name at least one of process and oci"),
        ("[limits]\nfiles = 0", "limits.files: 0 is too small: use 1 or more"),
        ("[agent\n", "not TOML: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(file: Path, text: str, expected: str) -> None:
    assert expected in refusal(file, text)


def test_of_several_problems_one_is_told_and_the_others_counted(file: Path) -> None:
    assert refusal(file, "[hold]\nbudgt = 1\n[seal]\nworker = 1").endswith("(and 1 more)")


def test_a_missing_or_unreadable_file_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file: write it, or name another with --config or ZONE_BUNDLE_CON"):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    file.write_bytes(b"[agent]\n\xff")
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8"):
        load_config(file)


def test_the_environment_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[hold]\nbudget = "7s"')
    monkeypatch.setenv("ZONE_BUNDLE_CONFIG", os.fspath(file))
    assert load_config().hold.budget == 7.0


def test_without_a_name_the_default_has_to_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZONE_BUNDLE_CONFIG", raising=False)
    monkeypatch.setattr("zonebundle.agent.config.DEFAULT_PATH", tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load_config()
