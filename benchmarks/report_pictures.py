"""Pictures of a report in a browser: its page at several widths, its slider moved, a cell under the pointer.

    python -m benchmarks.report_pictures demo/report.html --out docs/pictures [--point 3] [--cell 0.5 0.5]

Writes `report-<width>.png`, the top of the page at each of WIDTHS, `report-point.png`, the first heat map at the
point of training with that index, and `report-hover.png`, it with the pointer at that share of its width and height,
and prints how long the widest page took: until its words, its load event and its last figure.
Needs playwright and a Chromium or Chrome on PATH; the browser has no network. What its console says is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.pictures import PictureError, find_browser, tell
from schedulers.errors import GradscopeError, UsageError

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = {360: 780, 820: 1000, 1280: 900}
"""Width and height of the screens, in pixels: a telephone, a tablet, a desk."""
READY = "body[data-drawn]"
TIMES = (
    "[performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN,"
    " performance.getEntriesByType('navigation')[0].loadEventEnd, Number(document.body.dataset.drawn)]"
)
COLOURS = 192  # of a picture's palette, so that it is small enough to be committed


def take(report: Path, out: Path, *, point: int, cell: tuple[float, float]) -> list[Path]:
    """The pictures' paths. Raises PictureError when the page says anything on its console or is too wide."""
    from playwright.sync_api import sync_playwright

    made, said = [], list[str]()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        for width, height in WIDTHS.items():
            page = browser.new_context(offline=True, viewport={"width": width, "height": height}).new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(report.resolve().as_uri())
            page.wait_for_selector(READY)
            if page.evaluate("document.documentElement.scrollWidth") > width:
                said.append(f"the page is wider than {width} pixels")
            made.append(out / f"report-{width}.png")
            page.screenshot(path=made[-1])
        words, loaded, drawn = page.evaluate(TIMES)
        size = report.stat().st_size / 1e6
        print(f"{size:.2f} MB; words after {words:.0f} ms, loaded {loaded:.0f} ms, all figures {drawn:.0f} ms")
        made += _moved(page, out, point, cell)
        browser.close()
    if said:
        raise PictureError(f"{report}: {'; '.join(said)}")
    for path in made:
        _shrink(path)
    return made


def _moved(page: Page, out: Path, point: int, cell: tuple[float, float]) -> list[Path]:
    """The first figure after keys have moved the control to a point, then with the pointer on a cell."""
    if not page.locator(".control").count():
        raise PictureError("the report has one point of training: there is no slider to move")
    page.locator(".control input").focus()
    page.keyboard.press("Home")
    for _ in range(point):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(2000)
    figure = page.locator(".linked .figure").first
    figure.scroll_into_view_if_needed()
    page.evaluate("document.querySelector('.linked').scrollIntoView()")
    page.wait_for_timeout(500)
    made = [out / "report-point.png", out / "report-hover.png"]
    page.screenshot(path=made[0])
    box = figure.locator(".nsewdrag").first.bounding_box()
    if box is None:
        raise PictureError("the first figure of the report has no cells")
    page.mouse.move(box["x"] + cell[0] * box["width"], box["y"] + (1 - cell[1]) * box["height"])
    page.wait_for_timeout(1000)
    page.screenshot(path=made[1])
    return made


def _shrink(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; prints each file with its size. Exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report_pictures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--point", type=int, default=3, help="how often the right arrow is pressed (default %(default)s)"
    )
    parser.add_argument(
        "--cell", type=float, nargs=2, default=(0.5, 0.5), metavar=("X", "Y"), help="shares of width and height"
    )
    options = parser.parse_args(arguments)
    try:
        if not options.report.is_file():
            raise UsageError(f"{options.report}: no such report; make one with `gradscope plot`")
        options.out.mkdir(parents=True, exist_ok=True)
        made = take(options.report, options.out, point=options.point, cell=tuple(options.cell))
    except GradscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    tell(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
