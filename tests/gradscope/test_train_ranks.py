"""Training on several ranks: the steps of one, stops and resumes on any number, no silent disagreement, no hang."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.cli.run_settings import make_schedule
from gradscope.ranks import ALONE
from gradscope.trainer import read_log, train
from tests.gradscope.ranks_job import run_ranks
from tests.gradscope.small_methods import random_data, small_setting
from tests.gradscope.train_ranks_job import HANGS, Answer, run_function, step_on_nan, train_double

MIXED = ["mixed"]
CHANGES: dict[str, dict[str, Any]] = {
    "mocov3": {},
    "simclr": {"budget": 1000.0},
    "dino": {"drop_path": 0.2, "clip": 0.5, "weight_decay_end": 0.4, "decay_biases": False, "freeze_last_layer": 0.3},
}


def on_ranks(
    count: int,
    method: str,
    out: Path,
    schedules: list[str] = MIXED,
    trouble: dict[int, tuple[str, int]] | None = None,
    **changes: Any,
) -> list[Answer]:
    folder = out.with_name(f"{out.name}-job")
    return run_function(
        count, train_double, folder, method, out, schedules, trouble or {}, {**CHANGES[method], **changes}
    )


def alone(method: str, out: Path, **changes: Any) -> dict[str, Any]:
    train_double(ALONE, method, out, MIXED, {}, {**CHANGES[method], **changes})
    return last(out)


def last(out: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(out)[-1].path)


def assert_equal_runs(first: dict[str, Any], second: dict[str, Any], tolerance: float = 1e-8) -> None:
    """The same steps, strategies and units; parameters, buffers and moments to rounding."""
    assert [first[k] for k in ("step", "units", "samples")] == [second[k] for k in ("step", "units", "samples")]
    rows = [
        [(row["step"], row["units"], row["strategy"], row["lr"]) for row in json.loads(content["log"])]
        for content in (first, second)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == first["step"] > 5
    losses = [[row["loss"] for row in json.loads(content["log"])] for content in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance / 10)  # DINO keeps its centre in float32
    for name, value in first["model"].items():
        if name == "centre":
            tolerance = max(tolerance, 1e-6)
        torch.testing.assert_close(second["model"][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_ranks_train_as_one_does(method: str, count: int, tmp_path: Path) -> None:
    whole = alone(method, tmp_path / "whole")
    answers = on_ranks(count, method, tmp_path / "ranks")
    assert [a.code for a in answers] == [0] * count, answers
    assert_equal_runs(whole, last(tmp_path / "ranks"), 1e-5 if method == "dino" else 1e-8)
    assert {a.value for a in answers} == {(whole["step"], whole["units"], whole["samples"])}
    assert len({row["strategy"] for row in read_log(tmp_path / "ranks")}) > 2


def test_ranks_accumulate_passes_of_their_own(tmp_path: Path) -> None:
    whole = alone("mocov3", tmp_path / "whole", norm=False, accumulate=1)
    answers = on_ranks(2, "mocov3", tmp_path / "ranks", norm=False, accumulate=2)
    assert [a.code for a in answers] == [0, 0], answers
    assert_equal_runs(whole, last(tmp_path / "ranks"))


@pytest.mark.parametrize("method", ["mocov3", pytest.param("dino", marks=pytest.mark.slow)])
def test_ranks_stop_together_and_one_continues(method: str, tmp_path: Path) -> None:
    tolerance = 1e-5 if method == "dino" else 1e-8
    whole = alone(method, tmp_path / "whole")
    out = tmp_path / "run"
    answers = on_ranks(2, method, out, trouble={1: ("SIGTERM", 4)})
    assert [a.code for a in answers] == [143, 143], answers
    assert sum("stopped at" in a.stderr for a in answers) == 1
    assert load_checkpoint(out / "resume.pt")["step"] == 4
    assert_equal_runs(whole, alone(method, out), tolerance)
    assert not (out / "resume.pt").exists()


def test_one_stops_and_ranks_continue(tmp_path: Path) -> None:
    whole = alone("mocov3", tmp_path / "whole")
    out = tmp_path / "run"
    (answer,) = on_ranks(1, "mocov3", out, trouble={0: ("SIGTERM", 5)})
    assert answer.code == 143 and load_checkpoint(out / "resume.pt")["step"] == 5
    answers = on_ranks(2, "mocov3", out)
    assert [a.code for a in answers] == [0, 0], answers
    assert_equal_runs(whole, last(out))


def test_ranks_with_different_strategies_end_at_once(tmp_path: Path) -> None:
    answers = on_ranks(2, "mocov3", tmp_path / "run", ["none", "patch=7"])
    assert all(a.code not in (0, -9) and a.value is None for a in answers), answers
    assert sum("disagree on" in a.stderr for a in answers) == 1
    assert not (tmp_path / "run" / "step-00000001.pt").exists()


def test_ranks_that_draw_different_strategies_end_at_once(tmp_path: Path) -> None:
    answers = on_ranks(2, "mocov3", tmp_path / "run", ["patch=4@0.5;patch=7", "patch=4@0.2;patch=7"])
    assert all(a.code not in (0, -9) and a.value is None for a in answers), answers
    assert sum("RankError: the ranks disagree on" in a.stderr for a in answers) == 1


def test_ranks_that_see_different_checkpoints_end_at_once(tmp_path: Path) -> None:
    """As on two machines of which one has an old copy of the folder."""
    answers = run_function(2, train_apart, tmp_path / "job", tmp_path)
    assert all(a.code not in (0, -9) for a in answers), answers
    assert sum("disagree on the step to continue from" in a.stderr for a in answers) == 1


def train_apart(ranks: Any, folder: Path) -> None:
    out = folder / f"run-{ranks.rank}"
    if ranks.rank == 0:
        train_double(ALONE, "mocov3", out, MIXED, {}, {"budget": 200.0})
    train_double(ranks, "mocov3", out, MIXED, {}, {"budget": 200.0})


def test_ranks_that_see_different_images_end_at_once(tmp_path: Path) -> None:
    answers = run_function(2, train_on_images_of_its_own, tmp_path / "job", tmp_path / "run")
    assert all(a.code not in (0, -9) for a in answers), answers
    assert sum("disagree on settings, schedule or data: rank 1" in a.stderr for a in answers) == 1


def train_on_images_of_its_own(ranks: Any, out: Path) -> None:
    setting = small_setting("mocov3", data=random_data(seed=ranks.rank))
    train(setting, make_schedule("mixed", setting), out, ranks=ranks)


def test_a_rank_that_hangs_ends_the_job_in_time(tmp_path: Path) -> None:
    """A time-out far below the time for which the other rank hangs."""
    given = ("mocov3", tmp_path / "run", MIXED, {1: ("hang", 5)}, {})
    answers = run_function(2, train_double, tmp_path / "job", *given, GRADSCOPE_RANK_TIMEOUT=str(HANGS / 3))
    assert answers[0].code == 1 and all(a.value is None for a in answers), answers
    assert "does not answer in time, which GRADSCOPE_RANK_TIMEOUT sets" in answers[0].stderr


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job_and_it_continues(rank: int, tmp_path: Path) -> None:
    whole = alone("mocov3", tmp_path / "whole")
    out = tmp_path / "run"
    answers = on_ranks(2, "mocov3", out, trouble={rank: ("SIGKILL", 5)})
    assert answers[rank].code == -signal.SIGKILL and answers[1 - rank].code == 1, answers
    assert "another rank of this job has ended before its time" in answers[1 - rank].stderr
    answers = on_ranks(2, "mocov3", out)
    assert [a.code for a in answers] == [0, 0], answers
    assert_equal_runs(whole, last(out))


def test_a_loss_that_is_not_finite_on_one_rank_leaves_no_broken_checkpoint(tmp_path: Path) -> None:
    points = tuple(i / 20 for i in range(21))
    answers = on_ranks(2, "dino", tmp_path / "run", trouble={1: ("nan", 4)}, checkpoints=points)
    assert all(a.code not in (0, -9) for a in answers), answers
    assert sum("the loss is nan" in a.stderr for a in answers) >= 1
    saved = list_checkpoints(tmp_path / "run")
    assert len(saved) >= 2
    for checkpoint in saved:
        model = load_checkpoint(checkpoint.path)["model"]
        assert all(torch.isfinite(value).all() for value in model.values()), checkpoint.path.name


@pytest.mark.parametrize("method", ["mocov3", "dino"])
def test_no_rank_takes_a_step_that_is_not_finite_on_another(method: str, tmp_path: Path) -> None:
    """The loss of the other rank is finite, its averaged gradient is not."""
    for answer in run_function(2, step_on_nan, tmp_path, method):
        assert answer.code == 0, answer
        raised, unmoved = answer.value
        assert "the loss is nan" in raised and unmoved


def test_a_batch_that_the_ranks_do_not_divide_is_refused(tmp_path: Path) -> None:
    answers = on_ranks(2, "mocov3", tmp_path / "run", batch_size=15)
    assert sorted(a.code for a in answers) == [2, 2]
    assert sum("batch_size 15 is not a multiple of 2 ranks x 1 passes" in a.stderr for a in answers) == 1


def test_the_command_line_trains_on_two_ranks_and_speaks_once(tmp_path: Path) -> None:
    """On the bundled images and the demo's model, from the batches and rates of one process."""
    arguments = [
        "train", "--budget", "260", "--batch-size", "16", "--patch", "4", "--grid", "patch=4,7;dropout=0,0.5",
        "--schedule", "mixed", "--set", "evaluations=()", "--set", "head_hidden=16", "--json", "--out",
    ]  # fmt: skip
    (one,) = run_ranks(1, [*arguments, str(tmp_path / "one")], tmp_path)
    two = run_ranks(2, [*arguments, str(tmp_path / "two")], tmp_path)
    assert one.code == 0 and [rank.code for rank in two] == [0, 0], (one, two)
    assert two[1].stdout == two[1].stderr == ""
    facts = [json.loads(text.stdout) for text in (one, two[0])]
    assert [facts[0][k] for k in ("steps", "units", "samples")] == [facts[1][k] for k in ("steps", "units", "samples")]
    rows = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [r["strategy"] for r in rows[0]] == [r["strategy"] for r in rows[1]]
    assert [r["loss"] for r in rows[0]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-4)
