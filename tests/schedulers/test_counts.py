import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import UsageError, format_count, parse_count


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100M", 100_000_000),
        ("100m", 100_000_000),
        ("2.5B", 2_500_000_000),
        ("2.5g", 2_500_000_000),
        ("1e8", 100_000_000),
        ("1E+8", 100_000_000),
        ("100_000_000", 100_000_000),
        ("314K", 314_000),
        ("0.3M", 300_000),
        (".5k", 500),
        ("3T", 3e12),
        ("3P", 3e15),
        (" 7 ", 7),
        (950, 950),
        (2.5, 2.5),
    ],
)
def test_counts_are_read(text: str | int | float, value: float) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "10Q", "MB", "10MB", "Mi", "10Mi", "-1", "-5M", "nan", "inf", "", " ", "M", "e8", "0", "0M", "1__0", "_1", "1_",
        "1 M", "1,000", "1e999", "1e9999999999", "0x10", "٣", "10**9", 0, -3, float("nan"), float("inf"), True, 10**400,
    ],
)  # fmt: skip
def test_other_texts_are_refused_with_what_a_count_looks_like(text: str | int | float) -> None:
    with pytest.raises(UsageError, match=r"is not a count such as 100M, 2\.5B or 1e8") as error:
        parse_count(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (100e6, "100M"),
        (2.5e6, "2.5M"),
        (314_000, "314K"),
        (950, "950"),
        (999_999, "1M"),
        (999.96, "1K"),
        (1_234_567, "1.235M"),
        (2.5e9, "2.5B"),
        (3e12, "3T"),
        (4e15, "4P"),
        (0.25, "0.25"),
        (0, "0"),
    ],
)
def test_counts_are_written_short(value: float, text: str) -> None:
    assert format_count(value) == text


@settings(deadline=None)
@given(st.floats(min_value=1e-6, max_value=1e30))
def test_what_is_written_is_read_back(value: float) -> None:
    assert parse_count(format_count(value)) == pytest.approx(value, rel=1 / 2000)
