"""The training loop: a pre-training method under a schedule of strategies, paid for in units.

Everything random in a step (images, views, kept tokens, strategy) is a function of the seed and the step
alone, so a run that was stopped continues to the same parameters, bit for bit on one machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradscope.checkpoints import checkpoint_path, load_checkpoint, save_checkpoint
from gradscope.config import Setting, config_of, open_setting
from gradscope.engines import derive_seed
from gradscope.errors import CheckpointError, InfeasibleError, NonFiniteError, UsageError
from gradscope.evaluation import extract_features, knn_accuracy
from gradscope.files import check_writable, write_text
from gradscope.methods import MoCoV3
from gradscope.signals import StopFlag
from schedulers import Schedule, format_count

LOG_ROWS = 400  # rows of the log over a whole run
SAVE_SECONDS = 60.0
RESUME_FILE = "resume.pt"
LOG_FILE = "log.jsonl"
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
    """What a finished run spent and reached; `accuracy` is kNN accuracy in [0, 1] at the end, if evaluated."""

    out: Path
    step: int
    units: float
    samples: int
    seconds: float
    accuracy: float | None


def train(
    setting: Setting, schedule: Schedule, out: Path, *, device: torch.device | None = None, report: Report | None = None
) -> TrainResult:
    """Train until the budget is spent to within one step; continue where `out` left off.

    Writes to `out`: `step-*.pt` at `config.checkpoints` and at the end, `log.jsonl`, `resume.pt` (removed at
    the end). Raises InfeasibleError when the budget does not pay for one step, CheckpointError when
    `out` holds another run, NonFiniteError when the loss is, Interrupted on a signal, after saving.
    """
    run = _Run(setting, schedule, out, device or torch.device("cpu"), report or (lambda fraction, text: None))
    return run.finish()


class _Run:
    """One run in memory. Steps are taken by `_train_step`; everything else here is book-keeping around it."""

    def __init__(self, setting: Setting, schedule: Schedule, out: Path, device: torch.device, report: Report) -> None:
        self.setting, self.config, self.schedule = setting, setting.config, schedule
        self.out, self.device, self.report = out, device, report
        self.model: MoCoV3 = setting.new_model().to(device).train()
        if schedule.cost_model != "tokens":
            raise UsageError(
                f"the schedule is counted in units of the cost model {schedule.cost_model!r}, the trainer tokens; "
                "convert it with schedulers.in_costs(schedule, cost, 'tokens')"
            )
        self.costs = {strategy: self.model.cost(strategy) for strategy in schedule.strategies}
        self._check_budget()
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.parameter_names = [name for name, _ in named]
        self.optimizer = torch.optim.AdamW([p for _, p in named], lr=0.0, weight_decay=self.config.weight_decay)
        self.state = RunState()
        self.log: list[dict[str, Any]] = []
        self.order: tuple[int, torch.Tensor] | None = None
        self._resume()

    @property
    def fraction(self) -> float:
        return self.state.units / self.config.budget

    def finish(self) -> TrainResult:
        state, started = self.state, time.monotonic() - self.state.seconds
        saved = time.monotonic()
        with StopFlag() as stop:
            if state.step == 0:
                if 0.0 in self.config.evaluations and not self.log:
                    self._evaluate()
                if 0.0 in self.config.checkpoints:
                    self._save(checkpoint_path(self.out, 0))
            while True:
                strategy = self.schedule.draw(self.fraction, seed=self.config.seed, step=state.step)
                step_units = self.config.batch_size * self.costs[strategy]
                if state.units + step_units > self.config.budget:
                    break
                before = self.fraction
                loss, lr = self._train_step(strategy, before)
                state.step += 1
                state.units += step_units
                state.samples += self.config.batch_size
                state.seconds = time.monotonic() - started
                if int(self.fraction * LOG_ROWS) > int(before * LOG_ROWS) or state.step == 1:
                    self._log(strategy=str(strategy), loss=loss, lr=lr)
                if _passed(self.config.evaluations, before, self.fraction):
                    started += self._evaluate()
                if _passed(self.config.checkpoints, before, self.fraction):
                    self._save(checkpoint_path(self.out, state.step))
                if stop.signal is not None or time.monotonic() - saved > SAVE_SECONDS:
                    self._save(self.out / RESUME_FILE)
                    saved = time.monotonic()
                    stop.raise_if_set(
                        f"stopped at {self.fraction:.1%} of the budget and saved; run the same command to continue"
                    )
            if 1.0 in self.config.evaluations and self._final_accuracy() is None:
                self._evaluate()
            last = checkpoint_path(self.out, state.step)
            if not last.exists():
                self._save(last)
            (self.out / RESUME_FILE).unlink(missing_ok=True)
            self._write_log()
            stop.raise_if_set("stopped after the last step; this run is complete")
        return TrainResult(self.out, state.step, state.units, state.samples, state.seconds, self._final_accuracy())

    def _final_accuracy(self) -> float | None:
        """The accuracy logged at the present step, None when this step was not evaluated."""
        return next((row["accuracy"] for row in self.log if "accuracy" in row and row["step"] == self.state.step), None)

    def _train_step(self, strategy: Any, fraction: float) -> tuple[float, float]:
        config, step = self.config, self.state.step
        epoch, position = divmod(step, self.setting.steps_per_epoch)
        if self.order is None or self.order[0] != epoch:
            self.order = (epoch, self.setting.shuffled(epoch, config.seed))
        indices_B = self.order[1][position * config.batch_size : (position + 1) * config.batch_size]
        views = self.setting.views(indices_B, _generator("views", config.seed, step), self.device)
        lr = config.lr * config.batch_size / 256 * config.learning_rate_decay.factor(fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.update_momentum(fraction)
        loss = self.model.loss((views[0], views[1]), strategy, _generator("mask", config.seed, step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        value = loss.item()
        if value != value or value in (float("inf"), float("-inf")):
            raise NonFiniteError(
                f"step {step}: the loss is {value} under {strategy}; lower --lr (now {config.lr:g}) or "
                "lengthen the warm-up"
            )
        return value, lr

    def _evaluate(self) -> float:
        """kNN accuracy on full-length sequences, into the log; returns the seconds it took."""
        begun = time.monotonic()
        data = self.setting.data
        train_ND = extract_features(self.model.backbone, data.train_images, data)
        test_MD = extract_features(self.model.backbone, data.test_images, data)
        accuracy = knn_accuracy(train_ND, data.train_labels, test_MD, data.test_labels)
        self._log(accuracy=accuracy)
        self.report(self.fraction, f"kNN {accuracy:.1%}")
        return time.monotonic() - begun

    def _log(self, **values: Any) -> None:
        state = self.state
        rate = state.samples / state.seconds if state.seconds else 0.0
        row = {**state.values(), "fraction": self.fraction, "samples_per_second": round(rate, 1), **values}
        row["seconds"] = round(state.seconds, 3)
        self.log.append(row)
        if "loss" in values:
            self.report(self.fraction, f"{values['strategy']}  loss {values['loss']:.3f}  {rate:.0f} samples/s")

    def _write_log(self) -> None:
        write_text(self.out / LOG_FILE, "".join(json.dumps(row) + "\n" for row in self.log))

    def _save(self, path: Path) -> None:
        self._write_log()
        content = {
            **self.state.values(),
            "config": self.config.to_dict(),
            "schedule": self.schedule.to_json(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "parameter_names": self.parameter_names,
            "log": json.dumps(self.log),
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(path, content)

    def _resume(self) -> None:
        """Load the furthest checkpoint of `out`, after checking that it belongs to this run."""
        numbered = sorted(self.out.glob("step-*[0-9].pt"))[-1:] if self.out.is_dir() else []
        furthest: Mapping[str, Any] | None = None
        for path in [*numbered, self.out / RESUME_FILE]:
            if path.exists():
                content = load_checkpoint(path)
                self._check_same_run(content, path)
                if furthest is None or content["step"] > furthest["step"]:
                    furthest = content
        if furthest is None:
            check_writable(self.out / LOG_FILE)
            return
        self.model.load_state_dict(furthest["model"])
        self.optimizer.load_state_dict(furthest["optimizer"])
        torch.set_rng_state(furthest["rng"])
        self.state = RunState(**{name: furthest[name] for name in self.state.values()})
        self.log = json.loads(furthest["log"])
        self.report(self.fraction, f"resuming at step {self.state.step}")

    def _check_same_run(self, content: Mapping[str, Any], path: Path) -> None:
        changed = self.config.changed(config_of(content, path))
        if changed:
            raise CheckpointError(
                f"{self.out}: holds a run with another {', '.join(changed)}; choose another --out, or the "
                "settings of that run"
            )
        if Schedule.from_json(content["schedule"]).stages != self.schedule.stages:
            raise CheckpointError(f"{self.out}: holds a run with another schedule; choose another --out")

    def _check_budget(self) -> None:
        mixture = [strategy for strategy, weight in self.schedule.at(0.0).mixture if weight > 0]
        dearest = max(mixture, key=lambda strategy: self.costs[strategy])
        smallest = self.config.batch_size * self.costs[dearest]
        if self.config.budget < smallest:
            raise InfeasibleError(
                f"budget {format_count(self.config.budget)} does not pay for one step of {dearest} with a batch of "
                f"{self.config.batch_size}; the smallest budget that does is {smallest:.0f}",
                smallest=smallest,
            )


def load_run(checkpoint: Path, data_folder: Path | None = None) -> tuple[Setting, MoCoV3, dict[str, Any]]:
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


def read_log(out: Path) -> list[dict[str, Any]]:
    """Rows of a run's `log.jsonl`. Raises UsageError when there is none."""
    path = out / LOG_FILE
    if not path.is_file():
        raise UsageError(f"{path}: no training log; give a folder that `gradscope train --out` wrote")
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: not a training log of gradscope ({error}); remove it or name another folder"
        ) from error


def _generator(stream: str, seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(stream, seed, step))


def _passed(points: tuple[float, ...], before: float, after: float) -> bool:
    """Whether one of the points in (0, 1) was reached by the step from `before` to `after`."""
    return any(before < point <= after for point in points if point < 1)
