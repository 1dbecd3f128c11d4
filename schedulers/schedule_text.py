"""Schedules in one line, as typed on a command line: patch=30,dropout=0.5@0.4;patch=16."""

from __future__ import annotations

from collections.abc import Callable

from schedulers.errors import UsageError
from schedulers.schedule import Schedule, Stage
from schedulers.strategy import Strategy


def parse_schedule(text: str, *, cost: Callable[[Strategy], float], reference: Strategy) -> Schedule:
    """Stages separated by semicolons, each `axis=value,...@end`: the strategy until that fraction.

    The last stage ends at 1 and needs no `@`; an axis that is not given takes the reference's value.
    `cost` gives a strategy's units per sample. Raises UsageError, naming the part, for another form,
    an axis that the reference does not have, and ends that do not increase to 1.

    >>> plan = parse_schedule("patch=30@0.4;patch=16", cost=lambda s: 1.0, reference=Strategy(patch=16, dropout=0))
    >>> [(stage.end, str(stage.strategy)) for stage in plan.stages]
    [(0.4, 'patch=30,dropout=0'), (1.0, 'patch=16,dropout=0')]
    """
    parts = [part.strip() for part in text.split(";")]
    stages: list[Stage] = []
    start = 0.0
    for i, part in enumerate(parts):
        strategy_text, at, end_text = part.partition("@")
        last = i == len(parts) - 1
        if not at and not last:
            raise UsageError(f"schedule {text!r}: {part!r} does not say until when; add @ and a fraction, as in @0.4")
        end = _fraction(text, part, end_text) if at else 1.0
        if last and end != 1:
            raise UsageError(f"schedule {text!r}: it stops at {end:g}; the last part must run until 1")
        if not start < end <= 1:
            raise UsageError(f"schedule {text!r}: {part!r} ends at {end:g}, which is not in ({start:g}, 1]")
        strategy = _complete(text, Strategy.parse(strategy_text), reference)
        stages.append(Stage(start, end, ((strategy, 1.0),), float(cost(strategy))))
        start = end
    return Schedule(stages=tuple(stages))


def _fraction(text: str, part: str, end_text: str) -> float:
    try:
        return float(end_text)
    except ValueError:
        raise UsageError(f"schedule {text!r}: {end_text!r} in {part!r} is not a fraction of the budget") from None


def _complete(text: str, strategy: Strategy, reference: Strategy) -> Strategy:
    for axis in strategy:
        if axis not in reference:
            raise UsageError(f"schedule {text!r}: unknown axis {axis!r}; the axes are {', '.join(reference)}")
    return Strategy({axis: strategy.get(axis, reference[axis]) for axis in reference})
