"""The typer application: options common to all commands, errors and exit codes.

Only the standard library and typer are imported here and at the top of the command modules, so that
`--help` stays fast; torch, xarray and plotly are imported by the command that needs them.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

import gradscope.cli.compare as compare
import gradscope.cli.cost as cost
import gradscope.cli.evaluate as evaluate
import gradscope.cli.measure as measure
import gradscope.cli.optimize as optimize
import gradscope.cli.training as training
import gradscope.cli.view as view
from gradscope.cli.console import SETTINGS, Command

CONFIG_FILE = "gradscope.toml"
_NO_MEMORY = r"allocate memory|out of memory|not enough memory"

app = typer.Typer(
    name="gradscope",
    help="Measure what cheaper gradients of a Vision Transformer are worth, find the best schedule under "
    "a budget, and train with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GRADSCOPE"},
)
for module in (view, training, evaluate, measure, optimize, compare, cost):
    module.register(app)
for info in app.registered_commands:
    info.cls = Command


@app.callback()
def common(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help=f"TOML file with a table per command; default {CONFIG_FILE} if there is one.",
            envvar="GRADSCOPE_CONFIG",
        ),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="GRADSCOPE_DEBUG")
    ] = False,
) -> None:
    """Flags win over environment variables (GRADSCOPE_*), these over the TOML file, and that over defaults."""
    path = config or (Path(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else None)
    if path is not None:
        context.default_map = _defaults(path, context)


def main() -> None:
    """Entry point: run a command, print errors in one to three lines, exit as design section 9 says."""
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("GRADSCOPE_DEBUG"))
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        code, why = getattr(error, "exit_code", None), _lacking(error)
        if why:
            print(f"error: {why}", file=sys.stderr)
            sys.exit(1)
        if code is None:
            print(
                f"error: {type(error).__name__}: {error} (an unexpected one: run with `gradscope --debug "
                "...` for the traceback)",
                file=sys.stderr,
            )
            sys.exit(1)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(code)


def _lacking(error: Exception) -> str:
    """What the machine did not give: memory, or a file that is named; "" for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(_NO_MEMORY, text)):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        return (
            f"not enough memory{f' ({asked[1]} were asked for at once)' if asked else ''}; take a smaller batch, image "
            "size, model or grid"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return ""


def _defaults(path: Path, context: typer.Context) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}", param_hint="--config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} is not TOML: {error}", param_hint="--config") from error
    commands: dict[str, Any] = getattr(context.command, "commands", {})
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            raise typer.BadParameter(
                f"{path}: [{name}] is no command; the tables are {', '.join(commands)}", param_hint="--config"
            )
        spelled = {
            option.lstrip("-").replace("-", "_"): parameter.name
            for parameter in commands[name].params
            for option in parameter.opts
        }
        if name == "train":
            context.meta[SETTINGS] = _take_settings(table, spelled)
        for key in list(table):
            if key.replace("-", "_") not in spelled:
                known = ", ".join(spelled)
                raise typer.BadParameter(
                    f"{path}: [{name}] has no option {key!r}; it has {known}", param_hint="--config"
                )
            table[spelled[key.replace("-", "_")]] = table.pop(key)
    return tables


def _take_settings(table: dict[str, Any], spelled: dict[str, str | None]) -> dict[str, Any]:
    """Take out of a [train] table the settings that have no option of their own."""
    others = [key for key in table if key.replace("-", "_") not in spelled]
    if not others:
        return {}
    from gradscope.config import TrainConfig

    known = set(TrainConfig.__dataclass_fields__)
    return {key.replace("-", "_"): table.pop(key) for key in others if key.replace("-", "_") in known}
