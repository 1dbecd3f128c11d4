"""The trainer: its budget, its checkpoints, and a resumed run that equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.cli.training import make_schedule
from gradscope.config import Setting, TrainConfig
from gradscope.engines import derive_seed
from gradscope.errors import CheckpointError, InfeasibleError, Interrupted, UsageError
from gradscope.evaluation import extract_features, finetune_accuracy, knn_accuracy, linear_accuracy
from gradscope.trainer import load_run, read_log, train
from schedulers import Strategy, in_costs

Make = Callable[..., Setting]


def run(setting: Setting, out: Path, schedule: str = "mixed", **options: object):  # type: ignore[no-untyped-def]
    return train(setting, make_schedule(schedule, setting), out, **options)  # type: ignore[arg-type]


def test_the_budget_is_spent_to_within_one_step(make_setting: Make, tmp_path: Path) -> None:
    setting = make_setting()
    result = run(setting, tmp_path / "run", "patch=7,dropout=0.5@0.5;patch=4")
    cheap, full = (16 * setting.new_model().cost(Strategy(patch=p, dropout=d)) for p, d in ((7, 0.5), (4, 0)))
    assert setting.config.budget - full < result.units <= setting.config.budget
    log = [row for row in read_log(tmp_path / "run") if "loss" in row]
    units = sum({"patch=7,dropout=0.5": cheap, "patch=4,dropout=0": full}[row["strategy"]] for row in log)
    assert units == pytest.approx(result.units) and result.samples == 16 * result.step == 16 * len(log)
    switch = next(i for i, row in enumerate(log) if row["strategy"] == "patch=4,dropout=0")
    assert log[switch - 1]["units"] >= 200 > log[switch - 2]["units"]


def test_a_schedule_of_another_cost_model_is_not_run_by_its_fractions(make_setting: Make, tmp_path: Path) -> None:
    setting = make_setting()
    plan = dataclasses.replace(make_schedule("patch=7@0.5;patch=4", setting), cost_model="measured")
    with pytest.raises(UsageError, match=r"counted in units of the cost model 'measured'.*in_costs"):
        train(setting, plan, tmp_path / "run")
    train(setting, in_costs(plan, setting.new_model().cost, "tokens"), tmp_path / "run")


def test_checkpoints_lie_at_the_asked_progress(small_run: Path) -> None:
    found = list_checkpoints(small_run)
    assert [c.step for c in found] == sorted(c.step for c in found)
    for checkpoint, wanted in zip(found, (0, 0.25, 0.5, 0.75, 1), strict=True):
        assert abs(checkpoint.progress - wanted) <= 16 * 4 / 400
    assert not (small_run / "resume.pt").exists()


def test_log_rows_carry_what_is_documented(small_run: Path) -> None:
    rows = read_log(small_run)
    keys = {"step", "units", "samples", "fraction", "strategy", "loss", "lr", "samples_per_second", "seconds"}
    assert set(rows[0]) == keys
    config = TrainConfig.from_dict(load_checkpoint(list_checkpoints(small_run)[0].path)["config"])
    losses = [row for row in rows if "loss" in row]
    for before, row in itertools.pairwise(losses):  # the rate of a step is that of the fraction spent before it
        expected = config.lr * 16 / 256 * config.learning_rate_decay.factor(before["fraction"])
        assert row["lr"] == pytest.approx(expected)
    assert [round(r["fraction"], 1) for r in rows if "accuracy" in r][-1] == 1.0


def test_a_stopped_run_continues_to_the_same_parameters(make_setting: Make, tmp_path: Path) -> None:
    setting = make_setting()
    run(setting, tmp_path / "whole")
    for at in (3, 12):
        count = 0

        def stop(fraction: float, text: str, at: int = at) -> None:
            nonlocal count
            count += 1
            if count == at:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(Interrupted, match="run the same command") as stopped:
            run(setting, tmp_path / f"part-{at}", report=stop)
        assert stopped.value.exit_code == 130
        assert (tmp_path / f"part-{at}" / "resume.pt").exists()
        run(setting, tmp_path / f"part-{at}")
        whole, part = (load_checkpoint(list_checkpoints(tmp_path / name)[-1].path) for name in ("whole", f"part-{at}"))
        assert all(torch.equal(value, part["model"][name]) for name, value in whole["model"].items())
        moments = [c["optimizer"]["state"][0]["exp_avg_sq"] for c in (whole, part)]
        assert torch.equal(*moments)
        logs = [
            [{k: r[k] for k in ("step", "units", "loss", "strategy") if k in r} for r in json.loads(c["log"])]
            for c in (whole, part)
        ]
        assert logs[0] == logs[1]


def test_a_finished_run_is_not_touched_again(make_setting: Make, tmp_path: Path) -> None:
    setting = make_setting()
    first = run(setting, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("step-*.pt")}
    assert run(setting, tmp_path / "run") == first
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("step-*.pt")} == before


def test_the_folder_of_another_run_is_refused(make_setting: Make, tmp_path: Path) -> None:
    run(make_setting(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="another seed; choose another --out"):
        run(make_setting(seed=1), tmp_path / "run")
    with pytest.raises(CheckpointError, match="another schedule"):
        run(make_setting(), tmp_path / "run", "none")


def test_a_truncated_checkpoint_is_named(small_run: Path) -> None:
    last = sorted(small_run.glob("step-*.pt"))[-1]
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=rf"{last.name}: cannot be read as a checkpoint"):
        list_checkpoints(small_run)


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "config": Payload()}, tmp_path / "step-1.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "step-1.pt")
    assert not (tmp_path / "ran").exists()


def test_a_budget_below_one_step_names_the_smallest(make_setting: Make, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="smallest budget that does is 64") as error:
        run(make_setting(budget=60.0), tmp_path / "run", "none")
    assert error.value.smallest == 64 and error.value.exit_code == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "byol"}, "method 'byol' cannot be trained; the methods are mocov3"),
        ({"model": "huge"}, "unknown model 'huge'"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"batch_size": 500}, "larger than the 192 images"),
        ({"patches": (5,)}, "patch=5 does not divide image_size=28"),
        ({"decay": "linear"}, "linear"),
    ],
)
def test_settings_out_of_range_are_refused(make_setting: Make, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_setting(**changes)


def test_configuration_round_trip(make_setting: Make) -> None:
    config = make_setting().config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UsageError, match="unknown setting 'momentun'"):
        TrainConfig.from_dict({"budget": 1.0, "momentun": 0.9})


def test_knn_is_a_weighted_vote_of_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    train_ND, test_MD = torch.randn(40, 6, generator=generator), torch.randn(15, 6, generator=generator)
    labels_N, labels_M = (
        torch.randint(0, 3, (40,), generator=generator),
        torch.randint(0, 3, (15,), generator=generator),
    )
    right = 0
    for x, label in zip(test_MD, labels_M, strict=True):
        cosine = [float(torch.cosine_similarity(x, t, dim=0)) for t in train_ND]
        nearest = sorted(range(40), key=lambda i: -cosine[i])[:7]
        votes = [
            sum(torch.tensor(cosine[i] / 0.07).exp().item() for i in nearest if labels_N[i] == c) for c in range(3)
        ]
        right += votes.index(max(votes)) == label
    assert knn_accuracy(train_ND, labels_N, test_MD, labels_M, k=7) == pytest.approx(right / 15)
    with pytest.raises(UsageError, match="k=41 neighbours"):
        knn_accuracy(train_ND, labels_N, test_MD, labels_M, k=41)


def test_linear_probe_separates_what_is_separable() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.nn.functional.one_hot(labels, 3).float() @ torch.randn(3, 5, generator=generator) * 3
    features = features + 0.3 * torch.randn(90, 5, generator=generator)
    assert linear_accuracy(features[:60], labels[:60], features[60:], labels[60:]) == 1.0
    assert linear_accuracy(torch.randn(60, 5, generator=generator), labels[:60], features[60:], labels[60:]) < 0.8


def test_fine_tuning_learns_and_leaves_the_backbone_alone(small_run: Path) -> None:
    setting, model, _ = load_run(list_checkpoints(small_run)[-1].path)
    before = [p.clone() for p in model.backbone.parameters()]
    accuracy = finetune_accuracy(model.backbone, setting.data, epochs=20, batch_size=32, lr=2e-3)
    assert accuracy > 0.4  # ten classes
    assert all(torch.equal(a, b) for a, b in zip(before, model.backbone.parameters(), strict=True))


def test_features_ignore_the_training_mode_and_leave_it(small_run: Path) -> None:
    setting, model, _ = load_run(list_checkpoints(small_run)[-1].path)
    images = setting.data.test_images
    first = extract_features(model.backbone, images, setting.data, batch_size=7)
    assert model.backbone.training
    torch.testing.assert_close(first, extract_features(model.backbone.eval(), images, setting.data))
    assert not model.backbone.training


def test_a_step_is_momentum_loss_backward_adamw_written_out(make_setting: Make, tmp_path: Path) -> None:
    """Two steps by hand from the initial model: views, masks and rate as documented, torch's own AdamW."""
    setting = make_setting(budget=130.0, warmup=0.0, momentum=0.5)
    run(setting, tmp_path / "run", "patch=4,dropout=0.5")
    trained = load_checkpoint(list_checkpoints(tmp_path / "run")[-1].path)
    assert trained["step"] == 3
    model, config, strategy = setting.new_model().train(), setting.config, Strategy(patch=4, dropout=0.5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1)
    for step in range(3):
        fraction = step * 16 * 2.5 / 130
        indices = setting.shuffled(0, 0)[step * 16 : (step + 1) * 16]
        views = setting.views(indices, seeded("views", 0, step), torch.device("cpu"))
        optimizer.param_groups[0]["lr"] = config.lr * 16 / 256 * (1 + math.cos(math.pi * fraction)) / 2
        keep = 1 - (1 - 0.5) * (1 + math.cos(math.pi * fraction)) / 2
        with torch.no_grad():
            for slow, online in (
                (model.momentum_backbone, model.backbone),
                (model.momentum_projector, model.projector),
            ):
                for a, b in zip(slow.parameters(), online.parameters(), strict=True):
                    a.mul_(keep).add_(b, alpha=1 - keep)
        optimizer.zero_grad()
        model.loss((views[0], views[1]), strategy, seeded("mask", 0, step)).backward()
        optimizer.step()
    state = trained["optimizer"]["state"]
    moments = {name: state[i]["exp_avg_sq"] for i, name in enumerate(trained["parameter_names"])}
    compared = 0
    for name, value in model.named_parameters():
        online = name.removeprefix("momentum_")
        if online in moments:  # where the gradient is nothing but rounding (a bias before BatchNorm), Adam blows it up
            real = moments[online] > 1e-13
            torch.testing.assert_close(trained["model"][name][real], value[real], rtol=1e-3, atol=2e-6)
            compared += int(real.sum())
    assert compared > 0.9 * sum(
        p.numel() for n, p in model.named_parameters() if n.removeprefix("momentum_") in moments
    )


