"""The settings of the online policy as text, and which of them are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedulers import AdaptiveRule, UsageError


def test_an_empty_text_is_the_default() -> None:
    assert AdaptiveRule.parse("") == AdaptiveRule.parse(" , ") == AdaptiveRule()
    assert str(AdaptiveRule()) == ""


def test_every_setting_can_be_given_as_text() -> None:
    text = (
        "criterion=ca-mse, metric=euclidean,overhead=0.05,exploration=0,mix=0.02,start=0.2,finish=0.0,half_life=1.5,"
        "confidence=0.5,tolerance=0,dwell=.1,monotone=TRUE,minimum=3,maximum=9,sub_batch=16,frozen=true"
    )
    rule = AdaptiveRule.parse(text)
    assert rule == AdaptiveRule(
        "ca-mse", "euclidean", 0.05, 0.0, 0.02, 0.2, 0.0, 1.5, 0.5, 0.0, 0.1, True, 3, 9, 16, True
    )  # fmt: skip
    assert len(text.split(",")) == len(dataclasses.fields(AdaptiveRule))
    for field in dataclasses.fields(AdaptiveRule):
        assert type(getattr(rule, field.name)) is type(field.default), field.name


shares = st.floats(0, 0.4)


@given(
    overhead=shares, exploration=shares, mix=shares, start=shares, finish=shares, half_life=st.floats(1e-3, 10),
    confidence=st.floats(0, 1e6), tolerance=st.floats(0, 9), dwell=shares,
    monotone=st.booleans(), minimum=st.integers(3, 8), maximum=st.integers(8, 99), sub_batch=st.integers(0, 512),
    frozen=st.booleans(), criterion=st.sampled_from(["descent", "ca-mse", "descent-batch"]),
    metric=st.sampled_from(["optimizer", "euclidean"]),
)  # fmt: skip
def test_a_rule_is_read_back_from_its_text(**values: Any) -> None:
    rule = AdaptiveRule(**values)
    assert AdaptiveRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overhed=0.1", "'overhed=0.1' is not one of its settings, criterion, metric, overhead"),
        ("overhead", "overhead needs a value, as in overhead=0.03"),
        ("=1", "'=1' is not one of its settings"),
        ("overhead=0.1,start=0,overhead=0.2", "overhead is given twice"),
        ("overhead=much", "overhead='much' is not a number"),
        ("overhead=", "overhead='' is not a number"),
        ("minimum=four", "minimum='four' is not a"),
        ("minimum=4.5", "minimum='4.5' is not a whole number"),
        ("frozen=1", "frozen='1' is neither true nor false"),
        ("overhead=1.5", r"overhead=1.5 is not a share of the budget in \[0, 1\)"),
        ("overhead=nan", "overhead=nan is not a share"),
        ("criterion=best", "unknown criterion 'best'"),
        ("metric=adam", "metric='adam': use one of optimizer, euclidean"),
    ],
)
def test_bad_texts_name_the_setting(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        AdaptiveRule.parse(text)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exploration": -0.1}, "exploration=-0.1"),
        ({"dwell": 1.0}, "dwell=1.0"),
        ({"start": float("inf")}, "start=inf"),
        ({"confidence": -1.0}, "confidence=-1.0 must be a number of at least 0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"half_life": 0.0}, "half_life=0.0 must be a positive share"),
        ({"start": 0.6, "finish": 0.5}, "start=0.6 and finish=0.5 leave nothing of the budget between them"),
        ({"sub_batch": -1}, "sub_batch=-1"),
        ({"overhead": "0.1"}, "overhead='0.1' is not a number"),
        ({"minimum": 4.5}, "minimum=4.5 is not a whole number"),
        ({"half_life": True}, "half_life=True is not a number"),
        ({"minimum": 2}, "minimum=2 and maximum=32 sub-batches: standard errors need at least 3"),
        ({"minimum": 9, "maximum": 8}, "minimum may not exceed the maximum"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdaptiveRule(**values)
