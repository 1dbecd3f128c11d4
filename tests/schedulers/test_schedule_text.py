import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import Strategy, UsageError, parse_schedule

REFERENCE = Strategy(patch=16, dropout=0)


def read(text: str):
    schedule = parse_schedule(text, cost=lambda s: 100 / s.number("patch"), reference=REFERENCE)
    return [(stage.start, stage.end, str(stage.strategy), stage.cost) for stage in schedule.stages]


def test_stages_run_until_their_fractions_and_the_last_to_the_end() -> None:
    assert read("patch=20,dropout=0.5@0.4;dropout=.25@.7;patch=16") == [
        (0.0, 0.4, "patch=20,dropout=0.5", 5.0),
        (0.4, 0.7, "patch=16,dropout=0.25", 6.25),
        (0.7, 1.0, "patch=16,dropout=0", 6.25),
    ]


@pytest.mark.parametrize("text", ["patch=20", "patch=20@1", " patch=20 @ 1.0 "])
def test_one_strategy_runs_throughout(text: str) -> None:
    assert read(text) == [(0.0, 1.0, "patch=20,dropout=0", 5.0)]


def test_spaces_around_parts_do_not_matter() -> None:
    assert read(" patch=20 @ 0.4 ; patch=16 ") == read("patch=20@0.4;patch=16")


@settings(deadline=None)
@given(st.lists(st.integers(1, 999), min_size=0, max_size=5, unique=True))
def test_every_list_of_ends_is_read_back(thousandths: list[int]) -> None:
    ends = [k / 1000 for k in sorted(thousandths)]
    text = ";".join([*(f"patch={k + 1}@{end}" for k, end in enumerate(ends)), "patch=16"])
    assert [stage[1] for stage in read(text)] == [*ends, 1.0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not of the form axis=value"),
        ("patch=20@0.4;", "is not of the form axis=value"),
        ("patch=20;patch=16", "'patch=20' does not say until when; add @"),
        ("patch=20@half;patch=16", "'half' in 'patch=20@half' is not a fraction"),
        ("patch=20@0.4@0.5;patch=16", "'0.4@0.5' in .* is not a fraction"),
        ("patch=20@0.6;patch=24@0.6;patch=16", r"'patch=24@0.6' ends at 0.6, which is not in \(0.6, 1\]"),
        ("patch=20@0;patch=16", r"ends at 0, which is not in \(0, 1\]"),
        ("patch=20@1.2;patch=16", "ends at 1.2"),
        ("patch=20@nan;patch=16", "ends at nan"),
        ("patch=20@1;patch=16", r"'patch=16' ends at 1, which is not in \(1, 1\]"),
        ("patch=20@0.4", "it stops at 0.4; the last part must run until 1"),
        ("pacth=20", "unknown axis 'pacth'; the axes are patch, dropout"),
    ],
)
def test_other_texts_are_refused_by_part(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read(text)
