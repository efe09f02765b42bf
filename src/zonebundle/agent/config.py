"""The configuration file: TOML, checked as a whole before anything starts.

Keys are written with hyphens in the file and with underscores here. Durations become float seconds, sizes int bytes,
paths are absolute. Everything is frozen; nothing is read again while the agent runs.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from zonebundle.agent.config_values import (
    AbsolutePath,
    Argv,
    Duration,
    Pattern,
    Size,
    check_absolute,
    check_address,
    show,
)
from zonebundle.errors import ConfigError, UsageError
from zonebundle.model.ids import check_zone_name
from zonebundle.model.paths import printable
from zonebundle.model.record import Limits

DEFAULT_PATH: Final = Path("/etc/zone-bundle/config.toml")
ENVIRONMENT: Final = "ZONE_BUNDLE_CONFIG"

_RUNTIMES = ("process", "oci")
_LATER_RUNTIMES = ("podman", "lxc", "systemd", "illumos")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class _Section(BaseModel):
    # Code may use the Python names; load_config reads files by the hyphenated ones alone.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
    )


class AgentConfig(_Section):
    """`[agent]`: where the agent keeps its state and where it listens."""

    state_dir: AbsolutePath = Path("/var/lib/zone-bundle")
    listen: tuple[StrictStr, ...] = ("unix:/run/zone-bundle/agent.sock",)
    token_file: AbsolutePath = Path("/etc/zone-bundle/token")

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        if not addresses:
            raise ValueError('nowhere to listen: name at least one socket, like "unix:/run/zone-bundle/agent.sock"')
        for address in addresses:
            check_address(address)
        if len(set(addresses)) != len(addresses):
            raise ValueError("an address is there twice: name each once")
        return addresses

    @property
    def sockets(self) -> tuple[Path, ...]:
        """The paths of the Unix sockets to listen on."""
        return tuple(Path(address.removeprefix("unix:")) for address in self.listen)


class StoreConfig(_Section):
    """`[store]`: where bundles are kept. `quota` is bytes, None: what the file system has."""

    dirs: tuple[AbsolutePath, ...] = (Path("/var/lib/zone-bundle/store"),)
    quota: Size | None = None

    @field_validator("dirs")
    @classmethod
    def _check_dirs(cls, dirs: tuple[Path, ...]) -> tuple[Path, ...]:
        if not dirs:
            raise ValueError("no directory: name one")
        for number, directory in enumerate(dirs):
            for other in dirs[number + 1 :]:
                if directory.is_relative_to(other) or other.is_relative_to(directory):
                    raise ValueError(f"{show(str(directory))} and {show(str(other))} lie in each other: choose others")
        return dirs


class HoldConfig(_Section):
    """`[hold]`: how long a zone may be held (seconds), and how many bytes of one current log are copied meanwhile."""

    budget: Duration = 2.0
    copy_limit: Size = Field(default=64 << 20, validation_alias="copy")
    must_keep: StrictBool = False

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, budget: float) -> float:
        if not budget > 0:
            raise ValueError("the hold needs some time: use more than 0s")
        return budget


class SealConfig(_Section):
    """`[seal]`: `workers` 0 is one a core; `ahead` (seconds) 0 is off."""

    workers: Annotated[StrictInt, Field(ge=0, le=1024)] = 0
    ahead: Duration = 30.0


class CleanupConfig(_Section):
    """`[cleanup]`: the first values of the clean-up context. `period` is seconds, `storage_limit` percent."""

    period: Duration = 600.0
    storage_limit: Annotated[StrictInt, Field(ge=1, le=50)] = 25
    priority: tuple[Literal["cause", "time"], ...] = ("cause", "time")

    @field_validator("period")
    @classmethod
    def _check_period(cls, period: float) -> float:
        if not 60 <= period <= 86400:
            raise ValueError(f"{period:g} s is out of bounds: use 60s to 24h")
        return period

    @field_validator("priority")
    @classmethod
    def _check_priority(cls, priority: tuple[str, ...]) -> tuple[str, ...]:
        if sorted(priority) != ["cause", "time"]:
            raise ValueError('name each of "cause" and "time" once, the more important one first')
        return priority


class EvidenceConfig(_Section):
    """`[evidence]`: what is collected. `commands` run inside the zone; `logs` are patterns below its root.

    `stacks` "user": a tool of the host takes the stacks of processes in user space, where there is one.
    """

    commands: tuple[Argv, ...] = ()
    logs: tuple[Pattern, ...] = ("var/log/**", "var/svc/log/**")
    archives: tuple[AbsolutePath, ...] = ()
    stacks: Literal["user", "kernel"] = "user"


class LimitsConfig(_Section):
    """`[limits]` of one bundle, in bytes and files; past them the newest is kept."""

    file: Size = 32 << 30
    bundle: Size = 64 << 30
    files: Annotated[StrictInt, Field(ge=1)] = 1_000_000

    def as_limits(self) -> Limits:
        """The same for the capture record."""
        return Limits(file=self.file, bundle=self.bundle, files=self.files)


class ZoneConfig(_Section):
    """`[zones.NAME]`: a zone of the process runtime, started by `command` or found by `pid_file`."""

    root: AbsolutePath
    command: Argv | None = None
    pid_file: AbsolutePath | None = None
    logs: tuple[Pattern, ...] = ("logs/**",)
    environment: dict[StrictStr, StrictStr] = Field(default_factory=dict)

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not name or "=" in name or "\0" in name + value:
                raise ValueError(f"{show(name)} cannot be set: a name is not empty, without = and null bytes")
        return environment

    @model_validator(mode="after")
    def _check_process(self) -> Self:
        if (self.command is None) == (self.pid_file is None):
            raise ValueError("a zone has exactly one of command (to be started) and pid-file (to be found)")
        return self


class OciConfig(_Section):
    """`[runtimes.oci]`: the OCI runtime's program, and its state directory where that is not the default."""

    command: Annotated[StrictStr, Field(min_length=1)] = "runc"
    root: AbsolutePath | None = None


