"""Many files through one engine: reading, networks and writing overlap, and memory stays where it is.

    tasks -> 2 readers -> the networks, in batches of one size -> 2 writers -> results
                 └──────────── a budget of pixels in flight ─────────┘

The queues between the threads have no bounds of their own: a reader begins a picture only when the budget has room for
it, and the budget gets it back when the picture is written or has failed.  The networks never wait for a batch to fill:
they take what has been read, up to engine.BATCH_PIXELS of one size (batch_networks.py).
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import batch_files, files, picture_files, thumbnails
from .batch_networks import Item, Networks, Settings, next_batch
from .conversion import Task
from .errors import NotEnoughMemory, PercoError, full_text
from .printable import printable

READERS = WRITERS = 2
PIXELS_IN_FLIGHT = 48 << 20
"""Some hundred megabytes of pictures that are read, at work, or to be written."""

STOP_SECONDS = 0.5
"""How long a file that is being written may take to be finished when the work is broken off."""


@dataclass(frozen=True)
class Result:
    """What became of a task.

    size_bytes: of what was written.  width_px, height_px: of the picture.  error: why there is none, or
        why the source was not removed.
    """

    task: Task
    status: Literal["written", "skipped", "failed"]
    size_bytes: int = 0
    width_px: int = 0
    height_px: int = 0
    error: str = ""


@dataclass(frozen=True)
class Thumbnailed:
    """The thumbnails of a written file are in the cache, or `error` says why not."""

    path: Path
    error: str = ""


class _IsThere(FileExistsError):
    """Something is in a target's place that the settings do not allow to replace."""

    def __init__(self, target: Path) -> None:
        super().__init__(f"{printable(target)} is there already: --overwrite replaces it")


