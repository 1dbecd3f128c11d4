"""`gradscope cost`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradscope.cli.console import Json, emit, parse_grid_axes, table

PAPER_GRID = "patch=16,20,24,30,40,48;dropout=0,0.25,0.5,0.75,0.9"


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Further")(cost)


def cost(
    method: Annotated[str, typer.Option(help="mocov3, simclr or dino.", envvar="GRADSCOPE_METHOD")] = "mocov3",
    image_size: Annotated[int, typer.Option(help="Pixels per side.")] = 240,
    patch: Annotated[int | None, typer.Option(help="Base patch in pixels; default: the smallest of the grid.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help=f"Strategies; default the paper's grid at 240 pixels ({PAPER_GRID}), else the patches "
            "that divide the image."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The cost of every strategy of a grid, in units per sample, under each cost model.

    gradscope cost --method mocov3 --image-size 240
    """
    from gradscope.errors import UsageError
    from schedulers import Grid, Strategy, paper_cost, token_cost, token_counts

    if grid is None and image_size % 240:
        sizes = [p for p in range(2, image_size // 2 + 1) if image_size % p == 0]
        grid = f"patch={','.join(map(str, sizes or [image_size]))};dropout=0,0.25,0.5"
    axes = parse_grid_axes(grid or PAPER_GRID)
    if set(axes) - {"patch", "dropout"}:
        raise UsageError(
            f"--grid: unknown axis {sorted(set(axes) - {'patch', 'dropout'})[0]!r}; the axes are patch, dropout"
        )
    if any(isinstance(value, str) for values in axes.values() for value in values):
        raise UsageError(f"--grid {grid!r}: patch and dropout take numbers, as in patch=16,24;dropout=0,0.5")
    base = int(min(axes.get("patch", (16,)))) if patch is None else patch
    axes = {
        "patch": tuple(dict.fromkeys((base, *axes.get("patch", ())))),
        "dropout": tuple(dict.fromkeys((0, *axes.get("dropout", ())))),
    }
    rows: list[dict[str, Any]] = []
    for strategy in Grid(axes, Strategy(patch=base, dropout=0)).strategies():
        counts = token_counts(image_size, base, strategy)
        costs = {
            "tokens": token_cost(method, image_size, base, strategy),
            "paper": paper_cost(method, image_size, base, strategy),
            "measured": None,
        }
        rows.append({**strategy, "tokens_query": counts.query, "tokens_key": counts.key, "cost": costs})
    text = [
        [
            str(row["patch"]),
            f"{row['dropout']:g}",
            str(row["tokens_query"]),
            str(row["tokens_key"]),
            f"{row['cost']['tokens']:.3f}",
            f"{row['cost']['paper']:.3f}",
        ]
        for row in rows
    ]
    emit({"rows": rows}, table(["patch", "dropout", "query", "key", "tokens", "paper"], text), as_json=as_json)
