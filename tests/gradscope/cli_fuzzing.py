"""Command lines with odd values for every option of every command, and what one does in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import typer
from hypothesis import strategies as st
from PIL import Image

import gradscope.config
import gradscope.models
import gradscope.watch
from gradscope import ProfileOptions, profile
from gradscope.cli.app import app, main
from gradscope.cli.run_settings import make_schedule
from gradscope.config import TrainConfig, open_setting
from gradscope.data import ImageData
from gradscope.progress import Progress
from gradscope.stepper import Stepper
from gradscope.tasks import PretrainTask
from gradscope.trainer import train
from schedulers import Strategy, parse_schedule, save_schedule
from tests.gradscope.cli_words import NUMBERS, PATHS, TEXTS, TOML_VALUES, WORDS
from tests.mutations import outcome

STEPS = 2  # of training, of progress or of waiting, after which a command that goes on is interrupted
GRID = "patch=4,7;dropout=0,0.5"
BASES: dict[str, dict[str, list[str]]] = {
    "compare": {"a": ["schedule.json"], "b": ["other.json"]},
    "cost": {"image_size": ["28"], "grid": [GRID]},
    "demo": {"budget": ["600"], "out": ["demo"]},
    "evaluate": {"checkpoint": ["run"]},
    "merge": {"cubes": ["cube.nc", "cube.nc"], "out": ["merged.nc"]},
    "optimize": {"cube": ["cube.nc"], "budget": ["1M"], "slices": ["10"], "draws": ["10"]},
    "plot": {"cube": ["cube.nc"], "schedule": ["schedule.json"], "run": ["run"]},
    "profile": {"ckpt_dir": ["run"], "out": ["own.nc"], "samples": ["48"]},
    "show": {"file": ["cube.nc"]},
    "train": {
        "budget": ["400"], "out": ["new"], "batch_size": ["16"], "patch": ["4"], "grid": [GRID],
        "settings": ["head_hidden=16", "head_width=8"],
    },
}  # fmt: skip
"""Arguments with which a command works; those that are fuzzed take their place."""
BESIDE = {
    ("cost", "batch_size"): {"measure": [""]},
    ("cost", "cube"): {"model": ["demo"]},
    ("cost", "measure"): {"model": ["demo"]},
    ("cost", "model"): {"measure": [""]},
    ("cost", "repeats"): {"measure": [""]},
    ("evaluate", "blocks"): {"linear": [""]},
    ("evaluate", "epochs"): {"finetune": [""]},
    ("evaluate", "probe_epochs"): {"linear": [""], "solver": ["sgd"]},
    ("evaluate", "solver"): {"linear": [""]},
    ("optimize", "match_reference"): {"budget": []},
    ("optimize", "target_progress"): {"budget": []},
    ("plot", "interval"): {"watch": [""]},
}
"""What an option needs beside it to mean something."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One parameter of a command: how it is written, () for an argument, its type, and its environment variable."""

    name: str
    written: tuple[str, ...]
    flag: bool
    kind: type
    variable: str

    @property
    def likely(self) -> list[str]:
        """Odd values of the kind that the option is made for."""
        return PATHS if self.kind is Path else NUMBERS if self.kind in (int, float) else TEXTS


@dataclasses.dataclass(frozen=True)
class Line:
    """One command line with its environment and settings file; `fuzzed`: what a message about it may name."""

    words: tuple[str, ...]
    variables: Mapping[str, str]
    settings: str
    fuzzed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Told:
    """What a line did: exit code, None where its process did not end well, what it printed, whether it was stopped."""

    code: int | None
    out: str
    err: str
    stopped: bool = False


def commands() -> dict[str, dict[str, Option]]:
    """Every parameter of every command by name, as the commands themselves tell them."""
    group: Any = typer.main.get_command(app)
    return {
        name: {parameter.name: _option(name, parameter) for parameter in command.params}
        for name, command in sorted(group.commands.items())
    }


def _option(command: str, parameter: Any) -> Option:
    kind = parameter.type_descriptor.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is list:
        (kind,) = typing.get_args(kind)
    written = tuple(word for word in parameter.opts if word.startswith("-"))
    variable = parameter.envvar or f"GRADSCOPE_{command}_{parameter.name}".upper()
    return Option(parameter.name, written, bool(getattr(parameter, "is_flag", False)), kind, variable)


