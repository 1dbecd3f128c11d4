"""Writing files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from gradscope.errors import WriteError
from gradscope.progress import say

PROBE_BYTES = 4096  # room that a folder must have before work for it begins
PATIENCE = 600.0  # seconds for which saves along the way may fail before work stops
_SEAL = b"\nsha256 of all before this line: "


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary sibling of `path`, sync it, and rename it over `path`.

    Raises WriteError when the folder cannot be written or the disk is full; what stood at `path` before is then intact.
    """
    if path.is_dir():
        raise WriteError(f"{path}: a folder; name a file in it")
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(path)
        write(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError.of(path, error) from error
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch.save fails once more while it closes its archive
            raise WriteError.of(path, error.__context__) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write bytes atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def check_writable(path: Path) -> None:
    """Raise WriteError now rather than after hours of work when `path` could not be written."""
    if path.is_dir():
        raise WriteError(f"{path}: a folder; name a file in it")
    probe = path.with_name(f".{path.name}.probe")
    write_bytes(probe, bytes(PROBE_BYTES))
    probe.unlink()


def remove_temporaries(path: Path, *, all_hosts: bool = False) -> None:
    """Remove what killed processes of this machine, or with `all_hosts` of any, left of writing `path`.

    `all_hosts` is for whoever holds the lock on `path`: that nobody else is writing it cannot be seen from afar.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(?:([0-9a-f]{{8}})\.)?(\d+)\.tmp")
    with contextlib.suppress(OSError):  # whether the folder can be written shows when that is tried
        for name in os.listdir(path.parent):
            found = pattern.fullmatch(name)
            if found and (all_hosts or (found[1] == _host() and not alive(int(found[2])))):
                path.with_name(name).unlink()


def alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


class Saves:
    """Saves along the way. One may fail while work that was paid for goes on, for the next will hold what it had.

    Each failure is told on stderr; from PATIENCE seconds after the first one on it is an error.
    """

    def __init__(self) -> None:
        self._failing_since: float | None = None

    def attempt(self, save: Callable[[], None]) -> bool:
        """Whether `save` could write. Raises WriteError when none could for too long."""
        try:
            save()
        except WriteError as error:
            now = time.monotonic()
            self._failing_since = now if self._failing_since is None else self._failing_since
            if now - self._failing_since >= PATIENCE:
                raise
            say(f"warning: {error}; going on, what was saved before stays, the next save is tried later")
            return False
        if self._failing_since is not None:
            say("saved again")
        self._failing_since = None
        return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; of a folder, of the names and bytes of all files in it."""
    if path.is_dir():
        parts = [f"{part.relative_to(path)}={file_digest(part)}" for part in sorted(path.rglob("*")) if part.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Append the digest of a file's bytes to it, for formats whose readers ignore what follows their end (HDF5)."""
    digest = file_digest(path)
    with path.open("ab") as stream:
        stream.write(_SEAL + digest.encode())


def seal_holds(path: Path) -> bool | None:
    """Whether a file is as it was when `seal` ended it; None where it has no seal."""
    long, size = len(_SEAL) + 64, path.stat().st_size
    if size < long:
        return None
    state, left = hashlib.sha256(), size - long
    with path.open("rb") as stream:
        stream.seek(left)
        end = stream.read(long)
        if not end.startswith(_SEAL):
            return None
        stream.seek(0)
        while left and (part := stream.read(min(left, 1 << 20))):
            state.update(part)
            left -= len(part)
    return end[len(_SEAL) :] == state.hexdigest().encode()


def _host() -> str:
    """This machine in eight digits, for names of temporary files in folders that several machines share."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; not all file systems can, and the file is there in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
