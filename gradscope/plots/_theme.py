"""The look that all figures share: template, colours, numbers, texts, and the slider over progress.

Nothing here is set as plotly's default: every figure is handed the template, so that importing
gradscope never changes the look of a user's own figures.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from schedulers.strategy import AxisValue

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLOUR_SCALE = "Viridis"
"""The one sequential scale: its light end is always the better one."""

GREY = "#c9ccd1"
"""Cells without a value."""

INK = "#1f2430"
MUTED = "#5b6270"
LINE = "#d9dce1"

# Paul Tol's "bright" scheme without its grey, distinct under the common colour-vision deficiencies, then an
# indigo and an orange from his and Okabe and Ito's; past eight, patterns, dashes or open symbols tell apart.
PALETTE = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE", "#332288", "#E69F00")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon", "star-triangle-down")
PATTERNS = ("", "/", ".", "x", "-")

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
NOT_MEASURED = "not measured"


@cache
def template() -> Any:
    """The plotly template named `gradscope`, to be passed to each figure."""
    import plotly.graph_objects as go
    import plotly.io as pio

    axis = {
        "showline": False,
        "zeroline": False,
        "gridcolor": LINE,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": LINE,
        "title": {"standoff": 8, "font": {"size": 13, "color": MUTED}},
        "automargin": False,
    }
    made = go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": INK},
            "title": {
                "x": 0,
                "xref": "container",
                "xanchor": "left",
                "yref": "container",
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 18},
                "font": {"size": 15},
            },
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "colorway": list(PALETTE),
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "align": "left",
                "bgcolor": "white",
                "bordercolor": MUTED,
                "font": {"color": INK, "size": 12},
            },
            "legend": {
                "orientation": "h",
                "xref": "container",
                "x": 0,
                "xanchor": "left",
                "yref": "container",
                "yanchor": "top",
                "itemsizing": "constant",
                "tracegroupgap": 0,
            },
        }
    )
    pio.templates["gradscope"] = made
    return made


def scale_colour(share: float) -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] at `share` in [0, 1] of the colour scale."""
    from plotly.colors import sample_colorscale

    (colour,) = sample_colorscale(COLOUR_SCALE, [share], colortype="tuple")
    return colour[0], colour[1], colour[2]


def hex_colour(text: str) -> tuple[float, float, float]:
    """Red, green and blue in [0, 1] of `#rrggbb`."""
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def ink_on(background: tuple[float, float, float]) -> str:
    """White or the dark ink, whichever contrasts more with the background (WCAG 2 relative luminance)."""

    def luminance(colour: tuple[float, float, float]) -> float:
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    behind = luminance(background)
    return "white" if 1.05 / (behind + 0.05) > (behind + 0.05) / (luminance(hex_colour(INK)) + 0.05) else INK


def plain(text: object) -> str:
    """`text` shown literally by plotly, which reads a subset of HTML in every label."""
    return html.escape(str(text), quote=False)


def wrapped(text: str, width: int = 54) -> str:
    """`text` escaped and broken into lines that fit a narrow screen."""
    return "<br>".join(plain(line) for line in textwrap.wrap(text, width)) or ""


def title_text(title: str, *lines: str) -> str:
    """A bold title over smaller lines; all of them are escaped here."""
    kept = (line.replace(" ± ", "\u00a0±\u00a0") for line in lines if line)
    small = "".join(f"<br><span style='font-size:12px;color:{MUTED}'>{wrapped(line)}</span>" for line in kept)
    return f"<b>{wrapped(title[:1].upper() + title[1:], 38)}</b>{small}"


def title_lines(text: str) -> int:
    """How many lines `title_text` made, to reserve room for them."""
    return text.count("<br>") + 1


def strategy_text(strategy: Mapping[str, AxisValue]) -> str:
    """`patch 7, dropout 0.5`: a strategy as figures and tables write it, with lines broken at commas alone."""
    return ", ".join(f"{axis}\u00a0{value}" for axis, value in strategy.items())


