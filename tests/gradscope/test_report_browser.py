"""The report in a browser without a network: slider, hover, keyboard, narrow screens, and no error on its console."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xarray as xr

from benchmarks.pictures import PictureError, find_browser
from gradscope.plots._theme import with_error
from gradscope.report import write_report
from tests.gradscope.cube_samples import sample_cube, sample_runs, sample_schedule, tree_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

POINTS = ["0", "0.25", "0.5", "0.75", "1"]
LINKED = 6  # figures that have frames: three criteria, two moments, bias and variance
SHOWN = "[...document.querySelectorAll('.linked .plotly-graph-div')].map(f => f.dataset.shows)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make test installs it)")
    try:
        path = find_browser()
    except PictureError as error:
        pytest.skip(str(error))
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def cube() -> xr.Dataset:
    return sample_cube()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, cube: xr.Dataset) -> Path:
    """A folder with a report and, as watched.html, one that loads itself again every five seconds."""
    folder = tmp_path_factory.mktemp("reports")
    parts: dict[str, Any] = {"cube": tree_of(cube), "schedule": sample_schedule(cube), "runs": sample_runs(rows=60)}
    write_report(folder / "report.html", **parts)
    write_report(folder / "watched.html", cube=cube, refresh=5)
    return folder


def opened(browser: Browser, report: Path, *, width: int = 1100) -> tuple[Page, list[str]]:
    """The page, all its figures drawn, and what its console says from now on and what it asks for."""
    page = browser.new_context(offline=True, viewport={"width": width, "height": 900}).new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url != report.as_uri() else None)
    page.goto(report.as_uri())
    page.wait_for_selector("body[data-drawn]", timeout=120_000)
    return page, said


@pytest.fixture
def page(browser: Browser, reports: Path) -> Iterator[Page]:
    """The report; whatever a test does with it, its console stays empty and it asks for nothing."""
    page, said = opened(browser, reports / "report.html")
    yield page
    page.context.close()
    assert not [text for text in said if not text.startswith("blob:")]


def until(page: Page, condition: str) -> None:
    """Wait for what JavaScript says (the page's own policy forbids the driver's way, which is eval).

    A page that is just being loaded again cannot be asked: it is asked again.
    """
    from playwright.sync_api import Error

    for _ in range(600):
        try:
            if page.evaluate(condition):
                return
        except Error as error:
            if "context was destroyed" not in str(error):
                raise
        page.wait_for_timeout(100)
    raise AssertionError(condition)


def settled(page: Page, at: int) -> None:
    """Wait until all figures over progress show the point of that index."""
    until(page, f"{SHOWN}.every(name => name === '{POINTS[at]}')")


def test_all_figures_are_drawn_and_begin_at_the_first_point(page: Page) -> None:
    assert page.evaluate(SHOWN) == ["0"] * (LINKED + 1)  # and the parameter groups
    page.wait_for_timeout(1500)
    assert page.evaluate(SHOWN) == ["0"] * (LINKED + 1)  # nothing plays by itself
    assert page.locator(".plotly-graph-div .main-svg").count() > 9


def test_arrow_keys_move_every_figure(page: Page, cube: xr.Dataset) -> None:
    slider = page.get_by_label("progress", exact=True)
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    settled(page, 2)
    assert slider.get_attribute("aria-valuetext") == "progress 0.5"
    assert page.locator(".control output").inner_text() == "0.5"
    shown = page.evaluate("document.querySelector('#figure-1').data[1].z")
    position = page.evaluate("document.querySelector('#figure-1')._transitionData._frames[2].data[1].z")
    assert shown == position
    page.keyboard.press("Home")
    settled(page, 0)


def test_the_mouse_moves_every_figure_by_the_one_slider(page: Page) -> None:
    assert page.locator(".slider-container, .updatemenu-container").count() == 0
    slider = page.get_by_label("progress", exact=True)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2)
    settled(page, 3)
    assert page.locator(".control output").inner_text() == POINTS[3]


def test_play_goes_to_the_end_and_stops(page: Page) -> None:
    button = page.locator(".control button")
    button.click()
    assert button.inner_text() == "Pause"
    settled(page, 4)
    until(page, "document.querySelector('.control button').textContent === 'Play'")


def test_moves_in_quick_succession_end_at_the_last(page: Page) -> None:
    moves = "for (const i of [1, 3, 2, 4, 2]) { r.value = i; r.dispatchEvent(new Event('input')); }"
    for _ in range(3):
        page.evaluate(f"const r = document.querySelector('.control input'); {moves}")
        settled(page, 2)
    assert page.locator(".control output").inner_text() == "0.5"


def test_a_hovered_cell_tells_its_numbers(page: Page, cube: xr.Dataset) -> None:
    page.locator("#figure-1").scroll_into_view_if_needed()
    box = page.locator("#figure-1 .nsewdrag").first.bounding_box()
    assert box is not None
    here = {"patch": 7, "dropout": 0.25}  # the third column, the second row from below
    page.mouse.move(box["x"] + box["width"] * 5 / 6, box["y"] + box["height"] / 2)
    page.wait_for_selector("#figure-1 .hoverlayer text", timeout=60_000)
    said = " ".join((page.locator("#figure-1 .hoverlayer").text_content() or "").split())
    at = {**here, "progress": 0.0, "metric": "optimizer"}
    value = with_error(float(cube["descent"].sel(at)), float(cube["descent_se"].sel(at)))
    for text in ("patch (pixel): 7", "dropout: 0.25", f"descent: {value}", "8,192 samples, done"):
        assert text in said, said


@pytest.mark.parametrize("width", [360, 820])
def test_no_page_is_wider_than_its_screen(browser: Browser, reports: Path, width: int) -> None:
    page, said = opened(browser, reports / "report.html", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate(
        "[...document.querySelectorAll('.figure')].map(figure =>"
        "  ['.main-svg', '.legend .traces'].flatMap((part, i) => [...figure.querySelectorAll(part)]"
        "    .slice(0, i ? undefined : 1).map(one => one.getBoundingClientRect().bottom)))"
    )
    assert all(max(entries, default=0) <= bottom for bottom, *entries in cut), cut
    widths = np.array(page.evaluate("[...document.querySelectorAll('.figure')].map(f => f.scrollWidth)"))
    assert sum(widths > width) == (width < 560)  # the parameter groups, in a box of their own that scrolls
    page.context.close()
    assert said == []


def test_a_watched_report_comes_back_to_the_point_that_it_showed(browser: Browser, reports: Path) -> None:
    page, said = opened(browser, reports / "watched.html")
    until(page, "window.before = true")
    page.locator("summary").first.click()
    page.get_by_label("progress", exact=True).focus()
    page.keyboard.press("End")
    settled(page, 4)
    until(page, "window.before === undefined && document.body?.dataset.drawn > 0")
    settled(page, 4)
    until(page, "document.querySelector('.control output').innerText === '1'")
    until(page, "document.querySelector('details').open && document.activeElement.id === 'progress'")
    page.context.close()
    assert said == []


def test_details_open_by_keyboard(page: Page) -> None:
    summary = page.locator("summary", has_text=re.compile("All values of descent")).first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("td", has_text="patch 7, dropout 0.25").last.is_visible()