class _Budget:
    """The pixels in flight.  One picture always fits, however large it is."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    def take(self, pixels: int, stopping: threading.Event) -> None:
        """Waits until there is room, or the work is broken off."""
        # In turns: a large picture is not overtaken by small ones for ever.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: stopping.is_set() or not self._taken or self._taken + pixels <= self._most)
            self._taken += pixels

    def give_back(self, pixels: int) -> None:
        """Makes room again."""
        with self._changed:
            self._taken -= pixels
            self._changed.notify_all()


def convert(
    tasks: Iterable[Task], settings: Settings, late: Callable[[Result | Thumbnailed], None] = lambda _: None
) -> Generator[Result | Thumbnailed, None, None]:
    """Converts files and tells what became of each, in the order in which they are done.

    A task that fails, for whatever reason, does not keep the others from being done.  Every target is written beside
    its place and renamed; folders are made as needed; a target that is there is replaced if the settings say so, but
    never where it was made of another source just before: some file systems do not tell A.perco from a.perco.

    `tasks` is read by another thread, as far ahead as there is room; it may wait for files to come.
    Closing the iterator, or an interrupt while it waits, breaks the work off: no target is left half-written, and
    `late` gets what was done until then and not yet given out.
    Raises ModelUnavailable, InvalidModel, NotEnoughMemory where the model for encoding cannot be loaded.
    """
    work = _Work(tasks, settings)
    try:
        yield from work.results()
    finally:
        try:
            work.stop()
        finally:
            for done in work.rest():
                late(done)


class _Work:
    """The threads of one conversion."""

    def __init__(self, tasks: Iterable[Task], settings: Settings) -> None:
        self._tasks, self._settings = iter(tasks), settings
        self._next_task = threading.Lock()
        self._budget = _Budget(PIXELS_IN_FLIGHT)
        self._stopping, self._given_up = threading.Event(), threading.Event()
        self._networks = Networks(settings)
        self._for_networks: queue.SimpleQueue[Item | Path | None] = queue.SimpleQueue()
        self._for_writers: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Result | Thumbnailed | BaseException | None] = queue.SimpleQueue()
        self._writing = threading.Lock()
        self._made: dict[tuple[int, int], Task] = {}
        self._writers = [self._thread(self._write_all) for _ in range(WRITERS)]

    def results(self) -> Iterator[Result | Thumbnailed]:
        """Starts the threads and gives what they have done, until all is."""
        readers = [self._thread(self._read_all) for _ in range(READERS)]
        try:
            for thread in [*self._writers, self._thread(self._run_networks), *readers]:
                thread.start()
        except RuntimeError as error:
            raise NotEnoughMemory("threads cannot be started: raise the limit on processes or memory") from error
        while (done := self._done.get()) is not None:
            if isinstance(done, BaseException):
                raise done
            yield done

    def stop(self) -> None:
        """Lets a file that is being written be finished, for a moment, and takes it back if it is not.

        The networks' thread is left to itself: it ends when it is done with what it is at.
        """
        self._stopping.set()
        self._budget.give_back(0)
        self._for_networks.put(None)
        for _ in range(WRITERS):
            self._for_writers.put(None)
        deadline = time.monotonic() + STOP_SECONDS
        try:
            for writer in self._writers:
                if writer.is_alive():  # it may never have been started
                    writer.join(max(0, deadline - time.monotonic()))
        finally:  # a second interrupt included
            if any(writer.is_alive() for writer in self._writers):
                self._given_up.set()
                files.discard_unfinished()

    def rest(self) -> Iterator[Result | Thumbnailed]:
        """What was done and `results` has not given."""
        with suppress(queue.Empty):
            while True:
                done = self._done.get_nowait()
                if isinstance(done, Result | Thumbnailed):
                    yield done

    def _thread(self, act: Callable[[], None]) -> threading.Thread:
        """A thread for `act`; what it raises, which is never the fault of one file, ends the conversion."""

        def guarded() -> None:
            try:
                act()
            except BaseException as error:
                self._done.put(error)

        return threading.Thread(target=guarded, daemon=True)

    def _fail(self, task: Task, pixels: int, error: Exception) -> None:
        self._budget.give_back(pixels)
        if self._given_up.is_set():  # it did not fail: it was taken back
            return
        if isinstance(error, _IsThere) and self._settings.skip_existing:
            self._done.put(Result(task, "skipped"))
            return
        # Pillow's plugins raise errors of many kinds for bad files, some with texts that say nothing without the kind.
        plain = isinstance(error, OSError | ValueError | PercoError) or not str(error)
        text = full_text(error) if plain else f"{type(error).__name__}: {error}"
        self._done.put(Result(task, "failed", error=text))

    def _read_all(self) -> None:
        while not self._stopping.is_set():
            with self._next_task:
                task = next(self._tasks, None)
            if task is None:
                break
            taken = 0

            def take(pixels: int) -> None:
                nonlocal taken
                self._budget.take(pixels, self._stopping)
                taken = pixels

            try:
                if task.problem:
                    raise ValueError(task.problem)
                self._check_place(task)
                item = (
                    batch_files.read_photo(task, self._settings, take)
                    if task.encodes
                    else batch_files.read_perco(task, take)
                )
            except Exception as error:
                self._fail(task, taken, error)
            else:
                self._for_networks.put(item)
        self._for_networks.put(None)

    def _run_networks(self) -> None:
        """Batches while there are any; thumbnails of what is written when there are none."""
        waiting: dict[tuple[Any, ...], list[Item]] = {}
        written: list[Path] = []
        reading = READERS
        while reading or waiting:
            while reading:
                try:
                    news = self._for_networks.get(block=not waiting and not written)
                except queue.Empty:
                    break
                if self._stopping.is_set():
                    return
                if news is None:
                    reading -= 1
                elif isinstance(news, Path):
                    written.append(news)
                else:
                    waiting.setdefault(news.key, []).append(news)
            if waiting:
                self._run_batch(next_batch(waiting))
            elif written:
                self._make_thumbnails(written.pop(0))
        for _ in range(WRITERS):
            self._for_writers.put(None)
        for writer in self._writers:
            writer.join()
        while not self._for_networks.empty():
            news = self._for_networks.get()
            if isinstance(news, Path):
                written.append(news)
        for path in written:
            if self._stopping.is_set():
                return
            self._make_thumbnails(path)
        self._done.put(None)

    def _run_batch(self, batch: Sequence[Item]) -> None:
        self._networks.load(batch)
        try:
            self._networks.run(batch)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0].task, batch[0].pixels, error)
                return
            # One of them may be the cause, or there was memory for fewer.
            for item in batch:
                self._run_batch([item])
            return
        for item in batch:
            self._for_writers.put(item)

    def _make_thumbnails(self, path: Path) -> None:
        if self._networks.make_thumbnails:
            (filled,) = thumbnails.fill_files([path], again=True)
            self._done.put(Thumbnailed(path, filled.error))

    def _write_all(self) -> None:
        while (item := self._for_writers.get()) is not None and not self._stopping.is_set():
            try:
                size = self._write(item)
            except Exception as error:
                self._fail(item.task, item.pixels, error)
                continue
            self._budget.give_back(item.pixels)
            self._done.put(Result(item.task, "written", size, *item.size))
            if item.task.encodes:
                self._for_networks.put(item.task.target)

    def _write(self, item: Item) -> int:
        """Writes the target, and removes the source if that is asked for.  Returns the target's bytes."""
        target = item.task.target
        if item.image is not None:
            kind = picture_files.writable_kind(target.suffix)
            assert kind is not None
            picture, metadata = picture_files.turned(item.image, item.metadata)
            kept = metadata if self._settings.keep_metadata else metadata.colours
            item.data, item.size, item.image = picture_files.picture_bytes(picture, kind, kept), picture.size, None
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._writing:
            if self._given_up.is_set():
                raise InterruptedError
            self._check_place(item.task)
            try:
                files.write_beside(target, item.data, new=not self._settings.overwrite)
            except FileExistsError as error:  # since the look just before
                raise _IsThere(target) from error
            self._made[_file_number(target)] = item.task
        if self._settings.delete_source:
            batch_files.check_written(item, self._networks)
            batch_files.remove_source(item)
        return len(item.data)

    def _check_place(self, task: Task) -> None:
        """Raises FileExistsError where something is in a target's place that must not be replaced."""
        if not os.path.lexists(task.target):
            return
        other = self._made.get(_file_number(task.target)) if task.target.exists() else None
        # that it is there still: the number of a file that is gone is given to others
        if other and other.target != task.target and other.target.exists() and other.target.samefile(task.target):
            raise FileExistsError(f"it would become the same file as {printable(other.source)}: rename one of them")
        if not self._settings.overwrite:
            raise _IsThere(task.target)


def _file_number(path: Path) -> tuple[int, int]:
    """What tells a file from all others, whatever its name."""
    state = path.stat()
    return state.st_dev, state.st_ino
