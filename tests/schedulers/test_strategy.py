import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import Grid, Strategy, UsageError

AXES = st.text("abcdefghij_", min_size=1, max_size=6)
VALUES = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from(["bf16", "fp32", "large"]),
)


@settings(deadline=None)
@given(st.dictionaries(AXES, VALUES, min_size=1, max_size=4))
def test_a_strategy_reads_its_own_text(values: dict) -> None:
    strategy = Strategy(values)
    assert Strategy.parse(str(strategy)) == strategy
    assert str(Strategy.parse(str(strategy))) == str(strategy)


def test_the_order_of_axes_does_not_matter_to_equality_and_hash() -> None:
    a, b = Strategy(patch=4, dropout=0.5), Strategy(dropout=0.5, patch=4)
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, Strategy(patch=4, dropout=0.25)}) == 2


@pytest.mark.parametrize("value", [4, 4.0, np.int64(4), np.float32(4)])
def test_whole_numbers_are_one_value(value: float) -> None:
    strategy = Strategy(patch=value)
    assert (str(strategy), type(strategy["patch"])) == ("patch=4", int)


def test_numpy_scalars_become_plain_python() -> None:
    strategy = Strategy({"dropout": np.float64(0.1), "precision": np.str_("bf16")})
    assert (type(strategy["dropout"]), type(strategy["precision"])) == (float, str)


def test_a_strategy_cannot_be_changed() -> None:
    values = {"patch": 4}
    strategy = Strategy(values)
    values["patch"] = 7
    assert strategy["patch"] == 4
    with pytest.raises(TypeError):
        strategy["patch"] = 7  # type: ignore[index]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_equal(duplicate) -> None:
    strategy = Strategy(patch=4, mode="a")
    assert duplicate(strategy) == strategy
    assert hash(duplicate(strategy)) == hash(strategy)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not of the form axis=value"),
        ("patch", "'patch' is not of the form"),
        ("patch=", "'patch=' is not of the form"),
        ("=4", "'=4' is not of the form"),
        ("patch=4,", "'' is not of the form"),
        ("patch=4,patch=7", "axis 'patch' is given twice"),
        ("dropout=nan", "is not a finite number"),
        ("dropout=inf", "is not a finite number"),
    ],
)
def test_texts_that_are_no_strategy_are_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Strategy.parse(text)


@pytest.mark.parametrize("value", [True, None, [4], {"a": 1}])
def test_values_are_numbers_or_texts(value: object) -> None:
    with pytest.raises(UsageError, match=r"'patch': .* is neither a number nor a text"):
        Strategy({"patch": value})  # type: ignore[dict-item]


def test_a_number_is_asked_for_by_axis() -> None:
    strategy = Strategy(patch=4, mode="a")
    assert strategy.number("patch") == 4.0
    with pytest.raises(UsageError, match="axis 'mode' must be a number, not 'a'"):
        strategy.number("mode")
    with pytest.raises(UsageError, match="no axis 'dropout'; its axes are patch, mode"):
        strategy.number("dropout")


def grid() -> Grid:
    return Grid({"mode": ("a", "b", "c"), "layers": (12, 6.0)}, Strategy(layers=12, mode="b"), {"layers": "1"})


def test_strategies_are_listed_in_row_major_order() -> None:
    names = [str(strategy) for strategy in grid().strategies()]
    assert names == [f"mode={m},layers={n}" for m in "abc" for n in (12, 6)]
    assert (len(grid()), grid().shape) == (6, (3, 2))


def test_positions_agree_with_the_row_major_order() -> None:
    for i, strategy in enumerate(grid().strategies()):
        assert np.ravel_multi_index(grid().position(strategy), grid().shape) == i


def test_a_strategy_on_the_grid_takes_the_grids_order_of_axes() -> None:
    assert str(grid().check({"layers": 6, "mode": "c"})) == "mode=c,layers=6"
    assert str(grid().reference) == "mode=b,layers=12"


@pytest.mark.parametrize(
    ("strategy", "match"),
    [
        (Strategy(mode="a"), "gives no value for axis 'layers'"),
        (Strategy(mode="a", layers=6, patch=4), "unknown axis 'patch' in .*; the axes are mode, layers"),
        (Strategy(mode="d", layers=6), "mode=d is not on the grid; mode is one of a, b, c"),
    ],
)
def test_a_strategy_off_the_grid_is_refused(strategy: Strategy, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        grid().check(strategy)
    with pytest.raises(UsageError, match=match):
        grid().position(strategy)


@pytest.mark.parametrize(
    ("axes", "reference", "match"),
    [
        ({}, Strategy(), "at least one axis"),
        ({"patch": ()}, Strategy(patch=4), "'patch' has no values"),
        ({"patch": (4, 4.0)}, Strategy(patch=4), "lists a value twice: 4, 4"),
        ({"patch": (4, 7)}, Strategy(patch=5), "patch=5 is not on the grid"),
    ],
)
def test_grids_that_cannot_be_are_refused(axes: dict, reference: Strategy, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Grid(axes, reference)
