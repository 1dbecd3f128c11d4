"""`gradscope show`: what is in a cube, a schedule, or a checkpoint of ours or of another code base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gradscope.cli.console import Json, emit, table

FAILURES = 10  # failed cells that are named


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Further")(show)


def show(
    file: Annotated[Path, typer.Argument(help="A cube, a schedule or a checkpoint, also of other code bases.")],
    as_json: Json = False,
) -> None:
    """What is in a file.

    gradscope show cube.nc
    """
    from gradscope.errors import UsageError

    if not file.is_file():
        what = "is a folder; name one of its files" if file.is_dir() else "no such file"
        raise UsageError(f"{file}: {what}; give a cube (.nc), a schedule (.json) or a checkpoint (.pt)")
    others = dict.fromkeys((".pth", ".tar", ".ckpt", ".safetensors", ".bin"), _show_foreign)
    readers = {".nc": _show_cube, ".json": _show_schedule, ".pt": _show_checkpoint, **others}
    if file.suffix not in readers:
        raise UsageError(f"{file}: not a kind of file this command knows ({', '.join(readers)})")
    facts, lines = readers[file.suffix](file)
    emit(facts, lines, as_json=as_json)


def _show_cube(file: Path) -> tuple[dict[str, Any], list[str]]:
    from gradscope.cube import DONE, FAILED, grid_of, open_cube

    cube = open_cube(file).dataset
    grid, status = grid_of(cube), cube["status"].values
    facts: dict[str, Any] = {
        "kind": "cube", "progress": [float(p) for p in cube["progress"].values],
        "axes": {name: list(values) for name, values in grid.axes.items()}, "reference": str(grid.reference),
        "done": int((status == DONE).sum()), "failed": int((status == FAILED).sum()), "cells": int(status.size),
        "batch_size": int(cube.attrs["batch_size"]), "samples": int(cube["n_samples"].max()),
        "samples_least": int(cube["n_samples"].where(status == DONE).min()) if (status == DONE).any() else 0,
        "estimator": cube.attrs.get("engine", ""), "units": float(cube.attrs.get("units", 0.0)),
        "failures": json.loads(cube.attrs.get("failures_json", "{}")),
    }  # fmt: skip
    lines = [
        f"cube: {facts['done']} of {facts['cells']} cells done, {facts['failed']} failed; K "
        f"{facts['batch_size']}, {facts['samples_least']} to {facts['samples']} samples per cell",
        f"estimator {facts['estimator'] or 'unknown'}, {facts['units']:,.0f} units spent",
    ]
    lines += [f"progress: {', '.join(f'{p:.3g}' for p in cube['progress'].values)}"]
    lines += [f"{name}: {', '.join(map(str, values))}" for name, values in grid.axes.items()]
    lines += [f"reference: {grid.reference}"]
    failed = [f"failed: {cell}: {why}" for cell, why in facts["failures"].items()]
    more = [f"and {len(failed) - FAILURES} more; --json has them all"] if len(failed) > FAILURES else []
    return facts, [*lines, *failed[:FAILURES], *more]


def _show_schedule(file: Path) -> tuple[dict[str, Any], list[str]]:
    import json

    from gradscope.cli.compare import mixture_text
    from schedulers import load_schedule

    plan = load_schedule(file)
    columns = {
        "fraction": [f"{stage.start:.2f}-{stage.end:.2f}" for stage in plan.stages],
        "cost": [f"{stage.cost:.3f}" for stage in plan.stages],
        "strategy": [mixture_text(stage) for stage in plan.stages],
        "progress": ["" if s.progress is None else f"{s.progress[0]:.2f}-{s.progress[1]:.2f}" for s in plan.stages],
        "best": ["" if s.probability is None else f"{s.probability:.0%}" for s in plan.stages],
        "else by": ["" if s.regret is None else f"{s.regret:.1%}" for s in plan.stages],
        "rival": ["" if s.rival is None else str(s.rival) for s in plan.stages],
    }
    known = {name: column for name, column in columns.items() if any(column)}
    rows = [[column[i] for column in known.values()] for i in range(len(plan.stages))]
    lines = [
        *table(list(known), rows),
        *(line for name, value in plan.predicted.items() for line in _predicted_lines(name, value)),
    ]
    return {"kind": "schedule", **json.loads(plan.to_json())}, lines


def _predicted_lines(name: str, value: Any) -> list[str]:
    """One line, or one for each entry of a list of objects, as of `more_samples`."""
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return [f"predicted {name}: {_value_text(value)}"]
    return [f"predicted {name}:", *(f"  {_value_text(entry)}" for entry in value)]


def _value_text(value: Any) -> str:
    """JSON, but an object's fields as `name value, name value`, and a strategy as people write it."""
    import json

    from schedulers import Strategy, UsageError

    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    texts = []
    for name, inner in value.items():
        try:
            text = str(Strategy(inner)) if name == "strategy" and isinstance(inner, dict) else _value_text(inner)
        except UsageError:  # edited by hand
            text = _value_text(inner)
        texts.append(f"{name} {text}")
    return ", ".join(texts)


