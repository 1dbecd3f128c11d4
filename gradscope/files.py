"""Writing files so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from gradscope.errors import GradscopeError

_SEAL = b"\nsha256 of all before this line: "


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary sibling of `path`, sync it, and rename it over `path`.

    Raises GradscopeError when the folder cannot be written; what stood at `path` before is then intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        raise GradscopeError(
            f"{path}: cannot be written ({error.strerror or str(error).splitlines()[0][:80]}); "
            "choose a folder you may write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def check_writable(path: Path) -> None:
    """Raise GradscopeError now rather than after hours of work when `path` could not be written."""
    write_atomically(path.with_name(f".{path.name}.probe"), lambda temporary: temporary.touch())
    path.with_name(f".{path.name}.probe").unlink()


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


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
