"""The verbs that read a store dir without an agent: verify, export."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zonebundle.cli import output
from zonebundle.cli.files import written
from zonebundle.errors import StoreError, UsageError
from zonebundle.model.paths import printable

if TYPE_CHECKING:
    from zonebundle.store.check import Problem, Progress, Repaired
    from zonebundle.store.reader import StoreReader
    from zonebundle.store.store import Store

# Each segment that is read would redraw the line.
_REDRAWN_EVERY = 100
# These come and go while an agent works.
_HARMLESS = ("unfinished", "unused")

_directory = click.Path(path_type=Path)


@dataclass(slots=True)
class _Outcome:
    """What came of one store dir. `failure` says why it could not be read at all, or not to its end."""

    directory: Path
    problems: list[Problem] = field(default_factory=list)
    repaired: list[Repaired] = field(default_factory=list)
    unused: int = 0
    segments: int = 0
    bundles: int = 0
    failure: str = ""

    @property
    def is_clean(self) -> bool:
        return not self.failure and all(problem.kind in _HARMLESS for problem in self.problems)

    def add(self, found: Problem | Repaired) -> None:
        """Take in what was found."""
        from zonebundle.store.check import Kind, Problem

        if not isinstance(found, Problem):
            self.repaired.append(found)
        elif found.kind == Kind.UNUSED:
            # There may be a million: what seal-ahead has made is used by no bundle yet.
            self.unused += 1
        else:
            self.problems.append(found)

    def count(self, segments: int, bundles: int) -> None:
        """Take in how much was looked at."""
        self.segments, self.bundles = segments, bundles

    def to_json(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "problems": [_found_to_json(problem) for problem in self.problems],
            "repaired": [_found_to_json(repaired) for repaired in self.repaired],
            "segments": self.segments,
            "unused_segments": self.unused,
            "bundles": self.bundles,
            "error": self.failure or None,
        }


class _Everybody:
    """A guard that lets no segment be removed: an agent that is stopped has records and claims that we do not know."""

    def used(self, digests: frozenset[str]) -> set[str]:
        return set(digests)

    def forget(self, digests: Collection[str]) -> None:
        return

    def open_holds(self) -> frozenset[str]:
        return frozenset()


@click.command("verify")
@click.option("--store", "stores", metavar="DIR", multiple=True, type=_directory, help="A store dir; may be repeated.")
@click.option(
    "--config",
    "-c",
    "config",
    metavar="FILE",
    envvar="ZONE_BUNDLE_CONFIG",
    show_envvar=True,
    type=_directory,
    help="The configuration that names the store dirs, else /etc/zone-bundle/config.toml.",
)
@click.option("--repair", "is_repair", is_flag=True, help="Bring what is damaged from the other dirs; stop the agent.")
@click.option("--deep", is_flag=True, help="Inflate every piece too.")
@click.option("--json", "as_json", is_flag=True, help="Print the result for programs.")
def verify(stores: Sequence[Path], config: Path | None, is_repair: bool, deep: bool, as_json: bool) -> int:
    """Read every byte of the store dirs, and tell what is damaged.

    Runs beside an agent, but for --repair. Exits with 1 if anything is not as it should be.
    """
    state, directories = _places(stores, config, is_repair=is_repair)
    if is_repair:
        outcomes = _repair(state, directories, deep=deep)
    else:
        outcomes = [_check(directory, deep=deep) for directory in directories]
    for outcome in outcomes:
        outcome.problems.sort(key=_importance)
    if as_json:
        output.print_json(
            {"is_clean": all(outcome.is_clean for outcome in outcomes), "stores": [each.to_json() for each in outcomes]}
        )
    else:
        _print(outcomes)
    return 0 if all(outcome.is_clean for outcome in outcomes) else output.EXIT_FAILED


@click.command("export")
@click.option("--store", metavar="DIR", required=True, type=_directory, help="The store dir.")
@click.argument("zone")
@click.argument("bundle_id", metavar="ID")
@click.option("--output", "-o", "target", metavar="FILE", help="Where to write it, else ID.tar.gz; - is stdout.")
def export(store: Path, zone: str, bundle_id: str, target: str | None) -> None:
    """Write a bundle from a store dir to a .tar.gz file; needs no agent."""
    if target == "-" and sys.stdout.isatty():
        raise UsageError("a bundle is binary: redirect stdout, or name a file with --output")
    from zonebundle.cli.sealing import byte_progress
    from zonebundle.store.splice import splice

    bundle = _open_reader(store).find(zone, bundle_id)
    name = f"{bundle.header.metadata.bundle_id}.tar.gz" if target is None else target
    with (
        written(name) as file,
        byte_progress(name, shown=sys.stderr.isatty(), to_stderr=True) as progress,
    ):
        task = progress.add_task(name, total=bundle.size) if progress else None
        for block in splice(bundle):
            file.write(block)
            if progress is not None and task is not None:
                progress.advance(task, len(block))
    if gaps := bundle.header.gaps:
        output.print_note(f"the bundle has {output.count_of(gaps, 'gap')}: see report.json in it")


def _places(stores: Sequence[Path], config: Path | None, *, is_repair: bool) -> tuple[Path | None, list[Path]]:
    """The state directory, if it is known, and the store dirs."""
    # Only for a repair it matters what was deleted, and the store dirs tell that too.
    if stores and (config is None or not is_repair):
        return None, list(dict.fromkeys(stores))
    from zonebundle.agent.config import load_config

    loaded = load_config(config)
    return loaded.agent.state_dir, list(dict.fromkeys(stores or loaded.store.dirs))


def _open_reader(directory: Path) -> StoreReader:
    from zonebundle.store.reader import StoreReader, read_format

    if read_format(directory) is None:
        raise StoreError(f"there is no store in {printable(str(directory))}; name the directory that holds `format`")
    return StoreReader.open(directory)


def _check(directory: Path, *, deep: bool) -> _Outcome:
    from zonebundle.store.check import check_store

    outcome = _Outcome(directory)
    try:
        with _progress(outcome) as progress:
            for problem in check_store(_open_reader(directory), deep=deep, progress=progress):
                outcome.add(problem)
    except StoreError as error:
        outcome.failure = str(error)
    return outcome


def _repair(state: Path | None, directories: Sequence[Path], *, deep: bool) -> list[_Outcome]:
    from zonebundle.store.check import repair
    from zonebundle.store.tombstones import Tombstones

    outcomes = {directory: _Outcome(directory) for directory in directories}
    with contextlib.ExitStack() as stack:
        stores: dict[Path, Store] = {}
        for directory in directories:
            try:
                stores[directory] = stack.enter_context(_open_store(directory))
            except StoreError as error:
                if _is_in_use(error):
                    raise StoreError(
                        f"store {directory} is in use by an agent: stop it, or let it repair by itself, "
                        "which it does when a store dir comes back"
                    ) from None
                # The others can be mended without it.
                outcomes[directory].failure = str(error)
        tombstones = Tombstones([*([state] if state else []), *stores])
        for directory, store in stores.items():
            outcome = outcomes[directory]
            others = [other for other in stores.values() if other is not store]
            try:
                with _progress(outcome) as progress:
                    for found in repair(store, others, tombstones, deep=deep, progress=progress):
                        outcome.add(found)
            except StoreError as error:
                outcome.failure = str(error)
    return list(outcomes.values())


def _open_store(directory: Path) -> Store:
    from zonebundle.store.store import Store

    # An empty directory becomes a store, which gets all bundles of the others; one that is not there is a typing error.
    if not directory.is_dir():
        raise StoreError(f"there is no directory {printable(str(directory))}; make it, or mount it")
    return Store.open(directory, _Everybody())


def _is_in_use(error: StoreError) -> bool:
    return "has a writer already" in str(error)


@contextlib.contextmanager
def _progress(outcome: _Outcome) -> Iterator[Progress]:
    """Counts what is looked at, and shows it on a terminal."""
    if not sys.stderr.isatty():
        yield outcome.count
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("") as status:

        def show(segments: int, bundles: int) -> None:
            outcome.count(segments, bundles)
            if (segments + bundles) % _REDRAWN_EVERY == 0:
                # As text: a directory's name is never markup.
                status.update(Text(f"{outcome.directory}: {segments:,} segments, {bundles:,} bundles"))

        yield show


def _print(outcomes: Sequence[_Outcome]) -> None:
    for outcome in outcomes:
        for repaired in outcome.repaired:
            output.print_line(f"repaired: {repaired}")
    for outcome in outcomes:
        if outcome.failure:
            output.print_line(printable(outcome.failure))
    for problem in sorted((each for outcome in outcomes for each in outcome.problems), key=_importance):
        output.print_line(_line(problem))
    output.print_line(_summary(outcomes))


def _importance(problem: Problem) -> tuple[bool, int, str]:
    from zonebundle.store.check import Kind

    return not problem.is_damage, list(Kind).index(Kind(problem.kind)), str(problem.path)


def _line(problem: Problem) -> str:
    if problem.bundle is None or problem.bundle[1] in problem.path.parts:
        return str(problem)
    zone, bundle_id = problem.bundle
    return f"{problem} (bundle {printable(zone)}/{bundle_id})"


def _summary(outcomes: Sequence[_Outcome]) -> str:
    bundles = output.count_of(sum(outcome.bundles for outcome in outcomes), "bundle")
    segments = output.count_of(sum(outcome.segments for outcome in outcomes), "segment")
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    damaged = sum(problem.is_damage for problem in problems)
    others = len(problems) - damaged
    unused = sum(outcome.unused for outcome in outcomes)
    repaired = sum(len(outcome.repaired) for outcome in outcomes)
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    parts = [
        f"{failed} of {output.count_of(len(outcomes), 'store')} could not be read" if failed else "",
        f"{repaired} repaired" if repaired else "",
        f"{damaged} damaged" if damaged else "",
        output.count_of(others, "other remark") if others else "",
        f"{output.count_of(unused, 'segment')} used by no bundle (removed by the next clean-up)" if unused else "",
    ]
    found = ", ".join(filter(None, parts)) or "all whole"
    return f"{bundles}, {segments}: {found}"


def _found_to_json(found: Problem | Repaired) -> dict[str, Any]:
    data: dict[str, Any] = {"path": str(found.path), "what": found.what}
    if found.bundle:
        data["bundle"] = {"zone_name": found.bundle[0], "bundle_id": found.bundle[1]}
    kind = getattr(found, "kind", None)
    return data if kind is None else {"kind": str(kind), "is_damage": getattr(found, "is_damage", False), **data}
