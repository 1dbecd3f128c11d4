"""A run's configuration and schedule from the texts of options."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.cli.console import note, parse_grid_axes

if TYPE_CHECKING:
    from gradscope.config import Setting, TrainConfig
    from schedulers import AdaptiveRule, Schedule, Strategy


def make_config(
    values: dict[str, Any], grid: str | None, settings: list[str], stored: Mapping[str, Any] | None = None
) -> TrainConfig:
    """A configuration from options, a grid's text and `key=value` texts, which win over `stored` settings of a file.

    Raises UsageError naming what is wrong.
    """
    import ast
    import dataclasses

    from gradscope.config import TrainConfig
    from gradscope.data import DATASETS
    from gradscope.data.folder import IMAGE_SIZE
    from gradscope.errors import UsageError

    types = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    kept = {key: _as_tuple(v) if isinstance(types[key], tuple) else v for key, v in (stored or {}).items()}
    if grid is not None:
        axes = parse_grid_axes(grid)
        names = {"patch": "patches", "dropout": "dropouts"}
        for axis, points in axes.items():
            if axis not in names:
                raise UsageError(f"--grid {grid!r}: unknown axis {axis!r}; the axes are patch, dropout")
            if any(isinstance(point, str) for point in points):
                raise UsageError(f"--grid {grid!r}: patch and dropout take numbers, as in patch=2,4;dropout=0,0.5")
            values[names[axis]] = points
    by_option = set(values)
    for text in settings:
        key, equals, value = text.partition("=")
        if equals and key not in types:
            raise UsageError(f"--set {text!r}: unknown setting {key!r}; the settings are {', '.join(sorted(types))}")
        if not equals:
            raise UsageError(
                f"--set {text!r}: not of the form setting=value; the settings are {', '.join(sorted(types))}"
            )
        try:
            read = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            read = value
        if key in values and key not in by_option:
            raise UsageError(f"--set {text!r}: {key} is set twice")
        if key in values:
            option = {"patches": "grid", "dropouts": "grid"}.get(key, key.replace("_", "-"))
            raise UsageError(f"--set {text!r}: {key} has an option of its own, --{option}")
        values[key] = _as_tuple(read) if isinstance(types[key], tuple) else read
    values = {**kept, **values}
    if values.get("data", DATASETS[0]) not in DATASETS:
        # the run may be continued from elsewhere
        values["data"] = str(Path(os.path.expanduser(values["data"])).resolve())
    if (
        values.get("model", "demo") == "demo"
        and "patch" not in values
        and values.get("data", DATASETS[0]) not in DATASETS
    ):
        values["patch"] = _patch_for(values.get("image_size") or IMAGE_SIZE)
        values.setdefault("patches", ())
    return TrainConfig.for_run(values.pop("method"), values.pop("model"), **values)


def make_plan(text: str, setting: Setting) -> Schedule | AdaptiveRule:
    """What an option's text names: `online` with its rule, or a schedule."""
    from schedulers import AdaptiveRule

    if text == "online" or text.startswith("online:"):
        return AdaptiveRule.parse(text.partition(":")[2])
    return make_schedule(text, setting)


def make_schedule(text: str, setting: Setting) -> Schedule:
    """The schedule that an option's text names: none, mixed, stages, or a file. Checks that the model can run it.

    A file whose costs are of another model than `tokens`, which training counts in, becomes the same run in tokens.
    """
    from gradscope.errors import UsageError
    from schedulers import constant_schedule, load_schedule, mixed_schedule, parse_schedule

    config, cost = setting.config, setting.cost

    if text == "none":
        return constant_schedule(config.reference, cost(config.reference))
    if text == "mixed":
        strategies = setting.config.grid(setting.image_size).strategies()
        return mixed_schedule(strategies, [cost(s) for s in strategies])
    if Path(text).is_file():
        plan = load_schedule(text)
    elif "=" in text:
        plan = parse_schedule(text, cost=cost, reference=config.reference)
    else:
        raise UsageError(
            f"--schedule {text!r}: no such file; give a schedule file, a strategy such as "
            "patch=4,dropout=0.5, stages such as patch=7@0.4;patch=2, mixed, online or none"
        )
    for strategy in plan.strategies:
        for axis in strategy:
            if axis not in config.reference:
                raise UsageError(
                    f"--schedule {text!r}: unknown axis {axis!r}; {config.method} has {', '.join(config.reference)}"
                )
        cost(strategy)  # refuses a patch that does not divide the image, and a dropout that leaves no token
    if Path(text).is_file():
        plan = _in_tokens(plan, text, cost)
        if any(abs(stage.cost / sum(w * cost(s) for s, w in stage.mixture) - 1) > 1e-3 for stage in plan.stages):
            note(
                f"note: {text} was made for other costs than those of {config.method} on {setting.image_size} pixels "
                f"at patch {config.patch}; its stages keep their fractions of the budget"
            )
        for name, here in (("budget", config.budget), ("batch_size", config.batch_size)):
            made_for = getattr(plan, name)
            if made_for is not None and abs(made_for - here) > 0.5:  # a budget may be given in whole units
                note(f"note: {text} was made for {name} {made_for:.9g}, this run has {here:.9g}")
    return plan


def _in_tokens(plan: Schedule, path: str, cost: Callable[[Strategy], float]) -> Schedule:
    """The plan as it is, or, where it counts other costs than tokens, the same samples counted in tokens."""
    from schedulers.schedule import in_costs

    if plan.cost_model == "tokens":
        return plan
    counted = in_costs(plan, cost, "tokens")
    budgets = ""
    if plan.budget is not None:
        budgets = (
            f"; its budget of {plan.budget:,.0f} units is {counted.budget:,.0f} here (--budget {counted.budget:.0f})"
        )
    note(
        f"note: {path} counts {plan.cost_model} costs, training counts tokens: its stages get as many samples as it "
        f"planned{budgets}"
    )
    return counted


def _patch_for(image_size: int) -> int:
    """The base patch of the demo's model for a folder of pictures: the largest that leaves 14 x 14 patches or more."""
    fitting = (p for p in range(1, image_size + 1) if image_size % p == 0 and image_size // p >= 14)
    return max(fitting, default=1)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
