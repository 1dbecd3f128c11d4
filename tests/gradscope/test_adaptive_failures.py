"""What goes wrong in a probe ends no training: it is told, what ran goes on, after three blank probes none is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradscope import Grid, Strategy
from gradscope.errors import Interrupted, TaskError
from tests.gradscope.adaptive_loops import (
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
    cost,
    coupled,
    decisions_of,
    linear,
    loss,
    new_loop,
    seed_all,
)

NAN = float("nan")
Trouble = Callable[[Strategy, int], float | None]
ERRORS = (
    RuntimeError("shapes cannot be multiplied"),
    torch.OutOfMemoryError("out of memory"),
    ValueError(""),
    KeyError("x"),
    AssertionError(),
    NotImplementedError("no"),
    StopIteration(),
    ZeroDivisionError("division"),
)


def failing(strategy: Strategy, error: Exception, first: int = 0, last: int = 10**9) -> Trouble:
    """Raise under a strategy, from its first to its last probe; the trial before training passes."""
    seen = {"probes": -1, "call": -1}

    def trouble(now: Strategy, call: int) -> None:
        if now == strategy and torch.is_grad_enabled():
            seen["probes"] += 1
            if first <= seen["probes"] <= last:
                raise error

    return trouble


def assert_trained_to_the_end(loop: Loop) -> None:
    controller = loop.controller
    assert controller.finished and controller.budget - BATCH * 3 < controller.spent <= controller.budget
    assert controller.step == len(loop.ran) and all(torch.isfinite(p).all() for p in loop.model.parameters())
    assert controller.decisions[-1].why == "finish" and loop.ran[-1] == WHOLE


# --- what the model refuses from the first


def refusing(strategy: Strategy) -> tuple[Spy, dict[str, Any]]:
    spy = Spy()

    def refused(model: nn.Module, batch: Any, now: Strategy, generator: torch.Generator) -> torch.Tensor:
        if now == strategy:
            raise ValueError(f"cannot run {now}\nat all")
        return spy.loss(model, batch, now, generator)

    return spy, {"loss": refused}


def test_a_strategy_that_the_model_refuses_never_runs() -> None:
    told: list[str] = []
    spy, task = refusing(QUARTER)
    loop = new_loop(spy=spy, task=task, report=told.append).all()
    assert told[0] == "keep=0.25 is left out, the model refuses it: ValueError: cannot run keep=0.25"
    assert QUARTER not in loop.ran and {HALF, WHOLE} == set(loop.ran)
    controller = loop.controller
    assert len(controller.probes) >= 3 and all(r.strategies == 2 and not r.failures for r in controller.probes)
    assert controller.policy.candidates == (HALF, WHOLE)
    assert spy.units_without_gradient == controller.probe_units - math.fsum(r.units for r in controller.probes)
    assert_trained_to_the_end(loop)


def test_what_is_refused_stays_out_after_a_resume() -> None:
    spy, task = refusing(QUARTER)
    state = new_loop(spy=spy, task=task).until(1).controller.state_dict()
    part = new_loop(spy=Spy(), check=False)
    part.controller.load_state_dict(state)
    assert part.controller.policy.candidates == (HALF, WHOLE)
    part.all()
    assert QUARTER not in part.ran


def test_a_model_that_refuses_the_reference_is_an_error_at_once() -> None:
    spy, task = refusing(WHOLE)
    with pytest.raises(TaskError, match="the model refuses the reference keep=1: ValueError: cannot run keep=1"):
        new_loop(spy=spy, task=task)


def test_without_the_check_a_refusal_shows_in_the_first_probe() -> None:
    spy, task = refusing(QUARTER)
    loop = new_loop({**MIXED, "start": 0.0}, spy=spy, task=task, check=False)
    assert loop.controller.spent == 0 and spy.calls == 0
    loop.backward(WHOLE, 0)
    loop.controller.observe(0)
    (record,) = loop.controller.probes
    assert list(record.failures) == ["keep=0.25"] and loop.controller.policy.candidates == (HALF, WHOLE)


def test_a_loss_that_is_not_finite_is_no_refusal() -> None:
    loop = new_loop(spy=Spy(trouble=lambda now, call: NAN if now == QUARTER and call <= 3 else 1.0))
    assert loop.controller.policy.candidates == (QUARTER, HALF, WHOLE)


@pytest.mark.parametrize("kind", ["raises", "empty"])
def test_data_that_cannot_be_had_at_all_is_an_error_that_names_batches(kind: str) -> None:
    def none(size: int, seed: int) -> Iterator[Any]:
        if kind == "raises":
            raise FileNotFoundError("images/0.png")
        return iter(())

    with pytest.raises(TaskError, match="batches"):
        new_loop(task={"batches": none})


# --- one strategy


@pytest.mark.parametrize("error", ERRORS[::2], ids=lambda e: type(e).__name__)
def test_an_error_under_one_strategy_takes_it_out(error: Exception) -> None:
    told: list[str] = []
    loop = new_loop(spy=Spy(trouble=failing(QUARTER, error)), budget=3000, report=told.append).all()
    first = loop.controller.probes[0]
    assert list(first.failures) == ["keep=0.25"] and type(error).__name__ in first.failures["keep=0.25"]
    assert first.strategies == 2 and not first.error and "failed: keep=0.25" in "\n".join(told)
    assert QUARTER not in loop.ran[first.step + 1 :]
    assert sum("keep=0.25" in r.failures for r in loop.controller.probes) <= 3
    assert_trained_to_the_end(loop)


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_loss_that_is_not_finite_under_one_strategy_takes_it_out(value: float) -> None:
    trouble: Trouble = lambda now, call: value if now == HALF and torch.is_grad_enabled() else 1.0  # noqa: E731
    loop = new_loop(spy=Spy(trouble=trouble), budget=3000).all()
    first = loop.controller.probes[0]
    assert list(first.failures) == ["keep=0.5"] and "the loss is" in first.failures["keep=0.5"]
    assert HALF not in loop.ran[first.step + 1 :] and not first.error
    assert_trained_to_the_end(loop)


def test_a_strategy_that_failed_once_comes_back() -> None:
    """It fails on its first sub-batch alone, as where memory was short for a moment."""
    loop = new_loop(spy=Spy(trouble=failing(QUARTER, RuntimeError("short of memory"), 0, 0))).all()
    whys = [d.why for d in loop.controller.decisions]
    assert "failed: keep=0.25" in whys and "back: keep=0.25" in whys
    assert [bool(r.failures) for r in loop.controller.probes].count(True) == 1
    assert_trained_to_the_end(loop)


def test_what_runs_stays_when_its_probes_fail() -> None:
    loop = new_loop({**PROBES, "confidence": 100.0}).until(1)
    now = loop.controller.policy.incumbent
    assert now is not None and now != WHOLE
    loop.spy.trouble = failing(now, RuntimeError("out of memory"))
    loop.until(2)
    assert loop.controller.policy.incumbent == now and str(now) in loop.controller.probes[-1].failures
    assert_trained_to_the_end(loop.all())


# --- whole probes


def on_reference(error: Exception | float) -> Trouble:
    def trouble(now: Strategy, call: int) -> float | None:
        if now != WHOLE or not torch.is_grad_enabled():
            return 1.0
        if isinstance(error, Exception):
            raise error
        return error

    return trouble


@pytest.mark.parametrize("error", [NAN, *ERRORS[::3]], ids=lambda e: type(e).__name__)
def test_a_reference_that_cannot_be_measured_leaves_everything_as_it_is(error: Exception | float) -> None:
    """Told three times, then no more probes; all candidates stay mixed until the finish."""
    told: list[str] = []
    loop = new_loop(spy=Spy(trouble=on_reference(error)), budget=3000, report=told.append).all()
    controller = loop.controller
    assert len(controller.probes) == 3 and [d.why for d in controller.decisions] == ["start", "finish"]
    for record in controller.probes:
        assert record.strategies == 0 and record.error and not record.switched and not record.scores
    lines = [line for line in told if "nothing could be measured" in line and "what ran goes on" in line]
    assert len(lines) == 3
    assert set(loop.ran[: controller.decisions[1].step]) == set(GRID.strategies())
    assert_trained_to_the_end(loop)


def test_the_last_strategy_stays_when_probes_go_blank_later() -> None:
    loop = new_loop({**PROBES, "confidence": 0.0}).until(1)
    decided = loop.controller.decisions
    assert loop.controller.policy.incumbent is not None
    loop.spy.trouble = on_reference(NAN)
    loop.all()
    later = loop.controller.decisions[len(decided) :]
    assert loop.controller.decisions[: len(decided)] == decided and later[-1].why == "finish"
    assert [d.why for d in later[:-1]] == ["mix", "resume"] * 3 and {d.strategy for d in later[:-1]} == {
        decided[-1].strategy
    }
    assert [bool(r.error) for r in loop.controller.probes] == [False, True, True, True]
    assert_trained_to_the_end(loop)


def test_one_blank_probe_is_forgiven() -> None:
    loop = new_loop().until(1)
    loop.spy.trouble = on_reference(NAN)
    loop.until(2)
    loop.spy.trouble = None
    loop.all()
    assert [bool(r.error) for r in loop.controller.probes].count(True) == 1 and len(loop.controller.probes) >= 5
    assert_trained_to_the_end(loop)


@pytest.mark.parametrize("kind", ["raises", "raises later", "ends", "ends at once", "short batch", "no tensor"])
def test_data_that_fails_in_a_probe_ends_no_training(kind: str) -> None:
    trouble = {"on": False}

    def odd(size: int, seed: int) -> Iterator[Any]:
        for number, batch in enumerate(batches(size, seed)):
            if trouble["on"]:
                if kind == "raises" or (kind == "raises later" and number == 2):
                    raise OSError("the disk is gone")
                if kind == "ends at once" or (kind == "ends" and number == 2):
                    return
                if kind == "short batch" and number == 1:
                    batch = tuple(part[:3] for part in batch)
                if kind == "no tensor":
                    batch = ("x", "y")
            yield batch

    loop = new_loop(task={"batches": odd}, budget=3000)
    trouble["on"] = True
    loop.all()
    assert len(loop.controller.probes) == 3 and all(r.error for r in loop.controller.probes)
    assert loop.controller.probe_units <= 0.4 * 3000
    assert_trained_to_the_end(loop)


def test_a_loss_of_the_wrong_shape_ends_no_training() -> None:
    def many(model: nn.Module, batch: Any, now: Strategy, generator: torch.Generator) -> torch.Tensor:
        found = loss(model, batch, now, generator)
        return found if spy.training or not torch.is_grad_enabled() else torch.stack([found, found])

    spy = Spy()
    loop = new_loop(task={"loss": many}, spy=spy, budget=3000)
    loop.all()
    assert all("loss has shape (2,)" in r.error for r in loop.controller.probes) and loop.controller.probes
    assert_trained_to_the_end(loop)


def test_a_parameter_that_gets_no_gradient_is_told_by_name() -> None:
    model = linear()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    loop = new_loop(model=model, budget=3000).all()
    assert all("'spare.weight' receives no gradient" in r.error for r in loop.controller.probes)
    assert_trained_to_the_end(loop)


@pytest.mark.parametrize("kind", ["one", "reference", "batches"])
def test_a_probe_that_fails_leaves_the_training_stream_alone(kind: str) -> None:
    """Bit by bit as without probes, BatchNorm's statistics and random streams included."""
    numbers = []
    for overhead in (0.4, 0.0):
        spy = Spy(torch.float32)
        seed_all()
        loop = new_loop({**MIXED, "overhead": overhead}, model=coupled(), spy=spy, charge=False, budget=2000)
        spy.trouble = {"one": failing(HALF, RuntimeError("x"), 1), "reference": on_reference(NAN)}.get(kind, raising)
        loop.all()
        numbers.append(loop.numbers())
        assert any(r.failures or r.error for r in loop.controller.probes) == bool(overhead)
        if kind == "one":  # what fails leaves the mixture, so only what came before can be compared
            return
    assert numbers[0] == numbers[1]


