"""The online mode in a loop of a user's own: nothing of training is touched, every unit is counted, runs go on."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope import AdaptiveController, AdaptiveRule, Strategy
from gradscope.adaptive.probe import live_second_moment
from gradscope.errors import GradscopeError, InfeasibleError, TaskError, UsageError
from gradscope.ranks import ALONE as ONE
from gradscope.ranks import current_ranks
from schedulers import MOMENTS, Schedule
from tests.gradscope.adaptive_loops import (
    ALONE,
    BATCH,
    GRID,
    HALF,
    MIXED,
    PROBES,
    QUARTER,
    WHOLE,
    Loop,
    Spy,
    batches,
    bits,
    cost,
    coupled,
    decisions_of,
    linear,
    new_loop,
    sample_losses,
    seed_all,
)
from tests.gradscope.test_untouched import changes, state_of
from tests.schedulers.adaptive_cases import moments_of

MODELS = {"linear in float64": lambda: linear(), "BatchNorm and dropout": coupled}


def follow(model: nn.Module, strategies: list[Strategy]) -> Loop:
    """The same training with no controller in it."""
    loop = new_loop(MIXED, model=model, check=False)
    seed_all()
    for step, strategy in enumerate(strategies):
        loop.backward(strategy, step)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    return loop


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_training_is_the_same_bit_by_bit_with_probes_and_without(kind: str, per_sample: bool) -> None:
    """Parameters, moments of the optimizer, BatchNorm's statistics, and what comes next in every random stream."""
    loops = []
    for rule in (MIXED, {**MIXED, "overhead": 0.0}):
        seed_all()
        task = {"sample_losses": sample_losses} if per_sample else {}
        loops.append(new_loop(rule, model=MODELS[kind](), charge=False, budget=2500, task=task).all())
    probed, bare = loops
    assert len(probed.controller.probes) >= 3 and not bare.controller.probes
    assert all(record.strategies == 3 and not record.failures for record in probed.controller.probes)
    assert probed.ran == bare.ran and len(set(bare.ran)) == 3
    assert probed.numbers() == bare.numbers() == follow(MODELS[kind](), bare.ran).numbers()
    expected = "per-sample-fast" if per_sample and kind == "linear in float64" else "subbatch"
    assert probed.controller.state_dict()["engine"] == expected


@pytest.mark.parametrize("kind", MODELS)
def test_a_probe_leaves_the_model_as_it_found_it(kind: str) -> None:
    loop = new_loop(model=MODELS[kind]()).until(1)
    for module in loop.model.modules():
        module.register_forward_hook(lambda *_: None)
    parameter = next(loop.model.parameters())
    called: list[int] = []
    parameter.register_post_accumulate_grad_hook(lambda p: called.append(1))
    for _ in range(400):
        strategy, step = loop.controller.at(loop.controller.step), loop.controller.step
        loop.backward(strategy, step)
        before, moments, count = state_of(loop.model), loop.numbers(), len(called)
        probes = len(loop.controller.probes)
        loop.controller.observe(step)
        assert not changes(before, state_of(loop.model)) and loop.numbers() == moments and len(called) == count
        if len(loop.controller.probes) > probes:
            return
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    pytest.fail("no probe")


def test_making_a_controller_changes_nothing() -> None:
    model = coupled()
    seed_all(3)
    before = state_of(model)
    new_loop(model=model)
    assert not changes(before, state_of(model))


