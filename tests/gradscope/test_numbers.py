"""Gradients that are not finite, zero, tiny or huge: what a profile makes of them, cell by cell, by every engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from typer.testing import CliRunner

from gradscope import Grid, ProfileOptions, Strategy, Task, open_cube, profile, profile_of
from gradscope.cli.app import app
from gradscope.cube import DONE, FAILED
from gradscope.engines import FlatParameters, PerSampleEngine
from gradscope.errors import NonFiniteError, UsageError
from gradscope.estimators import EUCLIDEAN, Block, GradientStream, GroupLayout, Sketch, inner_products
from gradscope.plots._theme import with_error
from gradscope.profiler import ProfileSummary
from gradscope.untouched import untouched
from schedulers import CRITERIA, load_schedule
from tests.gradscope.tasks_for_tests import make_checkpoints

ENGINES = ("subbatch", "per-sample", "per-sample-fast")
MOMENTS = ("bias_sq", "variance", "norm_sq", "inner", "norm_sq_ref")
NUMBERS = (*MOMENTS, "inner_se", "descent", "descent_se", "ca_mse", "moment_cov", "influence")
Trouble = Callable[[str, Tensor], Tensor]


class NumbersTask(Task):
    """Least squares on lines; `light` (the reference reads all six inputs) may trouble its losses."""

    grid = Grid({"light": ("no", "some", "much")}, Strategy(light="no"))
    batch_size = 8
    dtype = torch.float32

    def __init__(self, trouble: Trouble = lambda light, losses: losses) -> None:
        self.trouble = trouble
        self.moment: float | None = None

    def load(self, checkpoint: Path) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).to(self.dtype)

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(size, 6, generator=generator)
            yield x.to(self.dtype), (x.sum(1) + torch.randn(size, generator=generator)).to(self.dtype)

    def sample_losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        light = str(strategy["light"])
        x = batch[0] * (torch.arange(6) < {"no": 6, "some": 4, "much": 2}[light]).to(self.dtype)
        return self.trouble(light, (model(x).squeeze(1) - batch[1]).square())

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        return self.sample_losses(model, batch, strategy, generator).mean()

    def cost(self, strategy: Strategy) -> float:
        return {"no": 3.0, "some": 2.0, "much": 1.0}[str(strategy["light"])]

    def second_moment(self, checkpoint: Path, model: nn.Module) -> Mapping[str, Tensor] | None:
        if self.moment is None or "5" not in checkpoint.stem:
            return None
        return {name: torch.full_like(p, self.moment) for name, p in model.named_parameters()}

    def describe(self) -> Mapping[str, str]:
        return {"name": "numbers"}

    def training(self, folder: Path) -> Mapping[str, float]:
        return {"budget": 5000.0}


def scaled(factor: float, *where: str) -> Trouble:
    """Losses times a factor under the strategies named, under all where none is."""
    return lambda light, losses: losses * factor if not where or light in where else losses


def bent(light: str, losses: Tensor) -> Tensor:
    """Under `much` a finite loss with an infinite slope: the square root at 0."""
    return losses + torch.sqrt(losses - losses.detach()) if light == "much" else losses


def measured(
    task: Task, folder: Path, engine: str = "subbatch", steps: tuple[int, ...] = (0,), racing: bool = False
) -> tuple[xr.Dataset, ProfileSummary]:
    allocation = "racing" if racing else "fixed"
    options = ProfileOptions(samples=80 if racing else 40, allocation=allocation, estimator=engine, seed=3)
    tree, summary = profile(task, make_checkpoints(folder / "run", steps), folder / "cube.nc", options=options)
    return tree.dataset, summary


def assert_finite(cube: xr.Dataset, names: tuple[str, ...] = NUMBERS) -> None:
    done = cube["status"].values == DONE
    for name in names:
        assert np.isfinite(cube[name].values[done]).all(), name


@pytest.mark.parametrize(("engine", "racing"), [*((engine, False) for engine in ENGINES), ("subbatch", True)])
def test_a_slope_that_is_infinite_fails_its_cells_alone(tmp_path: Path, engine: str, racing: bool) -> None:
    cube, summary = measured(NumbersTask(bent), tmp_path, engine, (0, 10), racing)
    assert (cube["status"].sel(light="much") == FAILED).all() and int((cube["status"] == DONE).sum()) == 4
    reason = "NonFiniteError: the gradient is not finite under light=much"
    assert summary.failures == {f"progress={p},light=much": reason for p in (0, 1)}
    assert_finite(cube)


def test_a_failed_cell_is_tried_again_and_nothing_else(tmp_path: Path) -> None:
    _, first = measured(NumbersTask(scaled(float("nan"), "much")), tmp_path)
    cube, second = measured(NumbersTask(), tmp_path)
    assert (first.measured, len(first.failures)) == (2, 1)
    assert (second.reused, second.measured, second.failures) == (2, 1, {}) and (cube["status"] == DONE).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_moments_scale_with_gradients_whose_squares_leave_float32(tmp_path: Path, engine: str, factor: float) -> None:
    plain, _ = measured(NumbersTask(), tmp_path / "plain", engine)
    cube, summary = measured(NumbersTask(scaled(factor)), tmp_path / "scaled", engine)
    if engine == "per-sample-fast":
        assert (cube["status"] == FAILED).all()
        assert all(
            "float32 does not hold the squares" in why and "subbatch" in why for why in summary.failures.values()
        )
        return
    assert_finite(cube)
    for name in (*MOMENTS, "inner_se"):
        found, expected = (c[name].sel(metric="euclidean").values for c in (cube, plain))
        np.testing.assert_allclose(found / factor**2, expected, rtol=1e-5, err_msg=name)
    for name in ("descent", "descent_se", "ca_mse"):
        found, expected = (c[name].sel(metric="euclidean").values for c in (cube, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


def test_one_huge_strategy_is_measured_and_loses(tmp_path: Path) -> None:
    cube, summary = measured(NumbersTask(scaled(1e25, "much")), tmp_path, racing=True)
    assert not summary.failures
    assert_finite(cube)
    profile_now = profile_of(cube)
    assert profile_now.influence is None  # does not fit into float32: its errors count by its own covariance
    score = profile_now.scores(CRITERIA["ca-mse"], profile_now.progress)[0][0]
    assert score.argmax() == 2 and np.isfinite(score).all()


def test_ordinary_sums_of_products_are_those_in_float32() -> None:
    layout = GroupLayout(("a", "b"), (500, 300))
    generator = torch.Generator().manual_seed(0)
    a, b = (1e-6 * torch.randn(800, generator=generator) for _ in range(2))
    expected = [(x * y).double().sum().item() for x, y in zip(layout.split(a), layout.split(b), strict=True)]
    assert inner_products(a, b, layout, EUCLIDEAN).tolist() == [expected]
    tiny = inner_products(a * 1e-20, b, layout, EUCLIDEAN)[0]
    true = [(x.double() * y).sum().item() for x, y in zip(layout.split(a * 1e-20), layout.split(b), strict=True)]
    np.testing.assert_allclose(tiny, true, rtol=1e-12)


def test_a_gradient_too_large_for_standard_errors_is_refused() -> None:
    layout = GroupLayout(("all",), (4,))
    stream = GradientStream.empty(
        layout, EUCLIDEAN, Sketch(layout, seed=0, device=torch.device("cpu")), torch.zeros(4, dtype=torch.float64)
    )
    huge = torch.full((4,), 1e80, dtype=torch.float64)
    block = Block(huge, 1, *[inner_products(huge, huge, layout, EUCLIDEAN)] * 2)
    with pytest.raises(NonFiniteError, match=r"up to 1e\+80, is too large for moments"):
        stream.add(0, block, block)


@pytest.mark.parametrize(
    ("engine", "where"), [*((engine, ("no",)) for engine in (*ENGINES, "auto")), *((e, ("much",)) for e in ENGINES)]
)
def test_gradients_of_exactly_zero_are_measured(tmp_path: Path, engine: str, where: tuple[str, ...]) -> None:
    cube, summary = measured(NumbersTask(scaled(0.0, *where)), tmp_path, engine)
    assert (cube["status"] == DONE).all() and not summary.failures
    assert_finite(cube, MOMENTS)
    zero = cube.sel(light=list(where))
    assert all((zero[name] == 0).all() for name in ("variance", "norm_sq", "inner"))
    if where == ("much",):
        assert_finite(cube)
        assert (zero["descent"] == 0).all() and (zero["ca_mse"] > 0).all()
    else:
        assert cube["descent"].isnull().all()  # nothing is known of directions against a reference of zero


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_second_moment_that_is_none_fails_that_checkpoint_alone(tmp_path: Path, value: float) -> None:
    task = NumbersTask()
    task.moment = value
    cube, summary = measured(task, tmp_path, steps=(0, 5, 10), racing=True)
    assert (cube["status"].values == [[DONE] * 3, [FAILED] * 3, [DONE] * 3]).all()
    assert all("second moment of parameter '0.weight' is not finite" in why for why in summary.failures.values())
    assert_finite(cube)


def test_a_second_moment_of_zeros_makes_the_euclidean_metric_of_it(tmp_path: Path) -> None:
    task = NumbersTask()
    task.moment = 0.0
    cube, _ = measured(task, tmp_path, steps=(5,))
    plain, weighted = (cube.sel(metric=name) for name in ("euclidean", "optimizer"))
    np.testing.assert_allclose(weighted["norm_sq"], 1e8 * plain["norm_sq"], rtol=1e-6)
    np.testing.assert_allclose(weighted["descent"], plain["descent"], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
def test_models_in_half_precision_are_measured_and_their_overflow_told(
    tmp_path: Path, engine: str, dtype: torch.dtype
) -> None:
    half = NumbersTask(scaled(1e38, "much"))
    half.dtype = dtype
    cube, summary = measured(half, tmp_path, engine)
    assert cube["status"].values.tolist() == [[DONE, DONE, FAILED]]
    (why,) = summary.failures.values()
    assert "NonFiniteError" in why
    assert_finite(cube)


def test_squares_of_small_half_precision_gradients_are_not_lost(tmp_path: Path) -> None:
    task = NumbersTask(scaled(1e-4))
    task.dtype = torch.float16
    model = task.load(tmp_path)
    engine = PerSampleEngine(task, model, FlatParameters.of(task, model))
    with untouched(model):
        block = engine.reference(next(task.batches(8, 0)), seed=0).block
        each = next(engine.gradients(next(task.batches(8, 0)), task.grid.reference, seed=0))
    expected = sum(float(g.double().square().sum()) for g in each.values())
    assert block.squares_WG.sum() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_sub_batches_of_one_sample(tmp_path: Path, engine: str) -> None:
    options = ProfileOptions(samples=24, allocation="fixed", estimator=engine, batch_size=1)
    tree, summary = profile(NumbersTask(), make_checkpoints(tmp_path / "run", (0,)), tmp_path / "c.nc", options=options)
    assert (tree["status"] == DONE).all() and (tree["n_samples"] == 24).all() and not summary.failures
    assert_finite(tree.dataset)
    with pytest.raises(UsageError, match="make 2 sub-batches of 1; standard errors need at least 3"):
        ProfileOptions(samples=2).rule(1)


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return int(getattr(done.exception, "exit_code", 99)), str(done.exception)
    return done.exit_code, done.output


class OneBroken(NumbersTask):
    """Its second checkpoint holds a NaN."""

    def load(self, checkpoint: Path) -> nn.Module:
        model = super().load(checkpoint)
        if "5" in checkpoint.stem:
            next(model.parameters()).data[0, 0] = float("nan")
        return model


def test_a_broken_checkpoint_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells fail, the others are measured; every command then says what there is, and nothing is NaN."""
    monkeypatch.chdir(tmp_path)
    run = make_checkpoints(tmp_path / "run")
    code, said = command("profile", run, "--task", f"{__name__}:OneBroken", "--samples", 80, "--quiet")
    assert code == 4
    cube = open_cube(Path("cube.nc")).dataset
    assert (cube["status"].values == [[DONE] * 3, [FAILED] * 3, [DONE] * 3]).all()
    assert_finite(cube)
    code, said = command("show", "cube.nc")
    assert code == 0 and "failed: progress=0.5,light=some: reference: NonFiniteError: the loss" in said
    assert said.count("failed: ") == 3
    code, said = command("optimize", "--budget", 4000)
    assert code == 0 and "+- 0.0000000000" not in said
    json.loads(Path("schedule.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in a schedule"))
    assert load_schedule("schedule.json").progress_mode == "trajectory"
    code, said = command("optimize", "--budget", 4000, "--progress", "fraction")
    assert code == 2 and "at the profiled progress 0.5 (" in said and "by trajectory" in said
    assert command("plot")[0] == 0 and "NaN" not in Path("report.html").read_text().split("<script", 1)[0]


def test_a_profile_that_could_measure_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cube, summary = measured(NumbersTask(scaled(float("nan"), "no")), tmp_path, steps=(0, 5), racing=True)
    assert (cube["status"] == FAILED).all() and len(summary.failures) == 6
    for mode in ("trajectory", "fraction"):
        code, said = command("optimize", "--budget", 4000, "--progress", mode)
        assert code == 2 and "gives no descent score" in said and "zero or lost in noise" in said
    assert command("show", "cube.nc")[0] == command("plot")[0] == 0
    assert not Path("schedule.json").exists()


def test_an_error_below_rounding_is_not_shown() -> None:
    assert with_error(1.8, 2e-16) == "1.8" and with_error(1.8, 2e-3) == "1.800 ± 0.002"
