import os
import subprocess
import sys
from pathlib import Path

import schedulers

ROOT = Path(schedulers.__file__).parents[1]


def run_clean(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter that finds the package."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_schedulers_import_only_numpy_and_scipy() -> None:
    code = (
        "import pkgutil, importlib, sys, schedulers\n"
        "for m in pkgutil.iter_modules(schedulers.__path__): importlib.import_module('schedulers.' + m.name)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = set(run_clean(code).split())
    assert "schedulers" in loaded
    assert not loaded & {"torch", "xarray", "plotly", "gradscope", "typer", "h5netcdf", "h5py", "pandas"}
    ours = loaded - set(sys.stdlib_module_names) - set(run_clean("import sys; print(*sys.modules)").split())
    assert ours <= {"schedulers", "numpy", "scipy", "cython_runtime"} | {name for name in ours if name.startswith("_")}


def test_a_draw_is_the_same_in_every_process() -> None:
    code = (
        "from schedulers import Strategy, mixed_schedule\n"
        "plan = mixed_schedule([Strategy(patch=p) for p in (2, 4, 7)], [3, 2, 1])\n"
        "print([plan.draw(0.5, seed=3, step=k)['patch'] for k in range(40)])"
    )
    here = schedulers.mixed_schedule([schedulers.Strategy(patch=p) for p in (2, 4, 7)], [3, 2, 1])
    expected = str([here.draw(0.5, seed=3, step=k)["patch"] for k in range(40)])
    assert run_clean(code, PYTHONHASHSEED="1") == run_clean(code, PYTHONHASHSEED="2") == expected


def test_every_public_name_is_there() -> None:
    assert sorted(schedulers.__all__) == sorted(set(schedulers.__all__))
    for name in schedulers.__all__:
        assert getattr(schedulers, name) is not None