# --- what a probe measures, and what it costs


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_a_probe_measures_the_moments_of_design_section_3(metric: str, tmp_path: Path) -> None:
    """Beside gradients of autograd on the same sub-batches, in Adam's metric by its own second moment."""
    from gradscope.cube import open_cube

    spy = Spy()
    loop = new_loop(
        {**PROBES, "metric": metric, "minimum": 5, "maximum": 5, "start": 0.2}, spy=spy, cube=tmp_path / "cube.nc"
    )
    while not loop.controller.probes:
        model = {name: value.clone() for name, value in loop.model.state_dict().items()}
        state = {i: {k: v.clone() for k, v in kept.items()} for i, kept in loop.optimizer.state_dict()["state"].items()}
        spy.seeds.clear()
        assert loop.once()
    (*_, (_, seed)) = spy.seeds  # before it the engine was chosen
    loop.model.load_state_dict(model)
    parameters = list(loop.model.parameters())
    weight = torch.cat([torch.ones_like(p).flatten() for p in parameters])
    if metric == "optimizer":
        v = [kept["exp_avg_sq"] / (1 - 0.999 ** kept["step"].item()) for kept in state.values()]
        weight = 1 / (torch.cat([x.flatten() for x in v]).sqrt() + 1e-8)
    found = open_cube(tmp_path / "cube.nc").to_dataset().isel(progress=0).sel(metric=metric)
    assert set(found["n_samples"].values) == {5 * BATCH}
    for s in (WHOLE, HALF):
        rows = []
        for batch in itertools.islice(spy.batches(BATCH, seed), 5):
            rows.append([])
            for strategy in (s, WHOLE):
                # noise comes from a generator of the probe's own, which the whole sequence does not draw from
                mean = loss_without_noise(loop.model, batch, strategy)
                rows[-1].append(torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters)]) * weight.sqrt())
        g_MP, z_MP = (np.stack([row[i].numpy() for row in rows]) for i in (0, 1))
        expected = dict(zip(MOMENTS, moments_of(g_MP, z_MP, BATCH), strict=True))
        cell = found.sel(keep=s.number("keep"))
        tolerance = 1e-9 if s == WHOLE else 0.35
        for name in MOMENTS:
            scale = abs(expected[name]) + (expected["norm_sq_ref"] if s == HALF else 0)
            assert abs(float(cell[name]) - expected[name]) <= tolerance * scale, (s, name)
    whole = found.sel(keep=1)
    assert float(whole["bias_sq"]) == 0 and float(whole["norm_sq"]) == pytest.approx(float(whole["norm_sq_ref"]))


def loss_without_noise(model: nn.Module, batch: Any, strategy: Strategy) -> torch.Tensor:
    x, y = batch
    kept = round(x.shape[1] * strategy.number("keep"))
    x = torch.cat([x[:, :kept], torch.zeros_like(x[:, kept:])], dim=1)
    return (model(x).squeeze(1) - y).square().mean()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "none"])
@pytest.mark.parametrize("sub_batch", [0, 3])
def test_every_unit_is_counted_and_the_cap_holds(optimizer: str, sub_batch: int) -> None:
    """`spent` is what the task's loss was really called for: in steps, in probes, and in the first trial."""
    spy, rule = Spy(), {**PROBES, "sub_batch": sub_batch, "start": 0.0}
    loop = new_loop(rule, optimizer="AdamW" if optimizer == "none" else optimizer, spy=spy)
    if optimizer == "none":
        loop.controller = AdaptiveController(
            (spy := Spy()).task(), loop.model, budget=6000, batch_size=BATCH, rule=AdaptiveRule(**rule)
        )
        loop.spy = spy
    controller = loop.controller
    assert (
        controller.spent
        == controller.probe_units
        == spy.units_without_gradient
        == 8 * sum(map(cost, GRID.strategies()))
    )
    while loop.once():
        steps = math.fsum(BATCH * cost(s) for s in loop.ran)
        probes = math.fsum(record.units for record in controller.probes)
        assert controller.spent == pytest.approx(steps + controller.probe_units, rel=1e-12)
        assert controller.probe_units == pytest.approx(probes + spy.units_without_gradient, rel=1e-12)
        assert controller.probe_units <= 0.4 * 6000 and probes == pytest.approx(spy.units, rel=1e-12)
    assert len(controller.probes) >= 4 and controller.probe_units > 0.2 * 6000
    assert 6000 - BATCH * 3 < controller.spent <= 6000 and controller.remaining == 6000 - controller.spent