def make_line(
    command: str,
    given: Mapping[str, Sequence[str]],
    variables: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Line:
    """The line of a command with the values `given` on it, in the environment and in the settings file, by parameter.

    They stand in the place of the command's usual arguments; the others are as in BASES.
    """
    known, variables, settings = commands()[command], variables or {}, settings or {}
    odd = {*given, *variables, *settings}
    beside = {key: value for name in sorted(odd) for key, value in BESIDE.get((command, name), {}).items()}
    usual = {name: values for name, values in {**BASES.get(command, {}), **beside}.items() if name not in odd}
    words, arguments = list[str](), list[str]()
    for name, option in known.items():
        for value in given.get(name, usual.get(name, ())):
            if not option.written:
                arguments.append(value)
            else:
                words += [option.written[0]] if option.flag else [option.written[0], value]
    lines = [f"{known[name].written[0].lstrip('-')} = {value}" for name, value in settings.items()]
    return Line(
        (command, *words, *arguments),
        {known[name].variable: value for name, value in variables.items()},
        "\n".join([f"[{command}]", *lines, ""]) if lines else "",
        tuple(sorted(odd)),
    )


@st.composite
def lines(draw: Any, command: str) -> Line:
    """Lines with up to four odd parameters, each given on the line, in the environment or in the settings file."""
    known = commands()[command]
    given, variables, settings = dict[str, list[str]](), dict[str, str](), dict[str, str]()
    for name in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4, unique=True)):
        option = known[name]
        some = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6)
        values = st.sampled_from(option.likely) | st.sampled_from(option.likely) | st.sampled_from(WORDS) | some
        where = draw(st.sampled_from(["line", "line", "line", "variable", "settings"])) if option.written else "line"
        if where == "line":
            given[name] = draw(st.lists(values, min_size=1, max_size=2))
        elif where == "variable":
            variables[name] = draw(values)
        else:
            settings[name] = draw(st.sampled_from(TOML_VALUES))
    if draw(st.booleans()) and "as_json" in known:
        given["as_json"] = [""]
    return make_line(command, given, variables, settings)


