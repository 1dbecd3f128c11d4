"""Counts of units as people write them: 100M is a hundred million."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

from schedulers.errors import UsageError

_POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12, "P": 15}
_MOST = 1.797e308  # the largest count of four digits
_COUNT = re.compile(r"((?:[0-9]+(?:_[0-9]+)*)?(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)([KMBGTP]?)", re.IGNORECASE)


def parse_count(text: str | int | float) -> float:
    """The number that `text` stands for: `100M`, `2.5B`, `1e8`, `100_000_000`, or a number itself.

    K, M, B (or G), T and P, in either case, are powers of 1000. Raises UsageError for anything else:
    another suffix, a negative number, zero, nan, inf, an empty text.
    """
    value = math.nan
    if isinstance(text, str):
        match = _COUNT.fullmatch(text.strip())
        if match and match[1][:1] not in ("", "e", "E"):
            value = float(Decimal(match[1]).scaleb(_POWERS[match[2].upper()]))
    elif not isinstance(text, bool):
        try:
            value = float(text)
        except (TypeError, OverflowError):
            value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{text!r} is not a count such as 100M, 2.5B or 1e8 (a positive number, with K, M, B, T or P)")
    return value


def format_count(x: float) -> str:
    """`x` in at most four significant digits with the suffix of its size: 100M, 2.5M, 314K, 950.

    `parse_count` reads every positive result back to within one part in 2000.
    """
    if not math.isfinite(x) or x == 0:
        return f"{x:g}"
    rounded = max(
        -_MOST, min(float(f"{x:.4g}"), _MOST)
    )  # before the suffix is chosen, so that 999_999 becomes 1M and not 1000K
    power = min(max(math.floor(math.log10(abs(rounded)) + 1e-12) // 3 * 3, 0), 15)
    suffix = next(name for name, exponent in _POWERS.items() if exponent == power)
    return f"{rounded / 10**power:.4g}{suffix}"


def exact(value: float) -> Fraction:
    """The simple fraction that `value` stands for: 0.9 gives 9/10 and 5 / 7 gives 5/7, not the double beside it.

    That is the fraction with a denominator of at most a million that the double is nearest to, else
    its shortest decimal. Products that are rounded go through here, because in doubles
    100 * (1 - 0.9) is just below 10 and 0.07 * 100 just above 7.
    """
    simple = Fraction(float(value)).limit_denominator(1_000_000)
    return simple if float(simple) == value else Fraction(repr(float(value)))
