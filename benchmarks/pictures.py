"""Pictures of a cube, a schedule or a report as PNG files, so that the README's can be made again.

    python -m benchmarks.pictures cube.nc schedule.json --out docs/pictures

A cube gives a heat map at each of `--progress` (by default its first, middle and last point), marked with the
schedule where one is given too; a schedule gives its strip, or with `--together NAME` all schedules one figure of
that name; a report (`.html`) the top of its page. Drawing needs a headless Chromium or Chrome on PATH.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schedulers.errors import GradscopeError, UsageError

if TYPE_CHECKING:
    from schedulers.schedule import Schedule

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 900
REPORT_HEIGHT = 1000
SECONDS = 120
_PNG = b"\x89PNG\r\n\x1a\n"


class PictureError(GradscopeError):
    """The browser could not draw a picture."""


def find_browser() -> str:
    """Path of the first of BROWSERS on PATH. Raises PictureError when there is none."""
    for name in BROWSERS:
        path = shutil.which(name)
        if path:
            return path
    raise PictureError(
        f"no browser found: pictures are drawn by one of {', '.join(BROWSERS)} on PATH; "
        "install one (Debian: apt-get install chromium)"
    )


def screenshot(browser: str, page: Path, picture: Path, *, width: int, height: int) -> None:
    """Draw the top `width` by `height` pixels of an HTML file. Raises PictureError when no picture comes of it."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "picture.png"
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            f"--user-data-dir={folder}/profile",
            "--virtual-time-budget=5000",
            f"--window-size={width},{height}",
            f"--screenshot={drawn}",
            page.resolve().as_uri(),
        ]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PictureError(f"{browser} did not finish: {error}") from error
        if not drawn.is_file() or not drawn.read_bytes().startswith(_PNG):
            last = run.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise PictureError(f"{browser} drew no picture of {page.name} (exit code {run.returncode}): {last[0]}")
        shutil.copyfile(drawn, picture)


def draw_figure(browser: str, figure: Any, picture: Path, *, width: int = WIDTH) -> None:
    """A plotly figure as a PNG of `width` pixels and the figure's own height.

    The page's width is set in the page, because a headless browser's window is never narrower than 500 pixels.
    """
    body = figure.to_html(
        full_html=False, include_plotlyjs=True, auto_play=False, config={"displayModeBar": False, "responsive": True}
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        page.write_text(
            f'<!doctype html><meta charset="utf-8"><body style="margin:0 12px;width:{width - 24}px">{body}</body>',
            encoding="utf-8",
        )
        screenshot(browser, page, picture, width=width, height=int(figure.layout.height))


def figures(
    paths: Sequence[Path],
    *,
    variables: Sequence[str],
    metric: str | None,
    progress: Sequence[float] | None,
    together: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """File name (without its ending) and figure for every cube and schedule among `paths`.

    With `together` the schedules are one figure of that name, in the order given, each called by its file.
    """
    from gradscope.plots import plot_bias_variance, plot_heatmap, plot_schedule, plot_schedules
    from schedulers.schedule import load_schedule

    schedules = {path: load_schedule(path) for path in paths if path.suffix == ".json"}
    schedule = next(iter(schedules.values()), None)
    for path in paths:
        if path.suffix != ".nc":
            continue
        from gradscope.cube import open_cube

        cube = open_cube(path).to_dataset()
        measured = [float(p) for p in cube["progress"].values]
        for wanted in progress or sorted({measured[0], measured[len(measured) // 2], measured[-1]}):
            nearest = min(measured, key=lambda p: abs(p - wanted))
            for name in variables:
                figure = plot_heatmap(cube, variable=name, metric=metric, schedule=schedule, progress=nearest)
                yield f"{path.stem}-{name}-{nearest:.2f}", figure
        yield (
            f"{path.stem}-bias-variance",
            plot_bias_variance(cube, metric=metric, progress=measured[len(measured) // 2]),
        )
    if together is not None:
        yield together, plot_schedules(_named(schedules))
        return
    for path, found in schedules.items():
        yield path.stem, plot_schedule(found)


def _named(schedules: Mapping[Path, Schedule]) -> dict[str, Schedule]:
    """The schedules by the name of their file, with its folder where two files have one name."""
    stems = [path.stem for path in schedules]
    return {path.stem if stems.count(path.stem) == 1 else str(path): found for path, found in schedules.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; prints each file with its size. Exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="REPORT_OR_CUBE", help="cube.nc, schedule.json, report.html"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--variable", nargs="+", default=["descent"], help="heat maps of these variables")
    parser.add_argument("--metric", help="euclidean or optimizer")
    parser.add_argument(
        "--progress", nargs="+", type=float, help="slider positions; the nearest measured ones are taken"
    )
    parser.add_argument("--together", metavar="NAME", help="draw all schedules in one figure, NAME.png")
    parser.add_argument("--width", type=int, default=WIDTH, help="pixels (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        _check(options.paths, options.together)
        browser = find_browser()
        options.out.mkdir(parents=True, exist_ok=True)
        made: list[Path] = []
        drawn = figures(
            options.paths,
            variables=options.variable,
            metric=options.metric,
            progress=options.progress,
            together=options.together,
        )
        for name, figure in drawn:
            made.append(options.out / f"{name}.png")
            draw_figure(browser, figure, made[-1], width=options.width)
        for page in (path for path in options.paths if path.suffix == ".html"):
            made.append(options.out / f"{page.stem}.png")
            screenshot(browser, page, made[-1], width=options.width, height=REPORT_HEIGHT)
    except GradscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    tell(made)
    return 0


def tell(made: Sequence[Path]) -> None:
    """Print each picture with its size."""
    for picture in made:
        print(f"{picture}  {picture.stat().st_size / 1000:.0f} kB")


def _check(paths: Sequence[Path], together: str | None) -> None:
    if together is not None and not any(path.suffix == ".json" for path in paths):
        raise UsageError(f"--together {together}: there is no schedule (.json) among the files")
    for path in paths:
        if path.suffix not in (".nc", ".json", ".html"):
            raise UsageError(f"{path}: give a cube (.nc), a schedule (.json) or a report (.html)")
        if not path.is_file():
            raise UsageError(f"{path}: no such file")


if __name__ == "__main__":
    sys.exit(main())
