import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import UsageError, kept_tokens, patch_tokens

KEPT = json.loads((Path(__file__).parent / "paper_costs.json").read_text(encoding="utf-8"))["kept_patch_tokens"]


@pytest.mark.parametrize("patch", KEPT["tokens"])
def test_the_papers_grid_keeps_the_exact_number_of_tokens(patch: str) -> None:
    tokens = patch_tokens(240, int(patch))
    assert [kept_tokens(tokens, d) for d in KEPT["dropout"]] == KEPT["tokens"][patch]


def test_a_tenth_of_a_hundred_is_ten() -> None:
    assert int(100 * (1 - 0.9)) == 9  # what doubles make of it
    assert kept_tokens(100, 0.9) == 10


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(0, 999))
def test_kept_tokens_is_the_floor_over_whole_thousandths(tokens: int, thousandths: int) -> None:
    kept = tokens * (1000 - thousandths) // 1000
    if kept:
        assert kept_tokens(tokens, thousandths / 1000) == kept
    else:
        with pytest.raises(UsageError, match="leaves none"):
            kept_tokens(tokens, thousandths / 1000)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan")])
def test_a_dropout_outside_0_to_1_is_refused(dropout: float) -> None:
    with pytest.raises(UsageError, match=r"dropout=.* is not in \[0, 1\)"):
        kept_tokens(100, dropout)


def test_a_patch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UsageError, match="patch=5 does not divide image_size=28; patches that do: 1, 2, 4, 7, 14, 28"):
        patch_tokens(28, 5)


@pytest.mark.parametrize(("size", "patch"), [(0, 4), (28, 0), (28, -4), (28, 3.5), (True, 1)])
def test_sizes_are_whole_and_positive(size: int, patch: int) -> None:
    with pytest.raises(UsageError, match="whole number"):
        patch_tokens(size, patch)


def test_fractions_are_taken_as_meant() -> None:
    # 0.3333 of 10000 drops exactly 3333 and 5/7 of 49 exactly 35, although the doubles lie beside them
    assert kept_tokens(10_000, 0.3333) == 6667
    assert kept_tokens(49, 5 / 7) == 14
    assert kept_tokens(10**9, 0.123456789) == 10**9 - 123_456_789
