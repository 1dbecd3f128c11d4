"""The files that a report is made from, read once or watched while a profile or a training run writes them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.errors import GradscopeError, UsageError
from gradscope.runlog import FOLLOWED_FILE, LOG_FILE, read_log
from gradscope.signals import StopFlag

if TYPE_CHECKING:
    from gradscope.report_facts import Facts
    from schedulers import Schedule

TICK = 0.2  # seconds between looks at a signal
LONGEST = 86_400  # seconds between looks at the files


@dataclass(frozen=True)
class Sources:
    """Where a report's parts lie. What is None is looked for in the working folder each time: `schedule.json`, and
    every training folder, the working folder itself among them."""

    cube: Path
    schedule: Path | None = None
    runs: Sequence[Path] | None = None

    def schedule_path(self) -> Path | None:
        """The schedule's file, None where none was named and there is none."""
        return self.schedule or (Path("schedule.json") if Path("schedule.json").is_file() else None)

    def run_folders(self) -> list[Path]:
        """The training folders, in order of their names."""
        if self.runs:
            return list(self.runs)
        logs = [*Path().glob(LOG_FILE), *sorted(Path().glob(f"*/{LOG_FILE}"))]
        return [log.parent for log in logs if any(log.parent.glob("step-*.pt"))]

    def stamp(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, inode, time of the last change and size of every file there is: equal where nothing was written.

        A file that is replaced has another inode, also where a clock was set back and the time is the same again.
        """
        files = [self.cube, self.schedule_path(), *(folder / LOG_FILE for folder in self.run_folders())]
        found = [(file, file.stat()) for file in files if file is not None and file.is_file()]
        return tuple((str(file), status.st_ino, status.st_mtime_ns, status.st_size) for file, status in found)

    def missing(self) -> list[Path]:
        """The files that were named and are not there, the cube among them."""
        logs = [folder / LOG_FILE for folder in self.runs or ()]
        named = [self.cube, *([self.schedule] if self.schedule else []), *logs]
        return [path for path in named if not path.is_file()]

    def read(self, *, unfinished: bool = False) -> dict[str, Any]:
        """Cube, schedule, runs and the schedules that these followed, as `build_report` takes them.

        With `unfinished` files that are not there yet are left out. Raises as `open_cube`, `load_schedule` and
        `read_log` do.
        """
        from gradscope.cube import open_cube
        from schedulers import load_schedule

        path, folders = self.schedule_path(), self.run_folders()
        if unfinished:
            path = path if path and path.is_file() else None
            folders = [folder for folder in folders if (folder / LOG_FILE).is_file()]
        named = _named(folders)
        return {
            "cube": None if unfinished and not self.cube.is_file() else open_cube(self.cube),
            "schedule": None if path is None else load_schedule(path),
            "runs": {name: read_log(folder) for name, folder in named.items()},
            "followed": {name: found for name, folder in named.items() if (found := _followed(folder))},
        }


def _followed(folder: Path) -> Schedule | None:
    """The schedule that a run followed, None where it is not known."""
    from schedulers import load_schedule

    try:
        return load_schedule(folder / FOLLOWED_FILE)
    except GradscopeError:  # none there, or none that can be read
        return None


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """By the name of the folder, or its path where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return {
        name if names.count(name) == 1 else str(folder): folder for name, folder in zip(names, folders, strict=True)
    }


def make_report(sources: Sources, out: Path, *, title: str) -> Facts:
    """Write the report and return what it says first."""
    from gradscope.report import facts_of, write_report

    parts = sources.read()
    write_report(out, **parts, title=title)
    return facts_of(**parts)


def watch_report(sources: Sources, out: Path, *, title: str, every: float, say: Callable[[str], None]) -> Facts:
    """Write the report again whenever one of its files has changed, looking every so many seconds, until SIGINT.

    The page written loads itself again as often. At the end it is written once more as one that stays as it is, and
    what it says first is returned. `say` is told of the first page, of what is waited for and of files that cannot be
    read.

    Raises:
        UsageError: `every` is below one second or above a day, or nothing was there until the end.
        Interrupted: SIGTERM, after the last page.
    """
    from gradscope.report import facts_of, write_report

    if not 1 <= every <= LONGEST:
        raise UsageError(f"--interval {every:g}: from 1 second to a day ({LONGEST:,})")
    seen: tuple[tuple[str, int, int, int], ...] | None = None
    good, told = dict[str, Any](), ""
    with StopFlag() as stop:
        while stop.signal is None:
            try:
                stamp = sources.stamp()
                if stamp != seen:
                    found = sources.read(unfinished=True)
                    if any(found.values()):
                        write_report(out, **found, title=title, refresh=every)
                        good = found
                    seen, news = stamp, _news(sources, out, every, written=bool(good))
                    told = _tell(news, told, say)
            except (GradscopeError, OSError) as error:  # a file may be read in the middle of being written
                seen, told = None, _tell(f"{error}; looking again", told, say)
            until = time.monotonic() + every
            while stop.signal is None and time.monotonic() < until:
                time.sleep(TICK)
        good = _last(sources, good, say)
        if good:
            write_report(out, **good, title=title)
        if stop.signal != signal.SIGINT:
            stop.raise_if_set(f"stopped; {out} is written" if good else "stopped; there was nothing to show")
    if not good:
        raise UsageError(f"{sources.cube}: nothing came to show; is this the folder of the profile or the run?")
    return facts_of(**good)


def _news(sources: Sources, out: Path, every: float, *, written: bool) -> str:
    missing = ", ".join(map(str, sources.missing()))
    if not written:
        return f"{missing or out}: not there yet; waiting"
    without = f", without {missing}, not there yet" if missing else ""
    return f"{out}: written{without}; it loads itself again every {every:g} s (Ctrl-C ends this)"


def _tell(news: str, told: str, say: Callable[[str], None]) -> str:
    """Say what has not just been said."""
    if news != told:
        say(news)
    return news


def _last(sources: Sources, good: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What is there at the end, or what was last read where that cannot be."""
    try:
        found = sources.read(unfinished=True)
    except (GradscopeError, OSError) as error:
        say(f"{error}; the report shows what was last read")
        return good
    return found if any(found.values()) else good
