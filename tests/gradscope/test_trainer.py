"""The trainer: its budget, its checkpoints, and a resumed run that equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import shutil
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradscope.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from gradscope.cli.run_settings import make_schedule
from gradscope.config import Setting, TrainConfig
from gradscope.engines import derive_seed
from gradscope.errors import BusyError, CheckpointError, InfeasibleError, Interrupted, UsageError
from gradscope.evaluation import extract_features
from gradscope.locks import sole_writer
from gradscope.trainer import RunOptions, load_run, read_log, train
from schedulers import Strategy, constant_schedule, in_costs, load_schedule
from tests.gradscope.small_methods import SmallSetting, random_data, small_setting
from tests.gradscope.train_ranks_job import run_function, train_killed_saving, train_until_killed

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
        ({"method": "byol"}, "method is 'byol'; it must be one of mocov3, simclr, dino"),
        ({"model": "huge"}, "model is 'huge'; it must be one of demo, tiny, small, base"),
        ({"precision": "fp16"}, "precision is 'fp16'; it must be one of float32, bf16"),
        ({"small_crops": 2}, "small_crops is 2; only dino has it, not mocov3"),
        ({"betas": (0.9,)}, "betas: .* must be two numbers"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale: .* must be the least and the most share"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
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


METHODS = ("mocov3", "simclr", "dino")
FEATURES = {  # settings that have state or timing of their own, so that a resumed run would show what it forgets
    "mocov3": {"accumulate": 2, "drop_path": 0.2},
    "simclr": {"precision": "bf16"},
    "dino": {"drop_path": 0.2, "clip": 1.0, "decay_biases": False, "weight_decay_end": 0.4, "freeze_last_layer": 0.3},
}


def of_method(method: str, **changes: object) -> SmallSetting:
    return small_setting(method, **{"evaluations": (0.0, 0.5, 1.0), "budget": 1000.0, **FEATURES[method], **changes})


def cost_by_hand(method: str, strategy: str) -> float:
    """Units per sample from sequence lengths counted here; DINO with two crops of 3 x 3 patches."""
    values = dict(part.split("=") for part in strategy.split(","))
    tokens = (28 // int(values["patch"])) ** 2
    query = tokens - math.ceil(tokens * float(values["dropout"])) + 1
    return {
        "mocov3": 3 * query + tokens + 1, "simclr": 3 * (query + query), "dino": 3 * query + 3 * 2 * 10 + 50,
    }[method] / 50  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_spends_its_budget_and_logs_what_is_documented(method: str, tmp_path: Path) -> None:
    setting = of_method(method)
    result = run(setting, tmp_path / "run", "mixed")
    rows = read_log(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "accuracy" in row]
    assert [row["step"] for row in steps] == list(range(1, result.step + 1))
    units = [16 * cost_by_hand(method, row["strategy"]) for row in steps]
    assert [row["units"] for row in steps] == pytest.approx(list(itertools.accumulate(units)), rel=1e-12)
    assert 1000 - 16 * cost_by_hand(method, "patch=4,dropout=0") < result.units <= 1000
    assert result.units == pytest.approx(sum(units)) and result.samples == 16 * result.step
    assert len({row["strategy"] for row in steps}) > 2
    common = {"step", "units", "samples", "fraction", "samples_per_second", "seconds"}
    assert all(set(row) == common | {"strategy", "loss", "lr"} for row in steps)
    assert all(set(row) == common | {"accuracy"} for row in evaluated)
    assert [row["fraction"] for row in steps] == pytest.approx([row["units"] / 1000 for row in steps])
    assert all(math.isfinite(row["loss"]) for row in steps) and len({row["loss"] for row in steps}) == len(steps)
    assert len(evaluated) == 3 and evaluated[0]["step"] == 0 and evaluated[2]["step"] == result.step
    assert evaluated[1]["fraction"] >= 0.5 > evaluated[1]["fraction"] - 16 * 7 / 1000
    assert result.accuracy == evaluated[-1]["accuracy"]
    content = load_checkpoint(list_checkpoints(tmp_path / "run")[-1].path)
    assert content["step"] == result.step and content["config"]["method"] == method
    assert set(content["model"]) == set(setting.new_model().state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_to_the_same_parameters_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Stopped by SIGTERM in its midst, from resume.pt; and from a checkpoint, as after a kill without warning."""
    setting = of_method(method, evaluations=(0.5,))
    run(setting, tmp_path / "whole")
    whole = load_checkpoint(list_checkpoints(tmp_path / "whole")[-1].path)
    news = 0

    def stop(fraction: float, text: str) -> None:
        nonlocal news
        news += 1
        if news == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="run the same command to continue") as stopped:
        run(setting, tmp_path / "stopped", report=stop)
    assert stopped.value.exit_code == 143
    resumed = load_checkpoint(tmp_path / "stopped" / "resume.pt")["step"]
    assert 5 <= resumed <= 7
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for checkpoint in list_checkpoints(tmp_path / "killed")[2:]:
        checkpoint.path.unlink()
    for name in ("stopped", "killed"):
        result = run(setting, tmp_path / name)
        assert result.step == whole["step"]
        part = load_checkpoint(list_checkpoints(tmp_path / name)[-1].path)
        assert_identical(whole, part)
        assert not (tmp_path / name / "resume.pt").exists()
        assert [p.name for p in (tmp_path / name).glob("step-*")] and [
            c.step for c in list_checkpoints(tmp_path / name)
        ] == [c.step for c in list_checkpoints(tmp_path / "whole")]


