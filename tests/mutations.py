"""Damaged files: random mutations of bytes, and what reading one does, seen from a process of its own."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradscope.errors import GradscopeError

SECONDS = 20  # that reading a small file may take at most
MEMORY = 4 << 30  # bytes that it may ask for beyond what the process has


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`data` cut short, with zeroed, doubled or shuffled parts, or with a few bits flipped; never `data` itself."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        found = bytearray(data)
        a, b = sorted(int(i) for i in rng.integers(0, len(data) + 1, 2))
        short = min(b, a + int(rng.integers(1, 257)))
        kind = int(rng.integers(0, 6))
        if kind == 0:
            del found[a:]
        elif kind == 1:
            found[a:short] = bytes(short - a)
        elif kind == 2:
            found[a:a] = found[a:short]
        elif kind == 3:
            found[a:short] = rng.permutation(np.frombuffer(data[a:short], np.uint8).copy()).tobytes()
        else:
            for bit in rng.integers(0, 8 * len(data), int(rng.integers(1, 9)) if kind == 4 else 1):
                found[bit // 8] ^= 1 << (bit % 8)
        if bytes(found) != data:
            made += 1
            yield bytes(found)


@dataclass(frozen=True)
class Outcome:
    """`kind`: read (`text` is what the job gave), refused (the message), raised (the traceback), died (the signal)."""

    kind: str
    text: str


def outcome(job: Callable[[], Any]) -> Outcome:
    """What `job` does in a forked process with bounded memory and time."""
    into, out_of = os.pipe()
    with warnings.catch_warnings():  # threads of other tests do not concern the child
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(into)
        os._exit(_child(job, out_of))
    os.close(out_of)
    with os.fdopen(into, "rb") as stream:
        told = stream.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome("died", signal.Signals(os.WTERMSIG(status)).name)
    return Outcome({0: "read", 1: "refused"}.get(os.WEXITSTATUS(status), "raised"), told)


def _child(job: Callable[[], Any], out_of: int) -> int:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(SECONDS)
    try:
        code, told = 0, str(job())
    except GradscopeError as error:
        code, told = 1, f"{type(error).__name__}: {error}"
    except BaseException:
        code, told = 2, traceback.format_exc()
    sys.stdout.flush()
    os.write(out_of, told.encode()[:60_000])
    return code
