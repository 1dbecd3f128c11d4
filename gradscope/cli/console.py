"""What the commands share: option types, output on stdout, and reading texts of options."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    import torch

    from schedulers import Grid, Strategy


LARGEST = (1 << 63) - 1
SETTINGS = "gradscope.settings"
"""Where a click context keeps the settings of a TOML file's [train] table that have no option of their own."""


class Command(TyperCommand):
    """A command that refuses, by the option's name, values that no option takes."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            for item in value if isinstance(value, list | tuple) else (value,):
                if why := _unusable(item):
                    raise typer.BadParameter(why, ctx=ctx, param_hint=f"'{' / '.join(parameter.opts)}'")
        return super().invoke(ctx)


def _unusable(value: object) -> str:
    """Why no option can have a value, "" for one that it may: numbers of 64 bits, paths that a system can have."""
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        return f"{_short(value)} is too large a number"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, Path | str) and "\0" in str(value):
        return f"{str(value)!r} holds a NUL character"
    if isinstance(value, Path):
        try:
            value.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return f"{_short(value)} is too long a name"
    return ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def parse_units(text: str | float) -> float:
    """An option's value such as `100M`, as units; typer turns the error into usage and exit code 2."""
    from schedulers.counts import parse_count
    from schedulers.errors import UsageError

    try:
        return parse_count(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


Budget = Annotated[
    float,
    typer.Option(
        "--budget",
        "-b",
        parser=parse_units,
        metavar="N[K|M|B]",
        help="Budget in units (a unit is one forward pass of a full-length sequence), as 300K or 100M.",
        envvar="GRADSCOPE_BUDGET",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", envvar="GRADSCOPE_QUIET")]
DataFolder = Annotated[Path | None, typer.Option(help="Folder that holds the data.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.", envvar="GRADSCOPE_DEVICE")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", envvar="GRADSCOPE_SEED")]


def emit(values: dict[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Print one JSON object or the lines. Raises WriteError where standard output is a file on a full disk."""
    from gradscope.errors import WriteError

    if as_json:
        lines = [json.dumps({"schema_version": 1, **values}, allow_nan=False)]
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still held back has nowhere to go
        raise WriteError.of("standard output", error) from error


def open_device(name: str) -> torch.device:
    """The device of that name. Raises UsageError when it is not there."""
    import torch

    from gradscope.errors import UsageError

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is no device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r}: only cpu and cuda are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device can be used here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def parse_grid_axes(text: str) -> dict[str, tuple[Any, ...]]:
    """Read `patch=2,4,7;dropout=0,0.5` into axes. Raises UsageError on another form."""
    from gradscope.errors import UsageError
    from schedulers import Strategy

    axes: dict[str, tuple[Any, ...]] = {}
    for part in text.split(";"):
        name, equals, values = part.partition("=")
        items = [value.strip() for value in values.split(",")]
        if not (name.strip() and equals and all(items)):
            raise UsageError(
                f"--grid {text!r}: {part!r} is not of the form axis=value,value (as in patch=2,4,7;dropout=0,0.5)"
            )
        if name.strip() in axes:
            raise UsageError(f"--grid {text!r}: axis {name.strip()!r} is given twice")
        try:
            axes[name.strip()] = tuple(Strategy.parse(f"{name}={item}")[name.strip()] for item in items)
        except UsageError as error:
            raise UsageError(f"--grid {text!r}: {error}") from None
    return axes


def override_grid(grid: Grid, text: str) -> Grid:
    """`grid` with the values that `text` names and the reference's. Raises UsageError for an axis that is not there."""
    from gradscope.errors import UsageError
    from schedulers import Grid

    axes = parse_grid_axes(text)
    for name in axes:
        if name not in grid.axes:
            raise UsageError(f"--grid {text!r}: unknown axis {name!r}; the axes are {', '.join(grid.axes)}")
        missing = () if grid.reference[name] in axes[name] else (grid.reference[name],)
        axes[name] = (*missing, *axes[name])
    return Grid({**grid.axes, **axes}, grid.reference, grid.units)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain text table, the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def complete(option: str, text: str, reference: Strategy) -> Strategy:
    """The strategy that an option's `text` names; an axis that is not given takes the reference's value."""
    from gradscope.errors import UsageError
    from schedulers import Strategy

    try:
        given = Strategy.parse(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    for axis in given:
        if axis not in reference:
            raise UsageError(f"{option}: unknown axis {axis!r} in {text!r}; the axes are {', '.join(reference)}")
    return Strategy({axis: given.get(axis, reference[axis]) for axis in reference})


def note(text: str) -> None:
    """One line on stderr."""
    from gradscope.progress import say

    say(text)