def seeded(stream: str, seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(stream, seed, step))


def test_the_last_step_is_always_kept_and_only_its_accuracy_is_the_result(make_setting: Make, tmp_path: Path) -> None:
    setting = make_setting(checkpoints=(0.5,), evaluations=(0.0, 0.5))
    result = run(setting, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run")[-1].step == result.step
    assert result.accuracy is None
    assert next(row["step"] for row in read_log(tmp_path / "run") if "accuracy" in row) == 0
    assert run(setting, tmp_path / "run") == result


def test_a_signal_in_the_last_step_stops_what_would_follow(make_setting: Make, tmp_path: Path) -> None:
    def stop(fraction: float, text: str) -> None:
        if text.startswith("kNN") and fraction > 0.9:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="complete"):
        run(make_setting(), tmp_path / "run", report=stop)
    assert run(make_setting(), tmp_path / "run").accuracy is not None


def test_training_leaves_other_files_of_the_folder_alone(make_setting: Make, tmp_path: Path) -> None:
    (tmp_path / "schedule.json").write_text("mine")
    run(make_setting(), tmp_path)
    assert (tmp_path / "schedule.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "abc"}, "budget is 'abc'; it must be a number"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"checkpoints": ("a",)}, "checkpoints is .*several of: a number"),
        ({"evaluations": 0.5}, "evaluations is 0.5; it must be several of"),
        ({"head_hidden": 1.5}, "head_hidden is 1.5; it must be a whole number"),
        ({"freeze_patch_embed": 1}, "freeze_patch_embed is 1; it must be True or False"),
        ({"lr": -1.0}, "lr is -1.0; it must be positive"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"weight_decay": -3.0}, "weight_decay is -3.0"),
        ({"momentum": 5.0}, r"momentum: 5.0 must lie in \[0, 1\]"),
    ],
)
def test_every_setting_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**{"budget": 1e3, **changes})  # type: ignore[arg-type]