class RuntimesConfig(_Section):
    """`[runtimes]`: which ones run, and what each needs to know."""

    enabled: tuple[StrictStr, ...] = ("process",)
    oci: OciConfig = OciConfig()

    @field_validator("enabled")
    @classmethod
    def _check_enabled(cls, enabled: tuple[str, ...]) -> tuple[str, ...]:
        for name in enabled:
            if name in _LATER_RUNTIMES:
                raise ValueError(f"{show(name)} comes with a later version; for now there are {_words(_RUNTIMES)}")
            if name not in _RUNTIMES:
                raise ValueError(f"{show(name)} is no runtime; there are {_words(_nearest(name, _RUNTIMES))}")
        if not enabled or len(set(enabled)) != len(enabled):
            raise ValueError(f"name at least one of {_words(_RUNTIMES)}, each once")
        return enabled


class Config(_Section):
    """The whole file. `staging` is mount point → staging directory on that file system."""

    agent: AgentConfig = AgentConfig()
    store: StoreConfig = StoreConfig()
    hold: HoldConfig = HoldConfig()
    seal: SealConfig = SealConfig()
    cleanup: CleanupConfig = CleanupConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    staging: dict[str, str] = Field(default_factory=dict)
    limits: LimitsConfig = LimitsConfig()
    zones: dict[str, ZoneConfig] = Field(default_factory=dict)
    runtimes: RuntimesConfig = RuntimesConfig()

    @field_validator("staging", mode="before")
    @classmethod
    def _check_staging(cls, staging: object) -> object:
        if not isinstance(staging, Mapping):
            return staging
        checked = {str(check_absolute(point)): str(check_absolute(directory)) for point, directory in staging.items()}
        for point, directory in checked.items():
            if not Path(directory).is_relative_to(point) or directory == point:
                raise ValueError(f"{show(directory)} does not lie below {show(point)}: name a directory on that mount")
        return checked

    @field_validator("zones", mode="before")
    @classmethod
    def _check_names(cls, zones: object) -> object:
        if isinstance(zones, Mapping):
            for name in zones:
                try:
                    check_zone_name(str(name))
                except UsageError as error:
                    raise ValueError(str(error)) from None
        return zones

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.zones and "process" not in self.runtimes.enabled:
            raise ValueError('runtimes.enabled: there are [zones.…], which need "process"; add it, or remove them')
        for directory in self.staging.values():
            for name, zone in self.zones.items():
                if Path(directory).is_relative_to(zone.root):
                    raise ValueError(
                        f"staging: {show(directory)} lies inside the root {zone.root} of zone {name}, "
                        "which could reach it: choose one outside"
                    )
        return self


def load_config(path: Path | None = None) -> Config:
    """Read and check the configuration file: `path`, else what ZONE_BUNDLE_CONFIG names, else DEFAULT_PATH.

    Raises ConfigError, one line with the file, the key, what is wrong with it and what is allowed.
    """
    if path is None:
        path = Path(os.environ.get(ENVIRONMENT) or DEFAULT_PATH)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: write it, or name another with --config or {ENVIRONMENT}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; TOML has to be") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {printable(str(error))}") from None
    try:
        return Config.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from None


def _describe(error: ValidationError) -> str:
    # Among several, what concerns the inner keys explains more than that a section as a whole is wrong.
    problems = sorted(error.errors(), key=lambda problem: -len(problem["loc"]))
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _explain(problems[0]) + others


def _explain(problem: ErrorDetails) -> str:
    key = _dotted(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _nearest(str(problem["loc"][-1]), _known_keys(problem["loc"][:-1]))
        return f"{key}: unknown key; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    text = _REASONS.get(problem["type"], "").format(value=show(problem["input"]), **problem.get("ctx", {}))
    if not text:
        text = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"].lower()
    return f"{key}: {text}" if key else text


_REASONS = {
    "int_type": "{value} is not a whole number",
    "bool_type": "{value} is neither true nor false",
    "string_type": '{value} is not a text: write it in quotes, "…"',
    "tuple_type": "{value} is not a list: write it in brackets, […]",
    "dict_type": "{value} is not a table",
    "model_type": "{value} is not a table",
    "literal_error": "{value} is not one of {expected}",
    "greater_than_equal": "{value} is too small: use {ge} or more",
    "less_than_equal": "{value} is too large: use {le} or less",
    "string_too_short": "{value} is too short",
}


def _dotted(location: tuple[int | str, ...]) -> str:
    key = ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        else:
            text = part if _BARE_KEY.fullmatch(part) else f'"{printable(part)}"'
            key += f".{text}" if key else text
    return key


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at `location` may have."""
    kind: Any = Config
    for part in location:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = next(field.annotation for name, field in kind.model_fields.items() if _key(kind, name) == part)
    return [_key(kind, name) for name in kind.model_fields]


def _key(model: type[BaseModel], name: str) -> str:
    alias = model.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else name.replace("_", "-")


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> list[str]:
    return sorted(known, key=lambda key: -SequenceMatcher(None, name, key).ratio())


def _words(names: list[str] | tuple[str, ...]) -> str:
    return " and ".join(names) if len(names) < 3 else ", ".join(names)
