"""What is compared: cases (a method, a model, data, a grid, budgets) and arms (how the schedule of a run is made).

The aim of a case is the paper's: how many times less budget gives the accuracy of no acceleration (its Figure 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.arms import Model, Offline

PAPER = ("--criterion", "ca-mse", "--metric", "euclidean")
FRACTION = ("--progress", "fraction")
ADAM = ("--metric", "optimizer")
POLY = ("--decay", "polynomial")
SHORT = 0.25  # of the largest budget


@dataclass(frozen=True)
class Arm:
    """`schedule`: the text of `gradscope train --schedule`, or `offline`: what it is made from.

    `least` and `most`: shares of the case's largest budget below and above which it is not run. `options`: more ones of
    `gradscope train`.
    """

    title: str
    schedule: str = ""
    offline: Offline | None = None
    least: float = 0.0
    most: float = 1.0
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """Budgets in units, ascending; pilots have the largest, or `pilot`. `aim`: times less budget.

    `favourite`: the constant that is also run with another decay. `device`: what the case is meant for.
    """

    name: str
    model: Model
    budgets: tuple[float, ...]
    aim: float
    constants: Mapping[str, str]
    hand_made: str
    favourite: str = "patch7"
    device: str = "cpu"
    pilot: float | None = None

    @property
    def pilot_budget(self) -> float:
        return self.pilot or self.budgets[-1]

    @property
    def arms(self) -> dict[str, Arm]:
        """By name, a pilot before what needs it."""
        return {
            "none": Arm("no acceleration", "none"),
            "mixed": Arm("every step drawn from the grid", "mixed"),
            **{name: Arm(f"constant {text}", text) for name, text in self.constants.items()},
            "hand-made": Arm(f"made by hand: {self.hand_made}", self.hand_made),
            "none-poly": Arm("no acceleration, polynomial decay", "none", most=SHORT, options=POLY),
            f"{self.favourite}-poly": Arm(
                f"constant {self.constants[self.favourite]}, polynomial decay",
                self.constants[self.favourite],
                most=SHORT,
                options=POLY,
            ),
            "paper": Arm("ca-mse, fraction, from the unaccelerated run", offline=Offline("none", PAPER, FRACTION)),
            "paper-trajectory": Arm("ca-mse, trajectory, from the unaccelerated run", offline=Offline("none", PAPER)),
            "paper-adam": Arm(
                "ca-mse in the optimizer's metric, fraction, from the unaccelerated run",
                offline=Offline("none", PAPER, (*FRACTION, *ADAM)),
            ),
            "paper-again": Arm("ca-mse, fraction, from the run of 'paper'", offline=Offline("paper", PAPER, FRACTION)),
            "paper-mixed": Arm("ca-mse, fraction, from the mixed run", offline=Offline("mixed", PAPER, FRACTION)),
            "descent": Arm("descent, trajectory, from the mixed run", offline=Offline("mixed")),
            "descent-fraction": Arm("descent, fraction, from the mixed run", offline=Offline("mixed", (), FRACTION)),
            "descent-euclidean": Arm(
                "descent in the euclidean metric, trajectory, from the mixed run",
                offline=Offline("mixed", (), ("--metric", "euclidean")),
            ),
            **{
                f"descent-explore{share}": Arm(
                    f"descent, trajectory, from the mixed run, {share} % exploration",
                    offline=Offline("mixed", (), ("--exploration", f"{share / 100:g}")),
                )
                for share in (5, 10, 25)
            },
            "descent-none": Arm("descent, trajectory, from the unaccelerated run", offline=Offline("none")),
            "online": Arm("online, probes charged", "online", least=0.25),
        }


CONSTANTS = {
    "patch4": "patch=4",
    "patch4-dropout0.5": "patch=4,dropout=0.5",
    "patch7": "patch=7",
    "patch14": "patch=14",
}
HAND_MADE = "patch=7@0.4;patch=4@0.85;patch=2"
BUDGETS = (15e3, 30e3, 60e3, 120e3, 240e3)

SMALL_60 = Model(
    4, (4, 6, 10, 15), (0.0, 0.5), data="fashion-mnist", image_size=60, batch_size=256, size="small",
    options=("--precision", "bf16"),
)  # fmt: skip

CASES = {
    case.name: case
    for case in (
        Case("mocov3", Model(2, (2, 4, 7, 14), (0.0, 0.5)), BUDGETS, 4.0, CONSTANTS, HAND_MADE),
        Case("simclr", Model(2, (2, 4, 7, 14), (0.0, 0.5), method="simclr"), BUDGETS[:4], 3.3, CONSTANTS, HAND_MADE),
        Case(
            "dino",
            Model(2, (2, 4, 7, 14), (0.0, 0.5), method="dino", settings=(("small_crops", 0),)),
            BUDGETS,
            2.5,
            CONSTANTS,
            HAND_MADE,
            pilot=120e3,
        ),
        Case(
            "mocov3-small-60",
            SMALL_60,
            (0.5e6, 1e6, 2e6, 4e6, 8e6),
            4.0,
            {"patch6": "patch=6", "patch6-dropout0.5": "patch=6,dropout=0.5", "patch10": "patch=10"},
            "patch=10@0.4;patch=6@0.85;patch=4",
            "patch10",
            device="cuda",
        ),
    )
}
"""On the CPU the demo's ViT and 28-pixel images at base patch 2: 197 tokens, as long as the paper's base grid. On a GPU
ViT-S and all of Fashion-MNIST at 60 pixels, base patch 4: 226 tokens, the paper's at 240 pixels and patch 16."""


def cases_for(device: str) -> list[str]:
    """The names of the cases that are meant for a device."""
    return [case.name for case in CASES.values() if case.device == device.partition(":")[0]]
