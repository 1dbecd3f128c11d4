"""The training loop: a pre-training method under a schedule of strategies, paid for in units.

Everything random in a step (images, views, kept tokens, strategy) is a function of the seed and the step
alone, so a run that was stopped continues to the same parameters, bit for bit on one machine.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gradscope.checkpoints import (
    checkpoint_path,
    list_steps,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    write_checkpoint,
)
from gradscope.config import Setting, config_of, open_setting
from gradscope.data import Ahead, ImageData
from gradscope.engines import derive_seed
from gradscope.errors import CheckpointError, Interrupted, NonFiniteError, UsageError
from gradscope.evaluation import dataset_features, knn_accuracy
from gradscope.files import Saves, check_writable, write_bytes, write_text
from gradscope.locks import sole_writer
from gradscope.methods import Method
from gradscope.plans import OfflinePlan, OnlinePlan, Plan
from gradscope.ranks import ALONE, Ranks
from gradscope.runlog import LOG_FILE, RunLog, read_log
from gradscope.signals import StopFlag
from gradscope.stepper import Stepper
from gradscope.task import RESUME_FILE
from schedulers import AdaptiveRule, Schedule

LOG_ROWS = 400  # rows of the log over a whole run
SAVE_SECONDS = 60.0
SAVE_SHARE = 50  # a save to resume from comes after at least so many times what the last one took
NEIGHBOURS = 20  # of the accuracy in the log, as DINO's
AHEAD = 2  # batches of a folder that are decoded while the model works
CONFIG_FILE = "config.toml"
Report = Callable[[float, str], None]  # (fraction of the budget, one line of news)


@dataclass
class RunState:
    """Where a run stands: optimizer steps, units and samples spent, seconds of training (evaluation not counted)."""

    step: int = 0
    units: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    def values(self) -> dict[str, Any]:
        return {"step": self.step, "units": self.units, "samples": self.samples, "seconds": self.seconds}


@dataclass(frozen=True)
class TrainResult:
    """What a finished run spent and reached; `accuracy` is kNN accuracy in [0, 1] at the end, if evaluated, `loss`
    the last one logged."""

    out: Path
    step: int
    units: float
    samples: int
    seconds: float
    accuracy: float | None
    loss: float | None = None


@dataclass(frozen=True)
class RunOptions:
    """How a run is done, without changing what it computes beyond rounding.

    `compiled`: torch.compile, one graph per strategy, all made before the first step. `keep`: newest checkpoints of
    progress that stay, None all of them (a profile wants them all). `tensorboard`: event files beside the log.
    `schedule_text`: the schedule as the command line has it, for `config.toml`. `charge_probes`: whether the budget
    pays for the probes of a run that decides by itself; off only to compare such runs.
    """

    compiled: bool = False
    keep: int | None = None
    tensorboard: bool = False
    schedule_text: str = ""
    charge_probes: bool = True

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"keep is {self.keep}; at least the newest checkpoint (1) has to stay")


def train(
    setting: Setting,
    schedule: Schedule | AdaptiveRule,
    out: Path,
    *,
    device: torch.device | None = None,
    report: Report | None = None,
    options: RunOptions | None = None,
    ranks: Ranks = ALONE,
    tell: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train until the budget is spent to within one step; continue where `out` left off.

    `schedule`: what runs when, or the rule by which it is decided while training runs. Writes to `out`: `step-*.pt`
    at `config.checkpoints` and at the end, `log.jsonl`, `config.toml`, `followed.json` (its schedule), `resume.pt`
    (removed at the end); of a run that decides by itself `cube.nc`, what it measured, and at its end `schedule.json`,
    what it ran. `ranks` each call this with the same arguments; the first one writes. `tell` gets what a
    run decides by itself, in one line each. Raises InfeasibleError when the budget does not pay for one step,
    CheckpointError when `out` holds another run, BusyError while another process writes there, NonFiniteError when the
    loss is, Interrupted on a signal, after saving, WriteError when the last save fails, or all along the way for long.
    """
    run = _Run(
        setting, schedule, out, device or torch.device("cpu"), report or (lambda fraction, text: None),
        options or RunOptions(), ranks, tell or (lambda text: None),
    )  # fmt: skip
    with sole_writer(out, folder=True) if ranks.first else nullcontext():
        run.begin()
        return run.finish()


