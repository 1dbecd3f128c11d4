"""One writer for each output: a second process is refused and told who the first one is."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from gradscope.errors import BusyError, WriteError
from gradscope.files import alive, remove_temporaries


@contextlib.contextmanager
def sole_writer(output: Path, *, folder: bool = False) -> Iterator[None]:
    """While in the context, no other process that asks for it too writes `output`, a file or a `folder`.

    What killed processes left half written of a file is removed.

    The lock is the operating system's, on a hidden file `.<name>.lock` beside a file or `.lock` in a folder. It goes
    with the process, however that ends; the file stays, empty, and means nothing by itself. Where a file system has no
    such locks, the file's existence is the lock.

    Raises:
        BusyError: another process has it; the message names host, process, command and since when.
        WriteError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    path = output / ".lock" if folder else output.with_name(f".{output.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=0)
    except Timeout:
        if not path.is_file():
            raise WriteError(f"{output}: cannot be written; choose a folder you may write to") from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise WriteError(f"{output}: {path} belongs to somebody else; remove it or choose another name") from None
        raise BusyError(f"{output}: is being written by {_holder(path)}; wait for it or stop it") from None
    except OSError as error:
        raise WriteError.of(output, error) from error
    try:
        with contextlib.suppress(OSError):  # a name is a courtesy
            path.write_text(json.dumps(_me()), encoding="utf-8")
        if not folder:
            remove_temporaries(output, all_hosts=True)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.write_text("", encoding="utf-8")
        lock.release()


def _me() -> dict[str, str | int]:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "command": " ".join(sys.argv)[:200]}


def _holder(path: Path) -> str:
    """Who wrote the lock's file, as far as it can be read; the file is explained where it may be a left-over."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {int(held['pid'])} on {held['host']} since {held['since']} ({held['command']})"
        gone = held["host"] == socket.gethostname() and not alive(int(held["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process (see {path})"
    return f"{who}, which is gone: {path} is a left-over that may be removed" if gone else who