@pytest.mark.parametrize("budget", [24, 60, 200, 500, 1000])
@pytest.mark.parametrize("overhead", [0.03, 0.99])
def test_the_cap_holds_on_tiny_budgets(budget: float, overhead: float) -> None:
    loop = new_loop({**PROBES, "overhead": overhead, "start": 0.0}, budget=budget).all()
    controller = loop.controller
    assert controller.probe_units <= overhead * budget and controller.spent <= budget
    assert loop.ran or overhead == 0.99


def test_passes_that_choose_the_engine_are_charged_as_well() -> None:
    """A task with per-sample losses is tried on a few samples; that is work that the cap is for."""
    calls = {"units": 0.0}

    def counted(model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> torch.Tensor:
        calls["units"] += len(batch[0]) * cost(strategy) / 3  # a forward pass
        return sample_losses(model, batch, strategy, generator)

    spy = Spy()
    loop = new_loop(spy=spy, task={"sample_losses": counted}).until(1)
    by_hand = calls["units"] + (spy.units + spy.units_without_gradient) / 3
    assert loop.controller.probe_units >= by_hand


def test_probes_without_charge_cost_the_budget_nothing() -> None:
    loop = new_loop(MIXED, charge=False).all()
    assert loop.controller.probe_units > 0
    assert loop.controller.spent == pytest.approx(math.fsum(BATCH * cost(s) for s in loop.ran), rel=1e-12)


def test_a_learning_rate_can_follow_the_fraction() -> None:
    loop = new_loop()
    seen = [loop.controller.fraction]
    while loop.once():
        seen.append(loop.controller.fraction)
    assert seen == sorted(seen) and seen[0] < 0.02 and 1 - 24 / 6000 < seen[-1] <= 1


# --- optimizers


def test_adams_second_moment_is_taken_from_the_optimizer() -> None:
    loop = new_loop(rule={**PROBES, "overhead": 0.0})
    assert live_second_moment(loop.model, loop.optimizer) is None  # nothing has moved yet
    squares = {name: torch.zeros_like(p) for name, p in loop.model.named_parameters()}
    for step in range(3):
        loop.backward(WHOLE, step)
        for name, p in loop.model.named_parameters():
            assert p.grad is not None
            squares[name] = 0.999 * squares[name] + 0.001 * p.grad**2
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    found = live_second_moment(loop.model, loop.optimizer)
    assert found is not None and list(found) == list(squares)
    for name, value in found.items():
        torch.testing.assert_close(value, squares[name] / (1 - 0.999**3), rtol=1e-9, atol=0)
    assert live_second_moment(loop.model, None) is None
    assert live_second_moment(loop.model, torch.optim.SGD(loop.model.parameters(), lr=0.1)) is None
    loop.model.append(nn.Linear(1, 1))
    assert live_second_moment(loop.model, loop.optimizer) is None  # of one parameter nothing is known


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adam", "NAdam", "Adamax", "Adagrad"])
def test_any_optimizer_will_do(optimizer: str) -> None:
    told: list[str] = []
    loop = new_loop(optimizer=optimizer, budget=3000, report=told.append).all()
    assert len(loop.controller.probes) >= 2 and not any(r.failures or r.error for r in loop.controller.probes)
    euclidean = optimizer in ("SGD", "RMSprop", "Adagrad")
    assert any("keeps no second moment" in line and optimizer in line for line in told) == euclidean


def test_parameters_that_are_not_trained_do_not_matter() -> None:
    model = linear()
    model[0].weight.requires_grad_(False)
    loop = new_loop(model=model).until(2)
    assert not any(r.failures or r.error for r in loop.controller.probes)


# --- use of observe


def test_observe_before_backward_is_refused() -> None:
    loop = new_loop()
    with pytest.raises(
        UsageError, match=r"observe\(step=0\): no parameter has a gradient; call it after loss.backward"
    ):
        loop.controller.observe(0)
    assert loop.controller.step == 0 and loop.once()
    with pytest.raises(UsageError, match="no parameter has a gradient"):
        loop.controller.observe(1)  # zero_grad() stands between
    assert loop.controller.step == 1


@pytest.mark.parametrize("wrong", [0, 2, 7, -1])
def test_observe_twice_or_out_of_order_is_refused(wrong: int) -> None:
    loop = new_loop()
    assert loop.once()
    loop.backward(WHOLE, 1)
    spent = loop.controller.spent
    with pytest.raises(UsageError, match=rf"observe\(step={wrong}\): the next optimizer step is 1; .* in order"):
        loop.controller.observe(wrong)
    assert loop.controller.spent == spent and loop.controller.step == 1
    loop.controller.observe(1)
    with pytest.raises(UsageError, match=r"observe\(step=1\): the next optimizer step is 2"):
        loop.controller.observe(1)


def test_at_may_be_asked_for_as_often_as_wanted_and_for_past_steps() -> None:
    loop = new_loop()
    ran = []
    while not loop.controller.finished:
        for _ in range(3):
            now = loop.controller.at(loop.controller.step)
        ran.append(now)
        loop.controller.at(10**6)
        assert loop.once()
        if loop.controller.step % 60 == 0:
            assert [loop.controller.at(k) for k in range(loop.controller.step)] == ran
    assert [loop.controller.at(k) for k in range(len(ran))] == ran == loop.ran
    with pytest.raises(UsageError, match="step=-1"):
        loop.controller.at(-1)


def test_a_short_last_batch_is_charged_as_what_it_is() -> None:
    loop = new_loop({**PROBES, "overhead": 0.0})
    for step, samples in enumerate((8, 5, None, 1)):
        before, now = loop.controller.spent, loop.controller.at(step)
        loop.backward(now, step)
        loop.controller.observe(step, samples=samples)
        assert loop.controller.spent - before == pytest.approx((samples or 8) * cost(now))
    assert loop.controller.samples == 22
    for samples in (0, -3, 9):
        with pytest.raises(UsageError, match=rf"samples={samples} of a step with a batch of 8"):
            loop.controller.observe(4, samples=samples)


def test_several_passes_make_one_step() -> None:
    """Gradients of two passes are accumulated; `observe` comes once."""
    loop = new_loop(budget=1500)
    while not loop.controller.finished:
        step = loop.controller.step
        for part in range(2):
            loop.backward(loop.controller.at(step), 2 * step + part)
        loop.controller.observe(step)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert loop.controller.probes and loop.controller.samples == BATCH * loop.controller.step


# --- decisions, and what is made of them


def test_a_decision_holds_from_the_next_step_on() -> None:
    loop = new_loop().all()
    controller = loop.controller
    assert [d.why for d in controller.decisions][:2] == ["start", "first"]
    at = {record.step for record in controller.probes if record.switched}
    changes = [d for d in controller.decisions if d.why in ("first", "switch")]
    assert {d.step - 1 for d in changes} == at
    first, finish = changes[0], controller.decisions[-1]
    assert finish.why == "finish" and set(loop.ran[finish.step :]) == {WHOLE}
    between = loop.ran[first.step : finish.step]
    assert sum(s == first.strategy for s in between) > len(between) / 3


def test_what_ran_is_a_schedule() -> None:
    loop = new_loop()
    (stage,) = loop.controller.schedule().stages
    assert len(stage.mixture) == 3 and (stage.start, stage.end) == (0, 1)
    loop.all()
    schedule = loop.controller.schedule()
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert schedule.budget == 6000 and schedule.batch_size == BATCH
    assert [s.start for s in schedule.stages] == [d.fraction for d in loop.controller.decisions]
    assert schedule.constraints["probe_units"] == loop.controller.probe_units


def test_probes_are_told_in_one_line_each() -> None:
    told: list[str] = []
    controller = new_loop(report=told.append).all().controller
    lines = [line for line in told if line.startswith("probe at")]
    assert len(lines) == len(controller.probes)
    for line, record in zip(lines, controller.probes, strict=True):
        assert f"{record.fraction:.1%}" in line and "\n" not in line and ("now" in line) == record.switched


def test_the_same_seed_gives_the_same_run_and_another_another() -> None:
    runs = []
    for seed in (0, 0, 1):
        seed_all()
        runs.append(new_loop(seed=seed, budget=3000).all())
    assert decisions_of(runs[0].controller) == decisions_of(runs[1].controller)
    assert runs[0].ran == runs[1].ran != runs[2].ran


def test_scores_do_not_depend_on_the_units_of_the_loss() -> None:
    """SGD, whose metric is euclidean: a loss in other units, and a learning rate to match, is the same run."""
    runs = []
    for factor in (1.0, 2.0**12):
        seed_all()
        spy = Spy(trouble=lambda strategy, call, factor=factor: factor)  # type: ignore[misc]
        runs.append(new_loop(optimizer="SGD", budget=3000, spy=spy).all())
    assert runs[0].controller.decisions == runs[1].controller.decisions and runs[0].ran == runs[1].ran
    assert len(runs[0].controller.probes) >= 2


# --- what is refused at once


def test_a_budget_below_one_step_names_the_smallest() -> None:
    with pytest.raises(
        InfeasibleError, match="does not pay for one step of 8 samples; the smallest that does is 24"
    ) as e:
        new_loop(budget=23)
    assert e.value.smallest == 24 and e.value.exit_code == 3
    assert new_loop(budget=24).all().controller.step >= 1


def test_the_optimizer_of_another_model_is_refused() -> None:
    task = Spy().task()
    with pytest.raises(UsageError, match="none of the model's parameters but others like them"):
        AdaptiveController(
            task, copy.deepcopy(model := linear()), torch.optim.AdamW(model.parameters()), budget=100, batch_size=BATCH
        )


def test_an_optimizer_over_master_copies_is_told_and_its_second_moment_estimated() -> None:
    seed_all()
    model, told = linear(torch.float64), list[str]()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    controller = AdaptiveController(
        Spy().task(), model, torch.optim.AdamW(masters), budget=6000, batch_size=BATCH,
        rule=AdaptiveRule(**PROBES), report=told.append,
    )  # fmt: skip
    assert sum("none of the model's parameters: its second moment is estimated" in line for line in told) == 1
    for step in range(60):
        loss = Spy().loss(model, next(batches(BATCH, step)), controller.at(step), torch.Generator())
        loss.backward()
        controller.observe(step)
    assert controller.probes and not controller.probes[0].error


def test_a_budget_may_be_a_text() -> None:
    assert new_loop(budget="6k").controller.budget == 6000
    with pytest.raises(UsageError):
        new_loop(budget="plenty")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_costs_must_be_positive(value: float) -> None:
    with pytest.raises(UsageError, match=r"costs: keep=0.25 has none"):
        new_loop(task={"cost": lambda s: value if s == QUARTER else 3.0})


def test_a_loop_task_loads_nothing() -> None:
    with pytest.raises(TaskError, match="a LoopTask loads no checkpoints"):
        Spy().task().load(Path("step-1.pt"))


def test_a_grid_of_one_trains_as_a_plain_loop() -> None:
    seed_all()
    told: list[str] = []
    loop = new_loop(grid=ALONE, budget=1200, report=told.append).all()
    assert told == ["there is one strategy only, keep=1: nothing to choose, and no probes"]
    controller = loop.controller
    assert set(loop.ran) == {WHOLE} and controller.step == 50 and controller.spent == 1200
    assert not controller.probes and controller.probe_units == 0 == loop.spy.units_without_gradient
    assert loop.numbers() == follow(linear(), loop.ran).numbers()
    assert len(controller.schedule().strategies) == 1


def test_without_torch_distributed_a_process_is_alone() -> None:
    assert current_ranks() is ONE and new_loop().controller.ranks is ONE


# --- states


def test_a_state_passes_through_json_and_through_torch_with_weights_only(tmp_path: Path) -> None:
    state = new_loop().until(3).controller.state_dict()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


def stopped(loop: Loop) -> tuple[bytes, dict[str, Any]]:
    """Everything that a checkpoint of a loop holds, through a file's bytes; and the random streams."""
    kept = io.BytesIO()
    torch.save(
        {
            "model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict(),
            "controller": loop.controller.state_dict(), "rng": torch.get_rng_state(),
        }, kept,
    )  # fmt: skip
    return kept.getvalue(), {"numpy": np.random.get_state()}


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_that_is_continued_anywhere_is_the_run_that_went_on(kind: str) -> None:
    import random

    seed_all()
    whole = new_loop(model=MODELS[kind](), budget=2500)
    points = []
    while True:
        probes = whole.controller.probes
        if whole.controller.step % 40 == 0 or (probes and probes[-1].step + 1 == whole.controller.step):
            points.append((*stopped(whole), random.getstate()))
        if not whole.once():
            break
    assert len(whole.controller.probes) >= 3 and len(points) >= 5
    for content, streams, python in points:
        seed_all(99)
        part = new_loop(model=MODELS[kind](seed=5) if kind == "BatchNorm and dropout" else linear(seed=5), budget=2500)
        kept = torch.load(io.BytesIO(content), weights_only=True)
        part.model.load_state_dict(kept["model"])
        part.optimizer.load_state_dict(kept["optimizer"])
        part.controller.load_state_dict(kept["controller"])
        torch.set_rng_state(kept["rng"])
        np.random.set_state(streams["numpy"])
        random.setstate(python)
        begun = part.controller.step
        part.all()
        assert part.controller.samples == whole.controller.samples == BATCH * len(whole.ran)
        assert part.ran == whole.ran[begun:] and decisions_of(part.controller) == decisions_of(whole.controller)
        assert part.numbers() == whole.numbers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 6001}, "budget"),
        ({"seed": 1}, "seed"),
        ({"rule": {**PROBES, "exploration": 0.2}}, "rule"),
        ({"task": {"cost": lambda s: 2 * cost(s)}}, "costs"),
        ({"grid": ALONE}, "axes"),
    ],
)
def test_a_state_of_another_run_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    state = new_loop().until(2).controller.state_dict()
    other = new_loop(**options)
    before = other.controller.state_dict()
    with pytest.raises(UsageError, match=f"of another run: other .*{message}"):
        other.controller.load_state_dict(state)
    assert other.controller.state_dict() == before
    if message not in ("axes",):
        other.controller.load_state_dict(state, strict=False)
        assert other.controller.step == state["step"]


@pytest.mark.parametrize(
    "damage",
    [{"version": 99}, {"version": "x"}, {"step": None}, {"probes": [{}]}, {"probes": 3}, {"policy": {}}, {"spent": []}],
)
def test_a_newer_or_damaged_state_is_refused_and_changes_nothing(damage: dict[str, Any]) -> None:
    state = new_loop().until(2).controller.state_dict()
    controller = new_loop().controller
    before = controller.state_dict()
    with pytest.raises(GradscopeError, match="of version 99, newer" if damage == {"version": 99} else "damaged"):
        controller.load_state_dict({**state, **damage})
    for name in state:
        with pytest.raises(GradscopeError, match="damaged"):
            controller.load_state_dict({key: value for key, value in state.items() if key != name})
    assert controller.state_dict() == before


def test_bits_are_compared() -> None:
    assert bits(torch.tensor(0.0)) != bits(torch.tensor(-0.0))
