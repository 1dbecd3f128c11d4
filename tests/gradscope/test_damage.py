"""Damaged and hostile files: refused in words, or read as they were; never a traceback, a wrong number, a hang."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from gradscope import open_cube, save_cube
from gradscope.checkpoints import load_checkpoint, save_checkpoint
from gradscope.cli import main
from gradscope.cube import digest_of, groups_of
from gradscope.data import folder_data
from gradscope.errors import CheckpointError, UsageError
from gradscope.files import seal, seal_holds
from gradscope.report import facts_of
from schedulers import load_schedule, save_schedule
from tests.gradscope.cube_samples import sample_cube, sample_schedule, tree_of
from tests.mutations import mutations, outcome

COUNTS = [40, pytest.param(1000, marks=pytest.mark.slow)]


def cube_text(path: Path) -> str:
    tree = open_cube(path)
    facts = facts_of(cube=tree)
    groups = groups_of(tree)
    return json.dumps([digest_of(tree.dataset), digest_of(groups) if groups else "", facts, str(tree.attrs)])


def checkpoint_text(path: Path) -> str:
    content = load_checkpoint(path)
    tensors = {name: hashlib.sha256(v.numpy().tobytes()).hexdigest() for name, v in content.pop("model").items()}
    return repr([tensors, content])


def settings_text(path: Path) -> str:
    """What `gradscope --config FILE cost` prints; a UsageError for its exit code 2."""
    said, told = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["gradscope", "--config", str(path), "cost", "--json"])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    if code:
        assert code == 2 and "an unexpected one" not in told.getvalue() and "Traceback" not in told.getvalue(), told
        raise UsageError(told.getvalue())
    return said.getvalue()


def pictures_text(path: Path) -> str:
    """The images of the folder as the loader gives them; the damaged one is the first."""
    data = folder_data(path.parents[2], image_size=16, threads=1)
    images_NCSS = data.plain("train", torch.arange(data.train_count))
    return f"{len(data.skipped)} skipped {hashlib.sha256(images_NCSS.numpy().tobytes()).hexdigest()}"


def write_cube(folder: Path) -> Path:
    cube = sample_cube()
    save_cube(cube, groups_of(tree_of(cube)), folder / "cube.nc")
    return folder / "cube.nc"


def write_checkpoint(folder: Path) -> Path:
    weights = {"a": torch.randn(300, generator=torch.Generator().manual_seed(0)), "b": torch.arange(8)}
    content: dict[str, Any] = {name: 1 for name in ("step", "units", "samples", "seconds")}
    content |= {"config": {"lr": 0.1}, "schedule": "{}", "model": weights, "optimizer": {}, "parameter_names": ["a"]}
    save_checkpoint(folder / "step-00000001.pt", content | {"rng": torch.get_rng_state()})
    return folder / "step-00000001.pt"


def write_schedule(folder: Path) -> Path:
    save_schedule(sample_schedule(sample_cube()), folder / "schedule.json")
    return folder / "schedule.json"


def write_settings(folder: Path) -> Path:
    (folder / "gradscope.toml").write_text(
        '[cost]\nmethod = "dino"\nimage_size = 28\n\n[train]\nlr = 0.004\ncrop_scale = [0.25, 1.0]\nseed = 3\n'
    )
    return folder / "gradscope.toml"


def write_pictures(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rng = np.random.default_rng(0)
        for number in range(3):
            path = folder / "train" / "things" / f"{number}.{kind.lower()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path, kind)
        return folder / "train" / "things" / f"0.{kind.lower()}"

    return write


DAMAGED = {  # how the file is made, how it is read, and whether a digest tells every wrong byte
    "cube": (write_cube, cube_text, True),
    "checkpoint": (write_checkpoint, checkpoint_text, True),
    "schedule": (write_schedule, lambda path: load_schedule(path).to_json(), False),
    "settings": (write_settings, settings_text, False),
    "PNG": (write_pictures("PNG"), pictures_text, False),
    "JPEG": (write_pictures("JPEG"), pictures_text, False),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_in_words_or_read_as_it_was(kind: str, count: int, tmp_path: Path) -> None:
    write, read, sealed = DAMAGED[kind]
    path = write(tmp_path)
    data, whole = path.read_bytes(), outcome(lambda: read(path))
    assert whole.kind == "read", whole.text
    seen: Counter[str] = Counter()
    for number, damaged in enumerate(mutations(data, count, seed=7)):
        path.write_bytes(damaged)
        found = outcome(lambda: read(path))
        other = found.kind == "read" and found.text != whole.text
        assert found.kind in ("read", "refused") and not (other and sealed), f"mutation {number}: {found}"
        named = str(path) in found.text or kind == "settings"  # there the message names the value
        assert found.kind == "read" or named, found.text
        seen[found.kind] += 1
    print(kind, dict(seen))
    path.write_bytes(data)
    assert outcome(lambda: read(path)) == whole


def test_a_sealed_file_is_known_and_one_without_a_seal_is_read(tmp_path: Path) -> None:
    cube = sample_cube()
    save_cube(cube, None, tmp_path / "cube.nc")
    assert seal_holds(tmp_path / "cube.nc") is True
    with xr.open_datatree(tmp_path / "cube.nc", engine="h5netcdf") as tree:  # other readers do not mind
        assert dict(tree.sizes)["progress"] == cube.sizes["progress"]
    cube.to_netcdf(tmp_path / "plain.nc", engine="h5netcdf")  # as an earlier version, or another program, writes it
    assert seal_holds(tmp_path / "plain.nc") is None
    assert digest_of(open_cube(tmp_path / "plain.nc").dataset) == digest_of(open_cube(tmp_path / "cube.nc").dataset)
    short = tmp_path / "short"
    short.write_bytes(b"abc")
    assert seal_holds(short) is None
    seal(short)
    assert seal_holds(short) is True
    short.write_bytes(short.read_bytes().replace(b"abc", b"abd"))
    assert seal_holds(short) is False


def test_a_cube_of_absurd_shape_is_refused_before_memory_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "cube.nc"
    sample_cube().to_netcdf(path, engine="h5netcdf")
    with h5netcdf.File(path, "a") as file:
        file.dimensions["height"] = file.dimensions["width"] = 1 << 20
        file.create_variable("absurd", ("height", "width"), "f8", chunks=(1024, 1024))
    assert path.stat().st_size < 10_000_000
    found = outcome(lambda: open_cube(path))
    assert found.kind == "refused" and "8,192.0 GiB of numbers" in found.text, found


def test_a_checkpoint_with_code_in_it_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (trap.touch, ())

    path = write_checkpoint(tmp_path)
    content = load_checkpoint(path)
    torch.save(content | {"config": Payload()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    assert not trap.exists()
    compressed = tmp_path / "packed.pt"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("packed/data.pkl", bytes(1 << 24))
    with pytest.raises(CheckpointError, match="compressed"):
        load_checkpoint(compressed)