def assert_identical(first: dict, second: dict) -> None:
    """Model, momentum encoder, centre, optimizer and log (but for seconds) are the same to the bit."""
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    states = [content["optimizer"]["state"] for content in (first, second)]
    assert states[0].keys() == states[1].keys()
    for i, state in states[0].items():
        assert all(torch.equal(value, states[1][i][key]) for key, value in state.items()), i
    logs = [
        [
            {k: v for k, v in row.items() if "seconds" not in k and k != "samples_per_second"}
            for row in json.loads(c["log"])
        ]
        for c in (first, second)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", ["mocov3", pytest.param("dino", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_parameters(method: str, kills: int, tmp_path: Path) -> None:
    """SIGKILL, also in the midst of writing; whatever is there after it can be read, and nothing unfinished stays."""
    changes = {"checkpoints": tuple(i / 25 for i in range(26)), "evaluations": (), **FEATURES[method]}
    begun = time.monotonic()
    (answer,) = run_function(1, train_until_killed, tmp_path / "job", method, tmp_path / "whole", math.inf, changes)
    assert answer.code == 0, answer
    seconds, choose = answer.value, random.Random(f"{kills} {method}")
    done = killed = 0
    while not done:
        delay = choose.uniform(0, 1.2 * seconds / min(kills, 6)) if killed < kills else math.inf
        (answer,) = run_function(1, train_until_killed, tmp_path / "job", method, tmp_path / "run", delay, changes)
        assert answer.code in (0, -signal.SIGKILL), answer
        killed, done = killed + (answer.code != 0), answer.code == 0 and killed >= min(kills, 1)
        for path in (tmp_path / "run").glob("*.pt"):
            load_checkpoint(path)
        if answer.code == 0 and not done:
            shutil.rmtree(tmp_path / "run")
        assert time.monotonic() - begun < 500
    whole, part = (load_checkpoint(list_checkpoints(tmp_path / name)[-1].path) for name in ("whole", "run"))
    assert_identical(whole, part)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "run")]
    assert names[0] == names[1]


@pytest.mark.parametrize("number", [0, 2])
def test_a_run_killed_in_the_midst_of_writing_a_checkpoint_continues(number: int, tmp_path: Path) -> None:
    changes = {"evaluations": (), "budget": 500.0}
    setting, out = of_method("mocov3", **changes), tmp_path / "run"
    run(setting, tmp_path / "whole")
    arguments = ("mocov3", out, number, {**FEATURES["mocov3"], **changes})
    (answer,) = run_function(1, train_killed_saving, tmp_path / "job", *arguments)
    assert answer.code == -signal.SIGKILL and len(list(out.glob(".step-*.pt.*.tmp"))) == 1
    assert len(list(out.glob("*.pt"))) == number
    for path in out.glob("*.pt"):
        load_checkpoint(path)
    run(setting, out)
    whole, part = (load_checkpoint(list_checkpoints(tmp_path / name)[-1].path) for name in ("whole", "run"))
    assert_identical(whole, part)
    assert not list(out.glob(".*.tmp"))


def test_a_checkpoint_is_replaced_as_a_whole(small_run: Path) -> None:
    """Who has the old file open goes on reading the old one: it is renamed over, not written into."""
    path = list_checkpoints(small_run)[-1].path
    content, before = load_checkpoint(path), path.read_bytes()
    with path.open("rb") as stream:
        save_checkpoint(path, {**content, "step": 99})
        assert stream.read() == before
    assert load_checkpoint(path)["step"] == 99 and not list(small_run.glob(".*.tmp"))