def raising(now: Strategy, call: int) -> None:
    raise RuntimeError("no loss at all")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped", exit_code=143), SystemExit(3)])
def test_whoever_wants_to_stop_a_run_can(error: BaseException) -> None:
    """And what was observed so far is whole: the step of that probe counts."""

    def stop(now: Strategy, call: int) -> None:
        if torch.is_grad_enabled():
            raise error

    loop = new_loop(spy=Spy(trouble=stop))
    before = loop.numbers()["model"]
    with pytest.raises(type(error)):
        loop.all()
    assert before.keys() == loop.numbers()["model"].keys()
    assert loop.controller.step == len(loop.ran)


# --- files


@pytest.mark.parametrize(
    "kind", ["folder", "no folder", "no cube", "other grid", pytest.param("other metrics", marks=pytest.mark.slow)]
)
def test_a_cube_that_cannot_be_written_ends_no_training(kind: str, tmp_path: Path) -> None:
    path, told = tmp_path / "cube.nc", list[str]()
    if kind == "folder":
        path.mkdir()
    elif kind == "no folder":
        path = tmp_path / "none" / "cube.nc"
    elif kind == "no cube":
        path.write_text("not a cube")
    else:
        small = Grid({"keep": (0.5, 1)}, reference=WHOLE)
        options: dict[str, Any] = {"grid": small} if kind == "other grid" else {"optimizer": "SGD"}
        before = new_loop({**PROBES, "start": 0.0}, cube=path, budget=4000, **options).until(1)
        before.controller.write_cube()
        assert path.exists()
    loop = new_loop({**PROBES, "start": 0.1}, cube=path, budget=3000, report=told.append).all()
    assert_trained_to_the_end(loop)
    assert len(loop.controller.probes) >= 2 and not any(r.error for r in loop.controller.probes)
    if kind in ("folder", "no cube"):
        assert any("could not be written" in line and "training goes on" in line for line in told)


def test_the_same_decisions_with_a_cube_and_without(tmp_path: Path) -> None:
    runs = []
    for cube in (None, tmp_path / "cube.nc"):
        seed_all()
        runs.append(new_loop(cube=cube, budget=3000).all())
    assert decisions_of(runs[0].controller) == decisions_of(runs[1].controller)
    assert runs[0].numbers() == runs[1].numbers()


def test_costs_of_the_spy_are_those_of_the_task() -> None:
    assert [cost(s) for s in GRID.strategies()] == [Spy().task().cost(s) for s in GRID.strategies()]
