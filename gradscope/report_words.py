"""The facts of a report in a few sentences of plain text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from gradscope.plots._theme import number, with_error
from gradscope.report_facts import SURE, THIS, Facts
from schedulers.counts import format_count

_SPELLED = 4  # changes of the best strategy that are told one by one


def sentences(facts: Facts) -> list[str]:
    """The facts in a few sentences of plain text, the most important first."""
    said = []
    if "profile" in facts:
        said += _said_best(facts["profile"], facts["best"]) + _said_sure(facts)
    if "schedule" in facts:
        said += _said_schedule(facts["schedule"])
    if "results" in facts:
        said += _said_results(facts)
    if "uncertain" in facts:
        said += _said_uncertain(facts)
    return said


def _said_best(profile: Facts, best: Sequence[Facts | None]) -> list[str]:
    found = [one for one in best if one is not None]
    by = f"By {profile['criterion']} ({profile['metric']} metric)"
    if not found:
        done = profile["cells"]["measured"]
        lost = f"{by} no strategy has a defined score: the reference gradient is lost in noise."
        return [lost if done else "Nothing is measured yet."]
    spans = [
        (strategy, [one["progress"] for one in group if one])
        for strategy, group in itertools.groupby(best, key=lambda one: one["strategy"] if one else None)
        if strategy is not None
    ]
    what = "best estimate" if all(one["decided"] is False for one in found) else "best strategy"
    if len(spans) == 1:
        where = f"at every point measured, progress {_range(spans[0][1])}" if len(found) > 1 else _at(spans[0][1])
        said = f"{by} the {what} is {_text(spans[0][0])} {where}."
    elif len(spans) <= _SPELLED:
        said = f"{by} the {what} is " + ", then ".join(f"{_text(s)} ({_at(ps)})" for s, ps in spans) + "."
    else:
        first, last = spans[0][0], spans[-1][0]
        said = (
            f"{by} the {what} goes from {_text(first)} at the beginning to {_text(last)} at the end, "
            f"with {len(spans) - 1} changes."
        )
    return [f"{said} {_said_gain(profile, found)}".strip()]


def _said_gain(profile: Facts, found: Sequence[Facts]) -> str:
    if all(one["compared"] == 1 for one in found):
        return "No other was measured there."
    if all(one["strategy"] == profile["reference"] for one in found):
        return "That is the reference: nothing cheaper is worth it by this criterion."
    gains = [one["gain"] for one in found if one["gain"] is not None and one["strategy"] != profile["reference"]]
    if not gains:
        return "Two standard errors do not tell it from the reference."
    low, high = number(min(gains), 2), number(max(gains), 2)
    told = f"It scores {low if low == high else f'{low} to {high}'} times as well as the reference"
    if len(gains) == len(found):
        return f"{told}."
    points = _count(len(found), "point")
    return f"{told} at {len(gains)} of {points}; elsewhere two standard errors do not tell them apart."


def _said_schedule(schedule: Facts) -> list[str]:
    budget, more = schedule["budget"], schedule["times_the_samples"]
    said = f"The schedule costs {number(schedule['units_per_sample'])} units per sample"
    if budget is not None:
        said += f": {format_count(budget)} units pay for {format_count(schedule['samples'])} samples"
        said += "" if more is None else f", {number(more, 2)} times as many as the reference alone"
    elif more is not None:
        said += f": a budget pays for {number(more, 2)} times as many samples as by the reference alone"
    lines = [f"{said}."]
    if said := _said_predicted(schedule["predicted"]):
        lines.append(said)
    if schedule["unsure_stages"]:
        lines.append(
            f"In {_count(schedule['unsure_stages'], 'stage')} of {len(schedule['stages'])} its strategy is best with "
            f"less than {SURE:.0%} probability."
        )
    if schedule.get("unlike_best"):
        lines.append(
            f"In {_count(schedule['unlike_best'], 'stage')} of {len(schedule['stages'])} it runs another strategy than "
            "the best at the nearest point measured: a stage serves a stretch of training and keeps the constraints."
        )
    return lines


def _said_results(facts: Facts) -> list[str]:
    """Accuracies, the best first; which of the runs followed the schedule shown."""
    rows = [row for row in facts["results"] if {"run", "units spent"} <= row.keys()]  # not of a table of another kind
    rows = [row for row in rows if re.fullmatch(r"[\d.]+%", str(row.get("kNN accuracy")))]
    rows.sort(key=lambda row: -float(row["kNN accuracy"].rstrip("%")))
    if not rows:
        return []

    def told(row: Facts) -> str:
        schedule = row.get("schedule", "")
        under = f", {'this schedule' if schedule == THIS else schedule}" if schedule else ""
        return f"{row['kNN accuracy']} by {row['run']} ({row['units spent']} units{under})"

    more = f", and {len(rows) - _SPELLED} more below" if len(rows) > _SPELLED else ""
    lines = [f"Measured kNN accuracy, one run each: {', '.join(map(told, rows[:_SPELLED]))}{more}."]
    known = [row["schedule"] for row in facts["results"] if row.get("schedule")]
    if "schedule" in facts and known and THIS not in known:
        lines.append("No run shown has followed the schedule shown.")
    return lines


def _said_predicted(predicted: Facts) -> str:
    """How far and how fast; "" for a schedule that was made by hand."""
    end, error, speed_up = (predicted.get(name) for name in ("progress", "progress_se", "speed_up"))
    if not isinstance(speed_up, float) or not math.isfinite(speed_up):
        return ""
    beyond = ", if what was measured last goes on to hold" if predicted.get("beyond_profile") else ""
    if not isinstance(end, float) or not isinstance(error, float):
        return f"It is predicted to train {number(speed_up)} times as fast as the reference alone{beyond}."
    reach = f"progress {with_error(end, error)} of the profiled run"
    if error >= end:
        return f"What it reaches is lost in noise ({reach}{beyond})."
    return f"It is predicted to reach {reach}, {number(speed_up, 2)} times as fast as the reference alone{beyond}."


def _said_sure(facts: Facts) -> list[str]:
    uncertain, lines = facts["uncertain"], list[str]()
    told = sum(one is not None and one["decided"] is not None for one in facts["best"])
    if uncertain["undecided"]:
        lines.append(
            f"At {len(uncertain['undecided'])} of {_count(told, 'point')} other strategies are within two standard "
            "errors of the best, so that one of them may be it."
        )
    elif told:
        lines.append(f"The best strategy is clear by more than two standard errors at {_all(told)}.")
    if uncertain["unknown"]:
        lines.append(
            f"At {_count(len(uncertain['unknown']), 'point')} nothing is known about how sure the best one is: only "
            "one strategy was measured, or standard errors are missing."
        )
    if uncertain["undefined"]:
        points = ", ".join(map(_short, uncertain["undefined"]))
        lines.append(f"At progress {points} no score is defined: the reference gradient is lost in noise.")
    return lines


def _said_uncertain(facts: Facts) -> list[str]:
    uncertain, cells, lines = facts["uncertain"], facts["profile"]["cells"], list[str]()
    if cells["failed"] or cells["pending"]:
        lines.append(f"Of {cells['all']} cells {cells['failed']} failed and {cells['pending']} are not measured yet.")
    if uncertain["untrained"]:
        lines.append(
            f"The checkpoints were never trained under {len(uncertain['untrained'])} of the "
            f"{facts['profile']['strategies']} strategies: part of the bias measured there is unfamiliarity."
        )
    if uncertain["other_cube"]:
        lines.append("The schedule was made from another cube than the one shown.")
    return lines


def _text(strategy: str) -> str:
    """`patch=4,dropout=0.5` as words; whatever else stands there is kept."""
    return strategy.replace(",", ", ").replace("=", " ")


def _range(progress: Sequence[float]) -> str:
    return f"{_short(progress[0])} to {_short(progress[-1])}"


def _short(progress: float) -> str:
    return f"{round(progress, 2):g}"


def _at(progress: Sequence[float]) -> str:
    return f"progress {_range(progress)}" if len(progress) > 1 else f"at progress {_short(progress[0])}"


def _all(points: int) -> str:
    return "the one point" if points == 1 else f"all {points} points"


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
