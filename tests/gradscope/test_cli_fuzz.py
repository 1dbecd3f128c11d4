"""Odd values for every option, on the line, in the environment and in the settings file: refused in words, or done."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import gradscope.demo
import gradscope.evaluation
import gradscope.foreign
import gradscope.report
import gradscope.timing  # noqa: F401  (imported once here, and not by every forked process)
from gradscope.cli import main
from gradscope.data import ImageData
from tests.gradscope.cli_fuzzing import Line, commands, lines, make_inputs, make_line, told, warm_up, wrong
from tests.gradscope.cli_words import TOML_VALUES

COMMANDS = sorted(commands())


@pytest.fixture(scope="module")
def images(few_images: ImageData) -> ImageData:
    return dataclasses.replace(
        few_images,
        train_images=few_images.train_images[:96],
        train_labels=few_images.train_labels[:96],
        test_images=few_images.test_images[:24],
        test_labels=few_images.test_labels[:24],
    )


@pytest.fixture(scope="module")
def inputs(images: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "inputs"
    make_inputs(folder, images)
    warm_up(folder)
    return folder


def check(line: Line, inputs: Path, images: ImageData) -> None:
    found = told(line, inputs, images)
    assert not wrong(line, found), f"{wrong(line, found)}: {line}\n{found}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usual_arguments_of_a_command_do_their_work(command: str, inputs: Path, images: ImageData) -> None:
    found = told(make_line(command, {}), inputs, images)
    assert found.code == 0 or (found.stopped and found.code == 130), found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_takes_or_refuses_odd_values(command: str, inputs: Path, images: ImageData) -> None:
    """one odd value for every third option, another one for each: the slow test takes all."""
    for number, (name, option) in enumerate(commands()[command].items()):
        if not option.flag and number % 3 == 1:
            check(make_line(command, {name: [option.likely[7 * number % len(option.likely)]]}), inputs, images)


@pytest.mark.parametrize(
    ("command", "name", "value", "message"),
    [
        ("cost", "image_size", "1000000000000", "at most 16,384 pixels"),
        ("evaluate", "device", "mps", "only cpu and cuda"),
        ("cost", "grid", "patch=" + "9" * 400, "too large"),
        ("evaluate", "blocks", "-1", "blocks=-1"),
        ("evaluate", "image_size", "100000", "more than this machine's memory"),
        ("evaluate", "temperature", "nan", "not a finite number"),
        ("merge", "out", ".", "a folder; name a file in it"),
        ("optimize", "out", "..", "a folder; name a file in it"),
        ("optimize", "slices", "1000000000", "at most 10,000"),
        ("profile", "task", "own:Broken", "ValueError: broken"),
        ("show", "file", "x" * 300, "too long a name"),
        ("train", "schedule", "1e-999999999*patch=7+1*patch=4", "is not in (0, 1]"),
        ("train", "seed", "9" * 30, "too large a number"),
        ("train", "settings", "width=1000000", "width is 1000000; it must be at most 65,536"),
    ],
)
def test_values_that_no_machine_could_bear_are_refused(
    command: str, name: str, value: str, message: str, inputs: Path, images: ImageData
) -> None:
    line = make_line(command, {name: [value]})
    found = told(line, inputs, images)
    assert not wrong(line, found) and found.code in (1, 2), found
    assert re.sub(r"\W", "", message) in re.sub(r"\W", "", found.err), found


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: not enough memory; take a smaller batch"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes. Error"),
         "error: not enough memory (4000 bytes were asked for at once)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "(2.50 GiB were asked"),
        (OSError(13, "Permission denied", "/there"), "error: /there: Permission denied"),
        (RuntimeError("no such operator"), "an unexpected one"),
    ],
)  # fmt: skip
def test_a_machine_that_lacks_something_is_told_of_in_words(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> None:
        raise error

    monkeypatch.setattr("gradscope.cli.app.app", failing)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_takes_or_refuses_every_odd_value(command: str, inputs: Path, images: ImageData) -> None:
    count = 0
    for name, option in commands()[command].items():
        found = [make_line(command, {name: [value]}) for value in ([""] if option.flag else option.likely)]
        if option.written:
            found += [make_line(command, {}, settings={name: value}) for value in TOML_VALUES]
            found += [make_line(command, {}, variables={name: value}) for value in option.likely[::3]]
        for line in found:
            check(line, inputs, images)
        count += len(found)
    print(f"{command}: {count} lines")


@pytest.mark.parametrize(
    ("command", "count"),
    [
        *itertools.product(COMMANDS, [2]),
        *(pytest.param(command, 400, marks=pytest.mark.slow) for command in COMMANDS),
    ],
)
def test_any_options_together_are_refused_in_words_or_done(
    command: str, count: int, inputs: Path, images: ImageData
) -> None:
    @settings(max_examples=count, derandomize=True, deadline=None, database=None)
    @given(lines(command))
    def checked(line: Line) -> None:
        check(line, inputs, images)

    checked()
