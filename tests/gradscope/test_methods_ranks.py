"""Loss, gradient, BatchNorm's statistics and the centre on several ranks equal those of one on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradscope.methods import BatchNorm1d
from gradscope.ranks import ALONE
from schedulers import Strategy
from tests.gradscope.small_methods import assert_same
from tests.gradscope.train_ranks_job import gathered, one_step, run_function

STRATEGIES = [Strategy(patch=4, dropout=0.5), Strategy(patch=7, dropout=0)]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mocov3", {}),
        ("simclr", {}),
        ("dino", {"drop_path": 0.3}),
        ("dino", {"batchnorm": True}),
    ],
)
def test_ranks_compute_the_loss_and_gradient_of_the_joined_batch(
    method: str, settings: dict[str, Any], count: int, tmp_path: Path
) -> None:
    arguments = (method, 8, STRATEGIES, settings)
    alone = one_step(ALONE, *arguments)
    answers = run_function(count, one_step, tmp_path, *arguments)
    assert [a.code for a in answers] == [0] * count, answers
    for answer in answers:
        for (loss, gradient, buffers), (loss_r, gradient_r, buffers_r) in zip(alone, answer.value, strict=True):
            assert loss_r == pytest.approx(loss, rel=1e-12)
            assert_same(gradient, gradient_r, 1e-12)
            assert buffers.keys() == buffers_r.keys() and buffers
            for name, value in buffers.items():
                tolerance = 1e-6 if name == "centre" else 1e-12  # the centre is a mean in float32
                torch.testing.assert_close(buffers_r[name], value, rtol=tolerance, atol=tolerance)


def test_gathering_does_not_depend_on_the_layout_in_memory(tmp_path: Path) -> None:
    for answer in run_function(2, gathered, tmp_path):
        constant, stacked = answer.value
        expected = torch.stack([torch.arange(6.0).reshape(2, 3).T + 10 * rank for rank in (0, 1)])
        assert torch.equal(stacked, expected) and torch.equal(constant, expected.flatten(0, 1))


def test_batchnorm_of_one_process_is_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    own, torchs, x = BatchNorm1d(5), torch.nn.BatchNorm1d(5), torch.randn(7, 5)
    for _ in range(2):
        assert torch.equal(own(x), torchs(x))
    assert torch.equal(own.running_var, torchs.running_var) and torch.equal(own.eval()(x), torchs.eval()(x))