class _Run:
    """One run in memory. Steps are taken by the stepper; everything here is book-keeping around it."""

    def __init__(
        self,
        setting: Setting,
        schedule: Schedule | AdaptiveRule,
        out: Path,
        device: torch.device,
        report: Report,
        options: RunOptions,
        ranks: Ranks,
        tell: Callable[[str], None],
    ) -> None:
        self.setting, self.config = setting, setting.config
        self.out, self.device, self.report, self.options, self.ranks = out, device, report, options, ranks
        # refuses what cannot be run before a model is made
        offline = OfflinePlan(schedule, setting) if isinstance(schedule, Schedule) else None
        self.model: Method = setting.new_model().to(device).train()
        self.stepper = Stepper(setting, self.model, device=device, ranks=ranks, compiled=options.compiled)
        self.state = RunState()
        if isinstance(schedule, AdaptiveRule):
            self.plan: Plan = OnlinePlan(
                schedule, setting, self.model, self.stepper.optimizer, out,
                device=device, ranks=ranks, report=tell, charge=options.charge_probes,
            )  # fmt: skip
        else:
            assert offline is not None
            self.plan = offline
        self.state.units = self.plan.units
        self.costs = {strategy: self.model.cost(strategy) for strategy in self.plan.strategies}
        self.log = RunLog(out, tensorboard=options.tensorboard and ranks.first)
        self.saves, self.late = Saves(), dict[Path, memoryview]()  # checkpoints that are still to be written
        self.order = lru_cache(maxsize=2)(lambda epoch: setting.shuffled(epoch, self.config.seed))

    def begin(self) -> None:
        """Stand where `out` left off, at the start where it is empty, and make ready for steps."""
        self._resume()
        if self.ranks.first:
            named = {"schedule": self.options.schedule_text} if self.options.schedule_text else {}
            write_text(self.out / CONFIG_FILE, self.config.to_toml(**named))
            self.plan.begin(self.out)
        self.stepper.start(self.plan.strategies)

    @property
    def fraction(self) -> float:
        return self.state.units / self.config.budget

    def finish(self) -> TrainResult:
        # images in memory need no decoding: what is left is done on the device
        depth = 0 if isinstance(self.setting.data, ImageData) else AHEAD
        with StopFlag() as stop, Ahead(self._prepare, depth=depth, workers=1) as ahead:
            self._train(stop, ahead)
            if 1.0 in self.config.evaluations and self._final_accuracy() is None:
                self._evaluate()
            last = checkpoint_path(self.out, self.state.step)
            if not last.exists():
                self._save(last)
            if self.ranks.first:
                (self.out / RESUME_FILE).unlink(missing_ok=True)
                self.plan.finish(self.out)
                self.log.write()
            stop.raise_if_set("stopped after the last step; this run is complete")
        self.log.close()
        state = self.state
        loss = next((row["loss"] for row in reversed(self.log.rows) if "loss" in row), None)
        return TrainResult(
            self.out, state.step, state.units, state.samples, state.seconds, self._final_accuracy(), loss
        )

    def _train(self, stop: StopFlag, ahead: Ahead[Any]) -> None:
        state, config = self.state, self.config
        started, saved, took = time.monotonic() - state.seconds, time.monotonic(), 0.0
        if state.step == 0:
            if 0.0 in config.evaluations and not self.log.rows:
                self._evaluate()
            if 0.0 in config.checkpoints:
                self._save(checkpoint_path(self.out, 0))
            started = time.monotonic()
        while True:
            strategy = self.plan.at(state.step, self.fraction)
            step_units = config.batch_size * self.costs[strategy]
            if state.units + step_units > config.budget:
                return
            signal = self.ranks.agree("step and strategy", (state.step, _number(strategy)), highest=stop.signal or 0)
            if signal or time.monotonic() - saved > max(SAVE_SECONDS, SAVE_SHARE * took):
                took = self._save(self.out / RESUME_FILE, must=bool(signal))
                started, saved = started + took, time.monotonic()
                if signal:  # that all ranks agreed on; one that came since then waits for the next step
                    raise Interrupted(
                        f"stopped at {self.fraction:.1%} of the budget and saved; run the same command to continue",
                        exit_code=128 + signal,
                    )
            before = self.fraction
            views = self.setting.finish(ahead.take(state.step), self.device)
            loss, lr = self.stepper.step(state.step, before, strategy, views)
            besides, news = self.plan.observe(state.step, before)
            state.step += 1
            state.units += step_units + besides
            state.samples += config.batch_size
            state.seconds = time.monotonic() - started
            if news is not None:
                self._log(**news)
            if int(self.fraction * LOG_ROWS) > int(before * LOG_ROWS) or state.step == 1:
                self._log(strategy=str(strategy), loss=loss, lr=lr)
            if _passed(config.evaluations, before, self.fraction):
                started += self._evaluate()
            if _passed(config.checkpoints, before, self.fraction):
                started += self._save(checkpoint_path(self.out, state.step), must=False)

    def _prepare(self, step: int) -> Any:
        """The CPU's part of this rank's views of a step: the data position is a function of the step alone."""
        config = self.config
        epoch, position = divmod(step, self.setting.steps_per_epoch)
        indices_B = self.order(epoch)[position * config.batch_size : (position + 1) * config.batch_size]
        generator = torch.Generator().manual_seed(derive_seed("views", config.seed, step))
        return self.setting.prepare(indices_B, generator, self.stepper.part)

    def _final_accuracy(self) -> float | None:
        """The accuracy logged at the present step, None when this step was not evaluated."""
        return next(
            (row["accuracy"] for row in self.log.rows if "accuracy" in row and row["step"] == self.state.step), None
        )

    def _evaluate(self) -> float:
        """kNN accuracy on full-length sequences, into the log; returns the seconds it took."""
        begun, data = time.monotonic(), self.setting.data
        if self.ranks.first and data.classes and data.test_count:
            with torch.compiler.set_stance("force_eager"):
                train_ND, test_MD = (dataset_features(self.model.evaluated, data, part) for part in ("train", "test"))
            few = min(NEIGHBOURS, data.train_count)
            accuracy = knn_accuracy(train_ND, data.train_labels, test_MD, data.test_labels, k=few)
            self._log(accuracy=accuracy)
            self.report(self.fraction, f"kNN {accuracy:.1%}")
        return time.monotonic() - begun

    def _log(self, **values: Any) -> None:
        if not self.ranks.first:
            return
        state = self.state
        last = next((row for row in reversed(self.log.rows) if "loss" in row), {"samples": 0, "seconds": 0.0})
        passed = state.seconds - last["seconds"]
        rate = (state.samples - last["samples"]) / passed if passed > 0 else 0.0
        row = {**state.values(), "fraction": self.fraction, "samples_per_second": round(rate, 1), **values}
        row["seconds"] = round(state.seconds, 3)
        self.log.add(row)
        if "loss" in values:
            self.report(self.fraction, f"{values['strategy']}  loss {values['loss']:.3f}  {rate:.0f} samples/s")

    def _save(self, path: Path, *, must: bool = True) -> float:
        """Write a checkpoint, on the first rank; returns the seconds it took.

        Unless it `must` be now, one that cannot be written is told, and written before the next one.
        """
        begun = time.monotonic()
        if not self.ranks.first:
            return 0.0
        kept = {f"parameter or buffer {name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.stepper.optimizer.state.get(parameter, {}).items():
                kept[f"the optimizer's {key} of {name}"] = value
        if wrong := [what for what, value in kept.items() if not bool(torch.isfinite(value).all())]:
            raise NonFiniteError(
                f"step {self.state.step}: {wrong[0]} is no longer finite; lower --lr; nothing was saved"
            )
        content = {
            **self.state.values(),
            "config": self.config.to_dict(),
            **self.plan.content(),
            "model": self.model.state_dict(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "parameter_names": self.stepper.parameter_names,
            "data": self.setting.data.digest,
            "log": json.dumps(self.log.rows),
            "rng": torch.get_rng_state(),
        }

        def write() -> None:
            self.plan.keep()
            self._write_late()
            self.log.write()
            save_checkpoint(path, content)

        if must:
            write()
        elif not self.saves.attempt(write) and path.name != RESUME_FILE:
            stream = io.BytesIO()
            write_checkpoint(stream, content)
            self.late[path] = stream.getbuffer()
        if self.options.keep is not None:
            for old in list_steps(self.out)[: -self.options.keep]:
                old.unlink()
        return time.monotonic() - begun

    def _write_late(self) -> None:
        for path in list(self.late):
            write_bytes(path, self.late[path])
            del self.late[path]

    def _resume(self) -> None:
        """Load the furthest checkpoint of `out`, after checking that it belongs to this run."""
        if self.ranks.first:
            remove_leftovers(self.out)
        furthest: Mapping[str, Any] | None = None
        for path in [*list_steps(self.out)[-1:], self.out / RESUME_FILE]:
            if path.exists():
                content = load_checkpoint(path)
                self._check_same_run(content, path)
                self.plan.load(content, path)
                if furthest is None or content["step"] > furthest["step"]:
                    furthest = content
        run = json.dumps([self.config.to_dict(), self.plan.text, self.setting.data.digest])
        self.ranks.same("settings, schedule or data", run)
        self.ranks.agree("the step to continue from", (-1 if furthest is None else furthest["step"],))
        if furthest is None:
            if self.ranks.first:
                check_writable(self.out / LOG_FILE)
            return
        self.plan.load(furthest, self.out / RESUME_FILE)
        self.model.load_state_dict(furthest["model"])
        self.stepper.optimizer.load_state_dict(furthest["optimizer"])
        torch.set_rng_state(furthest["rng"])
        self.state = RunState(**{name: furthest[name] for name in self.state.values()})
        self.log.load(json.loads(furthest["log"]))
        if self.ranks.first:
            self.report(self.fraction, f"resuming at step {self.state.step}")

    def _check_same_run(self, content: Mapping[str, Any], path: Path) -> None:
        changed = self.config.changed(config_of(content, path))
        if "data" in content and content["data"] == self.setting.data.digest:
            changed = [name for name in changed if name != "data"]  # the same images at another place
        if changed:
            raise CheckpointError(
                f"{self.out}: holds a run with another {', '.join(changed)}; choose another --out, or the "
                "settings of that run"
            )
        if content.get("data", self.setting.data.digest) != self.setting.data.digest:
            raise CheckpointError(
                f"{self.out}: holds a run on other images than {self.config.data} has now; put them back as they "
                "were, or choose another --out"
            )


def load_run(checkpoint: Path, data_folder: Path | None = None) -> tuple[Setting, Method, dict[str, Any]]:
    """The setting, the model and the content of a checkpoint of the bundled trainer."""
    content = load_checkpoint(checkpoint)
    setting = open_setting(config_of(content, checkpoint), data_folder)
    model = setting.new_model()
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint}: its tensors do not fit its configuration ({str(error).splitlines()[0]})"
        ) from error
    return setting, model.train(), content


def _number(value: object) -> int:
    """A whole number that stands for a value's text."""
    return derive_seed("number", str(value))


def _passed(points: tuple[float, ...], before: float, after: float) -> bool:
    """Whether one of the points in (0, 1) was reached by the step from `before` to `after`."""
    return any(before < point <= after for point in points if point < 1)


__all__ = ["LOG_FILE", "RunOptions", "TrainResult", "load_run", "read_log", "train"]