def _show_checkpoint(file: Path) -> tuple[dict[str, Any], list[str]]:
    from gradscope.checkpoints import load_checkpoint
    from gradscope.foreign import is_foreign

    if is_foreign(file):
        return _show_foreign(file)
    content = load_checkpoint(file)
    facts: dict[str, Any] = {
        "kind": "checkpoint",
        **{name: content[name] for name in ("step", "units", "samples", "seconds", "config")},
    }
    progress = content["units"] / content["config"]["budget"]
    lines = [
        f"checkpoint: step {content['step']:,}, {content['samples']:,} samples, {progress:.1%} of "
        f"{content['config']['budget']:,.0f} units"
    ]
    return facts, [*lines, *(f"{name} = {value}" for name, value in content["config"].items())]


def _show_foreign(file: Path) -> tuple[dict[str, Any], list[str]]:
    from gradscope.errors import UsageError
    from gradscope.foreign import architecture_of, read_foreign
    from gradscope.foreign.reading import some_names

    found = read_foreign(file)
    facts: dict[str, Any] = {
        "kind": "foreign checkpoint", "layout": found.layout, "method": found.method, "epoch": found.epoch,
        "total_epochs": found.total_epochs, "step": found.step, "leftovers": list(found.leftovers),
        "notes": list(found.notes),
    }  # fmt: skip
    told = [f"epoch {found.epoch:g}" if found.epoch is not None else "epoch unknown"]
    told += [f"of {found.total_epochs:g}"] if found.total_epochs is not None else []
    told += [f"step {found.step:,}"] if found.step is not None else []
    lines = [f"{found.layout} checkpoint, {' '.join(told)}"]
    lines.append(f"loss: {found.method}" if found.method else f"loss: none of its own, {found.lacking}")
    try:
        shape, heads = architecture_of(found), ""
    except UsageError:  # the width alone does not say how many
        shape, heads = architecture_of(found, heads=1), "unknown"
    heads = heads or f"{shape.size.heads}{' (a guess)' if shape.guessed else ''}"
    facts["model"] = {
        "width": shape.size.width, "depth": shape.size.depth,
        "heads": None if heads == "unknown" else shape.size.heads,
        "heads_guessed": shape.guessed, "patch": shape.patch, "image_size": shape.image_size,
        "channels": shape.channels,
        "positions": shape.positions, "norm_eps": shape.norm_eps,
    }  # fmt: skip
    lines.append(
        f"ViT: width {shape.size.width}, depth {shape.size.depth}, heads {heads}, patch {shape.patch}, images of "
        f"{shape.image_size} pixels and {shape.channels} channels, {shape.positions} positions"
    )
    lines += [f"heads of the loss: {', '.join(found.heads)}"] if found.heads else []
    lines += [f"tensors not used: {some_names(list(found.leftovers))}"] if found.leftovers else []
    return facts, [*lines, *(f"note: {text}" for text in found.notes)]
