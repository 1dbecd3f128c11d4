"""The pictures of one part of a folder, and what is taken in place of those that are broken."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

from gradscope.data.listing import Files
from gradscope.data.pictures import Picture, PictureError
from gradscope.errors import DataError

BROKEN_SHARE, BROKEN_COUNT = 0.1, 20
"""Broken pictures are an error when they are this many or more, and more than this share of those seen."""


class Shelf:
    """The pictures of one part, and which of them turned out to be broken; used by several threads at once."""

    def __init__(self, files: Files, report: Callable[[str], None]) -> None:
        self.files = files
        self.seen = bytearray(len(files.names))
        self.broken: set[int] = set()
        self._report = report
        self._lock = threading.Lock()

    def path(self, index: int) -> Path:
        return self.files.root / self.files.names[index]

    def open(self, index: int) -> tuple[int, Picture]:
        """The picture of that index, or the one in its place."""
        while True:
            if index in self.broken:
                index = self._next(index)
            try:
                picture = Picture(self.path(index))
            except PictureError as error:
                index = self.broke(index, error)
            else:
                self.seen[index] = 1
                return index, picture

    def broke(self, index: int, error: PictureError) -> int:
        """Note that a picture cannot be read; the index of the one to take instead."""
        with self._lock:
            first = index not in self.broken
            self.broken.add(index)
            self.seen[index] = 1
            broken, seen = len(self.broken), sum(self.seen)
        if first:
            self._report(f"picture left out: {self.path(index)} ({error})")
        if broken >= BROKEN_COUNT and broken > BROKEN_SHARE * seen:
            raise DataError(
                f"{self.files.root}: {broken} of {seen} pictures cannot be read, the last is {self.path(index)} "
                f"({error}); replace or remove them"
            )
        return self._next(index)

    def _next(self, index: int) -> int:
        """The index after a broken one, round its class, that is not known to be broken."""
        start, stop = self._class(index)
        for other in itertools.chain(range(index + 1, stop), range(start, index)):
            if other not in self.broken:
                return other
        raise DataError(
            f"{self.path(index).parent}: none of the {stop - start} pictures of this class can be read "
            f"({self.path(index).name} is the last); replace or remove them"
        )

    def _class(self, index: int) -> tuple[int, int]:
        """The range of a picture's class; of all pictures where there are no classes."""
        labels = self.files.labels
        if not labels:
            return 0, len(self.files.names)
        return bisect.bisect_left(labels, labels[index]), bisect.bisect_right(labels, labels[index])
