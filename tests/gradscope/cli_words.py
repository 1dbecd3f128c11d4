"""Odd values for the options of the command line: paths, numbers, texts, and values in TOML."""

from __future__ import annotations

PATHS = [
    "cube.nc", "own.nc", "schedule.json", "run", "run/step-00000000.pt", "pictures", "empty", "locked", "damaged.nc",
    "damaged.json", "damaged.pt", "gradscope.toml", "missing/deep/file.nc", "run/log.jsonl/below", ".", "/dev", "..",
    "/dev/null", "new.nc", "new.json", "new.pt", "new.html", "~", "a\nb", "grün ☃ 𝛁.nc", "x" * 300, "x/" * 3000,
]  # fmt: skip
NUMBERS = [
    "0", "1", "2", "3", "7", "64", "-1", "-0", "0.5", "-0.5", "1e-300", "1e30", "1e308", "1e999", "-1e999", "nan",
    "inf", "-inf", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1000000000000", "100000",
    "9" * 400, "9" * 5000, "1_000", "0x10", "١٢", "300K", "100M", "1e30T", "K", "1,2", "0,1", "-1,0", "0,,1",
]  # fmt: skip
TEXTS = [
    "", " ", "a", "auto", "cpu", "cuda", "meta", "cuda:99", "mps", "none", "mixed", "online", "online:", "online:x",
    "online:overhead=nan", "online:overhead=1e999", "online:finish=2", "mocov3", "simclr", "dino", "demo", "tiny",
    "small", "base", "fashion-mnist-10k", "fashion-mnist", "racing", "fixed", "descent", "ca-mse", "descent-batch",
    "optimizer", "euclidean", "float32", "bf16", "lbfgs", "sgd", "subbatch", "per-sample", "per-sample-fast",
    "device", "trajectory", "fraction", "tokens", "paper", "measured", "cosine", "polynomial", "constant", "patch",
    "dropout", "patch=4", "patch=4,dropout=0.5", "patch=4,dropout=nan", "patch=1e999", "patch=x", "patch=4,patch=7",
    "=", "a=", "patch=4@0.4;patch=7", "patch=4@nan;patch=7", "patch=4@1e999;patch=7", "dropout=0.8->0/5@0.6;patch=4",
    "dropout=0->1e999/3", "patch=7>4", "0.7*patch=7+0.3*patch=4", "nan*patch=7+0.3*patch=4",
    "patch=4,7;dropout=0,0.5", "patch=1e300;dropout=0", "patch=-4", "patch=0", "patch=4;dropout=1",
    "patch=4;dropout=-0.5", "noise=1", ";", ",", "patch=99999999999999999999", "patch=4.5", "patch=2,2",
    "json:JSONDecoder", "json:loads", "os:nothing", "no_module:A", "own:Own", "own:Broken", "own:NoGrid", "own", ":",
    "own:", ":Own", "..", "é☃𝛁", "e\u0301", "a\tb", "--json", "-", "--", "lr=nan", "lr=1e999", "lr=1e308",
    "width=1000000", "width=-1", "heads=7", "depth=100000", "betas=(0.9,)", "betas=1", "checkpoints=()",
    "checkpoints=(nan,)", "checkpoints=(2,)", "evaluations=()", "evaluations=(0.5,1e999)", "head_hidden=10000000000",
    "head_width=100000000", "prototypes=10000000000", "accumulate=0", "accumulate=3", "drop_path=1", "clip=-1",
    "temperature=0", "temperature=1e-300", "momentum=2", "positions=learned", "width=17", "crop_scale=(1,0)",
    "crop_scale=(1e-9,1e-9)", "mlp_ratio=1e30", "weight_decay=1e308", "warmup=2", "warmup=nan", "decay_alpha=nan",
    "decay_alpha=1e999", "patches=(4,)", "patches=()", "lr_end=1e308", "model=('a',)", "seed=3", "x=",
    "image_size=(28,28)", "small_crops=1000000", "freeze_patch_embed=maybe", "crop_scale=" + "(" * 300,
    "lr=1" + "+1" * 3000,
]  # fmt: skip
TOML_VALUES = [
    "1", "-1", "0", "1.5", "nan", "inf", "-inf", "1e999", "true", "false", '""', '"a"', '"1"', '"300K"', "[]", "[1]",
    "[[1]]", '["a"]', '["patch=4"]', "{}", "{a = 1}", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z",
    "99999999999999999999", '"\\u0000"', '"é☃𝛁"', '"run"', '"cube.nc"', "[1, 2]", '["cube.nc"]', "[nan]", "[true]",
    "9" * 400,
]  # fmt: skip
WORDS = [*PATHS, *NUMBERS, *TEXTS]
