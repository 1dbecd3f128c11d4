"""What a training run asks for its next strategy: a schedule that is fixed, or one that is decided on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gradscope.adaptive import AdaptiveController
from gradscope.config import Setting
from gradscope.errors import CheckpointError, InfeasibleError, UsageError
from gradscope.files import write_text
from gradscope.ranks import Ranks
from gradscope.runlog import FOLLOWED_FILE, SCHEDULE_FILE
from gradscope.tasks import TrainingTask
from schedulers import AdaptiveRule, Schedule, Strategy, format_count, save_schedule

CUBE_FILE = "cube.nc"


class Plan(Protocol):
    """Chooses strategies by step and spent fraction; what it keeps between steps is in `content`."""

    @property
    def strategies(self) -> Sequence[Strategy]:
        """All that it may choose."""
        ...

    @property
    def units(self) -> float:
        """Units that it has spent before the first step."""
        ...

    @property
    def text(self) -> str:
        """What must be the same for a run to be continued."""
        ...

    def at(self, step: int, fraction: float) -> Strategy: ...

    def observe(self, step: int, fraction: float) -> tuple[float, dict[str, Any] | None]:
        """After a step's gradient: units that were spent besides it, and a row for the log, where there is news."""
        ...

    def content(self) -> dict[str, Any]:
        """Its part of a checkpoint."""
        ...

    def load(self, content: Mapping[str, Any], path: Path) -> None:
        """Take up its part of a checkpoint. Raises CheckpointError for another plan's."""
        ...

    def keep(self) -> None:
        """Write what a checkpoint needs beside it, on the first rank. Raises WriteError where that cannot be."""
        ...

    def begin(self, out: Path) -> None:
        """Write what belongs beside a run from its start, on the first rank."""
        ...

    def finish(self, out: Path) -> None:
        """Write what belongs beside a finished run, on the first rank."""
        ...


class OfflinePlan:
    """A schedule.

    Raises UsageError for one counted in other units than tokens, InfeasibleError for a budget below its first step.
    """

    units = 0.0

    def __init__(self, schedule: Schedule, setting: Setting) -> None:
        if schedule.cost_model != "tokens":
            raise UsageError(
                f"the schedule is counted in units of the cost model {schedule.cost_model!r}, the trainer tokens; "
                "convert it with schedulers.in_costs(schedule, cost, 'tokens')"
            )
        self.schedule, config = schedule, setting.config
        self.seed = config.seed
        mixture = [strategy for strategy, weight in schedule.at(0.0).mixture if weight > 0]
        dearest: Strategy = max(mixture, key=setting.cost)
        smallest = config.batch_size * setting.cost(dearest)
        if config.budget < smallest:
            raise InfeasibleError(
                f"budget {format_count(config.budget)} does not pay for one step of {dearest} with a batch of "
                f"{config.batch_size}; the smallest budget that does is {smallest:.0f}",
                smallest=smallest,
            )

    @property
    def strategies(self) -> Sequence[Strategy]:
        return self.schedule.strategies

    @property
    def text(self) -> str:
        return self.schedule.to_json()

    def at(self, step: int, fraction: float) -> Strategy:
        return self.schedule.draw(fraction, seed=self.seed, step=step)

    def observe(self, step: int, fraction: float) -> tuple[float, dict[str, Any] | None]:
        return 0.0, None

    def content(self) -> dict[str, Any]:
        return {"schedule": self.schedule.to_json()}

    def load(self, content: Mapping[str, Any], path: Path) -> None:
        if "online" in content or Schedule.from_json(content["schedule"]).stages != self.schedule.stages:
            raise CheckpointError(f"{path.parent}: holds a run with another schedule; choose another --out")

    def keep(self) -> None:
        return

    def begin(self, out: Path) -> None:
        write_text(out / FOLLOWED_FILE, self.schedule.to_json())

    def finish(self, out: Path) -> None:
        return


class OnlinePlan:
    """Decides while training runs (`AdaptiveController`); writes `cube.nc` and `schedule.json` to `out`."""

    def __init__(
        self,
        rule: AdaptiveRule,
        setting: Setting,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        out: Path,
        *,
        device: torch.device,
        ranks: Ranks,
        report: Callable[[str], None],
        charge: bool = True,
    ) -> None:
        config = setting.config
        self.task = TrainingTask(setting, device=device)
        self.rule, self.out, self.ranks = rule, out, ranks
        self.controller = AdaptiveController(
            self.task,
            model,
            optimizer,
            budget=config.budget,
            batch_size=config.batch_size,
            rule=rule,
            seed=config.seed,
            ranks=ranks,
            cube=out / CUBE_FILE,
            report=report,
            precision=config.precision,
            # BatchNorm in their heads couples the samples of a batch
            estimator="auto" if config.method == "dino" and not config.head_batchnorm else "subbatch",
            charge=charge,
        )
        self.units, self._told = self.controller.spent, 0

    @property
    def strategies(self) -> Sequence[Strategy]:
        return self.task.grid.strategies()

    @property
    def text(self) -> str:
        return f"online {json.dumps(self.controller.policy.settings, sort_keys=True)}"

    def at(self, step: int, fraction: float) -> Strategy:
        return self.controller.at(step)

    def observe(self, step: int, fraction: float) -> tuple[float, dict[str, Any] | None]:
        self.task.fraction = fraction
        seconds = self.controller.probe_seconds
        before = self.controller.spent + self.controller.cost(step)
        self.controller.observe(step)
        if len(self.controller.probes) == self._told:
            return 0.0, None
        self.task.forget()  # the memory of a batch is the training's
        self._told = len(self.controller.probes)
        record = self.controller.probes[-1]
        now = self.controller.policy.incumbent
        row = {
            "probe": "" if now is None else str(now), "probe_units": record.units,
            "probe_seconds": round(self.controller.probe_seconds - seconds, 3),
            "best": record.best, "advantage": record.advantage, "standard_error": record.standard_error,
            "scores": record.scores, "failures": record.failures, "error": record.error,
        }  # fmt: skip
        return self.controller.spent - before, row

    def content(self) -> dict[str, Any]:
        return {"schedule": self.controller.schedule().to_json(), "online": self.controller.state_dict()}

    def load(self, content: Mapping[str, Any], path: Path) -> None:
        if "online" not in content:
            raise CheckpointError(f"{path.parent}: holds a run with another schedule; choose another --out")
        try:
            self.controller.load_state_dict(content["online"])
        except UsageError as error:
            raise CheckpointError(f"{path.parent}: {error}, or choose another --out") from error
        self._told = len(self.controller.probes)

    def keep(self) -> None:
        self.controller.write_cube(must=True)  # a run that is continued finds its measurements beside the checkpoint

    def begin(self, out: Path) -> None:
        (out / FOLLOWED_FILE).unlink(missing_ok=True)  # of an earlier run: this one is known at its end

    def finish(self, out: Path) -> None:
        self.keep()
        write_text(out / FOLLOWED_FILE, self.controller.schedule().to_json())
        save_schedule(self.controller.schedule(), out / SCHEDULE_FILE)