def test_only_the_newest_checkpoints_are_kept_where_asked(tmp_path: Path) -> None:
    setting = of_method("mocov3", checkpoints=tuple(i / 5 for i in range(6)), evaluations=(), budget=700.0)
    everything = run(setting, tmp_path / "all")
    assert len(list_checkpoints(tmp_path / "all")) == 6
    kept = run(setting, tmp_path / "two", options=RunOptions(keep=2))
    names = [[c.path.name for c in list_checkpoints(tmp_path / n)] for n in ("all", "two")]
    assert names[1] == names[0][-2:] and kept.step == everything.step
    assert run(setting, tmp_path / "two", options=RunOptions(keep=1)) == kept  # a finished run is left as it is
    with pytest.raises(UsageError, match=r"keep is 0; at least the newest checkpoint \(1\) has to stay"):
        RunOptions(keep=0)


def test_a_stopped_run_that_keeps_one_checkpoint_continues(tmp_path: Path) -> None:
    setting = of_method("mocov3", evaluations=(), checkpoints=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    run(setting, tmp_path / "whole")

    def stop(fraction: float, text: str) -> None:
        if 0.5 < fraction < 0.6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(setting, tmp_path / "run", report=stop, options=RunOptions(keep=1))
    assert len(list_checkpoints(tmp_path / "run")) == 1
    run(setting, tmp_path / "run", options=RunOptions(keep=1))
    whole, part = (load_checkpoint(list_checkpoints(tmp_path / name)[-1].path) for name in ("whole", "run"))
    assert_identical(whole, part)
    assert [path.name for path in (tmp_path / "run").glob("*.pt")] == [f"step-{whole['step']:08d}.pt"]


def test_a_folder_that_another_process_trains_in_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with sole_writer(out, folder=True), pytest.raises(BusyError, match="is being written by process"):
        run(of_method("mocov3", evaluations=(), budget=200.0), out)
    assert [path.name for path in out.iterdir()] == [".lock"]
    run(of_method("mocov3", evaluations=(), budget=200.0), out)


def test_what_a_killed_run_left_unfinished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    left = [
        ".step-00000003.pt.123.tmp",
        ".resume.pt.9.tmp",
        ".log.jsonl.77.tmp",
        ".config.toml.5.tmp",
        ".followed.json.4.tmp",
    ]
    mine = [".mine.tmp", ".step-3.txt.12.tmp", "step-old.txt", ".cube.nc.12.tmp"]
    for name in (*left, *mine):
        (out / name).write_text("half")
    run(of_method("mocov3", evaluations=(), budget=200.0), out)
    there = {path.name for path in out.iterdir()}
    assert not there & set(left) and set(mine) <= there
    assert not any(name.endswith(".probe") for name in there)


def test_the_saved_settings_are_those_of_the_run(tmp_path: Path) -> None:
    setting = of_method("dino", evaluations=())
    run(setting, tmp_path / "run")
    table = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["train"]
    kept = {name: value for name, value in setting.config.to_dict().items() if value is not None}
    assert {name: table[name] for name in kept} == kept


def test_the_schedule_stands_beside_the_run_and_a_users_file_stays(tmp_path: Path) -> None:
    setting = of_method("mocov3", evaluations=(), budget=200.0)
    reference = setting.config.reference
    run(setting, tmp_path / "run", str(reference))
    kept = load_schedule(tmp_path / "run" / "followed.json")
    assert kept.same_stages(constant_schedule(reference, setting.cost(reference)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "schedule.json").write_text("mine")
    (tmp_path / "mine" / "followed.json").write_text("of an earlier run")
    run(setting, tmp_path / "mine")
    assert (tmp_path / "mine" / "schedule.json").read_text() == "mine"
    assert len(load_schedule(tmp_path / "mine" / "followed.json").strategies) > 1


def test_unlabelled_images_are_trained_on_without_evaluation(tmp_path: Path) -> None:
    labelled = random_data()
    data = dataclasses.replace(labelled, classes=(), train_labels=labelled.train_labels[:0], test_labels=torch.empty(0))
    setting = small_setting("dino", data=data, evaluations=(0.5, 1.0))
    result = run(setting, tmp_path / "run")
    assert result.accuracy is None and not any("accuracy" in row for row in read_log(tmp_path / "run"))


def test_time_in_evaluation_and_saving_of_the_run_before_counts_once(tmp_path: Path) -> None:
    """Seconds go on from those of the stopped part, and never back."""
    setting = of_method("mocov3")

    def stop(fraction: float, text: str) -> None:
        if fraction > 0.5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(setting, tmp_path / "run", report=stop)
    before = load_checkpoint(tmp_path / "run" / "resume.pt")["seconds"]
    run(setting, tmp_path / "run")
    seconds = [row["seconds"] for row in read_log(tmp_path / "run")]
    assert seconds == sorted(seconds) and seconds[-1] > before > 0


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
