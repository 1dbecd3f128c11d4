"""Decisions: which accelerated gradient runs when. NumPy and SciPy only.

Strategies and grids, costs, criteria, the dynamic program that turns a profile into a schedule,
schedules as values and as JSON, learning-rate decay over the budget.
"""

from schedulers.adaptive import AdaptivePolicy
from schedulers.adaptive_rule import AdaptiveRule, Decision, ProbePlan, Verdict
from schedulers.comparison import Comparison, Segment, compare_schedules
from schedulers.constraints import Constraints
from schedulers.costs import (
    METHOD_FORMULAS,
    CostFormula,
    TokenCounts,
    paper_cost,
    paper_table2b_cost,
    sequence_cost,
    token_cost,
    token_counts,
)
from schedulers.counts import format_count, parse_count
from schedulers.criteria import CRITERIA, MOMENTS, Criterion, Moments, criterion_se, get_criterion, readable
from schedulers.decay import DECAY_KINDS, Decay
from schedulers.errors import GradscopeError, InfeasibleError, ScheduleError, UsageError
from schedulers.evidence import Measurement
from schedulers.optimizer import optimize, predict, reference_progress, smallest_budget
from schedulers.profile import Profile
from schedulers.program import solve
from schedulers.racing import RaceRule, boundary_cells, contenders
from schedulers.schedule import (
    Schedule,
    Stage,
    constant_schedule,
    in_costs,
    load_schedule,
    mixed_schedule,
    save_schedule,
)
from schedulers.schedule_text import parse_schedule
from schedulers.strategy import AxisValue, Grid, Strategy
from schedulers.tokens import kept_tokens, patch_tokens

__all__ = [
    "CRITERIA",
    "DECAY_KINDS",
    "METHOD_FORMULAS",
    "MOMENTS",
    "AdaptivePolicy",
    "AdaptiveRule",
    "AxisValue",
    "Comparison",
    "Constraints",
    "CostFormula",
    "Criterion",
    "Decay",
    "Decision",
    "GradscopeError",
    "Grid",
    "InfeasibleError",
    "Measurement",
    "Moments",
    "ProbePlan",
    "Profile",
    "RaceRule",
    "Schedule",
    "ScheduleError",
    "Segment",
    "Stage",
    "Strategy",
    "TokenCounts",
    "UsageError",
    "Verdict",
    "boundary_cells",
    "compare_schedules",
    "constant_schedule",
    "contenders",
    "criterion_se",
    "format_count",
    "get_criterion",
    "in_costs",
    "kept_tokens",
    "load_schedule",
    "mixed_schedule",
    "optimize",
    "paper_cost",
    "paper_table2b_cost",
    "parse_count",
    "parse_schedule",
    "patch_tokens",
    "predict",
    "readable",
    "reference_progress",
    "save_schedule",
    "sequence_cost",
    "smallest_budget",
    "solve",
    "token_cost",
    "token_counts",
]
