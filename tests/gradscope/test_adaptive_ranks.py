"""Several ranks decide as one: the bundled trainer, and a loop of a user's own whose ranks see unequal data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradscope import AdaptiveController, AdaptiveRule, LoopTask, Strategy
from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.ranks import Ranks, current_ranks
from gradscope.trainer import read_log, train
from tests.gradscope.adaptive_loops import (
    BATCH,
    GRID,
    PROBES,
    QUARTER,
    WHOLE,
    batches,
    cost,
    decisions_of,
    linear,
)
from tests.gradscope.train_ranks_job import Answer, double_setting, run_function

ONLINE = AdaptiveRule(overhead=0.5, minimum=3, maximum=4, sub_batch=8, dwell=0.0, exploration=0.3, confidence=0.0)


def train_online(ranks: Ranks, out: Path, rule: AdaptiveRule, trouble: dict[int, tuple[str, int]], changes: Any) -> Any:
    kind, at = trouble.get(ranks.rank, ("", -1))
    setting = double_setting("mocov3", trouble=kind, at=at, **{"budget": 2000.0, "checkpoints": (), **changes})
    told: list[str] = []
    result = train(setting, rule, out, ranks=ranks, tell=told.append)
    return result.step, result.units, told


def last(out: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(out)[-1].path)


def decided(out: Path) -> dict[str, Any]:
    state = last(out)["online"]
    return {
        "decisions": [(d["step"], d["strategy"], d["why"]) for d in state["policy"]["decisions"]],
        "probes": [(p["step"], p["strategies"], p["sub_batches"], p["best"], p["switched"]) for p in state["probes"]],
    }


def assert_equal_runs(first: Path, second: Path) -> None:
    """The same decisions, strategies and units; parameters to rounding."""
    assert decided(first) == decided(second)
    a, b = last(first), last(second)
    assert a["step"] == b["step"] and a["units"] == pytest.approx(b["units"], rel=1e-12)
    rows = [[(r["step"], r["strategy"]) for r in read_log(out) if "strategy" in r] for out in (first, second)]
    assert rows[0] == rows[1]
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_two_ranks_decide_as_one(tmp_path: Path) -> None:
    (one,) = run_function(1, train_online, tmp_path / "one-job", tmp_path / "one", ONLINE, {}, {})
    two = run_function(2, train_online, tmp_path / "two-job", tmp_path / "two", ONLINE, {}, {})
    assert one.code == 0 and [a.code for a in two] == [0, 0], (one, two)
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    found = decided(tmp_path / "two")
    assert len(found["probes"]) >= 2 and len(found["decisions"]) >= 2
    assert two[0].value[:2] == two[1].value[:2]
    for name in ("cube.nc", "schedule.json"):
        assert (tmp_path / "two" / name).exists()


@pytest.mark.slow
def test_ranks_stop_together_and_one_goes_on_deciding_the_same(tmp_path: Path) -> None:
    (one,) = run_function(1, train_online, tmp_path / "one-job", tmp_path / "one", ONLINE, {}, {})
    out = tmp_path / "two"
    at = {1: ("SIGTERM", 24)}
    stopped = run_function(2, train_online, tmp_path / "two-job", out, ONLINE, at, {})
    assert one.code == 0 and [a.code for a in stopped] == [143, 143], (one, stopped)
    kept = load_checkpoint(out / "resume.pt")
    assert 0 < kept["step"] < last(tmp_path / "one")["step"] and kept["online"]["probes"]
    (rest,) = run_function(1, train_online, tmp_path / "rest-job", out, ONLINE, {}, {})
    assert rest.code == 0, rest
    assert_equal_runs(tmp_path / "one", out)


def test_ranks_with_different_rules_end_at_once(tmp_path: Path) -> None:
    answers = run_function(2, train_apart, tmp_path / "job", tmp_path / "run")
    assert all(a.code not in (0, -9) for a in answers), answers
    assert sum("disagree on" in a.stderr for a in answers) == 1


def train_apart(ranks: Ranks, out: Path) -> Any:
    return train_online(ranks, out, dataclasses.replace(ONLINE, tolerance=0.1 * ranks.rank), {}, {})


# --- a loop of a user's own


def own_loop(ranks: Ranks, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Data parallel by hand, in float64: every rank has its part of each batch; `kind` says what is odd on rank 1.

    The controller finds the ranks by itself.
    """
    odd, probing, made = ranks.rank == 1, {"on": False}, list[AdaptiveController]()
    share = 3 + 2 * ranks.rank if kind == "unequal" else BATCH // ranks.size

    def second_probe() -> bool:
        return bool(odd and made and len(made[0].probes) == 1)

    def own_batches(size: int, seed: int) -> Iterator[Any]:
        for number, (x, y) in enumerate(batches(size, seed)):
            if second_probe() and (kind == "batches raise" or (kind == "batches raise later" and number == 1)):
                raise OSError("the disk is gone")
            if second_probe() and kind == "batches end" and number == 1:
                return
            yield (x + 0.5, y) if kind == "unequal" and odd else (x, y)

    def own_loss(model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        found = loss_without_noise(model, batch, strategy)
        if kind == "refuses" and odd and strategy == QUARTER:
            raise ValueError("no such kernel here")
        if odd and probing["on"]:
            if kind == "nan" and strategy == QUARTER:
                return found * float("nan")
            if kind == "nan reference" and strategy == WHOLE and second_probe():
                return found * float("nan")
            if kind == "loss raises" and strategy == QUARTER:
                raise RuntimeError("out of memory, say")
        return found

    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    task = LoopTask(GRID, loss=own_loss, batches=own_batches, cost=cost)
    given = None if kind == "no optimizer" else optimizer
    rule = AdaptiveRule(**{**PROBES, **options})
    controller = AdaptiveController(task, model, given, budget=3000, batch_size=BATCH, rule=rule)
    made.append(controller)
    assert controller.ranks.size == ranks.size and controller.ranks.rank == ranks.rank
    ran = []
    while not controller.finished:
        step = controller.step
        strategy = controller.at(step)
        ran.append(str(strategy))
        x, y = next(batches(BATCH, 1000 + step))
        first = ranks.rank * share if kind != "unequal" else 3 * ranks.rank
        part = loss_without_noise(model, (x[first : first + share], y[first : first + share]), strategy)
        (part * share / BATCH).backward()
        for p in model.parameters():
            assert p.grad is not None
            if ranks.size > 1:
                dist.all_reduce(p.grad)
        probing["on"] = True
        controller.observe(step)
        probing["on"] = False
        optimizer.step()
        optimizer.zero_grad()
    state = json.loads(decisions_of(controller))
    return {
        "ran": ran, "spent": controller.spent, "probe_units": controller.probe_units, "policy": state["policy"],
        "probes": len(controller.probes), "failures": [sorted(r.failures) for r in controller.probes],
        "errors": [r.error for r in controller.probes], "model": [p.detach().clone() for p in model.parameters()],
    }  # fmt: skip


def loss_without_noise(model: nn.Module, batch: Any, strategy: Strategy) -> Tensor:
    """A mean over samples, so that parts of a batch add up to the whole one's."""
    x, y = batch
    kept = round(x.shape[1] * strategy.number("keep"))
    x = torch.cat([x[:, :kept], torch.zeros_like(x[:, kept:])], dim=1)
    return (model(x).squeeze(1) - y).square().mean()


def two_ranks(kind: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    answers: list[Answer] = run_function(2, own_loop, folder, kind, options, GRADSCOPE_RANK_TIMEOUT="40")
    assert [a.code for a in answers] == [0, 0], answers
    return [a.value for a in answers]


def assert_agreed(values: list[dict[str, Any]]) -> None:
    """Same strategies at every step, same units, same evidence, same model."""
    first, second = values
    for name in ("ran", "spent", "probe_units", "policy", "probes"):
        assert first[name] == second[name], name
    assert all(torch.equal(a, b) for a, b in zip(first["model"], second["model"], strict=True))
    assert 2900 < first["spent"] <= 3000 and first["probe_units"] <= 0.4 * 3000 and first["probes"] >= 2


def test_two_ranks_of_an_own_loop_decide_as_one(tmp_path: Path) -> None:
    (one,) = run_function(1, own_loop, tmp_path / "one", "", {"sub_batch": BATCH})
    values = two_ranks("", tmp_path / "two", sub_batch=BATCH)
    assert_agreed(values)
    assert one.code == 0 and len({d["strategy"] for d in values[0]["policy"]["decisions"]}) > 1
    brief = [
        [(d["step"], d["strategy"], d["why"]) for d in value["policy"]["decisions"]] for value in (one.value, values[0])
    ]
    assert brief[0] == brief[1]
    assert one.value["ran"] == values[0]["ran"]
    assert one.value["spent"] == pytest.approx(values[0]["spent"], rel=1e-12)


@pytest.mark.parametrize("kind", ["unequal", "nan", "loss raises", "refuses"])
def test_ranks_agree_where_one_sees_other_data_or_fails(kind: str, tmp_path: Path) -> None:
    values = two_ranks(kind, tmp_path)
    assert_agreed(values)
    if kind in ("nan", "loss raises"):
        assert values[0]["failures"][0] == values[1]["failures"][0] == ["keep=0.25"]
    if kind == "refuses":
        assert "keep=0.25" not in values[0]["ran"]


@pytest.mark.parametrize(
    "kind",
    ["nan reference", "batches raise", "batches raise later", pytest.param("batches end", marks=pytest.mark.slow)],
)
def test_a_probe_that_fails_on_one_rank_alone_ends_no_training_and_hangs_no_rank(kind: str, tmp_path: Path) -> None:
    values = two_ranks(kind, tmp_path)
    assert_agreed(values)
    for value in values:
        assert value["errors"][0] == "" and value["errors"][1], value["errors"]


@pytest.mark.parametrize("overhead", [0.1, pytest.param(0.4, marks=pytest.mark.slow)])
def test_the_cap_counts_what_every_rank_spends(overhead: float, tmp_path: Path) -> None:
    """Without an optimizer every rank estimates the second moment by passes of its own."""
    values = two_ranks("no optimizer", tmp_path, overhead=overhead)
    for value in values:
        assert value["probe_units"] <= overhead * 3000 and value["ran"] == values[0]["ran"]


def test_current_ranks_are_those_of_the_default_group(tmp_path: Path) -> None:
    values = [a.value for a in run_function(2, who_am_i, tmp_path)]
    assert values == [(0, 2, True, [0, 1]), (1, 2, False, [0, 1])]


def who_am_i(ranks: Ranks) -> Any:
    here = current_ranks()
    return here.rank, here.size, here.first, here.gather(here.rank)
