"""Measured costs: operations against closed formulas, bytes, the clock's rounds, and the untouched model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradscope import Grid, Strategy
from gradscope.errors import TaskError, UsageError
from gradscope.methods import MoCoV3, Views
from gradscope.models import VIT_SIZES
from gradscope.task import task_digest
from gradscope.timing import MeasuredCosts, StrategyCost, SyntheticTask, measure_costs
from tests.gradscope.tasks_for_tests import FailingTask, LineTask
from tests.gradscope.test_untouched import changes, state_of

GRID = Grid({"patch": (4, 7), "dropout": (0, 0.5)}, Strategy(patch=4, dropout=0))
REFERENCE = GRID.reference


@pytest.fixture
def bundled() -> SyntheticTask:
    return SyntheticTask(GRID, model="demo", image_size=28, batch_size=4)


def line_model(task: LineTask) -> nn.Module:
    return task.load(Path("step-0.pt"))


def measure_lines(task: LineTask, **options: object) -> MeasuredCosts:
    given = {"batch_size": 8, "repeats": 2, **options}
    return measure_costs(task, line_model(task), task.grid.strategies(), **given)  # type: ignore[arg-type]


def mocov3_flops(task: SyntheticTask, batch: int, query: int, key: int) -> int:
    """A batch's operations at the base patch: 2 per multiply-add, a linear layer's backward pass twice its forward.

    Attention over L tokens of width D: 4 L²D forward (scores, mixture), 10 L²D backward (scores once more, four
    gradients). The patch embedding sees all patches and is frozen; the key's pass has no backward; the logits
    have a gradient to the queries alone.
    """
    size, config = VIT_SIZES[task.setting.config.model], task.setting.config
    hidden, width = config.head_hidden, config.head_width
    embed = 2 * (key - 1) * 3 * config.patch**2 * size.width
    linear = 2 * size.width**2 * (3 + 1 + 2 * size.mlp_ratio) * size.depth  # per token
    attention = size.width * size.depth  # times L²
    projector = 2 * (size.width * hidden + hidden**2 + hidden * width)
    predictor = 2 * 2 * width * hidden
    query_flops = embed + 3 * query * linear + 14 * query**2 * attention + 3 * (projector + predictor)
    key_flops = embed + key * linear + 4 * key**2 * attention + projector
    return round(batch * (query_flops + key_flops) + 2 * 2 * batch**2 * width)


@pytest.mark.parametrize(("dropout", "query"), [(0, 50), (0.5, 25)])
def test_flops_are_those_of_the_closed_formula(bundled: SyntheticTask, dropout: float, query: int) -> None:
    strategy = Strategy(patch=4, dropout=dropout)
    found = measure_costs(bundled, bundled.load(), [REFERENCE, strategy], batch_size=4, repeats=1)
    assert found[strategy].flops * 4 == mocov3_flops(bundled, 4, query, 50)


def test_attentions_share_of_the_flops_grows_with_the_square_of_the_tokens() -> None:
    def flops(patch: int) -> float:
        grid = Grid({"patch": (patch,), "dropout": (0,)}, Strategy(patch=patch, dropout=0))
        task = SyntheticTask(grid, model="demo", image_size=28, batch_size=2)
        return measure_costs(task, task.load(), [], batch_size=2, repeats=1)[grid.reference].flops

    size = VIT_SIZES["demo"]
    linear = 2 * size.width**2 * (4 + 2 * size.mlp_ratio) * size.depth * 4  # per token of query and key
    embed = 2 * 2 * 3 * 28**2 * size.width  # all pixels of both views
    assert flops(2) - flops(4) == (197 - 50) * linear + 18 * (197**2 - 50**2) * size.width * size.depth
    assert flops(4) > 50 * linear + embed


class TwoLayers(LineTask):
    """x -> W -> tanh -> V: autograd keeps x and the tanh, and the parameter V."""

    def load(self, checkpoint: Path) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False))

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        scale = 2 if strategy["keep"] == "half" else 1
        return scale * sum((model(batch[0]).sum() for _ in range(scale)), torch.zeros(()))


def test_memory_is_what_is_kept_besides_the_parameters_each_storage_once() -> None:
    found = measure_lines(TwoLayers())
    assert found[Strategy(keep="all", noise=0)].memory == 4 * (6 + 5)
    assert found[Strategy(keep="half", noise=0)].memory == 4 * (6 + 2 * 5)  # two passes over one input


def test_memory_of_the_bundled_model_grows_with_tokens_and_repeats_itself(bundled: SyntheticTask) -> None:
    def measured(strategies: list[Strategy]) -> dict[Strategy, tuple[float, float]]:
        found = measure_costs(bundled, bundled.load(), strategies, batch_size=4, repeats=1)
        return {s: (found[s].memory, found[s].flops) for s in GRID.strategies()}

    there = measured(GRID.strategies())
    memory = [there[s][0] for s in sorted(GRID.strategies(), key=lambda s: bundled.tokens(s)["query"])]
    assert all(a < b for a, b in itertools.pairwise(memory))
    size = VIT_SIZES["demo"]
    assert memory[-1] > 4 * 50 * size.width * size.depth * 10  # of every block: norms, q, k, v, mixture, MLP
    assert measured(GRID.strategies()[::-1]) == there


def test_every_timed_call_pays_for_the_keys(bundled: SyntheticTask, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, targets = [], MoCoV3.targets

    def counted(self: MoCoV3, views: Views, strategy: Strategy) -> Tensor:
        calls.append(strategy["patch"])
        return targets(self, views, strategy)

    monkeypatch.setattr(MoCoV3, "targets", counted)
    measure_costs(bundled, bundled.load(), GRID.strategies(), batch_size=4, repeats=3)
    assert sorted(calls) == [4] * 10 + [7] * 10  # two strategies of each patch, 3 rounds, the warm-up and the count


class Machine(LineTask):
    """Every loss moves a clock by its strategy's cost, times how slow the machine is in that round."""

    def __init__(self, slow: list[float]) -> None:
        self.now, self.slow, self.calls, self.sums = 0.0, slow, list[Strategy](), set[float]()

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        self.now += self.cost(strategy) * self.slow[len(self.calls) // len(self.grid)]
        self.calls.append(strategy)
        self.sums.add(sum(p.detach().double().sum().item() for p in model.parameters()))
        return super().loss(model, batch, strategy, generator)


def test_the_median_of_interleaved_rounds_without_the_first_is_taken() -> None:
    task = Machine(slow=[1, 1000, 1, 10, 2, 3, 50])  # the count, the warm-up, five rounds
    found = measure_lines(task, repeats=5, clock=lambda: task.now)
    for strategy in task.grid.strategies():
        assert found[strategy].seconds == pytest.approx(3 * task.cost(strategy) / 8)
        assert found[strategy].spread == pytest.approx((10 - 2) / 3)
        assert found.units(3.0)[strategy] == pytest.approx(task.cost(strategy))
    rounds = [task.calls[i : i + 6] for i in range(0, 42, 6)]
    assert all(set(one) == set(task.grid.strategies()) for one in rounds)
    assert [rounds[2 + i].index(task.grid.reference) for i in range(5)] == [0, 5, 4, 3, 2]
    assert len(task.sums) == 1  # the optimizer's steps move nothing


def test_units_follow_each_quantity_and_meet_tokens_at_the_reference(bundled: SyntheticTask) -> None:
    found = measure_costs(bundled, bundled.load(), GRID.strategies(), batch_size=4, repeats=1)
    for quantity in ("flops", "memory"):
        units = found.units(bundled.cost(REFERENCE), quantity)
        assert units[REFERENCE] == bundled.cost(REFERENCE) == 4
        for strategy in GRID.strategies()[1:]:  # attention's square and the heads' constant are small here
            assert units[strategy] == pytest.approx(bundled.cost(strategy), rel=0.25)
            assert units[strategy] != pytest.approx(bundled.cost(strategy), rel=1e-3)


def test_costs_tell_of_which_model_they_are(bundled: SyntheticTask) -> None:
    found = measure_costs(bundled, bundled.load(), [], batch_size=4, repeats=1)
    assert found.about()["source"] == "random numbers, model demo, method mocov3, image 28"
    assert measure_lines(LineTask()).about()["source"] == task_digest(LineTask())


def test_the_model_and_the_random_streams_are_left_as_they_were() -> None:
    task = LineTask()
    model = line_model(task)
    model[0].weight.grad = torch.ones(5, 6)
    before = state_of(model)
    measure_costs(task, model, task.grid.strategies(), batch_size=8, repeats=2)
    assert changes(before, state_of(model)) == []


def test_a_failing_strategy_has_no_costs_but_a_reason() -> None:
    found = measure_lines(FailingTask())
    raises, not_finite = Strategy(keep="half", noise=2), Strategy(keep="all", noise=2)
    assert found.failures == {
        str(not_finite): f"NonFiniteError: the loss is nan under {not_finite}",
        str(raises): "RuntimeError: out of memory, say",
    }
    for strategy in found.costs:
        cost = found[strategy]
        numbers = torch.tensor([cost.seconds, cost.spread, cost.flops, cost.memory])
        assert bool(numbers.isnan().all()) == (strategy in (raises, not_finite)) == bool(numbers.isnan().any())


def test_a_failing_reference_is_an_error() -> None:
    class Failing(LineTask):
        def loss(self, *args: object) -> Tensor:
            raise RuntimeError("no such layer")

    with pytest.raises(TaskError, match="fails under the reference keep=all,noise=0: RuntimeError: no such layer"):
        measure_lines(Failing())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 1}, "batch_size=1: a step needs at least 2"), ({"repeats": 0}, "repeats=0: at least 1 round")],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_lines(LineTask(), **options)


def test_units_are_relative_to_the_reference_and_nan_where_not_measured() -> None:
    a, b = Strategy(keep="all"), Strategy(keep="half")
    found = MeasuredCosts(a, {a: StrategyCost(2.0, 0, 10, 4), b: StrategyCost()}, "a device", 1, 8, 3, "2000-01-01")
    assert found.units(3.0)[a] == 3.0 and found.units(3.0)[b] != found.units(3.0)[b]
