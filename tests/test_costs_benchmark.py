"""The benchmark of measured costs: what it measures, and that its rows are valid and say what was found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.optimizer import costs
from benchmarks.summary import parse_row
from schedulers import Strategy, token_cost


def entry(case: costs.Case, time: list[float], flops_per_sample: float) -> dict[str, Any]:
    names = [str(strategy) for strategy in case.grid().strategies()[: len(time)]]
    strategies = {
        name: {
            "time_over_tokens": ratio,
            "flops_over_tokens": 1.0,
            "flops": flops_per_sample,
            "tokens_query": case.tokens,
        }
        for name, ratio in zip(names, time, strict=True)
    }
    about = {"kind": "cpu", "device": "x", "threads": 1, "clock": "wall", "date": "2000-01-01"}
    return {**dataclasses.asdict(case), **about, "strategies": strategies}


def test_rows_tell_the_ratio_furthest_from_one_and_the_cost_of_a_token(tmp_path: Path) -> None:
    short, long = costs.CASES["tiny-240"], costs.CASES["tiny-480"]
    results = {"tiny-240": entry(short, [1, 1.05, 0.8], 226e6), "tiny-480": entry(long, [1, 1.05], 901e6 * 1.5)}
    (tmp_path / "costs-cpu.json").write_text(json.dumps(results))
    rows = [parse_row(row, "rows") for row in costs.rows(tmp_path)]
    time = [row for row in rows if "time over" in row.claim]
    assert [(row.value, row.low, row.high, row.holds) for row in time] == [
        (0.8, 0.8, 1.05, False),
        (1.05, 1, 1.05, True),
    ]
    per_token = [row for row in rows if "among 901" in row.claim]
    assert len(per_token) == 1 and per_token[0].value == 1.5 and not per_token[0].holds


def test_every_case_fits_its_images_and_holds_the_figures_of_its_costs() -> None:
    for case in costs.CASES.values():
        for strategy in case.grid().strategies():
            token_cost("mocov3", case.image_size, case.patch, strategy)
    found = costs.measure(costs.QUICK["demo-28"], torch.device("cpu"), "wall")
    reference, *others = found["strategies"].values()
    assert reference["time_over_tokens"] == reference["flops_over_tokens"] == 1
    for text, one in zip(list(found["strategies"])[1:], others, strict=True):
        cost = token_cost("mocov3", 28, 2, Strategy.parse(text))
        ratio = one["seconds"] / reference["seconds"] * 4 / cost
        assert one["time_over_tokens"] == pytest.approx(ratio, abs=1e-3)


def test_two_batch_sizes_give_the_time_of_a_third() -> None:
    per_sample = {"a": 0.02, "b": 0.003}
    measured = {name: {size: each + 0.5 / size for size in (2, 8)} for name, each in per_sample.items()}
    found, fixed = costs.seconds_at_batch(64, measured)
    assert fixed == pytest.approx(0.5)
    assert found == pytest.approx({name: each + 0.5 / 64 for name, each in per_sample.items()})
    assert costs.seconds_at_batch(64, {"a": {64: 0.03}}) == ({"a": 0.03}, None)
