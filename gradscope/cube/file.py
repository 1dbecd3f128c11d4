"""The file of a cube: one NetCDF4 file, written whole and renamed, sealed with its digest, read with suspicion."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import xarray as xr

from gradscope.cube.schema import QUANTITIES, SCHEMA_VERSION
from gradscope.errors import CubeError
from gradscope.files import seal, seal_holds, write_atomically

ENGINE: Literal["h5netcdf"] = "h5netcdf"
LARGEST, DENSEST = 1 << 30, 1000  # bytes of numbers in a cube, and how many times the file that holds them
UNREADABLE = (  # what the readers of a damaged file were seen to raise
    OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError, ArithmeticError, MemoryError, EOFError
)  # fmt: skip
COMPRESSED = {"zlib": True, "complevel": 1}  # for the one large variable; mostly 0 where strategies left races early


def save_cube(cube: xr.Dataset, groups: xr.Dataset | None, path: Path) -> None:
    """Write the cube's file atomically; `digest_of` of the result identifies its numbers.

    Raises WriteError where that cannot be; the file is then as it was.
    """
    tree = xr.DataTree.from_dict(
        {"/": cube.drop_encoding(), **({"/param_groups": groups.drop_encoding()} if groups is not None else {})}
    )
    encoding = {"/": {"influence": COMPRESSED}} if "influence" in cube else None
    # in memory first: HDF5's own writer takes the process with it when the disk is full
    content = tree.to_netcdf(None, engine=ENGINE, write_inherited_coords=True, encoding=encoding)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        seal(temporary)

    write_atomically(path, write)


def open_cube(path: Path) -> xr.DataTree:
    """Read a cube into memory and close the file. Raises CubeError for a missing, damaged, foreign or newer file."""
    if path.is_dir():
        raise CubeError(f"{path}: a folder, not a cube; name a file in it")
    if not path.is_file():
        raise CubeError(
            f"{path}: no such cube; make one with `gradscope profile CKPT_DIR` (an online run writes one with its "
            "first probe)"
        )
    if path.suffix == ".json":
        raise CubeError(
            f"{path}: a schedule or other JSON, not a cube; name the .nc file that `gradscope profile` wrote"
        )
    with path.open("rb") as stream:
        if stream.read(8) != b"\x89HDF\r\n\x1a\n":
            raise CubeError(
                f"{path}: cannot be read as a cube, it is no NetCDF4 file, or damaged; name the .nc file that "
                "`gradscope profile` wrote"
            )
    if seal_holds(path) is False:
        raise CubeError(
            f"{path}: damaged, its bytes are not those that were written (whose digest stands at its end); profile "
            "again into another file"
        )
    try:
        with xr.open_datatree(path, engine=ENGINE, decode_times=False, decode_timedelta=False) as tree:
            _check_size(tree, path)
            loaded = tree.load()
    except CubeError:
        raise
    except UNREADABLE as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CubeError(
            f"{path}: cannot be read as a cube, it is damaged or not one ({reason}); profile again into another file"
        ) from error
    version = loaded.attrs.get("schema_version")
    missing = [name for name in (*QUANTITIES, "status", "cost", "n_samples") if name not in loaded.dataset]
    if version is None or missing or "reference" not in loaded.attrs:
        raise CubeError(
            f"{path}: a NetCDF file, but no cube of gradscope (it lacks {', '.join(missing) or 'schema_version'})"
        )
    if int(version) > SCHEMA_VERSION:
        raise CubeError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest this version "
            "reads; upgrade gradscope"
        )
    return loaded


def _check_size(tree: xr.DataTree, path: Path) -> None:
    """Raise CubeError before memory is asked for that no cube of such a file needs."""
    declared = sum(variable.nbytes for node in tree.subtree for variable in node.dataset.variables.values())
    if declared > max(LARGEST, DENSEST * path.stat().st_size):
        raise CubeError(
            f"{path}: declares {declared / 2**30:,.1f} GiB of numbers in a file of {path.stat().st_size:,} bytes; no "
            "profile writes that"
        )
