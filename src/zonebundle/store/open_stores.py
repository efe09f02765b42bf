"""The store directories of one host: those that are there are opened, again and again, and any may fail, go or hang.

Nothing that could hang is done with the lock held, and nothing is waited for without end where there is another
directory (see watch).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from zonebundle.errors import DamagedError, FullError, SilentError, StoreError
from zonebundle.store.prune import Guard, NobodyElse
from zonebundle.store.store import Store
from zonebundle.store.watch import Watch, begin, do_in, in_batches, wait_for

T = TypeVar("T")
U = TypeVar("U")
_log = structlog.get_logger()

# A directory that failed is tried again after so many seconds.
_PAUSE = 5.0


class OpenStores:
    """Opens the stores that are there; makes none. Methods block and may be called from any thread."""

    def __init__(self, directories: Sequence[Path], guard: Guard | None = None) -> None:
        self.directories = tuple(directories)
        self._guard = guard or NobodyElse()
        self._lock = threading.Lock()
        self._watches = {one: Watch(one, alone=len(directories) == 1) for one in directories}
        self._looks: dict[Path, Future[Store | None]] = {}
        self._open: dict[Path, Store] = {}
        self._retired: list[tuple[int, Store]] = []
        self._failures: dict[Path, str] = {}
        self._not_before: dict[Path, float] = {}
        # How often each directory may have missed something.
        self._missed: Counter[Path] = Counter()
        # Work is counted by the epoch in which it began; a new one begins when stores are taken out of use.
        self._epoch = 0
        self._working: Counter[int] = Counter()
        # What goes on in a store, whether or not anybody waits for it.
        self._used: Counter[Store] = Counter()
        self._drained: set[str] = set()
        # How often all were closed: a look that began before leaves none open.
        self._closed = 0
        # A drain names a path without links.
        self._places: dict[Path, Path] = {}
        for directory, watch in self._watches.items():
            watch.resolve(partial(self._set_place, directory))

    def _set_place(self, directory: Path, place: str) -> None:
        self._places[directory] = Path(place)

    def all(self) -> list[Store]:
        """The stores that can be had now, in the order of the configuration. Use them within `working`, and by `on`."""
        found: dict[Path, Store] = {}
        # Where there is one, another that is only being opened is not waited for.
        for directory in sorted(self.directories, key=lambda one: one not in self._open):
            if (store := self._get(directory, may_last=not found)) is not None:
                found[directory] = store
        return [found[directory] for directory in self.directories if directory in found]

    def _get(self, directory: Path, *, may_last: bool) -> Store | None:
        watch = self._watches[directory]
        mine: Future[Store | None] = Future()
        has_waited = False
        try:
            while True:
                with self._lock:
                    if not self._may_use(directory):
                        return None
                    look = self._looks.get(directory)
                    if look is None or look.done():
                        self._looks[directory] = mine
                        break
                found = self._wait_for_look(look, watch, may_last=may_last)
                if has_waited:
                    return found
                # That one may have looked before whatever made the caller ask; the next one has not.
                has_waited = True
            begin(lambda: self._look(directory), mine, watch, "look at")
            return self._wait_for_look(mine, watch, may_last=may_last)
        except SilentError as error:
            self._fail(directory, str(error))
        return None

    def _wait_for_look(self, look: Future[Store | None], watch: Watch, *, may_last: bool) -> Store | None:
        return wait_for(look, [watch]) if may_last and not watch.is_alone else watch.look(look)

    def _may_use(self, directory: Path) -> bool:
        return not (
            self.is_drained(directory)
            or self._watches[directory].is_silent
            or time.monotonic() < self._not_before.get(directory, 0.0)
        )

    def _look(self, directory: Path) -> Store | None:
        """One at a time for each directory."""
        closed = self._closed
        store = self._open.get(directory)
        if store is not None:
            is_in_place = store.is_in_place()
            with self._lock:
                # It may have been drained since.
                is_open = self._open.get(directory) is store
                if is_open and is_in_place:
                    self._failures.pop(directory, None)
                    return store
                if is_open:
                    # Unmounted, or mounted anew: what we have open is another one.
                    self._retire(directory)
            self._close_retired()
        try:
            store = Store.open(directory, self._guard, make=False)
        except StoreError as error:
            self._fail(directory, str(error))
            return None
        with self._lock:
            self._failures.pop(directory, None)
            self._open[directory] = store
            if closed == self._closed and not self.is_drained(directory):
                return store
            self._retire(directory)
        self._close_retired()
        return None

    def _retire(self, directory: Path) -> None:
        self._epoch += 1
        self._missed[directory] += 1
        self._retired.append((self._epoch, self._open.pop(directory)))

    def _fail(self, directory: Path, reason: str) -> None:
        with self._lock:
            self._not_before[directory] = time.monotonic() + _PAUSE
            self._missed[directory] += 1
            if self._failures.get(directory) != reason:
                _log.warning("a store directory cannot be used", directory=str(directory), reason=reason)
            self._failures[directory] = reason

    def on(self, store: Store, work: Callable[[], T]) -> T:
        """Do something in a store; however long it takes, if only the store answers.

        Raises what it raises. Raises SilentError when the store does not answer; then the work may go on later, and
        nobody hears of it.
        """
        return self.on_all(store, (), work)

    def on_all(self, store: Store, others: Sequence[Store], work: Callable[[], T]) -> T:
        """As `on`, if the work reads others besides, by their paths, which have to answer as well."""

        def work_on() -> T:
            # The others can be given back: if the work is left, it is not to keep a disk that is well.
            with self.using(store):
                return work()

        return self._do([used.directory for used in (store, *others)], work_on)

    def at(self, directory: Path, work: Callable[[], T]) -> T:
        """As `on`, in a directory that may have no store."""
        return self._do([directory], work)

    def _do(self, directories: Sequence[Path], work: Callable[[], T]) -> T:
        watches = [self._watches[directory] for directory in directories]
        try:
            return do_in(watches, work)
        except SilentError:
            for watch in watches:
                if watch.is_silent and watch.directory not in self._failures:
                    self._fail(watch.directory, str(watch.error()))
            raise

    def each(self, store: Store, listed: Callable[[], Iterable[T]]) -> Iterator[T]:
        """Go through a long list that is read from a store. Raises what reading raises; SilentError."""

        def on_store(work: Callable[[], U]) -> U:
            return self.on(store, work)

        return in_batches(listed, on_store)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While the body runs, no store that it got is closed. It must wait for none without end (see `using`)."""
        with self._lock:
            epoch = self._epoch
            self._working[epoch] += 1
        try:
            yield
        finally:
            with self._lock:
                self._working[epoch] -= 1
            self._close_retired()

    @contextlib.contextmanager
    def using(self, store: Store) -> Iterator[None]:
        """While the body runs, this store is not closed."""
        with self._lock:
            self._used[store] += 1
        try:
            yield
        finally:
            with self._lock:
                self._used[store] -= 1
                if not self._used[store]:
                    del self._used[store]
            self._close_retired()

    def _close_retired(self) -> None:
        with self._lock:
            oldest = min((epoch for epoch, count in self._working.items() if count), default=self._epoch)
            unused = [store for epoch, store in self._retired if epoch <= oldest and not self._used[store]]
            for store in unused:
                self._used[store] += 1
        for store in unused:
            watch = self._watches[store.directory]
            closing: Future[None] = Future()
            begin(partial(self._close, store), closing, watch, "close")
            if not watch.is_silent:
                with contextlib.suppress(SilentError):
                    watch.look(closing)

    def _close(self, store: Store) -> None:
        store.close()
        with self._lock:
            del self._used[store]
            self._retired = [retired for retired in self._retired if retired[1] is not store]

    @property
    def failures(self) -> dict[Path, str]:
        """Why the directories that are not there are not."""
        with self._lock:
            return dict(self._failures)

    def attendance(self) -> frozenset[tuple[Path, int]]:
        """The directories that can be had, each with how often it was missed: as long as that is equal, none was."""
        stores = self.all()
        with self._lock:
            return frozenset((store.directory, self._missed[store.directory]) for store in stores)

    def usable(self) -> list[Store]:
        """As `all`, but raises StoreError with every reason if there is none."""
        stores = self.all()
        if not stores:
            drained = [f"{directory} is being drained" for directory in self.directories if self.is_drained(directory)]
            raise StoreError("; ".join([*self.failures.values(), *drained]) or "there is no store directory")
        return stores

    def give_up(self, store: Store, error: StoreError) -> None:
        """Leave a store that failed alone for a while. One that is full can be read, and bundles be deleted there."""
        if not isinstance(error, FullError | DamagedError):
            self._fail(store.directory, str(error))

    def is_drained(self, directory: Path) -> bool:
        """Whether a directory lies on a path that is being drained."""
        place = self._places.get(directory, directory)
        return any(place.is_relative_to(path) for path in self._drained)

    def drain(self, path: str) -> None:
        """Use no directory at or below `path` any more; those that are open are closed when nobody works on them."""
        with self._lock:
            for directory in [directory for directory in self._open if self._places[directory].is_relative_to(path)]:
                self._retire(directory)
            self._drained.add(path)
        self._close_retired()

    def is_in_use(self, path: str) -> bool:
        """Whether work that began before the drain of `path` goes on, on a directory below it."""
        with self._lock:
            used = [store.directory for _, store in self._retired]
            used += (directory for directory, look in self._looks.items() if not look.done())
            return any(self._places[directory].is_relative_to(path) for directory in used)

    def undrain(self, path: str) -> None:
        """Use what is below `path` again."""
        with self._lock:
            self._drained.discard(path)
            self._not_before.clear()

    @property
    def are_silent(self) -> bool:
        """Whether a directory does not answer."""
        return any(watch.is_silent for watch in self._watches.values())

    def unlock(self) -> None:
        """Let others write to the stores, at the end of this process, which may be kept by one that hangs."""
        for store in [*self._open.values(), *(store for _, store in self._retired)]:
            if not self._watches[store.directory].is_silent:
                store.unlock()

    def close(self) -> None:
        """Give all directories back. Nothing may be on its way, but what waits for one that hangs."""
        with self._lock:
            self._closed += 1
            for directory in list(self._open):
                self._retire(directory)
        self._close_retired()