def make_inputs(folder: Path, images: ImageData) -> None:
    """A tiny run with its cube, two schedules, pictures, and files and folders that cannot be read, into `folder`."""
    folder.mkdir()
    with mock.patch.object(gradscope.config, "load_data", lambda *_, **__: images):
        config = TrainConfig(
            budget=200.0, batch_size=16, patch=4, patches=(4, 7), dropouts=(0.0, 0.5), head_hidden=16, head_width=8,
            width=16, depth=2, heads=2, checkpoints=(0.0, 1.0), evaluations=(),
        )  # fmt: skip
        setting = open_setting(config)
    train(setting, make_schedule("mixed", setting), folder / "run")
    profile(PretrainTask(setting), folder / "run", folder / "cube.nc", options=ProfileOptions(samples=48))
    plan = parse_schedule("patch=7@0.5;patch=4", cost=setting.cost, reference=Strategy(patch=4, dropout=0))
    save_schedule(plan, folder / "schedule.json")
    save_schedule(dataclasses.replace(plan, budget=1e6, batch_size=16), folder / "other.json")
    for name in ("empty", "locked", "pictures"):
        (folder / name).mkdir()
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / "pictures" / f"{i}.png")
    for name in ("cube.nc", "schedule.json", "run/step-00000000.pt"):
        data = (folder / name).read_bytes()
        (folder / name).with_name(f"damaged{Path(name).suffix}").write_bytes(data[: len(data) // 2])
    (folder / "run" / "damaged.pt").rename(folder / "damaged.pt")
    (folder / "own.py").write_text(
        "class Broken:\n    def __init__(self):\n        raise ValueError('broken')\n\n\nclass NoGrid:\n    pass\n"
    )


def warm_up(inputs: Path) -> None:
    """Have this process import what commands import when they run, so that its children need not."""
    files = [str(inputs / name) for name in ("cube.nc", "schedule.json", "run")]
    plot = ["plot", files[0], "--schedule", files[1], "--run", files[2], "--out", str(inputs.parent / "warm.html")]
    for words in (plot, ["compare", files[1], files[1]], ["cost", "--seed", "x"]):
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.object(sys, "argv", ["gradscope", *words]),
            contextlib.suppress(SystemExit),
        ):
            main()


def told(line: Line, inputs: Path, images: ImageData) -> Told:
    """Run a line in a copy of the folder `inputs`, in a process of its own with bounded memory and time."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "here"
        shutil.copytree(inputs, place)
        (place / "locked").chmod(0)
        try:
            found = outcome(lambda: json.dumps(dataclasses.asdict(_run(line, place, images))))
        finally:
            (place / "locked").chmod(0o755)
    return Told(**json.loads(found.text)) if found.kind == "read" else Told(None, "", f"{found.kind}: {found.text}")


def _run(line: Line, place: Path, images: ImageData) -> Told:
    """In the child: run the line; what it printed is cut short."""
    os.chdir(place)
    for name in [name for name in os.environ if name.startswith("GRADSCOPE_")]:
        del os.environ[name]
    os.environ.update(line.variables, HOME=str(place))
    if line.settings:
        Path("gradscope.toml").write_text(line.settings, encoding="utf-8")
    out, err, code, steps = io.StringIO(), io.StringIO(), 0, 0
    load, step, sizes = gradscope.config.load_data, Stepper.step, gradscope.models.VIT_SIZES
    tiny = gradscope.models.ViTSize(width=24, depth=2, heads=2, mlp_ratio=2.0)

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > STEPS:
            signal.raise_signal(signal.SIGINT)

    def counted_step(*arguments: Any) -> Any:
        count()
        return step(*arguments)

    def load_data(name: str, folder: Path | None = None, *, image_size: int | None = None) -> Any:
        if (name, folder) == ("fashion-mnist-10k", None) and image_size in (None, 28):
            return images
        return load(name, folder, image_size=image_size)

    with contextlib.ExitStack() as stack:
        for context in (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.dict(sizes, dict.fromkeys(sizes, tiny)),
            mock.patch.object(Progress, "update", count),
            mock.patch.object(Stepper, "step", counted_step),
            mock.patch.object(gradscope.watch.time, "sleep", count),
            mock.patch.object(gradscope.config, "load_data", load_data),
            mock.patch.object(torch, "compile", lambda model, **_: model),
            mock.patch.object(sys, "argv", ["gradscope", *line.words]),
        ):
            stack.enter_context(context)
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    text = out.getvalue()
    if "--json" in line.words and code in (0, 4) and isinstance(json.loads(text), dict):
        text = "one object"
    return Told(code, text[:5000], err.getvalue()[:20_000], steps > STEPS)


def wrong(line: Line, found: Told) -> str:
    """What is wrong with how a line ended, "" where nothing is."""
    said, words = found.err, {*line.words}
    if found.code is None:
        return "no normal end"
    if found.code not in (0, 1, 2, 3, 4) and not (found.stopped and found.code == 130):
        return f"exit code {found.code}"
    for sign in ("an unexpected one", "Traceback", "Warning"):
        if sign in said:
            return f"{sign!r} in a message"
    if found.code in (0, 4) and "--json" in words and not words & {"-h", "--help"} and found.out != "one object":
        return "no JSON object"
    if found.code in (1, 2, 3):
        if found.out.strip():
            return "output beside an error"
        if not _names(line, said):
            return "an error that names neither an option nor a file"
    return ""


def _names(line: Line, said: str) -> bool:
    """Whether a message names a parameter, an environment variable, or a value of the line."""
    known = commands()[line.words[0]]
    options = [name for fuzzed in line.fuzzed for name in (fuzzed, *known[fuzzed].written)]
    options += [name for name in known if len(name) > 4]  # short ones stand in many words
    words = [*line.words[1:], *line.variables.values(), *re.findall(r'"([^"]+)"', line.settings)]
    values = [part for word in words for part in (word, word.partition("=")[0]) if part]
    names = [*options, *values, *line.variables, "gradscope.toml", "memory"]
    if any(all(part in said for part in name.split("_")) for name in line.fuzzed if "_" in name):
        return True
    plain = _plain(said)
    return any(_plain(name)[:20] in plain for name in names if _plain(name)) or any(value in said for value in values)


def _plain(text: str) -> str:
    """Letters and digits alone: messages are wrapped in boxes, and names of settings written with other dashes."""
    return re.sub(r"[\W_]+", "", text)
