"""The online policy: which strategy runs now, and what to measure next, decided while training runs.

It is pure: everything that it answers follows from its settings and from what it was told, in which order. A run
begins with all candidates mixed, as a mixed pilot does (design §4), so that measurements are fair; when all have been
measured it chooses one strategy, as soon as its advantage over the mixture exceeds a tolerance, and goes to another
when that one's advantage exceeds its uncertainty, too. A share of the steps explores all candidates throughout, and
before a probe all are mixed again for a moment, because what is measured depends on what the model has just trained
under. The last part of the budget runs on the reference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from schedulers.adaptive_rule import AdaptiveRule, Decision, ProbePlan, Verdict
from schedulers.criteria import get_criterion
from schedulers.errors import GradscopeError, UsageError
from schedulers.evidence import Evidence, Measurement, Pooled
from schedulers.mixing import draw_from, mixture_by_budget
from schedulers.probe_planning import LEAST_PROBES, ProbePlanner
from schedulers.schedule import Schedule, Stage
from schedulers.strategy import Grid, Strategy

VERSION = 2
MIXED = 0.1  # of the way from one probe to the next, which may be mixed at most
ALIKE = 0.05  # share of the best score within which the first choice is the cheapest strategy


class OtherRunError(UsageError):
    """A state that is whole, but of another run."""


class AdaptivePolicy:
    """Chooses among the strategies of `grid` as training goes on.

    `costs` units per sample of every strategy; `budget` in units; `batch_size` samples of an optimizer step. `shared`:
    the part of a strategy's cost that a probe spends once for all strategies that name the same key (as
    `Task.shared_costs`). `seed` fixes what is drawn. Raises UsageError for costs that are not positive or are missing.
    """

    def __init__(
        self,
        grid: Grid,
        costs: Mapping[Strategy, float],
        *,
        budget: float,
        batch_size: int,
        rule: AdaptiveRule | None = None,
        seed: int = 0,
        shared: Mapping[Strategy, Mapping[str, float]] | None = None,
    ) -> None:
        self.grid, self.rule, self.seed = grid, rule or AdaptiveRule(), seed
        self.strategies = tuple(grid.strategies())
        missing = [s for s in self.strategies if not (s in costs and math.isfinite(costs[s]) and costs[s] > 0)]
        if missing:
            raise UsageError(f"costs: {missing[0]} has none that is a positive number of units per sample")
        if not (math.isfinite(budget) and budget > 0) or batch_size < 1:
            raise UsageError(f"budget={budget!r} must be a positive number of units and batch_size={batch_size!r} >= 1")
        self.costs = {s: float(costs[s]) for s in self.strategies}
        self.budget, self.batch_size = float(budget), batch_size
        sub_batch = self.rule.sub_batch or batch_size
        self.planner = ProbePlanner(grid, self.costs, shared or {}, sub_batch, self.rule.minimum, self.rule.maximum)
        self.evidence = Evidence(
            self.strategies,
            self.strategies.index(grid.reference),
            np.array([self.costs[s] for s in self.strategies]),
            batch_size,
            get_criterion(self.rule.criterion),
            self.rule.half_life,
            [],
        )
        self.probe_units = 0.0
        self._told = 0.0  # fraction of the budget after the last probe
        self._in_vain = 0.0  # what failed probes would have cost: the next one is as far away as if they had
        self._left_out: set[Strategy] = set()
        self._decisions = [Decision(0, 0.0, None, self.strategies, 1.0, "start")]
        self._mixtures: list[tuple[tuple[Strategy, float], ...]] = []  # one for each decision, made when asked for

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Everything decided so far, by step; the first one is the mixture at the start."""
        return tuple(self._decisions)

    @property
    def candidates(self) -> tuple[Strategy, ...]:
        """The strategies that can be chosen and explored: all of the grid but those that failed or were refused."""
        return self._decisions[-1].candidates

    @property
    def incumbent(self) -> Strategy | None:
        """The strategy that runs, apart from exploration; None while all candidates are mixed."""
        return self._decisions[-1].strategy

    @property
    def switches(self) -> int:
        """How often one chosen strategy followed another (the way out of the first mixture and the finish apart)."""
        return sum(d.why == "switch" for d in self._decisions)

    @property
    def mixing(self) -> bool:
        """Whether all candidates are mixed for a moment, before a probe."""
        return self.incumbent is not None and self._decisions[-1].exploration == 1

    @property
    def finishing(self) -> bool:
        return self._decisions[-1].why == "finish"

    def mixture(self, step: int) -> tuple[tuple[Strategy, float], ...]:
        """Probability of every strategy at an optimizer step, also a past one. Raises UsageError for a negative one."""
        if step < 0:
            raise UsageError(f"step={step} must be at least 0")
        number = len(self._decisions) - 1
        while self._decisions[number].step > step:
            number -= 1
        if len(self._mixtures) != len(self._decisions):
            self._mixtures = [self._mixture(decision) for decision in self._decisions]
        return self._mixtures[number]

    def at(self, step: int) -> Strategy:
        """The strategy of an optimizer step: a pure function of what was decided before it. Past steps do not change.

        Raises UsageError for a negative step.
        """
        return draw_from(self.mixture(step), seed=self.seed, step=step)

    def advance(self, step: int, spent: float) -> None:
        """Note that `step` is done and that `spent` units are: begins the finish, or to mix, when it is time."""
        finish = self.rule.finish
        if self.finishing:
            return
        if self.rule.frozen:
            if self.mixing:  # a state that was loaded all the same
                self._decide(step + 1, spent, self.incumbent, "resume")
        elif finish and spent >= (1 - finish) * self.budget:
            if self.grid.reference in self.candidates:
                self._decide(step + 1, spent, self.grid.reference, "finish")
        elif self.incumbent is not None and self._to_mix(spent) != self.mixing:
            self._decide(step + 1, spent, self.incumbent, "resume" if self.mixing else "mix")

    def _to_mix(self, spent: float) -> bool:
        """Whether the next probe is so near that its candidates are to be mixed, or just overdue."""
        cap, due = self.rule.overhead * self.budget, self._due()
        if not self.rule.mix or due >= 1 - self.rule.finish:
            return False
        plan = self.planner.plan(self.candidates, self.incumbent, cap, 0.0)
        if plan is None or self.planner.shorter(plan, min(cap - self.probe_units, self.budget - spent), 0.0) is None:
            return False
        return abs(spent / self.budget - due) < min(self.rule.mix, MIXED * (due - self._told))

    def _due(self) -> float:
        """Fraction of the budget at which the next probe is due, after the first one."""
        used = (self.probe_units + self._in_vain) / (self.rule.overhead * self.budget) if self.rule.overhead else 1.0
        return self.rule.start + used * (1 - self.rule.finish - self.rule.start)

    @property
    def probes(self) -> int:
        """Probes told of so far."""
        return self.planner.probes

    def plan(self, spent: float, *, set_up: float = 0.0) -> ProbePlan | None:
        """The probe that is due after `spent` units, None when none is, or the cap does not pay for one.

        `set_up`: units that it would spend besides its strategies' passes. The first probe comes at `start`, and from
        then on what probes have spent may grow evenly up to the cap, which it reaches where the finish begins.
        """
        rule, fraction = self.rule, spent / self.budget
        if not rule.overhead or not rule.start <= fraction < 1 - rule.finish:
            return None
        if self.probes and fraction < self._due():
            return None
        cap = rule.overhead * self.budget
        plan = self.planner.plan(self.candidates, self.incumbent, cap, set_up)
        left = min(cap - self.probe_units, self.budget - spent)
        return plan if plan is None or plan.units <= left else self.planner.shorter(plan, left, set_up)

    def tell(
        self,
        step: int,
        spent: float,
        units: float,
        found: Measurement | None,
        failed: Mapping[Strategy, str] | None = None,
    ) -> Verdict:
        """Take in a probe made after `step`, which cost `units` (in `spent` already), and decide.

        `found` is None where nothing could be measured; `failed` says which strategies could not, and why: they are no
        candidates until a later probe measures them, and after three failures in a row not at all. Where the reference
        itself could not be measured, nothing changes.
        """
        verdict = self._tell(step, spent, units, found, failed)
        self._told = spent / self.budget
        if self.mixing:
            self._decide(step + 1, spent, self._decisions[-1].strategy, "resume")
        return verdict

    def _tell(
        self,
        step: int,
        spent: float,
        units: float,
        found: Measurement | None,
        failed: Mapping[Strategy, str] | None,
    ) -> Verdict:
        fraction = spent / self.budget
        self.probe_units += units
        measured = () if found is None else found.strategies
        if self.grid.reference not in measured:
            self._in_vain += max(self.planner.last_units - units, 0.0)
        self.planner.note(measured, tuple(failed or ()))
        if found is None or self.grid.reference not in measured:
            return Verdict(None, None, None, False, {})
        self.evidence.add(fraction, found)
        self._note_candidates(step, spent, measured, tuple(failed or ()))
        if self.rule.frozen or self.finishing:
            return self._verdict(self.evidence.pooled(fraction), None, None, None, False)
        pooled = self.evidence.pooled(fraction)
        best = self._best(pooled, [s for s in found.strategies if s in self.candidates and self._allowed(s)])
        unmeasured = any(not self.planner.measured(s) for s in self.candidates)
        unknown = self.incumbent is None and unmeasured and self.probes < LEAST_PROBES
        if best is None or best == self.incumbent or unknown:
            return self._verdict(pooled, best, None, None, False)
        gain, error, least = self._advantage(pooled, best)
        # where nothing is known of what runs any more (it fails, and what was known is long ago), it is left
        # the first choice needs no certainty: going on with the mixture costs more than a choice between good ones
        doubt = 0.0 if self.incumbent is None else self.rule.confidence * error
        sure = math.isnan(gain) or gain - least > doubt
        changes = [d.fraction for d in self._decisions if d.why in ("first", "switch")]
        rested = not changes or fraction - changes[-1] >= self.rule.dwell
        switched = sure and rested
        if switched:
            self._decide(step + 1, spent, best, "first" if self.incumbent is None else "switch")
        if math.isnan(gain):
            return self._verdict(pooled, best, None, None, switched)
        return self._verdict(pooled, best, gain, error, switched)

    def leave_out(self, strategy: Strategy, why: str) -> None:
        """Never choose or explore a strategy, before training begins: the model refuses it.

        Raises UsageError when a step was decided on already, or for the reference.
        """
        if len(self._decisions) > 1 or self.probes:
            raise UsageError("a strategy can be left out only before training begins")
        if strategy == self.grid.reference:
            raise UsageError(f"the reference {strategy} cannot be left out ({why})")
        self._left_out.add(strategy)
        self.planner.leave_out(strategy)
        kept = tuple(s for s in self.strategies if s not in self._left_out)
        self._decisions, self._mixtures = [Decision(0, 0.0, None, kept, 1.0, "start")], []

    def schedule(self, spent: float) -> Schedule:
        """What was decided up to `spent` units, as a schedule whose last stage lasts to the end of the budget."""
        edges = [min(d.fraction, 1.0) for d in self._decisions] + [1.0]
        stages = []
        for i, decision in enumerate(self._decisions):
            mixture = self._mixture(decision)
            if edges[i + 1] > edges[i]:
                cost = math.fsum(weight * self.costs[s] for s, weight in mixture)
                stages.append(Stage(edges[i], edges[i + 1], mixture, cost))
        return Schedule(
            stages=tuple(stages),
            budget=self.budget,
            batch_size=self.batch_size,
            criterion=self.rule.criterion,
            metric=self.rule.metric,
            constraints={"online": str(self.rule), "probe_units": self.probe_units, "spent": spent},
        )

    def _note_candidates(
        self, step: int, spent: float, measured: Sequence[Strategy], failed: Sequence[Strategy]
    ) -> None:
        out = {s for s in failed if s not in (self.incumbent, self.grid.reference)}
        back = set(measured) - self._left_out
        kept = tuple(s for s in self.strategies if (s in self.candidates and s not in out) or s in back)
        if kept != self.candidates:
            now = self._decisions[-1]
            gone = ", ".join(str(s) for s in self.candidates if s not in kept)
            came = ", ".join(str(s) for s in kept if s not in self.candidates)
            why = "; ".join(filter(None, [f"failed: {gone}" if gone else "", f"back: {came}" if came else ""]))
            self._decisions.append(Decision(step + 1, spent / self.budget, now.strategy, kept, now.exploration, why))

    def _best(self, pooled: Pooled, among: Sequence[Strategy]) -> Strategy | None:
        """The best; as the first choice the cheapest of those about as good, which sees more samples for its units."""
        known = [s for s in among if np.isfinite(pooled.worth_C[self.strategies.index(s)])]
        if not known:
            return None
        best = max((self.strategies.index(s) for s in known), key=pooled.worth_C.__getitem__)
        if self.incumbent is not None:
            return self.strategies[best]
        least = pooled.worth_C[best] - ALIKE * abs(pooled.worth_C[best])
        good = [s for s in known if pooled.worth_C[self.strategies.index(s)] >= least]
        return min(good, key=lambda s: (self.costs[s], -pooled.worth_C[self.strategies.index(s)]))

    def _allowed(self, strategy: Strategy) -> bool:
        now = self.incumbent
        return now is None or not self.rule.monotone or self.costs[strategy] >= self.costs[now]

    def _advantage(self, pooled: Pooled, best: Strategy) -> tuple[float, float, float]:
        """Worth of `best` less that of what runs now, its standard error, and the least that is worth a switch."""
        at = self.strategies.index(best)
        if self.incumbent is None:  # the mixture: candidates have equal shares of the budget
            rows = [self.strategies.index(s) for s in self.candidates]
            rows = [c for c in rows if np.isfinite(pooled.worth_C[c])]
            now, now_B = float(pooled.worth_C[rows].mean()), pooled.draws_BC[:, rows].mean(axis=1)
        else:
            row = self.strategies.index(self.incumbent)
            now, now_B = float(pooled.worth_C[row]), pooled.draws_BC[:, row]
        gain = float(pooled.worth_C[at]) - now
        return gain, float((pooled.draws_BC[:, at] - now_B).std()), self.rule.tolerance * abs(now)

    def _verdict(
        self,
        pooled: Pooled,
        best: Strategy | None,
        gain: float | None,
        error: float | None,
        switched: bool,
    ) -> Verdict:
        sign = -1.0 if self.evidence.criterion.lower_is_better else 1.0
        known = [c for c, worth in enumerate(pooled.worth_C) if np.isfinite(worth)]
        errors_C = pooled.draws_BC.std(axis=0)
        return Verdict(
            best, gain, error, switched, {self.strategies[c]: sign * float(pooled.worth_C[c]) for c in known},
            {self.strategies[c]: float(errors_C[c]) for c in known},
            {self.strategies[c]: float(pooled.effective_C[c]) for c in known},
        )  # fmt: skip

    def _decide(self, step: int, spent: float, strategy: Strategy | None, why: str) -> None:
        exploration = {"finish": 0.0, "mix": 1.0}.get(why, self.rule.exploration)
        self._decisions.append(Decision(step, spent / self.budget, strategy, self.candidates, exploration, why))

    def _mixture(self, decision: Decision) -> tuple[tuple[Strategy, float], ...]:
        explored = decision.exploration if decision.strategy is not None else 1.0
        count = len(decision.candidates)
        return mixture_by_budget(
            [
                (s, (explored / count if s in decision.candidates else 0.0) + (1 - explored) * (s == decision.strategy),
                 self.costs[s])
                for s in self.strategies
            ]
        )  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a state to be of this policy."""
        return {
            "axes": {name: list(values) for name, values in self.grid.axes.items()},
            "reference": str(self.grid.reference),
            "costs": [self.costs[s] for s in self.strategies],
            "budget": self.budget,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "rule": asdict(self.rule),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decisions depend on, as plain values (JSON keeps it exactly)."""
        return {
            "version": VERSION,
            "settings": json.dumps(self.settings, sort_keys=True),
            "evidence": self.evidence.state(),
            "probe_units": self.probe_units,
            "in_vain": self._in_vain,
            "told": self._told,
            "planner": self.planner.state(),
            "left_out": [str(s) for s in self.strategies if s in self._left_out],
            "decisions": [
                {
                    "step": d.step, "fraction": d.fraction, "strategy": "" if d.strategy is None else str(d.strategy),
                    "candidates": [str(s) for s in d.candidates], "exploration": d.exploration, "why": d.why,
                }
                for d in self._decisions
            ],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Take up a state; the same decisions follow as would have.

        Raises UsageError for a state of other settings (unless not `strict`), GradscopeError for one that is newer or
        damaged.
        """
        try:
            if int(state["version"]) != VERSION:
                how = "newer" if int(state["version"]) > VERSION else "older"
                raise GradscopeError(
                    f"the state is of version {state['version']}, {how} than {VERSION}: go on with the gradscope that "
                    "wrote it"
                )
            self._check_settings(json.loads(state["settings"]), strict)
            decisions = [
                Decision(
                    int(d["step"]), float(d["fraction"]), self._named(d["strategy"]) if d["strategy"] else None,
                    tuple(self._named(text) for text in d["candidates"]), float(d["exploration"]), str(d["why"]),
                )
                for d in state["decisions"]
            ]  # fmt: skip
            if not decisions or decisions[0].step != 0:
                raise KeyError("decisions")
            left_out = {self._named(text) for text in state["left_out"]}
            probe_units, in_vain = float(state["probe_units"]), float(state["in_vain"])
            last = float(state.get("told", 0.0))  # states of the first days have none
            probes = self.evidence.read(state["evidence"])
            self.planner.load(state["planner"])
        except OtherRunError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GradscopeError(
                f"the state of the online policy is damaged ({type(error).__name__}: {error})"
            ) from error
        self.evidence.probes, self._in_vain, self._told = probes, in_vain, last
        self.probe_units, self._decisions, self._left_out = probe_units, decisions, left_out
        self._mixtures = []

    def _named(self, text: str) -> Strategy:
        return self.grid.check(Strategy.parse(text))

    def _check_settings(self, theirs: Mapping[str, Any], strict: bool) -> None:
        ours = json.loads(json.dumps(self.settings))
        changed = [name for name in ours if ours[name] != theirs.get(name)]
        fatal = [name for name in changed if strict or name in ("axes", "reference")]
        if fatal:
            raise OtherRunError(
                f"the state is of another run: other {', '.join(fatal)}; use the settings of that run"
                + ("" if "axes" in fatal or "reference" in fatal else ", or strict=False to go on with these")
            )