def number(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, with powers of ten only where they are shorter."""
    if not math.isfinite(value):
        return NOT_MEASURED if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        rounded = round(value, digits - 1 - exponent)
        text = f"{rounded:.{max(digits - 1 - exponent, 0)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = _scientific(value, digits - 1)
    return text.replace("-", "−") if "e" not in text else text


def with_error(value: float, error: float) -> str:
    """`0.0123 ± 0.0004`: as many digits as one standard error supports (two where it starts with 1).

    NaN gives "not measured"; an error that is NaN, zero or no more than the value's rounding is left out.
    """
    if not math.isfinite(value) or not math.isfinite(error) or error <= 1e-12 * abs(value):
        return number(value)
    exponent = math.floor(math.log10(error))
    decimals = -exponent + (1 if error / 10.0**exponent < 1.95 else 0)
    if decimals > 6 or max(abs(value), error) >= 1e7:
        top = math.floor(math.log10(max(abs(value), error)))
        places = max(decimals + top, 0)
        return f"({value / 10.0**top:.{places}f} ± {error / 10.0**top:.{places}f})e{top}".replace("(-", "(−")
    if decimals < 0:
        value, error = round(value, decimals), round(error, decimals)
    places = max(decimals, 0)
    return f"{value:.{places}f} ± {error:.{places}f}".replace("-", "−")


def _scientific(value: float, places: int) -> str:
    mantissa, _, exponent = f"{value:.{places}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa.replace('-', '−')}e{int(exponent)}"


def progress_labels(progress: Sequence[float]) -> list[str]:
    """A text for each progress, unique among them: two decimals where they suffice, trailing zeros dropped."""
    for decimals in (2, 3, 4, 6):
        labels = [f"{round(float(p), decimals):g}" for p in progress]
        if len(set(labels)) == len(labels):
            return labels
    return [repr(float(p)) for p in progress]


def start_index(progress: Sequence[float], wanted: float | None) -> int:
    """Index of the measured progress nearest to `wanted`; the first where None."""
    if wanted is None:
        return 0
    return min(range(len(progress)), key=lambda index: abs(progress[index] - wanted))


def points(values: Sequence[Any]) -> list[Any]:
    """`values`, or one None: plotly.js keeps a trace without points, but not one without values."""
    return list(values) or [None]


def legend_height(entries: int, columns: int = 2) -> int:
    """Pixels for a legend in as many columns as fit on a narrow screen."""
    return 12 + 19 * math.ceil(entries / columns)


SLIDER = 78
"""Pixels between axis and legend that a slider takes."""


def add_slider(figure: go.Figure, names: Sequence[str], *, active: int, y: float) -> None:
    """A slider over the frames `names` with play and pause, its top at the paper height `y`.

    One position needs no slider. Frames are redrawn at once: heat maps cannot be interpolated.
    """
    if len(names) < 2:
        return
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    moving = {
        "mode": "immediate",
        "frame": {"duration": 900, "redraw": True},
        "transition": {"duration": 0},
        "fromcurrent": True,
    }
    button = {"method": "animate"}
    figure.update_layout(
        sliders=[
            {
                "active": active,
                "x": 0,
                "len": 1,
                "y": y,
                "yanchor": "top",
                "pad": {"l": 74, "r": 8, "t": 0, "b": 0},
                "currentvalue": {"prefix": "progress ", "font": {"size": 13}, "xanchor": "left"},
                "font": {"size": 11, "color": MUTED},
                "bgcolor": "#eceef1",
                "activebgcolor": PALETTE[0],
                "bordercolor": LINE,
                "tickcolor": MUTED,
                "ticklen": 4,
                "minorticklen": 0,
                "steps": [{"label": name, "method": "animate", "args": [[name], still]} for name in names],
            }
        ],
        updatemenus=[
            {
                "type": "buttons",
                "direction": "down",
                "x": 0,
                "xanchor": "left",
                "y": y,
                "yanchor": "top",
                "pad": {"t": 4, "r": 0, "b": 0, "l": 0},
                "showactive": False,
                "bgcolor": "white",
                "bordercolor": LINE,
                "font": {"size": 11, "color": MUTED},
                "buttons": [
                    {**button, "label": "Play", "args": [None, moving]},
                    {**button, "label": "Pause", "args": [[None], still]},
                ],
            }
        ],
    )


def without_slider(figure: go.Figure) -> go.Figure:
    """The figure with its frames, but neither slider nor buttons nor the room for them: something else moves it."""
    if not figure.layout.sliders:
        return figure
    height = figure.layout.height - SLIDER
    figure.layout.legend.y *= figure.layout.height / height
    figure.layout.margin.b -= SLIDER
    figure.layout.height, figure.layout.sliders, figure.layout.updatemenus = height, (), ()
    return figure
