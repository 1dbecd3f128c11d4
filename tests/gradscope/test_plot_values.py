"""What all figures share: colours, numbers as text, and which strategies count as best."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given
from hypothesis import strategies as st

from gradscope.plots._colour import colour_range
from gradscope.plots._theme import COLOUR_SCALE, ink_on, number, progress_labels, scale_colour, with_error
from gradscope.plots._view import best_strategies, read_view, untrained_strategies, variable
from gradscope.races import Entry, RaceBook
from schedulers.strategy import Strategy
from tests.gradscope.cube_samples import sample_cube


@pytest.fixture(scope="module")
def cube() -> xr.Dataset:
    return sample_cube()


# Colours


def test_colours_are_linear_where_values_span_less_than_two_decades() -> None:
    values = np.array([0.5, 2.0, 20.0])
    found = colour_range(values, np.zeros(3), signed=False)
    assert (found.kind, found.low, found.high) == ("linear", 0.5, 20.0)
    assert [text for _, text in found.ticks] == ["5", "10", "15", "20"]


def test_colours_are_logarithmic_with_real_values_in_ticks_beyond_two_decades() -> None:
    values = np.array([0.01, 1.0, 100.0])
    found = colour_range(values, np.zeros(3), signed=False)
    assert found.kind == "log"
    np.testing.assert_allclose(found.colour(values), [-2, 0, 2])
    for position, text in found.ticks:
        assert math.isclose(10**position, float(text), rel_tol=1e-9)


def test_colours_of_zero_and_below_are_those_of_the_lower_end() -> None:
    values = np.array([-0.02, 0.0, 0.01, 5.0])
    found = colour_range(values, np.zeros(4), signed=False)
    assert found.colour(values).tolist()[:3] == [found.low] * 3
    assert found.ticks[0] == (-2.0, "≤ 0.01")


def test_colours_ignore_the_span_of_values_within_their_error() -> None:
    values, errors = np.array([1e-9, 0.5, 2.0]), np.array([0.1, 0.1, 0.1])
    assert colour_range(values, errors, signed=False).kind == "linear"
    assert colour_range(values, np.zeros(3), signed=False).kind == "log"


def test_colours_keep_the_sign_of_signed_values() -> None:
    values = np.array([-0.2, 0.0, 0.001, 0.6])
    found = colour_range(values, np.zeros(4), signed=True)
    assert found.kind == "symlog"
    shown = found.colour(values)
    assert shown[0] < 0 == shown[1] < shown[2] < shown[3]
    assert "0" in [text for _, text in found.ticks] and any(text.startswith("−") for _, text in found.ticks)


def test_colours_of_one_repeated_value_span_a_range() -> None:
    for value in (0.0, 3.0, -2.0):
        found = colour_range(np.full(4, value), np.zeros(4), signed=True)
        assert found.low < value < found.high


@example([-60061.0, -1.8622846978075527e-05], False)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=12),
    st.booleans(),
)
def test_colours_follow_the_order_of_values_within_the_range(numbers: list[float], signed: bool) -> None:
    values = np.array(numbers)
    found = colour_range(values, np.zeros(len(values)), signed=signed)
    assert found.low < found.high
    shown = found.colour(np.sort(values[~np.isnan(values)]))
    assert np.all(np.diff(shown) >= 0)
    assert np.all((shown >= found.low - 1e-9) & (shown <= found.high + 1e-9))
    assert all(found.low - 1e-6 <= position <= found.high + 1e-6 for position, _ in found.ticks)


def test_ink_contrasts_with_both_ends_of_the_scale() -> None:
    assert COLOUR_SCALE == "Viridis"
    assert ink_on(scale_colour(0.0)) == "white"
    assert ink_on(scale_colour(1.0)) != "white"


# Numbers as text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.01234, 0.0004, "0.0123 ± 0.0004"),
        (0.01234, 0.00014, "0.01234 ± 0.00014"),
        (12345.6, 432.0, "12300 ± 400"),
        (-2.5, 0.3, "−2.5 ± 0.3"),
        (1.25e-8, 3e-10, "(1.25 ± 0.03)e-8"),
        (0.5, math.nan, "0.5"),
        (0.5, 0.0, "0.5"),
        (math.nan, 0.1, "not measured"),
        (0.0, 0.02, "0.00 ± 0.02"),
    ],
)
def test_numbers_have_the_digits_that_their_error_supports(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1230"), (0.00123456, "0.00123"), (1.5e-7, "1.5e-7"), (2.5e9, "2.5e9"), (-1.0, "−1")],
)
def test_numbers_without_error_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_progress_labels_are_short_and_unique() -> None:
    assert progress_labels([0.0, 1 / 3, 1.0]) == ["0", "0.33", "1"]
    assert progress_labels([0.121, 0.122]) == ["0.121", "0.122"]


# Best strategies


def test_rivals_are_those_within_two_standard_errors(cube: xr.Dataset) -> None:
    view, shown = read_view(cube), variable(cube, "descent")
    values, errors = view.values("descent"), view.errors("descent")
    for t, best in enumerate(best_strategies(view, shown)):
        assert best is not None
        expected = {
            strategy
            for strategy in view.grid.strategies()
            for at in [(t, *view.grid.position(strategy))]
            if strategy != best.winner.strategy
            and best.winner.value - values[at] <= 2 * math.sqrt(errors[at] ** 2 + best.winner.error**2)
        }
        assert {rival.strategy for rival in best.rivals} == expected


def test_untrained_strategies_are_those_the_record_does_not_name(cube: xr.Dataset) -> None:
    assert untrained_strategies(cube) == [Strategy(patch=7, dropout=0.5)]
    for text in ("", "{}", "not json", "[]"):
        assert untrained_strategies(cube.assign_attrs(training_json=text)) is None


def test_the_best_strategy_is_one_that_was_left_in_the_race(cube: xr.Dataset) -> None:
    """A score that stands still since its strategy left the race does not win by its luck."""
    digests = [f"{t:064d}" for t in range(cube.sizes["progress"])]
    cube = cube.assign_coords(checkpoint_sha256=("progress", digests), step=("progress", range(len(digests))))
    view, shown = read_view(cube, metric="optimizer"), variable(cube, "descent")
    free = best_strategies(view, shown)
    assert free[0] is not None
    values = view.values("descent")[0]
    other = next(
        s for s in view.grid.strategies() if s != free[0].winner.strategy and np.isfinite(values[view.grid.position(s)])
    )
    cube["n_samples"].loc[{"patch": other["patch"], "dropout": other["dropout"]}] = 16_384  # others left with 8,192
    book = RaceBook()
    book.note(f"{digests[0][:16]}:0", Entry(("descent", 1), tuple(map(str, view.grid.strategies())), 8, (str(other),)))
    raced = best_strategies(read_view(cube.assign_attrs(races_json=book.text()), metric="optimizer"), shown)
    assert raced[0] is not None and raced[0].winner.strategy == other
    assert raced[1] == free[1]
