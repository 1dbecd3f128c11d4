"""What a cube keeps of each sub-batch's influence: covariances within and between cells."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.testing import assert_allclose, assert_array_equal

from gradscope import ProfileOptions, Strategy, merge_cubes, open_cube, profile, profile_of, save_cube
from gradscope.cube import DONE, groups_of
from gradscope.engines import derive_seed
from gradscope.errors import CubeError
from gradscope.influence import common_replicates, folded, influence_of
from gradscope.plots._view import best_strategies, read_view, variable
from schedulers import MOMENTS
from tests.gradscope.tasks_for_tests import FailingTask, LineTask, make_checkpoints

OPTIONS = ProfileOptions(samples=40, allocation="fixed", seed=3)
REFERENCE, OTHER = Strategy(keep="all", noise=0), Strategy(keep="half", noise=0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoints(tmp_path / "ckpt_dir")


def without_influence(tree: xr.DataTree, path: Path) -> xr.DataTree:
    """The cube as an earlier version wrote it."""
    save_cube(tree.to_dataset().drop_vars("influence"), groups_of(tree), path)
    return open_cube(path)


def test_products_over_the_replicates_are_the_covariance_of_every_cell(folder: Path, tmp_path: Path) -> None:
    profile(FailingTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    cube = open_cube(tmp_path / "cube.nc").dataset
    assert cube["influence"].dims == ("progress", "keep", "noise", "metric", "moment", "replicate")
    assert cube["influence"].dtype == np.float32 and cube.sizes["replicate"] == 5
    psi, done = cube["influence"].values.astype(float), (cube["status"] == DONE).values
    covariance = cube["moment_cov"].values
    scale = np.sqrt(np.einsum("...ee,...ff->...ef", covariance, covariance))
    close = abs(np.einsum("...er,...fr->...ef", psi, psi) - covariance) <= 1e-5 * scale
    assert close[done].all() and done.sum() == 12
    assert (psi[~done] == 0).all() and abs(psi[done].sum(-1)).max() < 1e-5 * abs(psi[done]).max()


def deleted_by_hand(folder: Path) -> dict[Strategy, np.ndarray]:
    """variance and norm_sq (M, 2) of the plain formulas with sub-batch m left out, from gradients by backward."""
    task, rows = LineTask(), {REFERENCE: [], OTHER: []}
    model = task.load(folder / "step-5.pt")
    for m, batch in zip(range(5), task.batches(8, 3), strict=False):
        for strategy, gradients in rows.items():
            seed = derive_seed(3, 5, m, strategy)
            torch.manual_seed(seed)
            loss = task.loss(model, batch, strategy, torch.Generator().manual_seed(seed))
            found = torch.autograd.grad(loss, list(model.parameters()))
            gradients.append(torch.cat([g.flatten() for g in found]).double().numpy())
    deleted = {}
    for strategy, gradients in rows.items():
        g_MP = np.stack(gradients)
        left = [np.delete(g_MP, m, 0) for m in range(5)]
        spread = [((g - g.mean(0)) ** 2).sum() for g in left]
        norm = [(g.mean(0) ** 2).sum() - s / (4 * 3) for g, s in zip(left, spread, strict=True)]
        deleted[strategy] = np.stack([8 / 3 * np.array(spread), norm], axis=1)
    return deleted


def test_products_between_strategies_are_the_jackknife_of_their_difference(folder: Path, tmp_path: Path) -> None:
    profile(LineTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    found = profile_of(open_cube(tmp_path / "cube.nc").dataset, metric="euclidean")
    assert found.influence is not None and found.covariance is not None
    names = found.grid.strategies()
    a, b = (found.influence[1, names.index(s)] for s in (OTHER, REFERENCE))
    deleted = deleted_by_hand(folder)
    apart = deleted[OTHER] - deleted[REFERENCE]
    expected = 4 / 5 * ((apart - apart.mean(0)) ** 2).sum(0)
    rows = [MOMENTS.index("variance"), MOMENTS.index("norm_sq")]
    assert_allclose(((a - b)[rows] ** 2).sum(-1), expected, rtol=1e-4)
    alone = sum(np.diagonal(found.covariance[1, names.index(s)])[rows] for s in (OTHER, REFERENCE))
    assert (abs(expected - alone) > 0.01 * alone).all()  # common images: independent errors would be another number


def test_all_strategies_share_the_references_row_as_they_share_its_norm(folder: Path, tmp_path: Path) -> None:
    few = dataclasses.replace(OPTIONS, samples=24, only=(OTHER,))
    profile(LineTask(), folder, tmp_path / "cube.nc", options=few)
    own = profile_of(open_cube(tmp_path / "cube.nc").dataset).influence
    more = dataclasses.replace(OPTIONS, only=(REFERENCE,))
    profile(LineTask(), folder, tmp_path / "cube.nc", options=more)
    shared = profile_of(open_cube(tmp_path / "cube.nc").dataset).influence
    assert own is not None and shared is not None
    i, c = MOMENTS.index("norm_sq_ref"), LineTask.grid.strategies().index(OTHER)
    assert own[:, c, i].any() and shared[0, 0, i].all()
    assert_array_equal(shared[:, c, i], shared[:, 0, i])
    rest = [e for e in range(5) if e != i]
    assert_array_equal(shared[:, c, rest, :3], own[:, c, rest])
    assert (shared[:, c, rest, 3:] == 0).all()


def test_influences_that_share_a_replicate_are_added_up() -> None:
    rng = np.random.default_rng(0)
    psi = rng.standard_normal((2, 5, 7))
    expected = np.zeros((2, 5, 3))
    for m in range(7):
        expected[..., m % 3] += psi[..., m]
    assert_allclose(folded(psi, 3), expected, rtol=1e-15)
    assert_array_equal(folded(psi, 9), np.concatenate([psi, np.zeros((2, 5, 2))], axis=-1))
    deleted = rng.standard_normal((7, 2, 5))
    assert_allclose(influence_of(deleted, 3), folded(influence_of(deleted, 7), 3), rtol=1e-5, atol=1e-6)


def test_adding_up_keeps_products_in_expectation() -> None:
    """Of two correlated estimates, 64 sub-batches in 8 replicates, over 4,000 draws: within 3 standard errors."""
    a, common = np.random.default_rng(1).standard_normal((2, 4000, 64)) / 8
    b = 0.6 * a + 0.8 * common
    products = (folded(a, 8) * folded(b, 8)).sum(-1)
    assert abs(products.mean() - 0.6) < 3 * products.std() / np.sqrt(4000)


def test_a_cube_with_more_sub_batches_than_replicates_adds_them_up_and_merges(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (dataclasses.replace(OPTIONS, only=(s,)) for s in (REFERENCE, OTHER))
    large, _ = profile(LineTask(), folder, tmp_path / "whole.nc", options=OPTIONS)
    wide, _ = profile(LineTask(), folder, tmp_path / "wide.nc", options=first)
    monkeypatch.setattr("gradscope.profile_cube.MOST_REPLICATES", 2)
    tight, _ = profile(LineTask(), folder, tmp_path / "tight.nc", options=second)
    assert (wide.sizes["replicate"], tight.sizes["replicate"]) == (5, 2)
    at = dict(keep="half", noise=0.5)
    added = folded(large["influence"].sel(at).values, 2)
    assert_allclose(tight["influence"].sel(at), added, rtol=1e-5, atol=1e-6 * abs(added).max())
    for parts in ([wide, tight], [tight, wide]):
        merged, _ = merge_cubes(parts)
        assert merged.sizes["replicate"] == 2  # what is added up cannot be told apart again
        assert_array_equal(merged["influence"].sel(at), tight["influence"].sel(at))
        assert_array_equal(
            merged["influence"].sel(keep="all", noise=0), folded(wide["influence"].sel(keep="all", noise=0).values, 2)
        )
    monkeypatch.undo()
    again, _ = profile(LineTask(), folder, tmp_path / "tight.nc", options=dataclasses.replace(OPTIONS, only=(OTHER,)))
    assert_array_equal(again["influence"].sel(at), tight["influence"].sel(at))


def test_the_number_of_replicates_that_cubes_have_in_common() -> None:
    def cube(replicates: int, blocks: int) -> xr.Dataset:
        values = {"influence": ("replicate", np.zeros(replicates)), "n_samples": ("cell", [8 * blocks])}
        return xr.Dataset(values, attrs={"batch_size": 8})

    none = xr.Dataset({"n_samples": ("cell", [800])}, attrs={"batch_size": 8})
    assert common_replicates([cube(5, 5), none, cube(16, 3)], 8) == 16
    assert common_replicates([cube(256, 300), cube(128, 200), cube(12, 12)], 256) == 128
    assert common_replicates([none], 7) == 7


def test_more_samples_later_widen_the_cube_and_keep_what_is_there(folder: Path, tmp_path: Path) -> None:
    before, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    more = dataclasses.replace(OPTIONS, samples=64, only=(OTHER,))
    after, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=more)
    fresh, _ = profile(LineTask(), folder, tmp_path / "fresh.nc", options=more)
    assert (before.sizes["replicate"], after.sizes["replicate"]) == (5, 8)
    grown = after["n_samples"] > before["n_samples"]
    assert int(grown.sum()) == 3
    kept = after["influence"].where(~grown, 0)
    assert_array_equal(kept[..., :5], before["influence"].where(~grown, 0))
    assert (kept[..., 5:] == 0).all()
    assert_array_equal(after["influence"].where(grown, 0), fresh["influence"].where(grown, 0))


def test_cubes_from_before_influence_was_kept(folder: Path, tmp_path: Path) -> None:
    """Their cells stay, and as long as one of them is in a cube no covariance between cells is claimed."""
    some = dataclasses.replace(OPTIONS, only=(REFERENCE, OTHER))
    tree, _ = profile(LineTask(), folder, tmp_path / "old.nc", options=some)
    old = without_influence(tree, tmp_path / "old.nc")
    assert profile_of(old.dataset).influence is None
    resumed, summary = profile(LineTask(), folder, tmp_path / "old.nc", options=OPTIONS)
    assert (summary.reused, summary.measured) == (6, 12)
    whole, _ = profile(LineTask(), folder, tmp_path / "whole.nc", options=OPTIONS)
    was = old["status"] == DONE
    assert_array_equal(resumed["influence"].where(~was, 0), whole["influence"].where(~was, 0))
    assert (resumed["influence"].where(was, 0) == 0).all()
    assert profile_of(resumed.to_dataset()).influence is None
    merged, _ = merge_cubes([old, whole])
    assert profile_of(merged).influence is None  # cells of as many samples: the first cube's count
    larger, _ = profile(LineTask(), folder, tmp_path / "larger.nc", options=dataclasses.replace(some, samples=48))
    for parts in ([old, larger], [larger, old]):
        merged, _ = merge_cubes(parts)
        assert_array_equal(merged["influence"], larger["influence"])
        assert profile_of(merged).influence is not None
    older = without_influence(larger, tmp_path / "older.nc")
    for parts in ([older, tree], [tree, older]):
        merged, _ = merge_cubes(parts)
        assert not merged["influence"].values.any() and profile_of(merged).influence is None


STAGES = [
    {"start": 0, "end": 0.25, "cost": 2.5, "mixture": [[dict(REFERENCE), 0.5], [{"keep": "half", "noise": 2}, 0.5]]},
    {"start": 0.25, "end": 1, "cost": 3, "mixture": [[dict(REFERENCE), 1]]},
]


def test_a_cube_knows_the_stages_that_its_checkpoints_were_trained_under(folder: Path, tmp_path: Path) -> None:
    tree, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    cube = tree.to_dataset()
    assert profile_of(cube).pilot is None
    cube.attrs["training_json"] = json.dumps({"budget": 100.0, "stages": STAGES})
    found = profile_of(cube)
    assert found.pilot is not None and found.reference_budget == 100
    first, last = found.pilot
    assert first.mixture == ((REFERENCE, 0.5), (Strategy(keep="half", noise=2), 0.5)) and first.cost == 2.5
    assert (last.start, last.end, last.strategy, last.pure) == (0.25, 1, REFERENCE, True)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        (json.dumps({"stages": STAGES[:1]}), r"stages\[0\].end"),
        (json.dumps({"stages": 5}), "stages: .*int"),
        (json.dumps({"stages": [{**STAGES[1], "start": None}]}), "stages: "),
        (json.dumps({"stages": [{"start": 0, "end": 1, "cost": 3}]}), "stages: one has no 'mixture'"),
        (json.dumps({"stages": [{**STAGES[1], "start": 0, "mixture": [[{"noise": [1]}, 1]]}]}), "axis 'noise'"),
    ],
)
def test_damaged_words_about_the_training_are_named(folder: Path, tmp_path: Path, training: str, message: str) -> None:
    options = dataclasses.replace(OPTIONS, samples=24, only=(REFERENCE,), checkpoints=(0,))
    cube = profile(LineTask(), folder, tmp_path / "cube.nc", options=options)[0].to_dataset()
    cube.attrs["training_json"] = training
    with pytest.raises(CubeError, match=f"training_json.*{message}"):
        profile_of(cube)


def test_rivals_are_told_by_what_measurements_on_the_same_images_share(folder: Path, tmp_path: Path) -> None:
    tree, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    view, shown = read_view(tree, metric="euclidean"), variable(tree, "descent")
    seen = profile_of(tree.dataset, metric="euclidean")
    psi_TCR = seen.score_influence("descent")
    scores_TC, errors_TC = seen.scores("descent", seen.progress)
    assert psi_TCR is not None
    assert_allclose(np.sqrt((psi_TCR**2).sum(-1)), errors_TC, rtol=1e-4)
    fewer = 0
    for t, best in enumerate(best_strategies(view, shown)):
        assert best is not None
        first = int(np.nanargmax(scores_TC[t]))
        apart_C = np.sqrt(((psi_TCR[t] - psi_TCR[t, first]) ** 2).sum(-1))
        near = set(np.flatnonzero(scores_TC[t, first] - scores_TC[t] <= 2 * apart_C)) - {first}
        names = [str(strategy) for strategy in seen.grid.strategies()]
        assert str(best.winner.strategy) == names[first]
        assert {str(rival.strategy) for rival in best.rivals} == {names[c] for c in near}
        alone = set(
            np.flatnonzero(scores_TC[t, first] - scores_TC[t] <= 2 * np.hypot(errors_TC[t], errors_TC[t, first]))
        )
        fewer += len(near) < len(alone - {first})
    assert fewer  # paired measurements tell more apart
    old = without_influence(tree, tmp_path / "old.nc")
    assert profile_of(old.dataset, metric="euclidean").score_influence("descent") is None
    assert all(best_strategies(read_view(old, metric="euclidean"), shown))
    moved = tree.to_dataset().copy(deep=True)  # as an earlier version computed it
    moved["descent"] *= 1.1
    alone = best_strategies(read_view(moved, metric="euclidean"), shown)
    moved = moved.drop_vars("influence")
    assert alone == best_strategies(read_view(moved, metric="euclidean"), shown)
