"""Prefetching: the same results as without, in order, ahead of time, with errors where they belong."""

import threading
import time

import pytest

from gradscope.data import Ahead
from gradscope.errors import UsageError


def wait_for(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.001)


@pytest.mark.parametrize(("depth", "workers"), [(0, 1), (1, 1), (3, 2), (5, 8)])
def test_results_depend_on_the_step_alone(depth: int, workers: int) -> None:
    with Ahead(lambda step: (step, step * step), depth=depth, workers=workers) as ahead:
        asked = [0, 1, 2, 7, 8, 3, 3, 100, 2, 0]
        assert [ahead.take(step) for step in asked] == [(step, step * step) for step in asked]


def test_exactly_the_next_steps_are_made_while_one_is_used() -> None:
    made: list[int] = []
    with Ahead(lambda step: made.append(step) or step, depth=2, workers=1) as ahead:
        assert ahead.take(4) == 4
        wait_for(lambda: len(made) == 3)
        time.sleep(0.02)
        assert sorted(made) == [4, 5, 6]
        assert ahead.take(5) == 5
        wait_for(lambda: len(made) == 4)
        assert sorted(made) == [4, 5, 6, 7]


def test_workers_run_at_the_same_time() -> None:
    """Two steps wait for one another: one worker could never finish."""
    both = threading.Barrier(2, timeout=5)

    def make(step: int) -> int:
        if step in (1, 2):
            both.wait()
        return step

    with Ahead(make, depth=2, workers=2) as ahead:
        assert [ahead.take(step) for step in range(3)] == [0, 1, 2]


def test_depth_0_has_no_threads() -> None:
    with Ahead(lambda step: threading.current_thread(), depth=0, workers=4) as ahead:
        assert ahead.take(0) is threading.current_thread()


def test_a_jump_drops_what_was_under_way() -> None:
    release, made = threading.Event(), []

    def make(step: int) -> int:
        if step == 1:
            release.wait(5)
        made.append(step)
        return step

    with Ahead(make, depth=3, workers=1) as ahead:
        assert ahead.take(0) == 0  # 1, 2 and 3 are to be made; 1 holds the only worker
        assert ahead.take(50) == 50
        release.set()
        assert ahead.take(51) == 51
        wait_for(lambda: 54 in made)
    assert 2 not in made and 3 not in made


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_by_the_step_that_caused_it(depth: int) -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError(f"step {step}")
        return step

    with Ahead(make, depth=depth, workers=2) as ahead:
        assert ahead.take(0) == 0 and ahead.take(1) == 1
        with pytest.raises(ValueError, match="step 2"):
            ahead.take(2)
        assert ahead.take(3) == 3


def test_closing_ends_the_threads_and_happens_once() -> None:
    before = threading.active_count()
    ahead = Ahead(lambda step: step, depth=4, workers=3)
    ahead.take(0)
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="after close"):
        ahead.take(1)


@pytest.mark.parametrize(("depth", "workers", "word"), [(-1, 1, "depth is -1"), (1, 0, "workers is 0")])
def test_illegal_numbers_are_named(depth: int, workers: int, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Ahead(lambda step: step, depth=depth, workers=workers)
