import json
import math
from pathlib import Path

import pytest

from schedulers import (
    METHOD_FORMULAS,
    Strategy,
    UsageError,
    paper_cost,
    paper_table2b_cost,
    sequence_cost,
    token_cost,
    token_counts,
)

PAPER = json.loads((Path(__file__).parent / "paper_costs.json").read_text(encoding="utf-8"))
FIG3 = [
    (int(patch), dropout, printed)
    for patch, row in PAPER["fig3"]["printed"].items()
    for dropout, printed in zip(PAPER["fig3"]["dropout"], row, strict=True)
    if printed is not None
]
TABLE2B = list(zip(PAPER["table2b"]["patch"], PAPER["table2b"]["printed"], strict=True))


def test_fig3_has_28_usable_cells() -> None:
    assert (len(FIG3), sum("?" in printed for _, _, printed in FIG3)) == (28, 4)


@pytest.mark.parametrize(("patch", "dropout", "printed"), FIG3)
def test_paper_cost_prints_as_in_fig3(patch: int, dropout: float, printed: str) -> None:
    cost = f"{paper_cost('mocov3', 240, 16, Strategy(patch=patch, dropout=dropout)):.2f}"
    assert _could_read(cost, printed) if "?" in printed else cost == printed


@pytest.mark.parametrize(("patch", "printed"), TABLE2B)
def test_table2b_cost_prints_as_in_table_2b(patch: int, printed: str) -> None:
    assert len(TABLE2B) == 5
    assert f"{paper_table2b_cost(240, patch):.2f}" == printed


@pytest.mark.parametrize(
    ("patch", "dropout", "cost"), [(4, 0, 4), (4, 0.5, 2.50), (7, 0, 1.36), (7, 0.5, 0.88), (14, 0, 0.40)]
)
def test_token_cost_of_28_pixel_images(patch: int, dropout: float, cost: float) -> None:
    # 50, 17 and 5 tokens with the class token; half of 49, 16 patches kept are 24 and 8
    assert token_cost("mocov3", 28, 4, Strategy(patch=patch, dropout=dropout)) == pytest.approx(cost, abs=1e-12)


def test_token_counts_are_those_the_model_runs() -> None:
    counts = token_counts(240, 16, Strategy(patch=24, dropout=0.9))
    assert (counts.query, counts.key, counts.base) == (11, 101, 226)


def test_an_axis_left_out_takes_the_references_value() -> None:
    assert token_counts(28, 4, Strategy(dropout=0.5)) == token_counts(28, 4, Strategy(patch=4, dropout=0.5))
    assert token_counts(28, 4, Strategy(patch=7)) == token_counts(28, 4, Strategy(patch=7, dropout=0))


@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_the_reference_costs_forward_and_backward_passes_in_units(method: str) -> None:
    # a forward pass of the base sequence is 1, with its backward pass 3; SimCLR runs both on both views
    expected = {"mocov3": 3 + 1, "simclr": 3 + 3, "dino": 3 + 1}[method]
    assert token_cost(method, 224, 16, Strategy(patch=16, dropout=0)) == pytest.approx(expected)


def test_dino_adds_three_passes_for_each_small_crop() -> None:
    assert sequence_cost("dino", query=197, key=197, base=197, small=37, crops=6) == pytest.approx(4 + 18 * 37 / 197)
    assert token_cost("dino", 224, 16, Strategy(patch=16), small=37, crops=6) == pytest.approx(4 + 18 * 37 / 197)


def test_simclr_weighs_the_key_as_the_query() -> None:
    assert sequence_cost("simclr", query=50, key=197, base=197) == pytest.approx(3 * (50 + 197) / 197)


@pytest.mark.parametrize(("method", "query", "key"), [("mocov3", 11, 101), ("simclr", 11, 11), ("dino", 11, 226)])
def test_the_key_is_as_long_as_the_method_makes_it(method: str, query: int, key: int) -> None:
    """MoCo-v3's has the patch and all tokens, SimCLR's is compressed as the query is, DINO's teacher sees the base."""
    counts = token_counts(240, 16, Strategy(patch=24, dropout=0.9), method=method)
    assert (counts.query, counts.key, counts.base) == (query, key, 226)


@pytest.mark.parametrize("patch", [16, 24, 48])
@pytest.mark.parametrize("dropout", [0, 0.25, 0.9])
def test_costs_of_every_method_follow_table_1(patch: int, dropout: float) -> None:
    strategy, tokens = Strategy(patch=patch, dropout=dropout), (240 // patch) ** 2
    kept = (tokens * (100 - round(100 * dropout))) // 100 + 1
    expected = {
        "mocov3": (3 * kept + tokens + 1) / 226,
        "simclr": 3 * (kept + kept) / 226,
        "dino": (3 * kept + 3 * 8 * 37 + 226) / 226,
    }
    for method, cost in expected.items():
        crops = {"small": 37, "crops": 8} if method == "dino" else {}
        assert token_cost(method, 240, 16, strategy, **crops) == pytest.approx(cost, rel=1e-12)


def test_the_papers_convention_of_the_other_methods() -> None:
    """The query scaled with its class token; SimCLR's key as the query, DINO's uncompressed with its small crops."""
    strategy = Strategy(patch=24, dropout=0.5)
    assert paper_cost("simclr", 240, 16, strategy) == pytest.approx(3 * (50.5 + 50.5) / 197, rel=1e-12)
    expected = (3 * 50.5 + 3 * 6 * 37 + 226) / 197
    assert paper_cost("dino", 240, 16, strategy, small=37, crops=6) == pytest.approx(expected, rel=1e-12)


def test_an_unknown_method_has_no_token_counts() -> None:
    with pytest.raises(UsageError, match="unknown method 'byol'; the methods are mocov3, simclr, dino"):
        token_counts(240, 16, Strategy(patch=24), method="byol")


def test_the_formulas_print() -> None:
    assert {name: str(formula) for name, formula in METHOD_FORMULAS.items()} == {
        "mocov3": "(3 L_q + L_k) / L_base",
        "simclr": "3 (L_q + L_k) / L_base",
        "dino": "(3 L_q + 3 K L_small + L_k) / L_base",
    }


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "byol"}, "unknown method 'byol'; the methods are mocov3, simclr, dino"),
        ({"query": 0}, "query=0"),
        ({"base": math.nan}, "base=nan"),
        ({"crops": -1, "small": 3}, "must not be negative"),
        ({"crops": 2, "small": 3}, "'mocov3' has no small crops"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes: dict, match: str) -> None:
    arguments = {"method": "mocov3", "query": 50, "key": 50, "base": 50} | changes
    with pytest.raises(UsageError, match=match):
        sequence_cost(arguments.pop("method"), **arguments)


@pytest.mark.parametrize("cost", [token_cost, paper_cost])
@pytest.mark.parametrize(
    ("strategy", "match"),
    [
        (Strategy(patch=24, resolution=160), "not 'resolution'"),
        (Strategy(patch=17), "does not divide"),
        (Strategy(patch=2.5), "whole number of pixels"),
        (Strategy(patch="large"), "must be a number"),
        (Strategy(patch=48, dropout=0.99), "leaves none of 25 tokens"),
    ],
)
def test_strategies_without_a_token_count_are_refused(cost, strategy: Strategy, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        cost("mocov3", 240, 16, strategy)


def _could_read(cost: str, printed: str) -> bool:
    return len(cost) == len(printed) and cost.startswith(printed.rstrip("?"))
