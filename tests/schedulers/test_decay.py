import doctest
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import DECAY_KINDS, Decay, UsageError
from schedulers import decay as decay_module


def test_polynomial_stays_above_cosine_late_in_training() -> None:
    assert Decay("polynomial", alpha=2).factor(0.75) == pytest.approx(0.4375)
    assert Decay("cosine").factor(0.75) == pytest.approx((1 - math.sqrt(0.5)) / 2)  # .1464
    for percent in range(50, 100):
        assert Decay("polynomial").factor(percent / 100) > Decay("cosine").factor(percent / 100)


def test_alpha_is_the_power_of_the_fraction() -> None:
    assert Decay("polynomial", alpha=3).factor(0.5) == pytest.approx(1 - 0.125)


@pytest.mark.parametrize("kind", DECAY_KINDS)
def test_warm_up_is_linear_from_zero_and_decay_takes_the_rest(kind: str) -> None:
    decay = Decay(kind, warmup=0.2)
    assert [decay.factor(f) for f in (0, 0.05, 0.1)] == pytest.approx([0, 0.25, 0.5])
    assert decay.factor(0.2) == 1
    assert decay.factor(0.6) == pytest.approx(Decay(kind).factor(0.5))


@pytest.mark.parametrize(("kind", "last"), [("cosine", 0), ("polynomial", 0), ("constant", 1)])
def test_the_value_at_the_end_holds_past_the_end(kind: str, last: float) -> None:
    decay = Decay(kind, warmup=0.1)
    assert decay.factor(1) == pytest.approx(last, abs=1e-12)
    assert decay.factor(1.5) == decay.factor(1)


@settings(deadline=None)
@given(st.sampled_from(DECAY_KINDS), st.floats(0.1, 10), st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1))
def test_after_the_warm_up_the_factor_never_rises(kind: str, alpha: float, warmup: float, a: float, b: float) -> None:
    decay = Decay(kind, alpha=alpha, warmup=warmup)
    early, late = sorted(warmup + (1 - warmup) * x for x in (a, b))
    assert 0 <= decay.factor(late) <= decay.factor(early) <= 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"kind": "linear"}, "'linear' is not one of cosine, polynomial, constant"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"warmup": 1}, "warmup=1"),
        ({"warmup": -0.1}, "warmup=-0.1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Decay(**arguments)


@pytest.mark.parametrize("fraction", [-0.1, math.nan])
def test_a_fraction_below_zero_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="fraction="):
        Decay().factor(fraction)


def test_the_examples_of_the_docstring_hold() -> None:
    assert doctest.testmod(decay_module) == (0, 2)
